"""The language model: a Qwen3 decoder with M-RoPE; its layers are one module, stacked.

Grouped-query attention with normalised queries and keys, SwiGLU, and rotary positions of time,
height and width interleaved over the frequencies. Report: arXiv 2511.21631.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mmmem_jax.models.qwen3_vl.attention import attend
from mmmem_jax.models.qwen3_vl.cached_attention import Past, attend_past, written
from mmmem_jax.models.qwen3_vl.config import TextConfig


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, scaled in the dtype of x."""

    def __init__(self, size: int, eps: float, *, dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return self.scale[...] * wide.astype(x.dtype)


class DecoderLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(
        self,
        config: TextConfig,
        *,
        dtype,
        attention: str,
        mesh: Mesh | None = None,
        rngs: nnx.Rngs,
    ):
        linear = partial(nnx.Linear, use_bias=False, param_dtype=dtype, rngs=rngs)
        norm = partial(RMSNorm, eps=config.rms_norm_eps, dtype=dtype)
        width, head = config.hidden_size, config.head_dim
        self.head_dim, self.attention, self.mesh = head, attention, mesh
        self.input_norm, self.post_attention_norm = norm(width), norm(width)
        self.q_norm, self.k_norm = norm(head), norm(head)
        self.q_proj = linear(width, config.num_heads * head)
        self.k_proj = linear(width, config.num_kv_heads * head)
        self.v_proj = linear(width, config.num_kv_heads * head)
        self.o_proj = linear(config.num_heads * head, width)
        self.gate_proj = linear(width, config.intermediate_size)
        self.up_proj = linear(width, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, width)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        rotation: tuple[Float[Array, "B L h"], Float[Array, "B L h"]],
        past: Past | None = None,
    ) -> tuple[Float[Array, "B L D"], Past | None]:
        """One layer.

        Args:
          x: what goes in.
          rotation: cosines and sines of the positions.
          past: what was read before; the keys and values of x go into it from `length` on. None:
            each token looks at itself and what comes before it in x.

        Returns:
          What comes out, and `past` with x in it.
        """
        normed = self.input_norm(x)
        heads = (*x.shape[:2], -1, self.head_dim)
        query = _rotate(self.q_norm(self.q_proj(normed).reshape(heads)), *rotation)
        key = _rotate(self.k_norm(self.k_proj(normed).reshape(heads)), *rotation)
        value = self.v_proj(normed).reshape(heads)
        how = {"implementation": self.attention}
        if past is None:
            attended = attend(query, key, value, causal=True, mesh=self.mesh, **how)
        else:
            # Written first and read after it: the other way round XLA copies all of the cache.
            past = written(past, key, value)
            attended = attend_past(query, past, **how)
        x = x + self.o_proj(attended.reshape(*x.shape[:2], -1))
        normed = self.post_attention_norm(x)
        x = x + self.down_proj(jax.nn.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return x, past


def stack_layers(
    config: TextConfig, *, dtype, attention: str, mesh: Mesh | None, rngs: nnx.Rngs
) -> DecoderLayer:
    """All layers as one module whose parameters have a leading axis N."""

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs: nnx.Rngs) -> DecoderLayer:
        return DecoderLayer(config, dtype=dtype, attention=attention, mesh=mesh, rngs=rngs)

    return stacked(rngs)


def rotation(
    positions: Int[Array, "B L 3"], config: TextConfig, dtype
) -> tuple[Float[Array, "B L h"], Float[Array, "B L h"]]:
    """Cosines and sines of M-RoPE, computed in float32, given in `dtype`.

    Frequency i turns with the height where i = 1 mod 3 and with the width where i = 2 mod 3, below
    3 times their section; all others turn with the time.
    """
    half = config.head_dim // 2
    i = jnp.arange(half)
    frequencies = config.rope_theta ** -(i.astype(jnp.float32) / half)
    _, height, width = config.mrope_section
    axis = jnp.where((i % 3 == 1) & (i < 3 * height), 1, 0)
    axis = jnp.where((i % 3 == 2) & (i < 3 * width), 2, axis)
    angles = jnp.asarray(positions, jnp.float32)[..., axis] * frequencies
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def _rotate(x: Float[Array, "B L H D"], cos, sin) -> Float[Array, "B L H D"]:
    """Number i of a head pairs with number i + D / 2."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
