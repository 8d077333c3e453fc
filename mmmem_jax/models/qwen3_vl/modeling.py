"""Qwen3-VL as one module: frames and tokens in, hidden states and logits out, cached or not.

model = Qwen3VL(config, rngs=nnx.Rngs(0))
visual = model.vision(visual_inputs)
hidden, _ = model(tokens, visual)
log_probs = jax.nn.log_softmax(model.logits(hidden))
"""

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mmmem_jax.models.qwen3_vl import language
from mmmem_jax.models.qwen3_vl.cached_attention import Past
from mmmem_jax.models.qwen3_vl.config import Qwen3VLConfig, TextConfig
from mmmem_jax.models.qwen3_vl.language import RMSNorm
from mmmem_jax.models.qwen3_vl.vision import VisionTower, VisualTokens


@struct.dataclass
class Tokens:
    """A batch of pieces of conversations, padded left or right."""

    ids: jax.Array  # [B, L] int32
    positions: jax.Array  # [B, L, 3] int32, time, height, width
    valid: jax.Array  # [B, L] bool, False for padding
    visual_index: jax.Array  # [B, L] int32, row of the VisualTokens, -1 for text


@struct.dataclass
class Cache:
    """What was read: S preallocated slots, of which the first `length` were written.

    A slot counts where it is valid; padding that was read leaves invalid ones between.
    """

    keys: jax.Array  # [N, B, S, K, H]
    values: jax.Array  # [N, B, S, K, H]
    valid: jax.Array  # [B, S] bool
    length: jax.Array  # [] int32
    hidden: jax.Array  # [B, D] of the newest token of each row, normalised: what logits are made of
    next_position: jax.Array  # [B] int32


def init_cache(config: TextConfig, batch_size: int, num_slots: int, dtype) -> Cache:
    """An empty cache of B rows and S slots."""
    shape = (config.num_layers, batch_size, num_slots, config.num_kv_heads, config.head_dim)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        valid=jnp.zeros((batch_size, num_slots), bool),
        length=jnp.zeros((), jnp.int32),
        hidden=jnp.zeros((batch_size, config.hidden_size), dtype),
        next_position=jnp.zeros(batch_size, jnp.int32),
    )


class Qwen3VL(nnx.Module):
    """The whole model.

    Args:
      config: its sizes.
      dtype: of parameters and activations, float32 or bfloat16.
      attention: one of `attention.IMPLEMENTATIONS`.
      remat: compute activations again in the backward pass, layer by layer.
      mesh: of axes data, group, model; activations are then split over data and group.
      rngs: initialises; use nnx.eval_shape where the parameters come from a checkpoint.
    """

    def __init__(
        self,
        config: Qwen3VLConfig,
        *,
        dtype=jnp.float32,
        attention: str = "xla",
        remat: bool = False,
        mesh: Mesh | None = None,
        rngs: nnx.Rngs,
    ):
        text = config.text
        self.config, self.dtype, self.remat, self.mesh = config, dtype, remat, mesh
        how = {"dtype": dtype, "attention": attention, "mesh": mesh, "rngs": rngs}
        self.vision = VisionTower(config.vision, **how)
        self.embed = nnx.Embed(text.vocab_size, text.hidden_size, param_dtype=dtype, rngs=rngs)
        self.layers = language.stack_layers(text, **how)
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, dtype=dtype)
        if not text.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                text.hidden_size, text.vocab_size, use_bias=False, param_dtype=dtype, rngs=rngs
            )

    def __call__(
        self, tokens: Tokens, visual: VisualTokens | None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """Reads tokens after what `cache` holds; each looks at itself and what came before.

        Args:
          tokens: L tokens; L more slots must be free in the cache.
          visual: what `visual_index` points into; None for text alone.
          cache: what was read before; None: nothing, and nothing is kept.

        Returns:
          hidden: [B, L, D], normalised; of padding it means nothing.
          cache: with the tokens in it, None where none was given.
        """
        if cache is None:
            tokens, places = _padding_last(tokens)
        x = self.embed(tokens.ids)
        if visual is not None:
            seen = visual.embeddings[jnp.maximum(tokens.visual_index, 0)].astype(x.dtype)
            x = jnp.where(tokens.visual_index[..., None] >= 0, seen, x)
        rotation = language.rotation(tokens.positions, self.config.text, x.dtype)
        x, past = self._decode(x, tokens, visual, rotation, cache)
        hidden = self.norm(x)
        if cache is None:
            return jnp.take_along_axis(hidden, places[..., None], axis=1), None
        return hidden, _extended(cache, tokens, hidden, past)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits of the next token."""
        tied = self.config.text.tie_word_embeddings
        weights = self.embed.embedding[...].T if tied else self.lm_head.kernel[...]
        return jnp.matmul(hidden, weights, preferred_element_type=jnp.float32)

    def _decode(self, x, tokens, visual, rotation, cache):
        """All layers, one after the other, in one loop."""
        graphdef, params = nnx.split(self.layers)
        past = None
        if cache is not None:
            at = (0, cache.length)
            valid = jax.lax.dynamic_update_slice(cache.valid, tokens.valid, at)
            past = Past(cache.keys, cache.values, valid, jnp.int32(0), cache.length)

        def layer(carry, one):
            x, past = carry
            index, params = one
            if past is not None:
                past = past._replace(layer=index)
            x, past = nnx.merge(graphdef, params)(x, rotation, past)
            if visual is not None:
                x = _add_deepstack(x, tokens.visual_index, visual.deepstack, index)
            return (self._split(x), past), None

        if self.remat:
            layer = jax.checkpoint(layer)
        number = jnp.arange(self.config.text.num_layers)
        (x, past), _ = jax.lax.scan(layer, (self._split(x), past), (number, params))
        return x, past

    def _split(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        if self.mesh is None:
            return x
        spec = PartitionSpec(("data", "group"))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def _padding_last(tokens: Tokens) -> tuple[Tokens, Int[Array, "B L"]]:
    """Tokens in their order before all padding, so that causal attention needs no other mask; and
    where each then is."""
    order = jnp.argsort(~tokens.valid, axis=1, stable=True)

    def moved(x):
        return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)

    return jax.tree.map(moved, tokens), jnp.argsort(order, axis=1)


def _add_deepstack(x, visual_index, deepstack, layer):
    """Adds what DeepStack has for this layer to the visual tokens."""

    def add(x):
        rows = deepstack[jnp.minimum(layer, deepstack.shape[0] - 1)]
        rows = rows[jnp.maximum(visual_index, 0)].astype(x.dtype)
        return x + jnp.where(visual_index[..., None] >= 0, rows, 0)

    return jax.lax.cond(layer < deepstack.shape[0], add, lambda x: x, x)


def _extended(cache: Cache, tokens: Tokens, hidden, past: Past) -> Cache:
    """The cache after the tokens were read."""
    length = tokens.ids.shape[1]
    newest = jnp.max(jnp.where(tokens.valid, jnp.arange(length), -1), axis=1)
    last = jnp.take_along_axis(hidden, jnp.maximum(newest, 0)[:, None, None], axis=1)[:, 0]
    highest = jnp.max(jnp.where(tokens.valid[..., None], tokens.positions, -1), axis=(1, 2))
    return Cache(
        keys=past.keys,
        values=past.values,
        valid=past.valid,
        length=cache.length + length,
        hidden=jnp.where((newest >= 0)[:, None], last, cache.hidden),
        next_position=jnp.maximum(cache.next_position, highest + 1),
    )
