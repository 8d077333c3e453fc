"""Reading into a cache, writing from it, and scoring what was written.

What is sampled comes with its log-probability under the distribution that it was drawn from,
temperature included, and `completion_log_probs` computes the same again from the text alone: before
the first update the ratio of eq. 11 is 1.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mmmem_jax.models.qwen3_vl.modeling import Cache, Qwen3VL, Tokens
from mmmem_jax.models.qwen3_vl.vision import VisualInputs, VisualTokens

LOWEST = -1e30  # logit of a token that may not come


class Generated(NamedTuple):
    """What was written after a prompt, up to and with the token that ended it."""

    ids: jax.Array  # [B, T] int32
    log_probs: jax.Array  # [B, T] float32, nats, 0 where not valid
    valid: jax.Array  # [B, T] bool


@partial(jax.jit, static_argnames="graphdef")
def encode_visual(graphdef: nnx.GraphDef, params: nnx.State, inputs: VisualInputs) -> VisualTokens:
    """The vision tower, jitted."""
    return nnx.merge(graphdef, params).vision(inputs)


@partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def _read(graphdef, params, tokens, visual, cache):
    return nnx.merge(graphdef, params)(tokens, visual, cache)[1]


def prefill(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Tokens,
    visual: VisualTokens | None,
    cache: Cache,
    *,
    chunk: int = 1024,
) -> Cache:
    """Reads a prompt, or the next piece of one, `chunk` tokens at a time.

    The cache handed in is taken over: use what is returned.

    Args:
      graphdef: of a Qwen3VL, as are `params`.
      params: its parameters.
      tokens: L tokens, for which the cache must have room.
      visual: what they point into.
      cache: what was read before.
      chunk: tokens a program reads; bounds the memory of attention.
    """
    for start in range(0, tokens.ids.shape[1], chunk):
        piece = jax.tree.map(lambda x, at=start: x[:, at : at + chunk], tokens)
        cache = _read(graphdef, params, piece, visual, cache)
    return cache


def marked(cache: Cache) -> Cache:
    """A place in a cache to `rewind` to: a copy of all but its keys and values."""
    return jax.tree.map(jnp.copy, cache.replace(keys=None, values=None))


def rewind(cache: Cache, mark: Cache) -> Cache:
    """Forgets what was read after `mark`, which serves any number of times; takes `cache` over."""
    return marked(mark).replace(keys=cache.keys, values=cache.values)


def repeat(cache: Cache, times: int) -> Cache:
    """A cache with each row `times` times, one after the other."""
    return Cache(
        keys=jnp.repeat(cache.keys, times, axis=1),
        values=jnp.repeat(cache.values, times, axis=1),
        valid=jnp.repeat(cache.valid, times, axis=0),
        length=cache.length,
        hidden=jnp.repeat(cache.hidden, times, axis=0),
        next_position=jnp.repeat(cache.next_position, times, axis=0),
    )


@partial(jax.jit, static_argnames=("graphdef", "ids"))
def next_log_probs(
    graphdef: nnx.GraphDef, params: nnx.State, cache: Cache, *, ids: tuple[int, ...] = ()
) -> Float[Array, "B O"]:
    """Log-probabilities of the next token: of all, or of `ids` among themselves (float32, nats)."""
    logits = nnx.merge(graphdef, params).logits(cache.hidden)
    return jax.nn.log_softmax(logits[:, jnp.array(ids)] if ids else logits)


def _allowed(logits, ids: Sequence[int]):
    """Logits of which only those of `ids` may come."""
    return jnp.full_like(logits, LOWEST).at[..., jnp.array(ids)].set(logits[..., jnp.array(ids)])


def _draw(row_keys, step, logits, temperature):
    """A token for each row, and its log-probability; temperature 0 takes the likeliest."""
    log_probs = jax.nn.log_softmax(logits / jnp.where(temperature > 0, temperature, 1.0))
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(row_keys)
    drawn = jax.vmap(jax.random.categorical)(keys, log_probs)
    ids = jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
    return ids, jnp.take_along_axis(log_probs, ids[:, None], axis=1)[:, 0]


@partial(
    jax.jit,
    static_argnames=("graphdef", "max_new_tokens", "stop_ids"),
    donate_argnames="cache",
)
def decode(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    rng_key: jax.Array,
    cache: Cache,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: Float[Array, ""] | float = 0.0,
    first_ids: tuple[int, ...] = (),
    active: Bool[Array, "B"] | None = None,
) -> tuple[Generated, Cache]:
    """Writes on, token by token, in one loop on the device, until every row has ended.

    Args:
      graphdef: of a Qwen3VL, as are `params`.
      params: its parameters.
      rng_key: one, and the draw of a row depends on its number and the step alone; or B, one for
        each row.
      cache: what was read, with room for `max_new_tokens` more; taken over.
      max_new_tokens: T.
      stop_ids: tokens that end a row.
      temperature: divides the logits; 0 takes the likeliest token, whose log-probability is then
        that at temperature 1.
      first_ids: the only tokens that may come first, their probabilities adding up to 1; all, if
        empty.
      active: rows that write, the others being left as they are; None: all.

    Returns:
      What was written, and the cache with all of it but the last token.
    """
    model = nnx.merge(graphdef, params)
    batch = cache.valid.shape[0]
    stops = jnp.array(stop_ids, jnp.int32)
    row_keys = rng_key
    if not rng_key.ndim:
        row_keys = jax.vmap(lambda row: jax.random.fold_in(rng_key, row))(jnp.arange(batch))

    def write(carry, logits):
        step, cache, out, running = carry
        ids, log_prob = _draw(row_keys, step, logits, temperature)
        out = Generated(
            out.ids.at[:, step].set(jnp.where(running, ids, 0)),
            out.log_probs.at[:, step].set(jnp.where(running, log_prob, 0.0)),
            out.valid.at[:, step].set(running),
        )
        running = running & ~jnp.any(ids[:, None] == stops, axis=1)
        return step + 1, cache, out, running

    def body(carry):
        step, cache, out, running = carry
        tokens = Tokens(
            ids=jax.lax.dynamic_slice_in_dim(out.ids, step - 1, 1, axis=1),
            positions=jnp.broadcast_to(cache.next_position[:, None, None], (batch, 1, 3)),
            valid=running[:, None],
            visual_index=jnp.full((batch, 1), -1, jnp.int32),
        )
        _, cache = model(tokens, None, cache)
        return write((step, cache, out, running), model.logits(cache.hidden))

    shape = (batch, max_new_tokens)
    empty = Generated(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool))
    logits = model.logits(cache.hidden)
    logits = _allowed(logits, first_ids) if first_ids else logits
    running = jnp.ones(batch, bool) if active is None else active
    carry = write((jnp.asarray(0), cache, empty, running), logits)
    carry = jax.lax.while_loop(lambda c: jnp.any(c[3]) & (c[0] < max_new_tokens), body, carry)
    return carry[2], carry[1]


def completion_log_probs(
    model: Qwen3VL,
    tokens: Tokens,
    visual: VisualTokens | None,
    *,
    num_new: int,
    temperature: float = 1.0,
    first_ids: tuple[int, ...] = (),
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probabilities and entropies of what was written, from the whole text.

    Args:
      model: whose distribution it is.
      tokens: left-padded prompts, each followed by T slots of what was written after it.
      visual: what they point into.
      num_new: T.
      temperature: that it was sampled at.
      first_ids: the only tokens that could come first; see `decode`.

    Returns:
      log_probs: float32 [B, T], nats, 0 in slots that are not valid.
      entropies: float32 [B, T], nats, of the distribution of each token; 0 likewise.
    """
    hidden, _ = model(tokens, visual)
    logits = model.logits(hidden[:, -num_new - 1 : -1]) / temperature
    if first_ids:
        logits = logits.at[:, 0].set(_allowed(logits[:, 0], first_ids))
    log_probs = jax.nn.log_softmax(logits)
    valid: Bool[Array, "B T"] = tokens.valid[:, -num_new:]
    written: Int[Array, "B T"] = tokens.ids[:, -num_new:]
    found = jnp.take_along_axis(log_probs, written[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_probs) * jnp.maximum(log_probs, LOWEST), axis=-1)
    return jnp.where(valid, found, 0.0), jnp.where(valid, entropy, 0.0)
