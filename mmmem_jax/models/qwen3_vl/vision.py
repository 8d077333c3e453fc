"""The vision tower: patches of images and video frames to tokens of the language model.

A ViT with positions interpolated from a learned square grid, rotary embeddings of row and column,
2 x 2 patches merged into one token, and DeepStack (arXiv 2406.04334): what some of its blocks give
is merged too, and added to the first layers of the language model. Report: arXiv 2511.21631.
"""

from collections.abc import Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mmmem_jax.models.qwen3_vl.attention import attend
from mmmem_jax.models.qwen3_vl.buckets import bucket_length
from mmmem_jax.models.qwen3_vl.config import VisionConfig

LAYER_NORM_EPS = 1e-6
ROPE_THETA = 10000.0


@struct.dataclass
class VisualInputs:
    """Frames (pairs of video frames, or images) as the tower reads them, padded to P patches."""

    patches: jax.Array  # [F, P, C * Tp * p * p] float32, in the order in which patches are merged
    position_index: jax.Array  # [F, P, 4] int32, rows of the learned grid to interpolate
    position_weight: jax.Array  # [F, P, 4] float32
    rotary: jax.Array  # [F, P, 2] int32, row and column
    lengths: jax.Array  # [F] int32, patches that are no padding


@struct.dataclass
class VisualTokens:
    """What the language model reads of frames; row f * P / 4 + i is token i of frame f."""

    embeddings: jax.Array  # [M, D], M = F * P / 4
    deepstack: jax.Array  # [K, M, D], added after each of the first K layers


