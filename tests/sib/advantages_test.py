"""Advantages of credit units within their group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmmem_jax.sib.advantages import STDS, advantages, returns_to_go
from mmmem_jax.train.sharding import make_mesh

REWARDS = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)


def to_go(rewards, discount):
    out = np.zeros_like(rewards)
    for u in reversed(range(rewards.shape[2])):
        later = out[..., u + 1] if u + 1 < rewards.shape[2] else 0
        out[..., u] = rewards[..., u] + discount * later
    return out


def compute(rewards=REWARDS, credit="state", discount=0.7, std="off"):
    return advantages(jnp.asarray(rewards), credit=credit, discount=discount, std=std)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (1, 8)])
def test_a_group_split_over_devices_is_one_group(shape, std):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    rewards = np.random.default_rng(1).normal(size=(4, 8, 3)).astype(np.float32)
    rewards[2] = 0.5  # a group without variance
    split = jax.device_put(
        rewards, NamedSharding(make_mesh(*shape), PartitionSpec("data", "group"))
    )
    together, apart = (
        jax.jit(functools.partial(advantages, credit="step", discount=0.7, std=std))(x)
        for x in (rewards, split)
    )
    assert len(apart.value.sharding.device_set) == 8
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), together, apart)


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
def test_returns_to_go(discount):
    np.testing.assert_allclose(
        returns_to_go(jnp.asarray(REWARDS), discount), to_go(REWARDS, discount), atol=1e-5
    )


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("credit", ["step", "state", "trajectory"])
def test_centred_over_the_group_at_the_same_unit(credit, std):
    value = compute(credit=credit, std=std).value
    assert value.shape == REWARDS.shape
    np.testing.assert_allclose(value.mean(1), 0, atol=1e-6)


@pytest.mark.parametrize("credit", ["step", "state", "trajectory"])
def test_only_step_credit_looks_ahead(credit):
    gain = to_go(REWARDS, 0.7) if credit == "step" else REWARDS
    centred = gain - gain.mean(1, keepdims=True)
    np.testing.assert_allclose(compute(credit=credit).value, centred, atol=1e-5)


def test_group_std_standardises_each_group():
    value = compute(std="group").value
    np.testing.assert_allclose(np.std(value, axis=1), 1, atol=1e-4)


def test_batch_std_keeps_groups_in_proportion():
    value = np.asarray(compute(std="batch").value)
    off = np.asarray(compute(std="off").value)
    assert np.sqrt(np.mean(value**2)) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(value / off, (value / off)[0, 0, 0], rtol=1e-3)


@pytest.mark.parametrize("std", STDS)
def test_groups_without_variance_are_skipped_and_counted(std):
    rewards = REWARDS.copy()
    rewards[0, :, 1] = rewards[2, :, 3] = rewards[2, :, 0] = 0.37
    out = compute(rewards, std=std)
    assert out.weight.shape == (3, 1, 4)
    assert np.argwhere(np.asarray(out.weight)[:, 0] == 0).tolist() == [[0, 1], [2, 0], [2, 3]]
    assert float(out.zero_share) == pytest.approx(3 / 12)
    assert not np.any(out.value[0, :, 1])
    assert np.all(np.isfinite(out.value))


@pytest.mark.parametrize("std", STDS)
def test_a_batch_without_variance(std):
    out = compute(np.full((2, 4, 3), 0.25, np.float32), std=std)
    assert not np.any(out.value)
    assert not np.any(out.weight)
    assert float(out.zero_share) == 1


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("size", [3, 5, 6, 8, 12, 100])
@pytest.mark.parametrize("reward", [28.13, 57.3, -120.7])
def test_equal_rewards_of_any_size_are_no_variance(reward, size, std):
    rewards = np.full((2, size, 3), reward, np.float32)
    rewards[0, 0, 1] *= 1.001  # the only group that differs
    out = compute(rewards, std=std)
    assert np.argwhere(np.asarray(out.weight)[:, 0]).tolist() == [[0, 1]]
    assert float(out.zero_share) == pytest.approx(5 / 6)
    assert np.argwhere(np.asarray(out.value).any(1)).tolist() == [[0, 1]]


def test_an_unknown_std_is_refused():
    with pytest.raises(ValueError, match="group, batch, off, got 'on'"):
        compute(std="on")
