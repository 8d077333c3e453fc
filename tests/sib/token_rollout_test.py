"""Rollouts of a model that decides: what is shared, what memories hold, what a unit is credited."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmmem_jax.memory import traces
from mmmem_jax.memory.types import DISCARD
from mmmem_jax.models.qwen3_vl import lora
from mmmem_jax.sib.token_rollout import encode_frames, held, rollout
from mmmem_jax.train import sft
from tests.sib.token_toys import B, G, L, T, make_batch, make_setup

CREDITS = ("state", "step", "trajectory")
EMPTY = traces.init(2, L)


def read_fn(memories):
    """Something of the memory that every decision may change: [B, G]."""
    return jnp.sum(memories.ids * memories.valid, (-2, -1)) / 100.0


@functools.cache
def rolled_out(credit, max_new_tokens=1):
    decider, adapter, base = make_setup(max_new_tokens)

    @jax.jit
    def run(adapter, base, batch):
        params = lora.join(adapter, base)
        visual = encode_frames(decider, nnx.merge(decider.graphdef, params), batch.patches)
        return rollout(
            decider, params, jax.random.key(3), batch, visual, init_traces=EMPTY,
            read_fn=read_fn, num_generations=G, credit=credit,
        )  # fmt: skip

    return jax.device_get(run(adapter, base, make_batch()))


@pytest.mark.parametrize("credit", CREDITS)
class TestEveryCredit:
    def test_shapes(self, credit):
        traj, units = rolled_out(credit), 1 if credit == "trajectory" else T
        states = 1 if credit == "state" else G
        assert traj.nodes.ids.shape == (B, states, T, L)
        assert traj.ids.shape == traj.token_log_prob.shape == (B, G, T, 1)
        assert traj.action.shape == (B, G, T)
        assert traj.task.shape == traj.length.shape == (B, G, units)
        assert traj.last.shape == traj.slots.shape == traj.tokens.shape == (B, G)
        assert set(np.unique(traj.action)) == {0, 1, 2}

    def test_memories_are_what_the_actions_make_of_the_captions(self, credit):
        traj, batch = rolled_out(credit), make_batch()
        decider, *_ = make_setup()
        for g in range(1 if credit == "state" else G):
            found = sft.follow(decider, batch, traj.action[:, g], EMPTY)
            kept = jax.tree.map(lambda x, g=g: x[:, g], traj.traces)
            jax.tree.map(
                np.testing.assert_array_equal, jax.tree.map(lambda x: x[:, 0], found.traces), kept
            )
            np.testing.assert_array_equal(found.nodes.ids[:, 0], traj.nodes.ids[:, g])

    def test_rewards_of_units_add_up_to_what_the_memory_gained(self, credit):
        traj = rolled_out(credit)
        carried = slice(0, 1) if credit == "state" else slice(None)
        np.testing.assert_allclose(traj.task.sum(-1)[:, carried], traj.last[:, carried], atol=1e-5)
        np.testing.assert_allclose(traj.length.sum(-1)[:, carried], traj.tokens[:, carried])
        np.testing.assert_array_equal(traj.tokens, held(traj.traces))

    def test_padding_is_no_decision(self, credit):
        traj = rolled_out(credit)
        assert not traj.valid[1, 0, -1]
        assert not traj.token_valid[1, :, -1].any()
        assert not traj.log_prob[1, :, -1].any()
        if credit != "trajectory":
            assert not traj.task[1, :, -1].any()


def test_state_credit_lets_all_go_on_from_generation_zero():
    traj = rolled_out("state")
    for x in jax.tree.leaves(traj.traces):
        np.testing.assert_array_equal(x, np.broadcast_to(x[:, :1], x.shape))
    assert np.any(traj.task != traj.task[:, :1])
    step = rolled_out("step")  # the same draws, as their states are the same at first
    np.testing.assert_array_equal(traj.action[:, :, 0], step.action[:, :, 0])


def test_credit_changes_no_trace_otherwise():
    whole, step = rolled_out("trajectory"), rolled_out("step")
    np.testing.assert_array_equal(whole.ids, step.ids)
    np.testing.assert_allclose(whole.task[..., 0], step.task.sum(-1), atol=1e-5)


def test_where_the_model_writes_its_trace_is_the_text_of_the_node():
    traj = rolled_out("step", 4)
    assert traj.ids.shape == (B, G, T, 4)
    for b in range(B):
        for g in range(G):
            opened = [
                t for t in range(T) if traj.action[b, g, t] != DISCARD and traj.valid[b, 0, t]
            ]
            if not opened:
                assert not traj.traces.valid[b, g].any()
                continue
            t = opened[-1]
            ids = traj.ids[b, g, t, 1:][traj.token_valid[b, g, t, 1:]]
            latest = traj.traces.latest[b, g]
            text = traj.traces.ids[b, g, latest][traj.traces.valid[b, g, latest]]
            np.testing.assert_array_equal(text, ids[ids != 13])


def test_nonsense_is_refused():
    decider, adapter, base = make_setup()
    with pytest.raises(ValueError, match="trajectory, state, step, got 'token'"):
        rollout(
            decider, lora.join(adapter, base), jax.random.key(0), make_batch(), None,
            init_traces=EMPTY, read_fn=read_fn, num_generations=G, credit="token",
        )  # fmt: skip
