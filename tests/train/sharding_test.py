"""Tests of mmmem_jax/train/sharding.py on eight CPU devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from mmmem_jax.errors import UserError
from mmmem_jax.policies.manager import Manager
from mmmem_jax.sib.update import init_state
from mmmem_jax.train import sharding


@pytest.fixture(scope="module")
def state():
    """A manager of 16 hidden units before its first update."""
    return init_state(Manager(8, 16, rngs=nnx.Rngs(0)), optax.adam(1e-3), jax.random.key(0))


def names_of(tree) -> dict:
    """{path: leaf}, a path as the rules see it."""
    return {sharding._name(path): x for path, x in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({"data": 1}, (1, 1, 1)),
        ({"data": 4, "group": 2}, (4, 2, 1)),
        ({"data": -1, "group": 2, "model": 2}, (2, 2, 2)),
        ({"data": -1, "group": 3}, (2, 3, 1)),
        ({"data": -1, "model": 8}, (1, 1, 8)),
    ],
)
def test_makes_the_mesh(asked, shape):
    mesh = sharding.make_mesh(**asked)
    assert dict(mesh.shape) == dict(zip(("data", "group", "model"), shape, strict=True))
    assert len({d.id for d in mesh.devices.flat}) == math.prod(shape)


def test_makes_the_mesh_of_the_devices_it_is_given():
    mesh = sharding.make_mesh(-1, 2, devices=jax.devices()[4:])
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()[4:]}


@pytest.mark.parametrize(
    "shape",
    [(9, 1, 1), (3, 3, 1), (2, 2, 3), (0, 1, 1), (1, 0, 1), (1, -1, 1), (-1, 9, 1), (-1, 1, 0)],
)
def test_a_mesh_that_cannot_be_made_is_refused(shape):
    with pytest.raises(UserError, match="lower config.mesh"):
        sharding.make_mesh(*shape)


def test_the_mesh_must_divide_batch_group_and_hidden_units():
    mesh = sharding.make_mesh(2, 2, 2)
    fits = {"batch_size": 8, "num_generations": 4, "hidden": 16}
    sharding.check_divides(mesh, **fits)
    for name, key, axis in (
        ("batch_size", "manager.batch_size", "data"),
        ("num_generations", "sib.num_generations", "group"),
        ("hidden", "manager.hidden", "model"),
    ):
        with pytest.raises(UserError, match=f"config.{key} = 7 .* the 2 .* mesh axis '{axis}'"):
            sharding.check_divides(mesh, **(fits | {name: 7}))


class TestRules:
    def test_moments_and_the_reference_lie_as_their_parameter(self, state):
        mesh = sharding.make_mesh(2, 2, 2)
        spec = {name: s.spec for name, s in names_of(sharding.by_rules(mesh, state)).items()}
        parameters = {n.removeprefix("params.") for n in spec if n.startswith("params.")}
        assert len(parameters) == 7
        for name in parameters:
            others = [n for n in spec if n.endswith(f".{name}")]
            assert len(others) == 4  # params, ref_params, mu, nu
            assert len({spec[n] for n in others}) == 1
        assert spec["params.item.kernel"] == PartitionSpec(None, "model")
        assert spec["opt_state.0.nu.mid.kernel"] == PartitionSpec("model")
        assert spec["opt_state.0.count"] == spec["rng"] == spec["step"] == PartitionSpec()

    def test_the_first_match_wins(self, state):
        mesh = sharding.make_mesh(2, 2, 2)
        rules = ((r"mid\.kernel", PartitionSpec(None, "model")), (".", PartitionSpec()))
        spec = {n: s.spec for n, s in names_of(sharding.by_rules(mesh, state, rules)).items()}
        split = {name for name, s in spec.items() if s != PartitionSpec()}
        assert split == {name for name in spec if name.endswith("mid.kernel")}
        reversed_rules = sharding.by_rules(mesh, state, rules[::-1])
        assert {s.spec for s in jax.tree.leaves(reversed_rules)} == {PartitionSpec()}

    def test_an_array_that_no_rule_knows_is_named(self):
        tree = {"params": {"layers": [{"kernel": jnp.zeros((2, 2))}]}}
        with pytest.raises(ValueError, match=r"no sharding rule .*'params\.layers\.0\.kernel'"):
            sharding.by_rules(sharding.make_mesh(1), tree)

    def test_an_axis_that_does_not_divide_is_named(self, state):
        mesh = sharding.make_mesh(1, 1, 3)
        with pytest.raises(UserError, match=r"kernel has 16 in dimension 1, .* over the 3 devices"):
            sharding.by_rules(mesh, state.params)


def test_arrays_lie_where_they_should(state):
    mesh = sharding.make_mesh(2, 2, 2)
    batch = sharding.put_batch(mesh, {"x": np.arange(16.0).reshape(8, 2)})
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(4, 2)}
    placed = names_of(sharding.place(mesh, state))
    for name, shape in (("params.mid.kernel", (8, 16)), ("params.out.kernel", (16, 3))):
        assert {s.data.shape for s in placed[name].addressable_shards} == {shape}
    params = sharding.replicate(mesh, {"w": jnp.ones((3, 3))})
    assert params["w"].sharding.is_fully_replicated
    assert len(params["w"].addressable_shards) == 8
    shard = sharding.make_shard(mesh)
    rollouts = jax.jit(lambda x: shard(x + 1.0))(jnp.zeros((8, 4, 5)))
    assert {s.data.shape for s in rollouts.addressable_shards} == {(4, 2, 5)}
    np.testing.assert_array_equal(rollouts, 1.0)
