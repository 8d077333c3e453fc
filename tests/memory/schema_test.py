"""Entities, glosses, relations and grounding of the symbolic schema."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax import memory
from mmmem_jax.memory import ADD_NEW, DISCARD, MERGE, ManagerOutput, MemoryConfig
from mmmem_jax.testing import toys

CONFIG = MemoryConfig(
    sensory_slots=2, episodic_slots=4, schema_slots=3, num_prototypes=1, num_relations=2, dim=4
)
A, B, C, D = np.eye(4, dtype=np.float32)
NONE = np.zeros(4, np.float32)
LENGTH = 6


def dictated(params, key, state, item):
    action, strength = (x[state.num_items] for x in params)
    return ManagerOutput(jnp.zeros(3), action, jnp.asarray(0.0), strength, jnp.zeros(0))


@jax.jit
def scan(items, actions, strengths):
    params = (jnp.asarray(actions, jnp.int32), jnp.asarray(strengths, jnp.float32))
    state = memory.init(CONFIG)
    return memory.scan(params, jax.random.key(0), state, items, decide_fn=dictated)[0]


def remember(mentions, *, texts=None, relation=(), actions=(), strengths=(), tokens=()):
    """The memory after chunks that mention the given pairs; the rest of LENGTH is discarded."""
    count = len(mentions)
    mention = np.zeros((LENGTH, 2, 4), np.float32)
    mention[:count] = np.array(mentions)
    text = np.zeros((LENGTH, 4), np.float32)
    text[:count] = np.ones(4) if texts is None else np.array(texts)

    def padded(values, default, fill):
        values = list(values or [default] * count)
        return jnp.asarray(values + [fill] * (LENGTH - count))

    start = jnp.arange(float(LENGTH))
    items = toys.random_items(0, LENGTH, dim=4).replace(
        mention=jnp.asarray(mention),
        mention_valid=jnp.asarray(mention.any(-1)),
        text=jnp.asarray(text),
        relation=padded(relation, -1, -1),
        tokens=padded(tokens, 1, 0),
        span=jnp.stack([start, start + 1], axis=1),
        valid=jnp.ones(LENGTH, bool),
    )
    actions = padded(actions, ADD_NEW, DISCARD)
    return jax.tree.map(np.asarray, scan(items, actions, padded(strengths, 1.0, 0.0)))


def entity(state, vector) -> int:
    """Slot of the entity nearest to `vector`."""
    graph = state.schema
    return int(np.argmax(np.where(graph.valid, graph.embedding @ vector, -np.inf)))


def edges(state):
    graph = state.schema
    return {tuple(e) for e in graph.relations[graph.relation_valid].tolist()}


class TestEntities:
    @pytest.mark.parametrize(("cosine", "entities"), [(0.71, 1), (0.69, 2)])
    def test_merge_from_cosine_seven_tenths(self, cosine, entities):
        near = cosine * A + np.sqrt(1 - cosine**2) * B
        state = remember([(A, NONE), (near, NONE)])
        assert state.schema.valid.sum() == entities

    def test_length_does_not_matter(self):
        state = remember([(A, NONE), (5 * A, NONE)])
        assert state.schema.valid.sum() == 1

    def test_embedding_is_the_mean_of_the_mentions(self):
        views = [A, A + 0.3 * B, A - 0.1 * C]
        state = remember([(view, NONE) for view in views])
        assert state.schema.mentions[state.schema.valid].tolist() == [3]
        np.testing.assert_allclose(state.schema.embedding[0], np.mean(views, axis=0), atol=1e-6)

    def test_gloss_is_recent_and_profile_is_usual(self):
        texts = [A, B, C]
        state = remember([(D, NONE)] * 3, texts=texts)
        np.testing.assert_allclose(state.schema.profile[0], np.mean(texts, axis=0), atol=1e-6)
        gloss = A
        for text in texts[1:]:
            gloss = 0.4 * gloss + 0.6 * text
        np.testing.assert_allclose(state.schema.gloss[0], gloss, atol=1e-6)

    def test_span_and_tokens_cover_the_mentions(self):
        state = remember([(A, NONE), (B, NONE), (A, NONE)], tokens=[3, 9, 5])
        slot = entity(state, A)
        assert state.schema.span[slot].tolist() == [0.0, 3.0]
        assert state.schema.tokens[slot] == 5

    def test_discarded_chunks_name_nobody(self):
        state = remember([(A, B)], actions=[DISCARD])
        assert not np.any(state.schema.valid)

    def test_the_weakest_entity_goes(self):
        mentions = [(A, NONE), (B, NONE), (C, NONE), (D, NONE)]
        state = remember(mentions, strengths=[3.0, 1.0, 2.0, 2.0])
        assert state.schema.embedding[state.schema.valid].sum(0).tolist() == [1, 0, 1, 1]

    def test_an_entity_weaker_than_all_is_not_kept(self):
        mentions = [(A, NONE), (B, NONE), (C, NONE), (D, NONE)]
        state = remember(mentions, strengths=[3.0, 2.0, 2.0, 1.0])
        assert state.schema.embedding[state.schema.valid].sum(0).tolist() == [1, 1, 1, 0]

    def test_never_two_of_one_name_when_inserted(self):
        config = MemoryConfig(
            sensory_slots=1, episodic_slots=6, schema_slots=8, num_relations=0, dim=8
        )

        def body(state, item):
            new = memory.step(state, item, jnp.asarray(ADD_NEW))
            return new, (state.schema, new.schema)

        items = toys.random_items(3, 64, num_mentions=1)
        run = jax.jit(lambda i: jax.lax.scan(body, memory.init(config), i)[1])
        before, after = jax.tree.map(np.asarray, run(items))
        inserted = np.argwhere(after.valid & (after.mentions == 1) & (before.mentions != 1))
        assert len(inserted) >= 6
        for t, slot in inserted:
            old, mention = before.embedding[t][before.valid[t]], after.embedding[t, slot]
            cosine = old @ mention / np.linalg.norm(old, axis=-1) / np.linalg.norm(mention)
            assert np.all(cosine < config.entity_similarity)


class TestGrounding:
    def test_leads_to_the_episodes_that_mention_the_entity(self):
        state = remember([(A, NONE), (B, NONE), (A, B)], actions=[ADD_NEW, ADD_NEW, MERGE])
        assert state.schema.grounding[entity(state, A)].tolist() == [True, True, False, False]
        assert state.schema.grounding[entity(state, B)].tolist() == [False, True, False, False]

    def test_an_episode_that_goes_takes_its_edges(self):
        mentions = [(A, NONE), (B, NONE), (B, NONE), (B, NONE), (B, NONE)]
        state = remember(mentions, strengths=[1.0, 2.0, 2.0, 2.0, 2.0])
        assert not np.any(state.schema.grounding[entity(state, A)])
        assert np.all(state.schema.grounding[entity(state, B)])

    def test_an_entity_that_goes_takes_its_edges(self):
        mentions = [(A, NONE), (B, NONE), (C, NONE), (D, NONE)]
        state = remember(mentions)
        assert state.schema.grounding[entity(state, D)].tolist() == [False, False, False, True]


class TestRelations:
    def test_join_the_first_mention_to_the_second(self):
        state = remember([(A, B)], relation=[7])
        assert edges(state) == {(entity(state, A), 7, entity(state, B))}

    def test_are_refreshed_and_never_doubled(self):
        state = remember([(A, B), (A, B)], relation=[7, 7])
        graph = state.schema
        assert graph.relation_valid.sum() == 1
        assert graph.relation_time[graph.relation_valid].tolist() == [2.0]

    def test_the_longest_unseen_one_goes(self):
        state = remember([(A, B), (B, A), (A, B), (A, C)], relation=[1, 2, 1, 3])
        a, b, c = (entity(state, x) for x in (A, B, C))
        assert edges(state) == {(a, 1, b), (a, 3, c)}

    @pytest.mark.parametrize("mention", [(A, NONE), (NONE, B), (A, A)])
    def test_need_two_entities(self, mention):
        assert not edges(remember([mention], relation=[7]))

    def test_no_relation_leaves_no_edge(self):
        assert not edges(remember([(A, B)], relation=[-1]))

    def test_of_an_evicted_entity_are_removed(self):
        state = remember([(A, B), (C, NONE), (D, NONE)], relation=[7, -1, -1])
        assert not edges(state)

    def test_an_entity_pushed_out_by_its_own_companion_has_none(self):
        # C takes the one empty slot; D, as weak, then takes that of C.
        state = remember([(A, B), (C, D)], relation=[-1, 7], strengths=[5.0, 1.0])
        assert state.schema.embedding[state.schema.valid].sum(0).tolist() == [1, 1, 0, 1]
        assert not edges(state)
