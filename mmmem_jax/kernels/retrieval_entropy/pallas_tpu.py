"""The triples of every block of keys in one read of the bank: a Pallas kernel for TPU.

The grid walks over tiles of keys, which Pallas streams into VMEM while the one before is at work.
The product has the keys as rows and the queries as lanes, so that a block's keys lie along the
sublanes, where reductions are cheap. What scales or masks a key comes as one float32 row.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from mmmem_jax.kernels.retrieval_entropy import blocks, xla
from mmmem_jax.kernels.retrieval_entropy import partial as parts

BLOCK = 64  # keys per block
LANES = 128  # queries at once
TILE_BYTES = 1 << 21  # of keys in VMEM, twice


def runs_here() -> bool:
    """Whether the default device is a TPU."""
    return jax.default_backend() == "tpu"


def supported(bank: xla.Bank) -> bool:
    """Whether the kernel takes a shared bank: any."""
    return bank.keys.ndim == 2


def _kernel(row, keys, query, m, mass, t):
    """Refs: row [1 n], keys [n D], query [128 D]; m, mass, t [n / 64, 128]."""
    tile, dtype = keys[...], query.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    raw = lax.dot_general(
        tile.astype(dtype),
        query[...],
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    factor = jnp.broadcast_to(row[...], raw.shape[::-1]).T
    s = jnp.where(jnp.isnan(factor), blocks.LOWEST, raw * factor)
    s = s.reshape(-1, BLOCK, raw.shape[-1])
    top = jnp.max(s, axis=1)
    d = s - top[:, None]
    p = jnp.where(s > blocks.LOWEST, jnp.exp(d), 0.0)
    m[...] = top
    mass[...] = jnp.sum(p, axis=1)
    t[...] = jnp.sum(p * d, axis=1)


def block_triples(
    query: Float[Array, "B D"], bank: xla.Bank, inverse: Float[Array, ""], *, interpret=False
) -> tuple[Float[Array, "blocks B"], Float[Array, "blocks B"], Float[Array, "blocks B"]]:
    """m, l, t of every 64 consecutive keys; m is the largest logit, `blocks.LOWEST` if none."""
    num_queries, dim = query.shape
    dtype = jnp.float32 if bank.keys.dtype == jnp.float32 else jnp.bfloat16
    padded = pl.cdiv(num_queries, LANES) * LANES
    query = jnp.pad(query.astype(dtype), ((0, padded - num_queries), (0, 0)))
    rows = TILE_BYTES // (dim * bank.keys.dtype.itemsize)
    rows = max(512, min(4096, rows // 512 * 512))  # of which 8 or more blocks
    num_tiles = pl.cdiv(bank.size, rows)
    factor = jnp.full(bank.size, inverse) if bank.scales is None else bank.scales * inverse
    factor = factor if bank.mask is None else jnp.where(bank.mask, factor, jnp.nan)
    factor = jnp.pad(factor, (0, num_tiles * rows - bank.size), constant_values=jnp.nan)
    num_blocks = pl.cdiv(bank.size, BLOCK)
    out = jax.ShapeDtypeStruct((num_blocks, padded), jnp.float32)
    scores = bank.size * padded
    triples = pl.pallas_call(
        _kernel,
        grid=(num_tiles, padded // LANES),  # a tile stays for all queries
        in_specs=[
            pl.BlockSpec((1, rows), lambda i, j: (0, i)),
            pl.BlockSpec((rows, dim), lambda i, j: (i, 0)),
            pl.BlockSpec((LANES, dim), lambda i, j: (j, 0)),
        ],
        out_specs=[pl.BlockSpec((rows // BLOCK, LANES), lambda i, j: (i, j))] * 3,
        out_shape=[out] * 3,
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=2 * scores * dim,
            transcendentals=scores,
            bytes_accessed=bank.keys.nbytes + 4 * bank.size + 12 * num_blocks * padded,
        ),
    )(factor[None], bank.keys, query)
    return tuple(x[:, :num_queries] for x in triples)


def summary(
    query: jax.Array, bank: xla.Bank, inverse, top_k: int, *, interpret=False
) -> parts.Partial:
    """As `xla.summary`, for a shared bank without values."""
    triples = functools.partial(block_triples, interpret=interpret)
    return blocks.summary(triples, BLOCK, query, bank, inverse, top_k)
