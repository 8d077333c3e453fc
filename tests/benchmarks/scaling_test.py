"""Tests of benchmarks/scaling.py on programs and parameters that are known."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks import common, scaling
from mmmem_jax.errors import UserError
from mmmem_jax.train import plan, sharding


@pytest.fixture
def config():
    """4 streams x 8 generations x 64 chunks on 2 x 4 devices."""
    config = common.make_config(full=False)
    config.manager.batch_size, config.sib.num_generations = 2, 2
    return scaling.scaled(config, (2, 4, 1))


def test_a_device_keeps_what_it_has(config):
    assert config.mesh.to_dict() == {"data": 2, "group": 4, "model": 1}
    assert (config.manager.batch_size, config.sib.num_generations) == (4, 8)


@pytest.mark.parametrize(
    ("shape", "axis", "gathers"),
    [
        ((4, 8, 64), "data", True),
        ((4, 8, 64), "group", True),
        ((4, 8, 64, 3), ("data", "group"), True),
        ((4, 8), ("data", "group"), False),  # one number a trajectory
        ((4, 8, 8), "data", False),  # one a credit unit
    ],
)
def test_gathered_trajectories_are_found(config, shape, axis, gathers):
    mesh = sharding.make_mesh(**config.mesh)

    def gather(x):
        return jax.lax.all_gather(x, axis)

    mapped = jax.shard_map(
        gather, mesh=mesh, in_specs=P("data", "group"), out_specs=P(), check_vma=False
    )
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    found = plan.collectives_of(compiled.as_text())
    assert any(c.kind == "all-gather" for c in found)
    assert any(scaling.gathers_trajectories(c, config) for c in found) == gathers


def test_the_difference_is_the_largest_of_any_mesh(config, monkeypatch):
    def train(config, streams, mesh):
        end = {"w": np.ones(3) + [0, 0.01 * (mesh.size - 1), 0], "b": np.zeros(2)}
        return {"w": np.zeros(3), "b": np.zeros(2)}, end

    monkeypatch.setattr(scaling, "train", train)
    config.streams.train = 1
    found = scaling.agreement(config, [(1, 1, 1), (2, 1, 1), (2, 2, 2)])
    assert found["diffs"] == pytest.approx({"1 x 1 x 1": 0, "2 x 1 x 1": 0.01, "2 x 2 x 2": 0.07})
    assert found["max_abs_diff"] == pytest.approx(0.07)
    assert (found["moved"], found["num_updates"]) == (1.0, config.manager.num_steps)


def test_without_libtpu_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="libtpu, which compiles for TPUs, is missing"):
        scaling.measure(False, tmp_path)
