"""What holds of the memory after every step, whatever the stream and the policy do."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax import memory
from mmmem_jax.memory import (
    ADD_NEW,
    DISCARD,
    MERGE,
    Item,
    MemoryConfig,
    MemoryState,
    StepOutput,
    pyramid,
    slots,
)
from mmmem_jax.memory.pyramid import tokens_held
from mmmem_jax.policies import rules
from mmmem_jax.testing import toys

SMALL = MemoryConfig(
    sensory_slots=3, episodic_slots=4, schema_slots=5, num_prototypes=2, num_relations=4, dim=8
)
CONFIGS = {
    "default": SMALL,
    "budget": dataclasses.replace(SMALL, token_budget=12),
    "short_nodes": dataclasses.replace(SMALL, max_node_tokens=9, merge_keep=1.0),
    "nearest": dataclasses.replace(SMALL, merge_target="nearest", num_prototypes=1, merge_keep=0.0),
    "no_schema": dataclasses.replace(SMALL, schema_slots=0, num_relations=0),
}
NUM_STREAMS, NUM_CHUNKS = 6, 60


def scan(key, state, items):
    return memory.scan(None, key, state, items, decide_fn=toys.random_decide)


jit_scan, jit_step = jax.jit(scan), jax.jit(memory.step)
run_rule = jax.jit(functools.partial(memory.scan, decide_fn=rules.decide))


class Run(NamedTuple):
    """Streams [B, T] and the memory before the first and after every step, [B, T + 1]."""

    config: MemoryConfig
    items: Item
    states: MemoryState
    output: StepOutput

    @property
    def levels(self):
        return self.states.sensory, self.states.episodic, self.states.schema

    def state(self, b, t) -> MemoryState:
        return jax.tree.map(lambda x: x[b, t], self.states)


def every_state(key, state, items):
    def body(state, item):
        new, output = scan(key, state, jax.tree.map(lambda x: x[None], item))
        return new, (state, jax.tree.map(lambda x: x[0], output))

    last, (states, output) = jax.lax.scan(body, state, items)
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), states, last), output


def streams(valid_share=1.0, num_mentions=2, num_streams=NUM_STREAMS, num_chunks=NUM_CHUNKS):
    items = [
        toys.random_items(seed, num_chunks, num_mentions=num_mentions, valid_share=valid_share)
        for seed in range(num_streams)
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *items)


@pytest.fixture(scope="module", params=list(CONFIGS))
def run(request) -> Run:
    config = CONFIGS[request.param]
    items = streams(valid_share=0.9)
    keys = jax.vmap(jax.random.key)(jnp.arange(NUM_STREAMS))
    init = memory.init(config)
    states, output = jax.jit(jax.vmap(every_state, in_axes=(0, None, 0)))(keys, init, items)
    return Run(config, *jax.tree.map(np.asarray, (items, states, output)))


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


class TestEveryStep:
    def test_streams_meet_every_case(self, run):
        done, item_valid = run.output, run.items.valid
        assert {ADD_NEW, MERGE, DISCARD} == set(np.unique(done.action))
        assert np.any(~item_valid)
        assert np.any(run.items.valid & (done.action == ADD_NEW) & (done.node_id < 0))  # too weak
        if run.config.token_budget is None:
            assert np.all(run.states.episodic.valid[:, -1])  # full

    def test_spans_are_ordered_and_inside_the_stream(self, run):
        end = np.maximum.accumulate(run.items.span[..., 1], axis=1)
        end = np.concatenate([np.zeros_like(end[:, :1]), end], axis=1)
        for level in run.levels:
            start, stop = level.span[..., 0], level.span[..., 1]
            inside = (0 <= start) & (start < stop) & (stop <= end[..., None])
            assert np.all(inside | ~level.valid)

    def test_no_slot_is_valid_and_empty(self, run):
        sensory, stream, graph = run.levels
        assert np.all(sensory.trace_id[sensory.valid] >= 0)
        assert np.all(sensory.node_id[sensory.valid] >= 0)
        assert np.all(stream.count[stream.valid] >= 1)
        assert np.all(stream.node_id[stream.valid] >= 0)
        assert np.all(stream.source[stream.valid] >= 0)
        assert np.all(graph.mentions[graph.valid] >= 1)
        assert np.all(np.any(graph.embedding[graph.valid] != 0, -1))

    def test_tokens_held_is_the_sum_over_valid_slots(self, run):
        total = sum(np.sum(np.where(x.valid, x.tokens, 0), -1) for x in run.levels)
        assert np.array_equal(run.states.tokens, total)
        held = np.where(run.states.episodic.valid, run.states.episodic.tokens, 0).sum(-1)
        assert np.array_equal(run.output.tokens, held[:, 1:])
        assert np.array_equal(run.output.slots, run.states.episodic.valid.sum(-1)[:, 1:])

    def test_what_is_compared_follows_from_what_is_held(self, run):
        _, stream, graph = run.levels
        visual = np.sum(stream.prototypes * stream.prototype_count[..., None], -2)
        key = np.concatenate([slots.unit(stream.text), slots.unit(visual)], -1)
        np.testing.assert_allclose(stream.key[stream.valid], key[stream.valid], atol=1e-5)
        np.testing.assert_allclose(graph.norm, np.linalg.norm(graph.embedding, axis=-1), atol=1e-5)

    def test_nodes_hold_what_was_added_to_them(self, run):
        stream, done = run.states.episodic, run.output
        for b in range(NUM_STREAMS):
            for slot in np.flatnonzero(stream.valid[b, -1]):
                mine = done.node_id[b] == stream.node_id[b, -1, slot]
                assert done.tokens_added[b][mine].sum() == stream.tokens[b, -1, slot]
                assert run.items.tokens[b][mine].sum() == stream.source_tokens[b, -1, slot]
                assert mine.sum() == stream.count[b, -1, slot]
                first, *_, last = np.flatnonzero(mine).repeat(2)
                assert stream.source[b, -1, slot].tolist() == [first, last]
                assert stream.span[b, -1, slot].tolist() == [
                    run.items.span[b, first, 0],
                    run.items.span[b, last, 1],
                ]

    def test_padding_changes_nothing(self, run):
        for b, t in np.argwhere(~run.items.valid):
            before, after = run.state(b, t), run.state(b, t + 1)
            assert same(before, after)
            assert run.output.node_id[b, t] == -1
            assert run.output.tokens_added[b, t] == 0

    def test_discard_moves_only_the_clock(self, run):
        discarded = np.argwhere(run.items.valid & (run.output.action == DISCARD))
        for b, t in discarded:
            before, after = run.state(b, t), run.state(b, t + 1)
            assert after.num_items == before.num_items + 1
            assert after.clock == run.items.span[b, t, 1]
            assert same(before, after.replace(clock=before.clock, num_items=before.num_items))

    def test_merge_without_a_node_opens_one(self, run):
        held = run.states.episodic.valid.any(-1)[:, :-1]
        merges = run.items.valid & (run.output.action == MERGE) & ~held
        opened = run.output.node_id >= 0
        fits = run.config.token_budget is None or run.items.tokens <= run.config.token_budget
        assert np.any(merges)
        assert np.all(opened[merges & fits])

    def test_node_ids_are_never_reused(self, run):
        opened = np.diff(run.states.episodic.next_id, axis=1)
        assert set(np.unique(opened)) <= {0, 1}
        for b in range(NUM_STREAMS):
            for t in range(NUM_CHUNKS + 1):
                ids = run.states.episodic.node_id[b, t][run.states.episodic.valid[b, t]]
                assert len(set(ids)) == len(ids)
                assert np.all(ids < run.states.episodic.next_id[b, t])

    def test_latest_is_the_newest_node_or_none(self, run):
        stream = run.states.episodic
        for b, t in np.argwhere(stream.latest >= 0):
            slot = stream.latest[b, t]
            assert stream.valid[b, t, slot]
            assert stream.node_id[b, t, slot] == stream.node_id[b, t][stream.valid[b, t]].max()

    def test_token_budget_is_never_passed(self, run):
        if run.config.token_budget is not None:
            assert run.output.tokens.max() <= run.config.token_budget
            assert run.output.tokens.max() > run.config.token_budget / 2

    def test_a_node_stops_taking_merges_when_it_is_full(self, run):
        most = run.config.max_node_tokens
        if most is not None:
            held = run.states.episodic.tokens
            assert held.max() == max(most, run.items.tokens.max())

    def test_grounding_leads_to_live_episodes_that_mention_the_entity(self, run):
        graph, stream, done = run.states.schema, run.states.episodic, run.output
        if not run.config.schema_slots:
            return
        edges = graph.grounding & graph.valid[..., None]
        assert np.any(edges[:, -1])
        assert not np.any(edges & ~stream.valid[:, :, None])
        for b, entity, slot in np.argwhere(edges[:, -1]):
            mine = done.node_id[b] == stream.node_id[b, -1, slot]
            named = run.items.mention[b][mine][run.items.mention_valid[b][mine]]
            cosine = named @ graph.embedding[b, -1, entity] / np.linalg.norm(named, axis=-1)
            cosine /= np.linalg.norm(graph.embedding[b, -1, entity])
            assert cosine.max() > 0.6  # the entity's mean may have moved on since

    def test_relations_join_two_known_entities(self, run):
        graph = run.states.schema
        if not run.config.schema_slots:
            return
        assert np.any(graph.relation_valid[:, -1])
        for b, t, r in np.argwhere(graph.relation_valid):
            subject, relation, target = graph.relations[b, t, r]
            assert graph.valid[b, t, subject]
            assert graph.valid[b, t, target]
            assert subject != target
            assert relation >= 0
        live = np.where(graph.relation_valid[..., None], graph.relations, -1)
        for b, t in np.ndindex(live.shape[:2]):
            edges = [tuple(e) for e in live[b, t] if e[1] >= 0]
            assert len(set(edges)) == len(edges)


class TestScan:
    def test_equals_steps(self):
        items = toys.random_items(1, 24)
        key, state = jax.random.key(3), memory.init(SMALL)
        last, output = jit_scan(key, state, items)
        # `step` is given the strengths that the policy drew.
        strength = pyramid.draw_noise(key, jnp.arange(24))[:, 1]
        for t in range(24):
            item = jax.tree.map(lambda x, t=t: x[t], items)
            state = jit_step(state, item, output.action[t], strength[t])
        # Two programs, which may round differently.
        for x, y in zip(*map(jax.tree.leaves, (state, last)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    def test_step_ranks_by_time_unless_told(self):
        item = jax.tree.map(lambda x: x[3], toys.random_items(0, 4))
        state = jit_step(memory.init(SMALL), item, jnp.asarray(ADD_NEW))
        assert float(state.episodic.strength[0]) == float(item.span[1])

    def test_segments_that_hand_the_state_on_equal_the_whole(self):
        items = toys.random_items(2, 36, valid_share=0.9)
        key, state = jax.random.key(5), memory.init(SMALL)
        whole, output = jit_scan(key, state, items)
        parts = []
        for cut in (slice(0, 24), slice(24, 36)):
            state, done = jit_scan(key, state, jax.tree.map(lambda x, cut=cut: x[cut], items))
            parts.append(done)
        assert same(state, whole)
        assert same(jax.tree.map(lambda *x: jnp.concatenate(x), *parts), output)

    def test_vmap_equals_a_loop(self):
        items, init = streams(0.9, num_streams=3, num_chunks=36), memory.init(SMALL)
        keys = jax.random.split(jax.random.key(0), 3)
        last, output = jax.jit(jax.vmap(scan, in_axes=(0, None, 0)))(keys, init, items)
        for b in range(3):
            one = jit_scan(keys[b], init, jax.tree.map(lambda x, b=b: x[b], items))
            for x, y in zip(jax.tree.leaves(one), jax.tree.leaves((last, output)), strict=True):
                if x.dtype == jnp.float32:
                    np.testing.assert_allclose(x, y[b], atol=1e-6)
                else:
                    assert np.array_equal(x, y[b])


class TestEdges:
    def test_an_empty_stream_leaves_an_empty_memory(self):
        init = memory.init(SMALL)
        state, output = jit_scan(jax.random.key(0), init, toys.random_items(0, 0))
        assert same(state, init)
        assert output.action.shape == (0,)
        assert int(tokens_held(state)) == 0

    def test_one_chunk(self):
        item = jax.tree.map(lambda x: x[0], toys.random_items(0, 1))
        state = jit_step(memory.init(SMALL), item, jnp.asarray(ADD_NEW))
        assert int(state.episodic.valid.sum()) == int(state.sensory.valid.sum()) == 1
        assert np.allclose(state.sensory.visual[0], item.visual)
        assert float(state.clock) == float(item.span[1])

    @pytest.mark.parametrize("name", ["similarity_merge", "surprise", "kmeans", "keep_recent"])
    def test_identical_chunks(self, name):
        first = jax.tree.map(lambda x: x[:1], toys.random_items(1, 8))
        assert np.any(first.text)
        assert np.any(first.coarse)
        items = jax.tree.map(lambda x: jnp.repeat(x, 16, axis=0), first)
        span = jnp.stack([jnp.arange(16.0), jnp.arange(1.0, 17.0)], axis=1)
        items = items.replace(span=span, change=jnp.zeros(16).at[0].set(1.0))
        found = rules.fixed_rules(16, 4, similarity=0.8, surprise_change=0.5, half_life=60.0)
        (rule,) = (rule for rule in found if rule.name == name)
        state, _ = run_rule(
            rule.params, jax.random.key(0), memory.init(rule.configure(SMALL)), items
        )
        merged = name in ("similarity_merge", "surprise")
        assert int(state.episodic.valid.sum()) == (1 if merged else 4)
        for x in jax.tree.leaves(state):
            assert np.all(np.isfinite(x))
        one_of_each = int(items.mention_valid[0].sum())
        assert int(state.schema.valid.sum()) <= one_of_each

    def test_items_without_mentions(self):
        items = toys.random_items(0, 12, num_mentions=0)
        state, _ = jit_scan(jax.random.key(0), memory.init(SMALL), items)
        assert int(state.episodic.valid.sum()) > 0
        assert not np.any(state.schema.valid)

    @pytest.mark.parametrize("field", ["sensory_slots", "episodic_slots", "num_prototypes", "dim"])
    def test_a_level_without_slots_is_refused(self, field):
        with pytest.raises(ValueError, match=f"MemoryConfig.{field} must be at least 1, got 0"):
            MemoryConfig(**{field: 0})

    def test_an_unknown_merge_target_is_refused(self):
        with pytest.raises(ValueError, match="latest or nearest: farthest"):
            MemoryConfig(merge_target="farthest")
