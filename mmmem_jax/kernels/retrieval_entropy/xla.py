"""Retrieval entropy by XLA: a matrix product per part of the bank, reduced and merged; tangents.

A bank whose scores would not fit beside it is taken in parts, each summarised before the next.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mmmem_jax.kernels.retrieval_entropy import partial as parts

MAX_SCORES = 1 << 26  # scores in memory at once: 256 MB


class Bank(NamedTuple):
    """Keys [N D], or [B N D] of each query its own; scales [N] of int8 rows; mask [N] or [B N]."""

    keys: jax.Array
    scales: Float[Array, "N"] | None = None
    mask: Bool[Array, "N"] | Bool[Array, "B N"] | None = None
    values: Float[Array, "N V"] | None = None

    @property
    def size(self) -> int:
        return self.keys.shape[-2]

    def part(self, start: jax.Array | int, size: int) -> "Bank":
        """`size` rows from `start`."""

        def rows(x, axis):
            if x is None or x.shape[axis] == size:
                return x
            return lax.dynamic_slice_in_dim(x, start, size, axis)

        axes = Bank(keys=-2, scales=0, mask=-1, values=0)
        return Bank(*map(rows, self, axes))


def _dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product with float32 sums; of float32 factors in full precision."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def raw_scores(query: Float[Array, "B D"], bank: Bank) -> Float[Array, "B N"]:
    """Inner products; the query is rounded to bfloat16 where the bank is bfloat16 or int8."""
    dtype = jnp.float32 if bank.keys.dtype == jnp.float32 else jnp.bfloat16
    subscripts = "bd,bnd->bn" if bank.keys.ndim == 3 else "bd,nd->bn"
    raw = _dot(subscripts, query.astype(dtype), bank.keys.astype(dtype))
    return raw if bank.scales is None else raw * bank.scales


def scores(query: Float[Array, "B D"], bank: Bank, inverse_temperature) -> Float[Array, "B N"]:
    """Logits, -inf where the mask says so."""
    if bank.keys.dtype == jnp.float32:  # not rounded, so that the query may be scaled, in less time
        s = raw_scores(query * inverse_temperature, bank)
    else:
        s = raw_scores(query, bank) * inverse_temperature
    return s if bank.mask is None else jnp.where(bank.mask, s, -jnp.inf)


def _without_nan(bank: Bank) -> Bank:
    """The bank with 0 in the slots where no query may look: 0 * NaN is no 0."""
    if bank.mask is None:
        return bank

    def rows(x, mask):
        return (
            None if x is None else jnp.where(jnp.expand_dims(mask, range(mask.ndim, x.ndim)), x, 0)
        )

    shared = jnp.any(bank.mask, axis=0) if bank.mask.ndim == 2 else bank.mask
    keys = rows(bank.keys, bank.mask if bank.keys.ndim == 3 else shared)
    return Bank(keys, rows(bank.scales, shared), bank.mask, rows(bank.values, shared))


def _over_parts(bank: Bank, num_queries: int, add: Callable):
    """carry = add(carry, start, size, new) over the bank's parts of `size` rows; None at first.

    `new` [size]: rows that were in no earlier part; None: all. The first part is outside the loop,
    so that under shard_map the carry varies over the mesh as the bank does.
    """
    size = max(1, min(bank.size, MAX_SCORES // num_queries))
    if size == bank.size:
        return add(None, 0, size, None)

    def body(i, carry):
        start = jnp.minimum(i * size, bank.size - size)
        return add(carry, start, size, jnp.arange(size) + start >= i * size)

    return lax.fori_loop(1, -(-bank.size // size), body, add(None, 0, size, None))


def summary(query: jax.Array, bank: Bank, inverse_temperature, top_k: int) -> parts.Partial:
    """The bank's `Partial` for the queries [B D]."""

    def add(carry, start, size, new):
        part = bank.part(start, size)
        s = scores(query, part, inverse_temperature)
        s = s if new is None else jnp.where(new, s, -jnp.inf)
        here = parts.summarise(s, top_k)
        place = here.top_indices
        here = here._replace(top_indices=jnp.where(place < 0, -1, place + start))
        if part.values is not None:
            p = jnp.exp(parts.shift(s, here.m[:, None]))
            read = _dot("bn,nv->bv", p, _without_nan(part).values.astype(jnp.float32))
            here = here._replace(read=read)
        return here if carry is None else parts.merge(carry, here)

    return _over_parts(bank, len(query), add)


