"""Attention as every tower of the model uses it, by the fastest kernel that JAX has for the device.

Nothing of size L x S is kept where a flash kernel runs: cuDNN's on GPUs, Pallas splash attention
on TPUs. Both are for tokens among themselves: all of a frame, or a text whose padding comes last,
where causal attention needs no other mask, as no token looks at what follows it. Splash fixes its
mask when it is compiled, so it cannot say where in a cache the new tokens begin: of reading into
a cache see `cached_attention`. cuDNN takes the dense mask of a chunk as a bias.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
BLOCKS = (512, 384, 256)  # of splash attention, best first


def best_implementation(platform: str) -> str:
    """'cudnn' on GPUs, 'splash' (Pallas) on TPUs, 'xla' elsewhere."""
    return {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform, "xla")


def attend(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    *,
    causal: bool = False,
    key_lengths: Int[Array, "B"] | None = None,
    mask: Bool[Array, "B L S"] | None = None,
    implementation: str = "xla",
    mesh: Mesh | None = None,
) -> Float[Array, "B L H D"]:
    """Softmax attention of H query heads over K key heads, H a multiple of K; softmax in float32.

    Args:
      query: of any float dtype, as are `key` and `value`; cuDNN takes 16 bits alone, other dtypes
        go by XLA.
      key: of the same dtype.
      value: of the same dtype.
      causal: no query looks at keys after it; S is L, and there is no mask.
      key_lengths: int32, keys from there on are padding; None: there is none.
      mask: True where a query may look; None: everywhere. With one splash attention cannot run.
      implementation: one of IMPLEMENTATIONS.
      mesh: of axes data, group, model, over which splash attention runs: rows over data and group,
        heads over model, where these divide them.
    """
    if key_lengths is not None:
        key_lengths = jnp.maximum(key_lengths, 1)  # a softmax of nothing may be NaN
    if implementation == "splash" and mask is None:
        return splash(query, key, value, causal=causal, key_lengths=key_lengths, mesh=mesh)
    flash = implementation == "cudnn" and query.shape[1] > 1 and query.dtype.itemsize == 2
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=None if mask is None else mask[:, None],
        is_causal=causal,
        key_value_seq_lengths=key_lengths,
        implementation="cudnn" if flash else "xla",
    )


def splash(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    *,
    causal: bool = False,
    key_lengths: Int[Array, "B"] | None = None,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "B L H D"]:
    """`attend` by Pallas splash attention, on each device of the mesh for its rows and heads.

    Lengths are padded to whole blocks; padded keys are of another segment than all queries.
    """
    if key_lengths is None:
        key_lengths = jnp.full(query.shape[0], key.shape[1], jnp.int32)
    run = partial(_splash, causal=causal, interpret=interpret)
    if mesh is None:
        return run(query, key, value, key_lengths)
    rows = ("data", "group")
    if query.shape[0] % (mesh.shape["data"] * mesh.shape["group"]):
        rows = None
    heads = None if query.shape[2] % mesh.shape["model"] else "model"
    if heads and key.shape[2] % mesh.shape["model"]:
        times = query.shape[2] // key.shape[2]
        key, value = jnp.repeat(key, times, axis=2), jnp.repeat(value, times, axis=2)
    spec = P(rows, None, heads)
    run = jax.shard_map(
        run, mesh=mesh, in_specs=(spec, spec, spec, P(rows)), out_specs=spec, check_vma=False
    )
    return run(query, key, value, key_lengths)


def _splash(query, key, value, key_lengths, *, causal: bool, interpret: bool):
    """Splash attention on one device."""
    length, slots = query.shape[1], key.shape[1]
    block_q, block_kv = _block(length), _block(slots)
    scale = np.float32(query.shape[-1] ** -0.5)
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    query = _head_major(query, block_q)
    key, value = _head_major(key, block_kv), _head_major(value, block_kv)
    heads, shape = query.shape[1], (query.shape[2], key.shape[2])
    mask = splash_attention.CausalMask(shape) if causal else splash_attention.FullMask(shape)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        interpret=interpret,
    )
    segments = jax.vmap(
        lambda keys: splash_attention.SegmentIds(
            q=jnp.ones(shape[0], jnp.int32), kv=(jnp.arange(shape[1]) < keys).astype(jnp.int32)
        )
    )(key_lengths)
    out = jax.vmap(kernel)(query, key, value, segments)
    return out[:, :, :length].swapaxes(1, 2)


def _head_major(x: Float[Array, "B L H D"], block: int) -> Float[Array, "B H P D"]:
    """Heads before tokens, padded to whole blocks."""
    x = x.swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))


def _block(length: int) -> int:
    """The block that pads a length least, of equals the largest."""
    return 128 if length <= 128 else min(BLOCKS, key=lambda block: -length % block)
