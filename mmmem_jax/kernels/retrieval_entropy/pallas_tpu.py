"""The bank's triple and every block's largest logit in one read: a Pallas kernel for TPU.

The grid walks over tiles of keys, which Pallas streams into VMEM while the one before is at work.
The product has the keys as rows and the queries as lanes, so that a block's keys lie along the
sublanes, where reductions are cheap. The triple stays in VMEM from tile to tile. What scales or
masks a key comes as one float32 row.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from mmmem_jax.kernels.retrieval_entropy import blocks, xla
from mmmem_jax.kernels.retrieval_entropy import partial as parts

BLOCK = 128  # keys per block: 4 bytes written per key and 128 queries
LANES = 128  # queries at once
TILE_BYTES = 1 << 21  # of keys in VMEM, twice


def runs_here() -> bool:
    """Whether the default device is a TPU."""
    return jax.default_backend() == "tpu"


def supported(bank: xla.Bank) -> bool:
    """Whether the kernel takes a shared bank: any."""
    return bank.keys.ndim == 2


def _kernel(row, keys, query, maxima, triple):
    """Refs: row [1 n], keys [n D], query [128 D]; maxima [n / 128, 128], triple [3 B]."""
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
    top = jnp.max(s.reshape(-1, BLOCK, LANES), axis=1)
    maxima[...] = top

    lanes = pl.ds(pl.multiple_of(pl.program_id(1) * LANES, LANES), LANES)

    @pl.when(pl.program_id(0) == 0)
    def _start():
        triple[:, lanes] = jnp.stack([jnp.full(LANES, x) for x in (blocks.LOWEST, 0.0, 0.0)])

    m, mass, t = (triple[i : i + 1, lanes] for i in range(3))
    new = jnp.maximum(m, jnp.max(top, axis=0, keepdims=True))
    d = s - new
    p = jnp.where(s > blocks.LOWEST, jnp.exp(d), 0.0)
    scale = jnp.exp(m - new)
    triple[0:1, lanes] = new
    triple[1:2, lanes] = scale * mass + jnp.sum(p, axis=0, keepdims=True)
    triple[2:3, lanes] = scale * (t + mass * (m - new)) + jnp.sum(p * d, axis=0, keepdims=True)


def maxima_and_triple(
    query: Float[Array, "B D"], bank: xla.Bank, inverse: Float[Array, ""], *, interpret=False
) -> tuple[Float[Array, "blocks B"], Float[Array, "3 B"]]:
    """The largest logit of every 128 consecutive keys and m, l, t of all; LOWEST for none valid."""
    num_queries, dim = query.shape
    dtype = jnp.float32 if bank.keys.dtype == jnp.float32 else jnp.bfloat16
    padded = pl.cdiv(num_queries, LANES) * LANES
    query = jnp.pad(query.astype(dtype), ((0, padded - num_queries), (0, 0)))
    rows = TILE_BYTES // (dim * bank.keys.dtype.itemsize)
    rows = max(1024, min(4096, rows // 1024 * 1024))  # 8 blocks or more: a tile of the output
    num_tiles = pl.cdiv(bank.size, rows)
    factor = jnp.full(bank.size, inverse) if bank.scales is None else bank.scales * inverse
    factor = factor if bank.mask is None else jnp.where(bank.mask, factor, jnp.nan)
    factor = jnp.pad(factor, (0, num_tiles * rows - bank.size), constant_values=jnp.nan)
    num_blocks = pl.cdiv(bank.size, BLOCK)
    out = [(num_blocks, padded), (3, padded)]
    scores = bank.size * padded
    maxima, triple = pl.pallas_call(
        _kernel,
        grid=(num_tiles, padded // LANES),  # a tile stays for all queries
        in_specs=[
            pl.BlockSpec((1, rows), lambda i, j: (0, i)),
            pl.BlockSpec((rows, dim), lambda i, j: (i, 0)),
            pl.BlockSpec((LANES, dim), lambda i, j: (j, 0)),
        ],
        out_specs=[
            pl.BlockSpec((rows // BLOCK, LANES), lambda i, j: (i, j)),
            pl.BlockSpec((3, padded), lambda i, j: (0, 0)),
        ],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in out],
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=2 * scores * dim,
            transcendentals=scores,
            bytes_accessed=bank.keys.nbytes + 4 * bank.size + 4 * num_blocks * padded,
        ),
    )(factor[None], bank.keys, query)
    return maxima[:, :num_queries], triple[:, :num_queries]


def summary(
    query: jax.Array, bank: xla.Bank, inverse, top_k: int, *, interpret=False
) -> parts.Partial:
    """As `xla.summary`, for a shared bank without values."""
    maxima, triple = maxima_and_triple(query, bank, inverse, interpret=interpret)
    return blocks.summary(maxima, tuple(triple), BLOCK, query, bank, inverse, top_k)
