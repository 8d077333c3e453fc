"""An update of a model that decides: ratios, gradients, what changes and what does not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmmem_jax.memory import traces
from mmmem_jax.models.qwen3_vl import lora
from mmmem_jax.sib.token_readers import overlap_reader
from mmmem_jax.sib.token_rollout import encode_frames
from mmmem_jax.sib.token_update import (
    TokenSibConfig,
    decisions_of,
    gradient,
    log_probs_of,
    make_optimizer,
    make_update,
    score,
)
from mmmem_jax.train.state import init_state
from tests.sib.token_rollout_test import rolled_out
from tests.sib.token_toys import G, T, make_batch, make_setup

SIB = TokenSibConfig(num_generations=G, clips_at_once=2, inner_epochs=2, entropy_bonus=0.01)


def reader_fn(params, memories, batch):
    return overlap_reader(memories, batch)


@functools.cache
def updated(credit="state", max_new_tokens=1, dtype=jnp.float32, **changes):
    """(state before, state after, metrics) of one update."""
    decider, adapter, base = make_setup(max_new_tokens, dtype=dtype)
    optimizer = make_optimizer(1e-3)
    config = dataclasses.replace(SIB, credit=credit, **changes)
    tight = traces.init(3, 2)  # where captions of three tokens do not fit
    update = make_update(decider, reader_fn, tight, optimizer, config)
    state = init_state(adapter, optimizer, jax.random.key(0))
    after, metrics = jax.jit(update)(state, make_batch(), base)
    return state, after, jax.device_get(metrics)


def scored(traj, decider, visual, clips_at_once):
    return decisions_of(make_batch(), visual, traj.nodes, traj.ids, traj.token_valid, clips_at_once)


@pytest.mark.parametrize(("credit", "max_new_tokens"), [("state", 1), ("step", 1), ("step", 4)])
def test_what_was_sampled_is_scored_alike(credit, max_new_tokens):
    traj = rolled_out(credit, max_new_tokens)
    decider, adapter, base = make_setup(max_new_tokens)

    @jax.jit
    def again(adapter):
        params = lora.join(adapter, base)
        visual = encode_frames(decider, nnx.merge(decider.graphdef, params), make_batch().patches)
        return log_probs_of(decider, params, scored(traj, decider, visual, 2))

    log_prob, entropy = again(adapter)
    np.testing.assert_allclose(log_prob, traj.log_prob, atol=1e-4)
    entropy = np.where(traj.valid, entropy, 0.5)
    assert np.all(entropy > 0)
    assert np.all(entropy <= np.log(3) + 1e-5)
    other, _ = again(lora.without_lora(adapter))
    assert np.abs(other - traj.log_prob).max() > 0.01


def test_gradients_of_pieces_add_up_to_that_of_the_whole():
    traj = rolled_out("state")
    decider, adapter, base = make_setup()
    weight = np.random.default_rng(0).normal(size=traj.log_prob.shape).astype(np.float32)
    entropy_weight = np.ones((len(weight), 1, T), np.float32)

    @jax.jit
    def both(adapter):
        model = nnx.merge(decider.graphdef, lora.join(adapter, base))
        visual = encode_frames(decider, model, make_batch().patches)

        def whole(adapter):
            piece = jax.tree.map(lambda x: x[0], scored(traj, decider, visual, T))
            log_prob, entropy = score(decider, lora.join(adapter, base), piece)
            # [T, B, G] and [T, B, 1]
            return (log_prob * weight.transpose(2, 0, 1)).sum() + entropy.sum()

        pieces = scored(traj, decider, visual, 1)
        found = gradient(decider, adapter, base, pieces, weight, entropy_weight)
        return found, jax.grad(whole)(adapter)

    found, expected = both(adapter)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected
    )
    assert optax.tree.norm(found) > 1e-2


@pytest.mark.parametrize(("credit", "max_new_tokens"), [("state", 1), ("trajectory", 4)])
def test_an_update_starts_at_ratio_one_and_changes_the_adapter_alone(credit, max_new_tokens):
    before, after, metrics = updated(credit, max_new_tokens)
    assert metrics["ratio_first"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["ratio_max"] - metrics["ratio_min"] > 1e-4  # of the second inner step
    assert all(np.isfinite(value) for value in metrics.values())
    assert int(after.step) == 1
    changed = jax.tree.map(lambda a, b: np.any(a != b), before.params, after.params)
    assert all(jax.tree.leaves(changed))
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(after.params)}
    assert all("lora" in name for name in names)
    assert metrics["share_add"] + metrics["share_merge"] + metrics["share_discard"] == (
        pytest.approx(1.0)
    )
    assert metrics["kl_ref_k3"] > 0
    assert metrics["tokens_dropped"] > 0
    assert metrics["reward"] == pytest.approx(
        metrics["reward_task"]
        + metrics["reward_length_weighted"]
        + metrics["reward_log_ratio_weighted"],
        abs=1e-5,
    )


def test_rounding_clips_nothing():
    """What is written token by token in bfloat16 has other probabilities than read whole."""
    _, _, metrics = updated("step", 8, jnp.bfloat16, inner_epochs=1)
    assert metrics["ratio_first"] > 1.01
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1.0
    assert metrics["clip_low_share"] == metrics["clip_high_share"] == 0.0