def tangents(query, bank: Bank, inverse_temperature, outputs, directions):
    """Tangents of `parts.finish`'s outputs, linear in `directions`; of the indices there is none.

    Args:
      query, bank, inverse_temperature: the point.
      outputs: `parts.finish`'s there, of this bank or of a larger one that it is a part of, whose
        tangents are the sums over its parts.
      directions: tangents of query, bank and inverse temperature; None where zero.

    With p = softmax(s): d log_z = sum p ds, dH = -sum p (log p + H) ds, and of the read-out r
    dr = sum p ((v - r) ds + dv). No part's scores are kept for the transpose that JAX takes of
    this for the gradient: they are computed again, as here.
    """
    d_query, d_bank, d_inverse = directions

    def add(carry, start, size, new):
        @jax.checkpoint
        def of_part(query, bank, inverse_temperature, outputs, start, new, directions):
            part = bank.part(start, size)
            place = outputs[3] - start
            place = jnp.where((outputs[3] < 0) | (place < 0), size, place)
            outputs = (*outputs[:3], place, outputs[4])
            return _part_tangents(query, part, inverse_temperature, outputs, new, directions)

        along = d_query, d_bank.part(start, size), d_inverse  # outside, to be summed in place
        here = of_part(query, bank, inverse_temperature, outputs, start, new, along)
        return here if carry is None else jax.tree.map(jnp.add, carry, here)

    return _over_parts(bank, len(query), add)


def _part_tangents(query, part: Bank, inverse_temperature, outputs, new, directions):
    """`tangents` of one part; an index that lies in another is out of bounds."""
    log_z, entropy, _, place, read = outputs
    d_query, d_part, d_inverse = directions
    subscripts = "bd,bnd->bn" if part.keys.ndim == 3 else "bd,nd->bn"
    part = _without_nan(part)
    some = jnp.isfinite(log_z)[:, None]
    valid = some if part.mask is None else some & part.mask
    valid = valid if new is None else valid & new
    s = jnp.where(valid, scores(query, part, inverse_temperature), 0.0)
    log_p = jnp.where(valid, s - log_z[:, None], 0.0)
    p = jnp.where(valid, jnp.exp(log_p), 0.0)

    d_raw = jnp.zeros_like(s)
    if d_query is not None:
        d_raw += _dot(subscripts, d_query.astype(jnp.float32), part.keys.astype(jnp.float32))
    if d_part.keys is not None:
        d_raw += _dot(subscripts, query.astype(jnp.float32), d_part.keys.astype(jnp.float32))
    d_raw = d_raw if part.scales is None else d_raw * part.scales
    if d_part.scales is not None:
        d_raw += raw_scores(query, part._replace(scales=None)) * d_part.scales
    ds = d_raw * inverse_temperature
    ds = ds if d_inverse is None else ds + s / inverse_temperature * d_inverse
    ds = jnp.where(valid, ds, 0.0)

    d_p = p * ds
    d_log_z = jnp.sum(d_p, axis=-1)
    d_entropy = -jnp.sum(d_p * (log_p + entropy[:, None]), axis=-1)
    d_top = jnp.take_along_axis(ds, place, axis=-1, mode="fill", fill_value=0.0)
    d_read = -d_log_z[:, None] * read
    for weight, values in ((d_p, part.values), (p, d_part.values)):
        if values is not None:
            d_read += _dot("bn,nv->bv", weight, values.astype(jnp.float32))
    return d_log_z, d_entropy, d_top, d_read
