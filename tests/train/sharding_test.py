"""Tests of mmmem_jax/train/sharding.py on eight CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax.errors import UserError
from mmmem_jax.train import sharding


@pytest.mark.parametrize(
    ("data", "group", "shape"), [(1, 1, (1, 1)), (4, 2, (4, 2)), (-1, 2, (4, 2)), (-1, 3, (2, 3))]
)
def test_makes_the_mesh(data, group, shape):
    mesh = sharding.make_mesh(data, group)
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "group")


@pytest.mark.parametrize(("data", "group"), [(9, 1), (3, 3), (0, 1), (1, 0), (1, -1), (-1, 9)])
def test_a_mesh_that_cannot_be_made_is_refused(data, group):
    with pytest.raises(UserError, match="lower config.mesh"):
        sharding.make_mesh(data, group)


def test_the_mesh_must_divide_batch_and_group():
    mesh = sharding.make_mesh(4, 2)
    sharding.check_divides(mesh, batch_size=8, num_generations=4)
    with pytest.raises(UserError, match="config.manager.batch_size = 6 .* 4 .* axis 'data'"):
        sharding.check_divides(mesh, batch_size=6, num_generations=4)
    with pytest.raises(UserError, match="config.sib.num_generations = 3 .* 2 .* axis 'group'"):
        sharding.check_divides(mesh, batch_size=8, num_generations=3)


def test_arrays_lie_where_they_should():
    mesh = sharding.make_mesh(4, 2)
    batch = sharding.put_batch(mesh, {"x": np.arange(16.0).reshape(8, 2)})
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(2, 2)}
    params = sharding.replicate(mesh, {"w": jnp.ones((3, 3))})
    assert params["w"].sharding.is_fully_replicated
    assert len(params["w"].addressable_shards) == 8
    shard = sharding.make_shard(mesh)
    rollouts = jax.jit(lambda x: shard(x + 1.0))(jnp.zeros((8, 4, 5)))
    assert {s.data.shape for s in rollouts.addressable_shards} == {(2, 2, 5)}
    np.testing.assert_array_equal(rollouts, 1.0)
