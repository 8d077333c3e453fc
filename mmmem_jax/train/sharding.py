"""The ('data', 'group') mesh: streams over one axis, generations of a group over the other."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmmem_jax.errors import UserError


def make_mesh(data: int, group: int) -> Mesh:
    """A mesh of data x group devices; data=-1 takes all that `group` leaves.

    Raises:
      UserError: if the devices do not suffice.
    """
    devices = jax.devices()
    data = len(devices) // max(group, 1) if data == -1 else data
    if data < 1 or group < 1 or data * group > len(devices):
        raise UserError(
            f"config.mesh asks for {data} x {group} devices and there are {len(devices)}; "
            "lower config.mesh.data or config.mesh.group"
        )
    grid = np.asarray(devices[: data * group]).reshape(data, group)
    return Mesh(grid, ("data", "group"), axis_types=(AxisType.Auto, AxisType.Auto))


def check_divides(mesh: Mesh, *, batch_size: int, num_generations: int) -> None:
    """Raises UserError unless the mesh divides the batch and the group."""
    for axis, name, size in (
        ("data", "manager.batch_size", batch_size),
        ("group", "sib.num_generations", num_generations),
    ):
        if size % mesh.shape[axis]:
            raise UserError(
                f"config.{name} = {size} does not divide over the {mesh.shape[axis]} devices of "
                f"mesh axis {axis!r}; make it a multiple"
            )


def make_shard(mesh: Mesh) -> Callable:
    """Puts a tree with leading axes [B, G] on the mesh, inside jit."""
    sharding = NamedSharding(mesh, PartitionSpec("data", "group"))
    return lambda tree: jax.lax.with_sharding_constraint(tree, sharding)


def put_batch(mesh: Mesh, batch):
    """Host arrays with a leading batch axis as device arrays split over 'data'."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def replicate(mesh: Mesh, tree):
    """A tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
