"""Which slots bear on a question, and what they cost to read."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax.memory import MemoryConfig
from mmmem_jax.retrieval import evidence as ev
from mmmem_jax.testing import toys

CONFIG = MemoryConfig(
    sensory_slots=3, episodic_slots=4, schema_slots=5, num_prototypes=2, num_relations=2, dim=8
)


@pytest.fixture(scope="module")
def state():
    return toys.random_memory(1, CONFIG)


def test_slots_are_numbered_sensory_episodic_schema(state):
    levels = np.asarray(ev.slot_levels(state)).tolist()
    assert levels == [ev.SENSORY] * 3 + [ev.EPISODIC] * 4 + [ev.SCHEMA] * 5
    valid = ev.slot_valid(state)
    assert np.array_equal(valid[3:7], state.episodic.valid)
    assert np.array_equal(valid[7:], state.schema.valid)


def test_similarity_is_the_best_cosine_over_options_and_vectors(state):
    query, options = toys.random_questions(1, 2, 3, 8)
    found = ev.slot_similarity(state, query, options)

    def cosine(a, b):
        return a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6)

    s, e, g = state.sensory, state.episodic, state.schema
    banks = (
        [[s.visual[i], s.text[i]] for i in range(3)]
        + [[e.text[i], *e.prototypes[i]] for i in range(4)]
        + [[g.embedding[i], g.gloss[i]] for i in range(5)]
    )
    for q in range(2):
        for slot, vectors in enumerate(banks):
            best = max(
                cosine(np.asarray(query[q] + o), np.asarray(v)) for o in options[q] for v in vectors
            )
            assert float(found[q, slot]) == pytest.approx(best, abs=1e-5)


def test_cost_is_text_plus_views(state):
    cost = np.asarray(ev.slot_tokens(state, (4, 16)))
    s, e, g = state.sensory, state.episodic, state.schema
    seen = np.any(s.visual != 0, axis=1)
    views = (np.asarray(e.prototype_count) > 0).sum(1)
    assert cost[:3].tolist() == (np.asarray(s.tokens) + 16 * seen).tolist()
    assert cost[3:7].tolist() == (np.asarray(e.tokens) + 4 * views).tolist()
    assert cost[7:].tolist() == (2 * np.asarray(g.tokens)).tolist()  # gloss and profile
    assert np.ptp(views) > 0


def test_an_entity_never_told_costs_two_views_and_an_empty_slot_nothing(state):
    schema = state.schema.replace(
        tokens=jnp.zeros(5, jnp.int32), valid=jnp.array([True, False, True, False, True])
    )
    cost = np.asarray(ev.slot_tokens(state.replace(schema=schema), (4, 16)))
    assert cost[7:].tolist() == [8, 0, 8, 0, 8]


def test_links_lead_from_live_slots_to_live_slots(state):
    grounding, holds = ev.links(state)
    assert np.any(grounding)
    assert not np.any(grounding & ~state.schema.valid[:, None])
    assert not np.any(grounding & ~state.episodic.valid[None])
    for episode, item in np.argwhere(holds):
        assert state.episodic.node_id[episode] == state.sensory.node_id[item]
    # An item whose episode is gone hangs under none.
    gone = state.replace(episodic=state.episodic.replace(valid=jnp.zeros(4, bool)))
    assert not np.any(ev.links(gone)[0])
    assert not np.any(ev.links(gone)[1])
