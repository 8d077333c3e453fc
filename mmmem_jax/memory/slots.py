"""Slot arithmetic shared by the levels: pick a slot, write a slot, weaken a slot."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def weakest(
    strength: Float[Array, "N"], age_key: Float[Array, "N"], valid: Bool[Array, "N"]
) -> Int[Array, ""]:
    """Slot to fill next: an empty one if any, else the weakest, ties to the smallest `age_key`."""
    rank = jnp.where(valid, strength, -jnp.inf)
    above = (rank - rank.min()) > 0  # two empty slots give NaN, which is not above
    return argmin(jnp.where(above, jnp.inf, age_key))


def argmin(x: Float[Array, "N"]) -> Int[Array, ""]:
    """Index of the first smallest value, in two plain reductions that compilers vectorise."""
    index = jnp.arange(x.shape[0], dtype=jnp.float32)
    return jnp.where((x - x.min()) > 0, jnp.inf, index).min().astype(jnp.int32)


def argmax(x: Float[Array, "N"]) -> Int[Array, ""]:
    """Index of the first largest value."""
    return argmin(-x)


def write(tree, index: Int[Array, ""], values, enabled: Bool[Array, ""]):
    """`tree` with row `index` of every leaf set to `values`' leaf where `enabled`.

    A disabled write goes past the end and is dropped, so the update is one row or nothing.
    """

    def leaf(x, v):
        row = jnp.where(enabled, index, x.shape[0])
        return x.at[row].set(jnp.asarray(v, x.dtype), mode="drop")

    return jax.tree.map(leaf, tree, values)


def only(index: Int[Array, ""], enabled: Bool[Array, ""], size: int) -> Bool[Array, "N"]:
    """True at `index` where `enabled`, written as one element so that no row recomputes it."""
    return write(jnp.zeros(size, bool), index, True, enabled)


def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """`x` at length 1, or 0 where it is zero."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def cosine(
    a: Float[Array, "N D"], b: Float[Array, "D"], norm: Float[Array, "N"] | None = None
) -> Float[Array, "N"]:
    """Cosine of each row of `a`, of length `norm` where it is known, with `b`; 0 for zero."""
    norm = jnp.linalg.norm(a, axis=-1) if norm is None else norm
    return (a @ b) / jnp.maximum(norm * jnp.linalg.norm(b), 1e-6)
