"""What a part of a bank of keys tells of the whole: an associative summary, merged part by part.

For scores s_i of the part's valid keys: m = max s, l = sum exp(s - m) (named mass here),
t = sum exp(s - m) (s - m), the top k, and optionally the read-out sum exp(s - m) v. Of the whole,
log Z = m + log l and the entropy in nats is H = log l - t / l.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK = 128  # scores in a tile, of which the largest is kept to find the top k
TILE = 1 << 14  # scores of a tile on a CPU: 64 KB, of 16 KB to 2 MB the fastest by a little
SMALL = 1 << 14  # entries of a row up to which one top_k was measured to be as fast as blocks


class Partial(NamedTuple):
    """Summary of the keys seen so far, per query."""

    m: Float[Array, "B"]  # -inf where no key is valid
    mass: Float[Array, "B"]
    t: Float[Array, "B"]
    top_values: Float[Array, "B K"]  # falling; -inf where there are fewer than K
    top_indices: Int[Array, "B K"]  # -1 where there are fewer than K
    read: Float[Array, "B V"]  # V = 0 without values


def shift(scores: jax.Array, m: jax.Array) -> jax.Array:
    """scores - m, and a finite number of weight exp(.) = 0 where the score is -inf."""
    return jnp.maximum(scores - jnp.where(jnp.isneginf(m), 0.0, m), -1e38)


def triple(
    scores: Float[Array, "... N"],
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """m, l, t of each row; a score of -inf is of no valid key."""
    m = jnp.max(scores, axis=-1)
    d = shift(scores, m[..., None])
    p = jnp.exp(d)
    return m, jnp.sum(p, axis=-1), jnp.sum(p * d, axis=-1)


def merge_triples(m: jax.Array, mass: jax.Array, t: jax.Array, axis: int):
    """m, l, t of the union of the parts along `axis`, and the factor each part is scaled by."""
    top = jnp.max(m, axis=axis, keepdims=True)
    d = shift(m, top)
    scale = jnp.exp(d)
    t = jnp.sum(scale * (t + mass * d), axis=axis)
    return jnp.squeeze(top, axis), jnp.sum(scale * mass, axis=axis), t, scale


def merge(a: Partial, b: Partial) -> Partial:
    """The summary of the keys of both; of equal scores those of `a` come first."""
    m, mass, t, scale = merge_triples(
        *(jnp.stack(pair) for pair in ((a.m, b.m), (a.mass, b.mass), (a.t, b.t))), axis=0
    )
    values = jnp.concatenate([a.top_values, b.top_values], axis=-1)
    indices = jnp.concatenate([a.top_indices, b.top_indices], axis=-1)
    values, order = lax.top_k(values, a.top_values.shape[-1])
    indices = jnp.take_along_axis(indices, order, axis=-1)
    read = scale[0][:, None] * a.read + scale[1][:, None] * b.read
    return Partial(m, mass, t, values, indices, read)


def log_z_and_entropy(m: jax.Array, mass: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the softmax whose triple this is, in nats; -inf and 0 without a valid key."""
    some = mass > 0.0
    mass = jnp.where(some, mass, 1.0)
    log_z = jnp.where(some, m + jnp.log(mass), -jnp.inf)
    return log_z, jnp.where(some, jnp.maximum(jnp.log(mass) - t / mass, 0.0), 0.0)


def finish(partial: Partial) -> tuple[jax.Array, ...]:
    """log_z, entropy, top_values, top_indices, read-out of the whole bank.

    Without a valid key: -inf, 0, -inf, -1, 0.
    """
    some = partial.mass[:, None] > 0.0
    read = jnp.where(some, partial.read / jnp.where(some, partial.mass[:, None], 1.0), 0.0)
    whole = log_z_and_entropy(partial.m, partial.mass, partial.t)
    return *whole, partial.top_values, partial.top_indices, read


def summarise(scores: Float[Array, "B N"], k: int) -> Partial:
    """The `Partial` of scores, without a read-out; a score of -inf is of no valid key."""
    cpu, default = (functools.partial(f, k=k) for f in (_tile_by_tile, _at_once))
    return lax.platform_dependent(scores, cpu=cpu, default=default)


def _at_once(scores, k: int) -> Partial:
    return Partial(*triple(scores), *top_k(scores, k), read=scores[:, :0])


def _tile_by_tile(scores, k: int) -> Partial:
    """Tiles of columns, each reduced while it is in the cache; 2 to 8 times as fast on a CPU.

    XLA's reductions there take several passes, and copies that are slow to allocate.
    """
    rows, size = scores.shape
    width = max(1, TILE // (rows * BLOCK)) * BLOCK
    if size < max(2 * width, 16 * k):
        return _at_once(scores, k)
    count = size // width

    def of_tile(i):
        tile = lax.dynamic_slice_in_dim(scores, i * width, width, axis=1)
        tile = lax.optimization_barrier(tile)  # sliced once, not in each reduction
        return triple(tile), jnp.max(tile.reshape(rows, -1, BLOCK), axis=-1)

    triples, maxima = lax.map(of_tile, jnp.arange(count))
    maxima = jnp.moveaxis(maxima, 0, 1).reshape(rows, -1)
    best = jnp.sort(_top_k(maxima, min(k, maxima.shape[1]))[1], axis=-1)
    place = (best[:, :, None] * BLOCK + jnp.arange(BLOCK)).reshape(rows, -1)
    values, order = lax.top_k(jnp.take_along_axis(scores, place, axis=-1), k)
    indices = jnp.take_along_axis(place, order, axis=-1)
    indices = jnp.where(jnp.isneginf(values), -1, indices)
    whole = Partial(*merge_triples(*triples, axis=0)[:3], values, indices, scores[:, :0])
    if count * width == size:
        return whole
    rest = _at_once(scores[:, count * width :], k)
    place = jnp.where(rest.top_indices < 0, -1, rest.top_indices + count * width)
    return merge(whole, rest._replace(top_indices=place))


def top_k(scores: Float[Array, "B N"], k: int) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """The k largest of each row, of equal ones the lowest index first; -inf and -1 beyond.

    Long rows by blocks: the k largest lie in the k blocks of largest maxima. (Were one in another
    block, each of those k would hold an entry before it: larger, or as large at a lower index.)
    """
    values, indices = _top_k(scores, min(k, scores.shape[-1]))
    pad = ((0, 0), (0, k - values.shape[-1]))
    values = jnp.pad(values, pad, constant_values=-jnp.inf)
    indices = jnp.pad(indices, pad, constant_values=-1)
    return values, jnp.where(jnp.isneginf(values), -1, indices)


def _top_k(scores, k: int):
    """`top_k` for k <= N, where an index of -inf is any."""
    num_rows, size = scores.shape
    if size <= max(SMALL, 16 * k):
        return lax.top_k(scores, k)
    # Near sqrt(N / k): as many maxima as candidates.
    block = 1 << max((size // k).bit_length() // 2, 3)
    num_blocks = -(-size // block)
    padded = jnp.pad(
        scores, ((0, 0), (0, num_blocks * block - size)), constant_values=-jnp.inf
    ).reshape(num_rows, num_blocks, block)
    best = jnp.sort(_top_k(jnp.max(padded, axis=-1), k)[1], axis=-1)
    candidates = jnp.take_along_axis(padded, best[:, :, None], axis=1).reshape(num_rows, -1)
    values, order = lax.top_k(candidates, k)
    return values, jnp.take_along_axis(best, order // block, axis=-1) * block + order % block
