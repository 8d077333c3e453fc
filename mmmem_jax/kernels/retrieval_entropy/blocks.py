"""From the triples (m, l, t) of every block of keys, which a kernel wrote, to the whole bank's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmmem_jax.kernels.retrieval_entropy import partial as parts
from mmmem_jax.kernels.retrieval_entropy import xla

LOWEST = -1e38  # the m of a block without a valid key; finite, so that differences are no NaN


def summary(
    triples: Callable, block: int, query: jax.Array, bank: xla.Bank, inverse, top_k: int
) -> parts.Partial:
    """As `xla.summary`: the blocks' triples merged, the top k found in the k best blocks.

    Args:
      triples: (query, bank, inverse) -> m, l, t, each [ceil(N / block), B].
      block: consecutive keys in a block; the last may have fewer.

    The scores of the k best blocks' keys are computed again: k * block of each query's N.
    """
    m, mass, t = triples(query, bank, inverse)
    m = jnp.where(mass > 0, m, -jnp.inf)
    best = jnp.sort(parts.top_k(m.T, min(top_k, len(m)))[1], axis=-1)  # -1 sorts first
    place = (best[:, :, None] * block + jnp.arange(block)).reshape(len(query), -1)
    some = (place >= 0) & (place < bank.size)
    row = jnp.where(some, place, 0)
    if bank.mask is not None:
        some &= bank.mask[row]
    scales = None if bank.scales is None else bank.scales[row]
    near = xla.Bank(bank.keys[row], scales, some)
    top, order = parts.top_k(xla.scores(query, near, inverse), top_k)
    indices = jnp.take_along_axis(place, jnp.maximum(order, 0), axis=-1)
    m, mass, t, _ = parts.merge_triples(m, mass, t, axis=0)
    return parts.Partial(m, mass, t, top, jnp.where(order < 0, -1, indices), read=top[:, :0])
