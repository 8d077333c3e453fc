"""The ('data', 'group', 'model') mesh, and what lies where on it.

Streams of a batch are split over 'data', the generations of a group over 'group', and the manager's
hidden units over 'model'. Every array stays one array to the program: means, spreads and gradients
are those of the whole batch on any mesh, and XLA adds the communication.
"""

import math
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmmem_jax.errors import UserError

AXES = ("data", "group", "model")
Rules = Sequence[tuple[str, PartitionSpec]]

# (regex, spec) over paths such as "params.mid.kernel" and "opt_state.1.0.mu.mid.kernel": the first
# that is found in a path says how that array is split. Moments and the reference follow their
# parameter, as their paths end alike. The first layer is split by its outputs and the second by its
# inputs, so a decision needs one sum over 'model'.
RULES: Rules = (
    (r"\b(item|context)\.kernel$", PartitionSpec(None, "model")),
    (r"\bitem\.bias$", PartitionSpec("model")),
    (r"\bmid\.kernel$", PartitionSpec("model")),
    (r"\b(mid\.bias|out\.kernel|out\.bias)$", PartitionSpec()),
    (r"\b(rng|step|count)$", PartitionSpec()),
)


def make_mesh(
    data: int, group: int = 1, model: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of data x group x model devices; data=-1 takes all that the others leave.

    Args:
      data: devices that the streams of a batch are split over.
      group: devices that the generations of a group are split over.
      model: devices that the manager's hidden units are split over.
      devices: those to choose from, by default all there are.

    Raises:
      UserError: if the devices do not suffice.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        data = len(devices) // max(group * model, 1)
    shape = (data, group, model)
    if min(shape) < 1 or math.prod(shape) > len(devices):
        raise UserError(
            f"config.mesh asks for {' x '.join(map(str, shape))} devices and there are "
            f"{len(devices)}; lower config.mesh.data, config.mesh.group or config.mesh.model"
        )
    if math.prod(shape) == len(devices):  # neighbours on the mesh are neighbours in the machine
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices[: math.prod(shape)]).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_divides(mesh: Mesh, *, batch_size: int, num_generations: int, hidden: int) -> None:
    """Raises UserError unless the mesh divides the batch, the group and the hidden units."""
    for axis, name, size in (
        ("data", "manager.batch_size", batch_size),
        ("group", "sib.num_generations", num_generations),
        ("model", "manager.hidden", hidden),
    ):
        if size % mesh.shape[axis]:
            raise UserError(
                f"config.{name} = {size} does not divide over the {mesh.shape[axis]} devices of "
                f"mesh axis {axis!r}; make it a multiple"
            )


def by_rules(mesh: Mesh, tree, rules: Rules = RULES):
    """The NamedSharding of every array of a tree, by the first rule that is found in its path.

    Args:
      mesh: of the axes that the rules name.
      tree: arrays, or their shapes.
      rules: (regex, PartitionSpec); a path is the names on the way joined by dots.

    Raises:
      ValueError: if no rule is found in a path.
      UserError: if an axis does not divide the dimension that is split over it.
    """
    return jax.tree.map_with_path(
        lambda path, x: _sharding(mesh, _name(path), x.shape, rules), tree
    )


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")  # of nnx


def _sharding(mesh: Mesh, name: str, shape: tuple[int, ...], rules: Rules) -> NamedSharding:
    spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
    if spec is None:
        raise ValueError(f"no sharding rule is found in {name!r}; add (regex, PartitionSpec)")
    sharding = NamedSharding(mesh, spec)
    for dim, axis in enumerate(spec):
        if axis is not None and shape[dim] % mesh.shape[axis]:
            raise UserError(
                f"{name} has {shape[dim]} in dimension {dim}, which does not divide over the "
                f"{mesh.shape[axis]} devices of mesh axis {axis!r}; lower config.mesh.{axis}"
            )
    return sharding


def place(mesh: Mesh, state, rules: Rules = RULES):
    """A state on the mesh, as the rules have it."""
    return jax.device_put(state, by_rules(mesh, state, rules))


def replicate(mesh: Mesh, tree):
    """A tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def keep_placed(mesh: Mesh, update: Callable, rules: Rules = RULES) -> Callable:
    """An update (state, batch, ...) -> (state, metrics) that leaves the state where rules have it.

    XLA would be free to return it elsewhere, and the next call to compile again for that.
    """

    def placed(state, batch, *frozen):
        state, metrics = update(state, batch, *frozen)
        return jax.lax.with_sharding_constraint(state, by_rules(mesh, state, rules)), metrics

    return placed


def make_shard(mesh: Mesh) -> Callable:
    """Puts a tree with leading axes [B, G] on the mesh, inside jit."""
    sharding = NamedSharding(mesh, PartitionSpec("data", "group"))
    return lambda tree: jax.lax.with_sharding_constraint(tree, sharding)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays with a leading batch axis: split over 'data'."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(mesh: Mesh, batch):
    """Host arrays with a leading batch axis as device arrays split over 'data'."""
    return jax.device_put(batch, batch_sharding(mesh))
