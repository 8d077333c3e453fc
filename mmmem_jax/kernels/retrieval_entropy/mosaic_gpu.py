"""Scores and the online triple of every block of keys, read once from the device's memory.

A Pallas Mosaic GPU kernel for Hopper. One warpgroup streams tiles of keys into shared memory with
the copy engine (TMA), two multiply them with the queries (wgmma; keys are the rows, queries the
columns, so that one query wastes little) and keep, per thread, the triple (m, l, t) of a block of
`block` consecutive keys: a tile holds one key of each of 128 blocks, so the loop over a block's
keys needs no exchange between threads. Only the triples are written, 12 / block bytes per score.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Bool, Float

from mmmem_jax.kernels.retrieval_entropy import blocks, xla
from mmmem_jax.kernels.retrieval_entropy import partial as parts
from mmmem_jax.kernels.retrieval_entropy.blocks import LOWEST

ROWS = 128  # blocks in a tile, one key of each; 64 for each of the two warpgroups that multiply
MAX_QUERIES = 64  # columns of a tile: more would not fit in registers beside the triple
SHARED_MEMORY = 200 * 1024  # bytes of the stages, of the 227 KB that a block may have


def runs_here() -> bool:
    """Whether the default device is a GPU that the kernel was written for."""
    device = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0"


def num_multiprocessors() -> int:
    """Of the default device; an H200's where it is no GPU."""
    return getattr(jax.devices()[0], "core_count", None) or 132


def block_size(num_keys: int, num_processors: int) -> int | None:
    """Keys per block: of the divisors of N from 4 to 32 the one that shares the work best.

    None if there is none, or there are too few keys for one tile.
    """

    def rounds(block: int) -> int:
        return math.ceil(num_keys / (block * ROWS * num_processors)) * block

    sizes = [g for g in range(32, 3, -1) if num_keys % (8 * g) == 0 and num_keys // g >= ROWS]
    return min(sizes, key=rounds, default=None)


def supported(bank: xla.Bank) -> bool:
    """Whether the kernel takes a shared bank: bfloat16, whole tiles."""
    num_keys, dim = bank.keys.shape
    whole = dim % 64 == 0 and block_size(num_keys, num_multiprocessors()) is not None
    return bank.keys.dtype == jnp.bfloat16 and whole


def _load(ref, index, layout):
    """`plgpu.load` of any version: before jax 0.11 the index is an argument of its own."""
    if jax.__version_info__ < (0, 11):
        return plgpu.load(ref, index, layout=layout, optimized=False)
    return plgpu.load(ref.at[index], layout=layout, optimized=False)


def _kernel(query, keys, mask, scale, out, *, stages: int, columns: int, chunk: int, masked: bool):
    """Refs in device memory: query [Bp D], keys [N/g g D], mask [g N/g], scale [1], out [3 N/g Bp].

    A block of the grid takes every so many'th work item: a tile's 128 blocks of keys times
    `columns` queries. All three warpgroups count the same steps, `chunk` dimensions each.
    """
    num_blocks, block, dim = keys.shape
    num_groups = pl.cdiv(num_blocks, ROWS)
    num_tiles = query.shape[0] // columns
    num_chunks = dim // chunk
    item_steps = block * num_chunks
    first, stride = lax.axis_index("sm"), lax.axis_size("sm")
    num_items = pl.cdiv(num_groups * num_tiles - first, stride)

    def place(i):
        """First block of keys and first query of the i-th item; the last tile overlaps."""
        item = first + i * stride
        start = jnp.minimum(lax.div(item, num_tiles) * ROWS, num_blocks - ROWS)
        return pl.multiple_of(start, 8), pl.multiple_of(lax.rem(item, num_tiles) * columns, 8)

    def scoped(keys_smem, query_smem, full, empty):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 2)
        def _stream():
            plgpu.set_max_registers(40, action="decrease")

            def fetch(step, _):
                slot = lax.rem(step, stages)
                start, column = place(lax.div(step, item_steps))
                inner = lax.rem(step, item_steps)
                key, d = lax.div(inner, num_chunks), lax.rem(inner, num_chunks)
                d = pl.multiple_of(d * chunk, chunk)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(
                    keys.at[pl.ds(start, ROWS), key, pl.ds(d, chunk)],
                    keys_smem.at[slot],
                    full.at[slot],
                )
                plgpu.copy_gmem_to_smem(
                    query.at[pl.ds(column, columns), pl.ds(d, chunk)],
                    query_smem.at[slot],
                    full.at[slot],
                )

            def drain(step, _):
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

            num_steps = num_items * item_steps
            lax.fori_loop(0, num_steps, fetch, None)
            lax.fori_loop(jnp.maximum(num_steps - stages, 0), num_steps, drain, None)

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            rows = pl.ds(pl.multiple_of(warpgroup * 64, 64), 64)
            shape = (64, columns)

            def full_of(value):
                return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA)

            def product(step):
                """[64 columns] logits of the tile whose chunks start at `step`."""

                def accumulate(acc):
                    for c in range(num_chunks):
                        slot = lax.rem(step + c, stages)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, keys_smem.at[slot, rows], query_smem.at[slot].T)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])
                    return acc[...]

                return pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32)) * scale[0]

            def item(i, _):
                start, column = place(i)
                own = pl.ds(pl.multiple_of(start + warpgroup * 64, 8), 64)

                def add_key(key, carry):
                    m, mass, t = carry
                    if masked:
                        row = _load(mask, (key, own), plgpu.Layout.WGMMA.reduce(1))
                        valid = lax.broadcast_in_dim(row, shape, [0]) > 0.0
                    s = product(i * item_steps + key * num_chunks)
                    if masked:
                        s = jnp.where(valid, s, LOWEST)
                    d = s - m
                    e = jnp.exp(-jnp.abs(d))
                    old, new = jnp.where(d > 0, e, 1.0), jnp.where(d > 0, 1.0, e)
                    if masked:
                        new = jnp.where(valid, new, 0.0)
                    rise = jnp.maximum(d, 0.0)
                    t = old * (t - rise * mass) + new * jnp.minimum(d, 0.0)
                    return jnp.maximum(m, s), old * mass + new, t

                triple = lax.fori_loop(
                    0, block, add_key, (full_of(LOWEST), full_of(0.0), full_of(0.0))
                )
                for row, value in enumerate(triple):
                    out[row, own, pl.ds(column, columns)] = value

            lax.fori_loop(0, num_items, item, None)

    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    pl.run_scoped(
        scoped,
        plgpu.SMEM((stages, ROWS, chunk), keys.dtype, transforms=transforms),
        plgpu.SMEM((stages, columns, chunk), keys.dtype, transforms=transforms),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        collective_axes="warpgroup",
    )


