"""From what a kernel wrote of every block of keys, and of the bank, to the bank's summary."""

import jax
import jax.numpy as jnp

from mmmem_jax.kernels.retrieval_entropy import partial as parts
from mmmem_jax.kernels.retrieval_entropy import xla

LOWEST = -1e38  # the m of a block without a valid key; finite, so that differences are no NaN


def summary(
    maxima: jax.Array, triple: tuple, block: int, query: jax.Array, bank: xla.Bank, inverse, top_k
) -> parts.Partial:
    """As `xla.summary`, the top k found in the k blocks of largest maxima.

    Args:
      maxima: [ceil(N / block), B], each block's largest logit, LOWEST where no key is valid.
      triple: m, l, t of the bank, each [B].
      block: consecutive keys in a block; the last may have fewer.
      query, bank, inverse, top_k: as of `xla.summary`.

    The scores of the k best blocks' keys are computed again: k * block of each query's N.
    """
    maxima = jnp.where(maxima > LOWEST, maxima, -jnp.inf)
    best = jnp.sort(parts.top_k(maxima.T, min(top_k, len(maxima)))[1], axis=-1)  # -1 sorts first
    place = (best[:, :, None] * block + jnp.arange(block)).reshape(len(query), -1)
    some = (place >= 0) & (place < bank.size)
    row = jnp.where(some, place, 0)
    if bank.mask is not None:
        some &= bank.mask[row]
    scales = None if bank.scales is None else bank.scales[row]
    near = xla.Bank(bank.keys[row], scales, some)
    top, order = parts.top_k(xla.scores(query, near, inverse), top_k)
    indices = jnp.take_along_axis(place, jnp.maximum(order, 0), axis=-1)
    m, mass, t = triple
    m = jnp.where(mass > 0, m, -jnp.inf)
    return parts.Partial(m, mass, t, top, jnp.where(order < 0, -1, indices), read=top[:, :0])
