"""Retrieval entropy over a bank whose rows are spread over a mesh: summarised where they lie.

Only the summaries travel: a few numbers and the top k per query and device.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mmmem_jax.kernels.retrieval_entropy import api, xla
from mmmem_jax.kernels.retrieval_entropy import partial as parts


def retrieval_entropy(
    query: Float[Array, "B D"],
    keys: Float[Array, "N D"] | Int[Array, "N D"],
    mask: Bool[Array, "N"] | None = None,
    *,
    mesh: Mesh,
    axis: str | tuple[str, ...],
    temperature: float | Float[Array, ""],
    top_k: int,
    scales: Float[Array, "N"] | None = None,
    values: Float[Array, "N V"] | None = None,
    implementation: api.Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """`api.retrieval_entropy` of a shared bank, N sharded over mesh axes and the queries whole.

    Returns the same as on one device, on every device; differentiable alike.

    Raises:
      ValueError: as `api.retrieval_entropy`, or if the devices of the axes do not divide N.
    """
    bank = xla.Bank(keys, scales, mask, values)
    api.check(query, bank, top_k)
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    shards = math.prod(mesh.shape[name] for name in axes)
    if keys.ndim == 3 or (mask is not None and mask.ndim == 2) or len(keys) % shards:
        raise ValueError(f"need a shared bank of a multiple of {shards} rows, got {keys.shape}")
    if implementation == "reference":
        raise ValueError("the reference runs on one device; take another implementation")
    local = jax.eval_shape(lambda: bank.part(0, len(keys) // shards))
    implementation = api.pick(implementation, query.shape, local, top_k)
    inverse = 1.0 / jnp.asarray(temperature, jnp.float32)
    outputs = _call(mesh, axes, top_k, implementation, query, bank, inverse)
    return outputs[:4] if values is None else outputs


def _over_mesh(mesh: Mesh, axes, function, size: int, rows, *whole):
    """`function(offset, rows, *whole)` on each device, `offset` the first of its `size` rows."""

    def local(rows, *whole):
        return function(lax.axis_index(axes) * size, rows, *whole)

    specs = (jax.tree.map(lambda _: P(axes), rows), *jax.tree.map(lambda _: P(), whole))
    # Gathered summaries are the same everywhere, which the check of replication cannot tell.
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return mapped(rows, *whole)


def _local_size(mesh: Mesh, axes, bank: xla.Bank) -> int:
    return bank.size // math.prod(mesh.shape[name] for name in axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _call(mesh, axes, top_k: int, implementation: str, query, bank: xla.Bank, inverse):
    def local(offset, bank, query, inverse):
        part = api.summary(top_k, implementation, query, bank, inverse)
        place = part.top_indices
        part = part._replace(top_indices=jnp.where(place < 0, -1, place + offset))
        gathered = lax.all_gather(part, axes)
        whole = jax.tree.map(lambda x: x[0], gathered)
        for i in range(1, len(gathered.m)):
            whole = parts.merge(whole, jax.tree.map(lambda x, i=i: x[i], gathered))
        return parts.finish(whole)

    return _over_mesh(mesh, axes, local, _local_size(mesh, axes, bank), bank, query, inverse)


def _jvp(mesh, axes, top_k: int, implementation: str, primals, tangents):
    query, bank, inverse = primals
    d_query, d_bank, d_inverse = api.directions(tangents)
    outputs = _call(mesh, axes, top_k, implementation, *primals)

    def local(offset, banks, query, inverse, outputs, d_query, d_inverse):
        bank, d_bank = banks
        place = jnp.where(outputs[3] < offset, -1, outputs[3] - offset)
        outputs = (*outputs[:3], place, outputs[4])
        along = d_query, d_bank, d_inverse
        return lax.psum(xla.tangents(query, bank, inverse, outputs, along), axes)

    size = _local_size(mesh, axes, bank)
    whole = query, inverse, outputs, d_query, d_inverse
    along = _over_mesh(mesh, axes, local, size, (bank, d_bank), *whole)
    return outputs, api.with_indices(outputs, along)


_call.defjvp(_jvp, symbolic_zeros=True)