def block_triples(
    query: BFloat16[Array, "B D"],
    keys: BFloat16[Array, "N D"],
    mask: Bool[Array, "N"] | None,
    inverse_temperature: Float[Array, ""],
    *,
    block: int | None = None,
    num_processors: int | None = None,
) -> Float[Array, "3 blocks B"]:
    """m, l, t of every `block` consecutive keys; m is their largest logit, LOWEST if none is valid.

    l = sum exp(s - m), t = sum exp(s - m) (s - m) over the block's valid keys.
    """
    num_queries, dim = query.shape
    num_processors = num_processors or num_multiprocessors()
    block = block or block_size(keys.shape[0], num_processors)
    columns = min(MAX_QUERIES, max(8, 1 << (num_queries - 1).bit_length()))
    padded = pl.cdiv(num_queries, columns) * columns
    query = jnp.pad(query, ((0, padded - num_queries), (0, 0)))
    num_blocks = keys.shape[0] // block
    chunk = 128 if dim % 128 == 0 else 64
    stages = SHARED_MEMORY // ((ROWS + columns) * chunk * 2)
    num_items = pl.cdiv(num_blocks, ROWS) * (padded // columns)
    masked = mask is not None
    rows = mask.reshape(num_blocks, block).T if masked else jnp.ones((1, 1))
    kernel = plgpu.kernel(
        functools.partial(_kernel, stages=stages, columns=columns, chunk=chunk, masked=masked),
        out_type=jax.ShapeDtypeStruct((3, num_blocks, padded), jnp.float32),
        grid=(min(num_processors, num_items),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
        ),
    )
    out = kernel(
        query,
        keys.reshape(num_blocks, block, dim),
        rows.astype(jnp.float32),
        inverse_temperature.astype(jnp.float32).reshape(1),
    )
    return out[..., :num_queries]


def summary(query: jax.Array, bank: xla.Bank, inverse, top_k: int) -> parts.Partial:
    """As `xla.summary`, for a bank that is `supported`."""
    block = block_size(bank.size, num_multiprocessors())

    query = query.astype(bank.keys.dtype)
    m, mass, t = block_triples(query, bank.keys, bank.mask, inverse, block=block)
    whole = parts.merge_triples(m, mass, t, axis=0)[:3]
    return blocks.summary(m, whole, block, query, bank, inverse, top_k)
