"""Rollouts of groups: what is shared, what is drawn anew, and what a unit is credited with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax import memory
from mmmem_jax.memory import MemoryConfig
from mmmem_jax.sib.rollout import CREDITS, episodic_tokens, group_keys, pad_to_units, rollout
from mmmem_jax.testing import toys
from mmmem_jax.train.sharding import make_mesh, make_shard

CONFIG = MemoryConfig(
    sensory_slots=2, episodic_slots=4, schema_slots=0, num_relations=0, num_prototypes=1, dim=8
)
B, G, T, BLOCK = 3, 4, 12, 4


def items(count=B, length=T, valid_share=0.9):
    all_items = [toys.random_items(b, length, valid_share=valid_share) for b in range(count)]
    return jax.tree.map(lambda *x: jnp.stack(x), *all_items)


def decide_fn(params, key, state, item):
    """Random actions; the context is a fingerprint of the memory they were taken in."""
    decision = toys.random_decide(params, key, state, item)
    stream = state.episodic
    weights = jnp.arange(1.0, 5.0)
    mark = jnp.stack([
        state.clock, state.num_items, state.tokens, stream.next_id,
        jnp.sum(stream.valid * weights * stream.strength), jnp.sum(stream.text * weights[:, None]),
    ])  # fmt: skip
    return decision.replace(context=mark)


def task_fn(states):
    """Something of the memory that every step may change: [B, G]."""
    return jnp.sum(states.episodic.valid * states.episodic.text[..., 0], -1) + states.clock / 10


@functools.partial(jax.jit, static_argnames=("credit", "generations", "shard"))
def run(stream, key, credit, generations=G, shard=lambda x: x):
    return rollout(
        None, key, items=stream, init_state=memory.init(CONFIG), decide_fn=decide_fn,
        task_fn=task_fn, num_generations=generations, block_size=BLOCK, credit=credit, shard=shard,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trajectories():
    return {c: jax.tree.map(np.asarray, run(items(), jax.random.key(0), c)) for c in CREDITS}


def test_generations_go_on_from_the_first_one_on_whichever_device_it_is(trajectories):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = make_mesh(1, 4, 2)
    split = run(items(), jax.random.key(0), "state", shard=make_shard(mesh))
    assert {s.data.shape for s in split.action.addressable_shards} == {(B, G // 4, T)}
    for name, x, y in zip(split._fields, trajectories["state"], split, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, err_msg=name)


def first_of_units(context):
    return context[:, :, ::BLOCK]


@pytest.mark.parametrize("credit", CREDITS)
class TestEveryCredit:
    def test_shapes(self, trajectories, credit):
        traj, units = trajectories[credit], 1 if credit == "trajectory" else T // BLOCK
        assert traj.action.shape == traj.log_prob.shape == (B, G, T)
        assert traj.context.shape == (B, G, T, 6)
        assert traj.task.shape == traj.length.shape == (B, G, units)
        assert traj.valid.shape == (B, 1, T)
        assert traj.last.shape == traj.tokens.shape == traj.slots.shape == (B, G)
        expected = np.where(items().valid, items().tokens, 0).sum(1)
        assert np.array_equal(traj.source_tokens[:, 0], expected)

    def test_rewards_of_units_add_up_to_the_change_of_the_potential(self, trajectories, credit):
        traj = trajectories[credit]
        generations = slice(0, 1) if credit == "state" else slice(None)  # the one carried on
        start = float(
            task_fn(jax.tree.map(lambda x: jnp.asarray(x)[None, None], memory.init(CONFIG)))[0, 0]
        )
        task, length = traj.task.sum(-1)[:, generations], traj.length.sum(-1)[:, generations]
        np.testing.assert_allclose(task, traj.last[:, generations] - start, atol=1e-5)
        np.testing.assert_allclose(length, traj.tokens[:, generations], atol=1e-5)

    def test_generations_differ(self, trajectories, credit):
        action = trajectories[credit].action
        assert all(len({tuple(a) for a in group}) == G for group in action)

    def test_the_seed_decides(self, trajectories, credit):
        again = run(items(), jax.random.key(0), credit)
        other = run(items(), jax.random.key(1), credit)
        assert np.array_equal(again.action, trajectories[credit].action)
        assert not np.array_equal(other.action, trajectories[credit].action)

    def test_log_probs_and_contexts_are_of_the_decisions_in_order(self, trajectories, credit):
        clock = trajectories[credit].context[..., 0]
        assert np.all(np.diff(clock, axis=-1) >= 0)
        assert not np.any(clock[..., 0])
        count = np.cumsum(np.asarray(items().valid), -1) - np.asarray(items().valid)
        assert np.array_equal(
            trajectories[credit].context[..., 1], np.broadcast_to(count[:, None], (B, G, T))
        )


def test_state_credit_restarts_every_unit_from_one_memory(trajectories):
    context = trajectories["state"].context
    starts = first_of_units(context)
    assert np.all(starts == starts[:, :1])
    assert np.any(context[:, :, 1::BLOCK] != context[:, :1, 1::BLOCK])
    free = first_of_units(trajectories["step"].context)
    assert np.any(free[:, :, 1:] != free[:, :1, 1:])


def test_state_credit_carries_on_generation_zero(trajectories):
    # Generation 0 never notices that the others were sent back.
    state, step = trajectories["state"], trajectories["step"]
    assert np.array_equal(state.action[:, 0], step.action[:, 0])
    assert np.array_equal(state.context[:, 0], step.context[:, 0])
    np.testing.assert_allclose(state.task[:, 0], step.task[:, 0], atol=1e-5)


def test_credit_changes_no_trace_otherwise(trajectories):
    whole, step = trajectories["trajectory"], trajectories["step"]
    assert np.array_equal(whole.action, step.action)
    np.testing.assert_allclose(whole.task[..., 0], step.task.sum(-1), atol=1e-5)


def test_a_trace_is_what_scan_makes_of_it(trajectories):
    key = group_keys(jax.random.key(0), B, G)[2, 1]
    stream = jax.tree.map(lambda x: x[2], items())
    state, output = jax.jit(
        lambda k, i: memory.scan(None, k, memory.init(CONFIG), i, decide_fn=decide_fn)
    )(key, stream)
    traj = trajectories["trajectory"]
    assert np.array_equal(output.action, traj.action[2, 1])
    assert float(episodic_tokens(state)) == traj.tokens[2, 1]
    assert int(state.episodic.valid.sum()) == traj.slots[2, 1]


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("length", [0, 1, 10])
def test_a_last_unit_that_is_not_full_is_padded(trajectories, credit, length):
    stream, key = items(), jax.random.key(0)
    traj = run(jax.tree.map(lambda x: x[:, :length], stream), key, credit)
    padded = -(-length // BLOCK) * BLOCK
    assert traj.action.shape == (B, G, padded)
    assert traj.task.shape == (B, G, 1 if credit == "trajectory" else max(padded // BLOCK, 1))
    assert not np.any(traj.valid[..., length:])
    # What is padded is as if it were not there: the decisions are those of the longer stream.
    for name in ("action", "log_prob", "context"):
        found, whole = getattr(traj, name), getattr(trajectories[credit], name)
        np.testing.assert_array_equal(found[:, :, :length], whole[:, :, :length])
    rest = np.arange(T) < length
    cut = run(stream.replace(valid=stream.valid & rest), key, credit)
    for name in ("last", "slots", "tokens", "source_tokens"):
        np.testing.assert_allclose(getattr(traj, name), getattr(cut, name), atol=1e-5)


def test_full_units_are_not_padded():
    stream = items()
    assert pad_to_units(stream, BLOCK) is stream


def test_draws_do_not_depend_on_the_size_of_the_batch_or_group():
    key = jax.random.key(0)
    small, large = group_keys(key, 2, 3), group_keys(key, 5, 7)
    assert np.array_equal(*(jax.random.key_data(k[:2, :3]) for k in (small, large)))
    data = jax.random.key_data(large).reshape(35, -1)
    assert len(np.unique(data, axis=0)) == 35
    first = run(jax.tree.map(lambda x: x[:2], items()), key, "step")
    assert np.array_equal(first.action, run(items(), key, "step").action[:2])
    fewer = run(items(), key, "step", generations=2)
    assert np.array_equal(fewer.action, run(items(), key, "step").action[:, :2])


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="trajectory, state, step, got 'token'"):
        run(items(), jax.random.key(0), "token")
