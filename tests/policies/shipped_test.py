"""Policies by name: the shipped manager, rules, damaged files, names that are not known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmmem_jax import memory
from mmmem_jax.errors import UserError
from mmmem_jax.memory.types import Item, MemoryConfig
from mmmem_jax.policies import manager, shipped

DIM = 384
CONFIG = MemoryConfig(
    sensory_slots=4, episodic_slots=4, schema_slots=2, num_relations=1, dim=DIM, merge_keep=1.0
)


def items(number: int) -> Item:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, number, DIM)).astype(np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    ends = np.arange(1, number + 1, dtype=np.float32)
    return Item(
        visual=jnp.asarray(x[0]), coarse=jnp.asarray(x[1]), text=jnp.asarray(x[2]),
        span=jnp.stack([ends - 1, ends], axis=1), tokens=jnp.full(number, 9, jnp.int32),
        mention=jnp.asarray(x[0][:, None]), mention_valid=jnp.ones((number, 1), bool),
        change=jnp.ones(number), relation=jnp.full(number, -1, jnp.int32),
        trace_id=jnp.arange(number, dtype=jnp.int32), valid=jnp.ones(number, bool),
    )  # fmt: skip


@pytest.mark.parametrize("name", shipped.NAMES)
def test_every_policy_fills_a_memory(name):
    policy = shipped.load_policy(name)
    assert policy.name == name
    state, _ = memory.scan(
        policy.params, jax.random.key(0), memory.init(policy.configure(CONFIG)), items(8),
        decide_fn=policy.decide_fn,
    )  # fmt: skip
    assert 0 < state.episodic.valid.sum() <= 4


def test_the_shipped_manager_is_small_says_where_it_comes_from_and_reads_no_entities():
    model, header = shipped.read_manager(shipped.LITE)
    assert (shipped.LITE / "manager.safetensors").stat().st_size < 1e6
    assert {"date", "versions", "command", "config", "constants", "held_out"} <= header.keys()
    weights = np.asarray(model.context.kernel[...])
    np.testing.assert_array_equal(weights[list(manager.SCHEMA_CONTEXT)], 0.0)


def test_a_manager_is_read_as_it_was_written(tmp_path):
    model = manager.Manager(6, 5, rngs=nnx.Rngs(3))
    shipped.write_manager(model, tmp_path / "m", {"date": "today"})
    found, header = shipped.read_manager(tmp_path / "m")
    assert header["date"] == "today"
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(found, nnx.Param), nnx.state(model, nnx.Param)
    )
    assert shipped.load_policy(tmp_path / "m").name == "m"


@pytest.mark.parametrize("name", ["lita", "", "/nowhere/at/all", "uniform", "uniform_merge"])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match="give lite, keep_recent"):
        shipped.load_policy(name)


def test_runs_of_other_jobs_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"job": "world"}')
    with pytest.raises(UserError, match="job 'world'"):
        shipped.load_policy(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    shipped.write_manager(manager.Manager(6, 5, rngs=nnx.Rngs(0)), tmp_path, {})
    weights = tmp_path / "manager.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:50])
    with pytest.raises(UserError, match="is no manager"):
        shipped.read_manager(tmp_path)
    weights.write_bytes(whole)
    (tmp_path / "manager.json").write_text('{"format": "mmmem_manager", "version": 2}')
    with pytest.raises(UserError, match="is not version 1"):
        shipped.read_manager(tmp_path)
    (tmp_path / "manager.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        shipped.read_manager(tmp_path)
