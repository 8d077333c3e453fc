"""The oracle: every score in memory, each quantity by its definition, in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def retrieval_entropy(
    query: Float[Array, "B D"],
    keys: Float[Array, "N D"] | Float[Array, "B N D"],
    mask: Bool[Array, "N"] | Bool[Array, "B N"] | None,
    *,
    temperature: float,
    top_k: int,
    values: Float[Array, "N V"] | None = None,
) -> tuple[Float[Array, "B"], Float[Array, "B"], Float[Array, "B K"], Int[Array, "B K"], jax.Array]:
    """As `api.retrieval_entropy`, in the query's precision; the bank is dequantised by the caller.

    Returns:
      log_z, entropy, top_values, top_indices, and the read-out [B V] (V = 0 without values).
    """
    batched = keys.ndim == 3
    if mask is not None:
        # A masked slot may hold NaN, which no product with 0 would remove.
        keys = jnp.where(mask[..., None], keys, 0) if batched or mask.ndim == 1 else keys
    scores = jnp.einsum("bd,bnd->bn" if batched else "bd,nd->bn", query, keys, precision="highest")
    scores = scores / temperature
    valid = jnp.broadcast_to(True if mask is None else mask, scores.shape)
    scores = jnp.where(valid, scores, -jnp.inf)
    some = jnp.any(valid, axis=-1)
    safe = jnp.where(some[:, None], scores, 0.0)
    log_p = jax.nn.log_softmax(safe, axis=-1)
    p = jnp.where(valid, jnp.exp(log_p), 0.0)
    entropy = -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)
    log_z = jnp.where(some, jax.nn.logsumexp(safe, axis=-1), -jnp.inf)
    order = jnp.argsort(-scores, axis=-1, stable=True)[:, :top_k]
    missing = top_k - order.shape[-1]
    top = jnp.take_along_axis(scores, order, axis=-1)
    order = jnp.where(jnp.isneginf(top), -1, order).astype(jnp.int32)
    top = jnp.pad(top, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    order = jnp.pad(order, ((0, 0), (0, missing)), constant_values=-1)
    if values is None:
        return log_z, entropy, top, order, jnp.zeros((len(query), 0), scores.dtype)
    keep = jnp.any(valid, axis=0)[:, None]
    return log_z, entropy, top, order, p @ jnp.where(keep, values, 0)
