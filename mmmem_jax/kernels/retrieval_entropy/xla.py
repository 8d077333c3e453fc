"""Retrieval entropy by XLA: a matrix product per part of the bank, reduced and merged; gradients.

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
            return None if x is None else lax.dynamic_slice_in_dim(x, start, size, axis)

        return Bank(
            rows(self.keys, self.keys.ndim - 2),
            rows(self.scales, 0),
            None if self.mask is None else rows(self.mask, self.mask.ndim - 1),
            rows(self.values, 0),
        )


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
    s = raw_scores(query, bank) * inverse_temperature
    return s if bank.mask is None else jnp.where(bank.mask, s, -jnp.inf)


def _without_nan(rows: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Rows [N ...] (or [B N ...]) with 0 where no query may look: 0 * NaN is no 0."""
    if mask is None:
        return rows
    if mask.ndim == 2 and rows.ndim == 2:
        mask = jnp.any(mask, axis=0)
    return jnp.where(mask[..., None], rows, 0)


def _over_parts(bank: Bank, num_queries: int, add: Callable, carry):
    """carry = add(carry, part, start, new) over the bank.

    `new` [n]: rows that were in no earlier part; None: all. The first part is outside the loop, so
    that under shard_map the carry varies over the mesh as the bank does.
    """
    size = max(1, min(bank.size, MAX_SCORES // num_queries))
    if size == bank.size:
        return add(carry, bank, 0, None)

    def body(i, carry):
        start = jnp.minimum(i * size, bank.size - size)
        new = jnp.arange(size) + start >= i * size
        return add(carry, bank.part(start, size), start, new)

    carry = add(carry, bank.part(0, size), 0, None)
    return lax.fori_loop(1, -(-bank.size // size), body, carry)


def summary(query: jax.Array, bank: Bank, inverse_temperature, top_k: int) -> parts.Partial:
    """The bank's `Partial` for the queries [B D]."""

    def add(carry, part, start, new):
        s = scores(query, part, inverse_temperature)
        s = s if new is None else jnp.where(new, s, -jnp.inf)
        m, mass, t = parts.triple(s)
        top, indices = parts.top_k(s, top_k)
        indices = jnp.where(indices < 0, -1, indices + start)
        read = jnp.zeros((len(query), 0), jnp.float32)
        if part.values is not None:
            p = jnp.exp(parts.shift(s, m[:, None]))
            read = _dot("bn,nv->bv", p, _without_nan(part.values, part.mask).astype(jnp.float32))
        here = parts.Partial(m, mass, t, top, indices, read)
        return here if carry is None else parts.merge(carry, here)

    return _over_parts(bank, len(query), add, None)


def differentiable(bank: Bank) -> Bank:
    """The bank's parts that have a gradient, None in place of the others."""
    floating = jnp.issubdtype(bank.keys.dtype, jnp.floating)
    return bank._replace(keys=bank.keys if floating else None, mask=None)


def gradients(query, bank: Bank, inverse_temperature, outputs, cotangents):
    """Cotangents of query, bank and inverse temperature from those of `parts.finish`'s outputs.

    With p = softmax(s): d log_z / ds_i = p_i, dH / ds_i = -p_i (log p_i + H), and of the read-out r
    in the direction g, p_i (g . v_i - g . r).
    """
    log_z, entropy, _, top_indices, read = outputs
    g_log_z, g_entropy, g_top, _, g_read = cotangents
    some = jnp.isfinite(log_z)[:, None]
    centre = jnp.where(some, log_z[:, None], 0.0)
    batched = bank.keys.ndim == 3

    def add(carry, part, start, new):
        d_query, d_bank, d_inverse = carry
        raw = raw_scores(query, part)
        s = raw * inverse_temperature
        valid = some if part.mask is None else some & part.mask
        valid = valid if new is None else valid & new
        s = jnp.where(valid, s, 0.0)
        log_p = s - centre
        p = jnp.where(valid, jnp.exp(log_p), 0.0)
        factor = g_log_z[:, None] - g_entropy[:, None] * (log_p + entropy[:, None])
        if part.values is not None:
            values = _without_nan(part.values, part.mask).astype(jnp.float32)
            own = _dot("bv,nv->bn", g_read, values)
            factor += own - jnp.sum(g_read * read, axis=-1, keepdims=True)
        ds = p * factor
        place = top_indices - start
        place = jnp.where((top_indices < 0) | (place < 0), bank.size, place)
        row = jnp.arange(len(query))[:, None]
        top = jnp.zeros_like(ds).at[row, place].add(g_top, mode="drop")
        ds = ds + jnp.where(valid, top, 0.0)
        d_inverse += jnp.sum(ds * jnp.where(valid, raw, 0.0))
        d_raw = ds * inverse_temperature
        keys = _without_nan(part.keys.astype(jnp.float32), part.mask)
        scaled = d_raw if part.scales is None else d_raw * part.scales
        d_query += _dot("bn,bnd->bd" if batched else "bn,nd->bd", scaled, keys)
        q = query.astype(jnp.float32)
        updates = {}
        if d_bank.keys is not None:
            updates["keys"] = _dot("bn,bd->bnd" if batched else "bn,bd->nd", scaled, q)
        if d_bank.scales is not None:
            unscaled = jnp.where(valid, raw_scores(query, part._replace(scales=None)), 0.0)
            updates["scales"] = jnp.sum(d_raw * unscaled, axis=0)
        if d_bank.values is not None:
            updates["values"] = _dot("bn,bv->nv", p, g_read)
        for name, update in updates.items():
            axis = 1 if name == "keys" and batched else 0
            whole = getattr(d_bank, name)
            old = lax.dynamic_slice_in_dim(whole, start, update.shape[axis], axis)
            whole = lax.dynamic_update_slice_in_dim(whole, old + update, start, axis)
            d_bank = d_bank._replace(**{name: whole})
        return d_query, d_bank, d_inverse

    d_bank = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), differentiable(bank))
    start = (jnp.zeros(query.shape, jnp.float32), d_bank, jnp.float32(0.0))
    d_query, d_bank, d_inverse = _over_parts(bank, len(query), add, start)
    pairs = zip(d_bank, bank, strict=True)
    d_bank = Bank(*(None if d is None else d.astype(x.dtype) for d, x in pairs))
    return d_query.astype(query.dtype), d_bank, d_inverse