def _grid_order(height: int, width: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each patch of a frame, those that are merged side by side."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    blocks = (height // merge, merge, width // merge, merge)
    return tuple(x.reshape(blocks).transpose(0, 2, 1, 3).ravel() for x in (rows, columns))


@lru_cache(maxsize=64)
def grid_positions(
    height: int, width: int, config: VisionConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of the patches of a frame of height x width patches.

    Returns:
      position_index: int32 [P, 4] and position_weight: float32 [P, 4], the corners of the learned
        grid, stretched so that its outermost points lie on the outermost patches, around each patch
        (bilinear); rotary: int32 [P, 2], row and column.
    """
    side = round(config.num_position_embeddings**0.5)
    rows, columns = _grid_order(height, width, config.spatial_merge_size)

    def corners(place, size):
        at = (place * np.float32(side - 1) / np.float32(max(size - 1, 1))).astype(np.float32)
        low = np.floor(at).astype(np.int32)
        return (low, np.minimum(low + 1, side - 1)), (1 - (at - low), at - low)

    (row_at, row_weight), (column_at, column_weight) = (
        corners(rows, height),
        corners(columns, width),
    )
    index = [r * side + c for r in row_at for c in column_at]
    weight = [r * c for r in row_weight for c in column_weight]
    return (
        np.stack(index, -1).astype(np.int32),
        np.stack(weight, -1).astype(np.float32),
        np.stack([rows, columns], -1).astype(np.int32),
    )


def patch_bucket(longest: int, config: VisionConfig) -> int:
    """P for frames of at most `longest` patches: few sizes, so that few programs are compiled."""
    return bucket_length(-(-longest // config.merge_unit)) * config.merge_unit


def visual_inputs(
    pixels: Sequence[tuple[np.ndarray, tuple[int, int, int]]],
    config: VisionConfig,
    *,
    num_frames: int | None = None,
) -> VisualInputs:
    """Pads images and videos to one shape.

    Args:
      pixels: (patches float32 [t * h * w, C * Tp * p * p], grid (t, h, w) in patches) of each.
      config: of the tower.
      num_frames: F; None: as many as there are. Frames beyond those given are empty.

    Returns:
      NumPy leaves; P is `patch_bucket` of the largest frame.
    """
    sizes = [h * w for _, (t, h, w) in pixels for _ in range(t)]
    frames, longest = num_frames or len(sizes), patch_bucket(max(sizes), config)
    patches = np.zeros((frames, longest, config.patch_dim), np.float32)
    index = np.zeros((frames, longest, 4), np.int32)
    weight = np.zeros((frames, longest, 4), np.float32)
    rotary = np.zeros((frames, longest, 2), np.int32)
    lengths = np.zeros(frames, np.int32)
    frame = 0
    for values, (t, h, w) in pixels:
        placed = grid_positions(h, w, config)
        for part in values.reshape(t, h * w, config.patch_dim):
            patches[frame, : h * w], lengths[frame] = part, h * w
            for array, place in zip((index, weight, rotary), placed, strict=True):
                array[frame, : h * w] = place
            frame += 1
    return VisualInputs(patches, index, weight, rotary, lengths)


class VisionBlock(nnx.Module):
    """Pre-norm transformer block with rotary attention within a frame."""

    def __init__(
        self, config: VisionConfig, *, dtype, attention: str, mesh: Mesh | None, rngs: nnx.Rngs
    ):
        width, inner = config.hidden_size, config.intermediate_size
        linear = partial(nnx.Linear, param_dtype=dtype, rngs=rngs)
        self.num_heads, self.attention, self.mesh = config.num_heads, attention, mesh
        self.norm1 = _layer_norm(width, dtype, rngs)
        self.norm2 = _layer_norm(width, dtype, rngs)
        self.qkv = linear(width, 3 * width)
        self.proj = linear(width, width)
        self.fc1 = linear(width, inner)
        self.fc2 = linear(inner, width)

    def __call__(
        self, x: Float[Array, "F P D"], angles: Float[Array, "F P h"], lengths: Int[Array, "F"]
    ) -> Float[Array, "F P D"]:
        heads = (*x.shape[:2], 3, self.num_heads, -1)
        query, key, value = jnp.unstack(self.qkv(self.norm1(x)).reshape(heads), axis=2)
        query, key = _rotate(query, angles), _rotate(key, angles)
        attended = attend(
            query,
            key,
            value,
            key_lengths=lengths,
            implementation=self.attention,
            mesh=self.mesh,
        )
        x = x + self.proj(attended.reshape(x.shape))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=True))


class PatchMerger(nnx.Module):
    """Neighbouring patches to one token; DeepStack's normalise what is merged, not each patch."""

    def __init__(self, config: VisionConfig, *, after: bool, dtype, rngs: nnx.Rngs):
        merged = config.hidden_size * config.merge_unit
        self.merged, self.after = merged, after
        self.norm = _layer_norm(merged if after else config.hidden_size, dtype, rngs)
        self.fc1 = nnx.Linear(merged, merged, param_dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(merged, config.out_hidden_size, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "F P D"]) -> Float[Array, "M D"]:
        if self.after:
            x = self.norm(x.reshape(-1, self.merged))
        else:
            x = self.norm(x).reshape(-1, self.merged)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """Frames to VisualTokens; its blocks are one module whose parameters are stacked."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        dtype,
        attention: str = "xla",
        mesh: Mesh | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        width = config.hidden_size
        self.patch_embed = nnx.Linear(config.patch_dim, width, param_dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Embed(
            config.num_position_embeddings, width, param_dtype=dtype, rngs=rngs
        )

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> VisionBlock:
            return VisionBlock(config, dtype=dtype, attention=attention, mesh=mesh, rngs=rngs)

        self.blocks = stacked(rngs)
        self.merger = PatchMerger(config, after=False, dtype=dtype, rngs=rngs)
        self.deepstack = nnx.List(
            PatchMerger(config, after=True, dtype=dtype, rngs=rngs) for _ in config.deepstack_layers
        )

    def __call__(self, inputs: VisualInputs) -> VisualTokens:
        """Encodes frames; padding gives rows that mean nothing and are not to be read."""
        x = self.patch_embed(inputs.patches.astype(self.patch_embed.kernel.dtype))
        corners = self.pos_embed(inputs.position_index)
        placed = (corners * inputs.position_weight[..., None]).sum(2)
        x = x + placed.astype(x.dtype)
        angles = _angles(inputs.rotary, self.config)
        graphdef, params = nnx.split(self.blocks)

        def block(x, layer):
            # Indexed here, as a slice of the stack outside would copy it.
            return nnx.merge(graphdef, jax.tree.map(lambda p: p[layer], params))(
                x, angles, inputs.lengths
            ), None

        found, start = [], 0
        for merger, layer in zip(self.deepstack, self.config.deepstack_layers, strict=True):
            x, _ = jax.lax.scan(block, x, jnp.arange(start, layer + 1))
            found.append(merger(x))
            start = layer + 1
        x, _ = jax.lax.scan(block, x, jnp.arange(start, self.config.depth))
        return VisualTokens(self.merger(x), jnp.stack(found))


def _layer_norm(width: int, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        width, epsilon=LAYER_NORM_EPS, use_fast_variance=False, param_dtype=dtype, rngs=rngs
    )


def _angles(rotary: Int[Array, "F P 2"], config: VisionConfig) -> Float[Array, "F P h"]:
    """Rotations of the pairs of a head's numbers: the first half by row, the others by column."""
    size = config.hidden_size // config.num_heads // 2
    frequencies = ROPE_THETA ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    return (rotary[..., None] * frequencies).reshape(*rotary.shape[:2], size)


def _rotate(x: Float[Array, "F P H D"], angles: Float[Array, "F P h"]) -> Float[Array, "F P H D"]:
    """Rotates in float32; number i of a head pairs with number i + D / 2."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
