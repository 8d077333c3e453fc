"""Slot arithmetic shared by the levels: pick a slot, write a slot, weaken a slot."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def weakest(
    strength: Float[Array, "N"], age_key: Float[Array, "N"], valid: Bool[Array, "N"]
) -> Int[Array, ""]:
    """Slot to fill next: an empty one if any, else the weakest, ties to the smallest `age_key`."""
    rank = jnp.where(valid, strength, -jnp.inf)
    tied = rank == rank.min()
    return jnp.argmin(jnp.where(tied, age_key, jnp.inf)).astype(jnp.int32)


def write(tree, index: Int[Array, ""], values, enabled: Bool[Array, ""]):
    """`tree` with row `index` of every leaf set to `values`' leaf where `enabled`.

    The row is read back when disabled, so the update is one row and never a copy of the buffer.
    """

    def leaf(x, v):
        row = jnp.where(enabled, jnp.asarray(v, x.dtype), x[index])
        return x.at[index].set(row)

    return jax.tree.map(leaf, tree, values)


def cosine(a: Float[Array, "N D"], b: Float[Array, "D"]) -> Float[Array, "N"]:
    """Cosine of each row of `a` with `b`, 0 where either is zero."""
    norm = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b)
    return (a @ b) / jnp.maximum(norm, 1e-6)
