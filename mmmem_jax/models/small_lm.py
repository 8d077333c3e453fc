"""SmolLM2 in Flax NNX: a Llama with a key-value cache, read from one GGUF file.

Sources: Llama (arXiv 2302.13971), RoPE (arXiv 2104.09864), grouped queries (arXiv 2305.13245),
SwiGLU (arXiv 2002.05202), SmolLM2 (arXiv 2502.02737), scoring options by pointwise mutual
information (arXiv 2104.08315).

One sequence at a time: a prompt goes through in chunks of `CHUNK` tokens and its continuation token
by token, all in one program. Attention is causal and every position is written before it is read,
so neither the padding of the prompt nor what an earlier text left in the cache matters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from mmmem_jax.errors import UserError
from mmmem_jax.models.gguf_weights import Gguf, gguf_tokenizer, open_gguf

CHUNK = 128
SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
NEUTRAL_PROMPT = "Answer the question."
_START, _END = "<|im_start|>", "<|im_end|>"
_CACHE_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)  # a program each; multiples of CHUNK
_OPTION_LENGTHS = (8, 16, 32, 64, 128)

# The tensors of blk.N in a GGUF file, and their names here.
_LAYER_TENSORS = {
    "attn_norm": "attention_norm",
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_output": "out",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama whose output matrix is its embedding."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    max_positions: int
    rope_base: float = 100_000.0
    norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


class KVCache(NamedTuple):
    """Keys and values of S positions in every layer."""

    keys: Float[Array, "N K S H"]  # K key-value heads of size H
    values: Float[Array, "N K S H"]


class LlamaLayer(nnx.Module):
    """Pre-norm transformer layer.

    Matrices are [out, in], as in the file: one token's product is a dot product per row, which the
    CPU reads at full memory bandwidth; [in, out] takes 1.7 times as long.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, inner = config.hidden_size, config.intermediate_size
        kv_width = config.num_kv_heads * config.head_size
        self.attention_norm = nnx.Param(jnp.ones(width))
        self.query = _matrix(width, width, rngs)
        self.key = _matrix(kv_width, width, rngs)
        self.value = _matrix(kv_width, width, rngs)
        self.out = _matrix(width, width, rngs)
        self.mlp_norm = nnx.Param(jnp.ones(width))
        self.gate = _matrix(inner, width, rngs)
        self.up = _matrix(inner, width, rngs)
        self.down = _matrix(width, inner, rngs)

    def __call__(
        self,
        x: Float[Array, "L D"],
        cache: KVCache,
        index: Int[Array, ""],
        positions: Int[Array, "L"],
    ) -> tuple[Float[Array, "L D"], KVCache]:
        """Runs layer number `index`, writing its keys and values at `positions`, a range."""
        normed = _rms_norm(x, self.attention_norm[...], self.config.norm_eps)
        attended, cache = self._attend(normed, cache, index, positions)
        x = x + attended @ self.out[...].T
        normed = _rms_norm(x, self.mlp_norm[...], self.config.norm_eps)
        gated = jax.nn.silu(normed @ self.gate[...].T) * (normed @ self.up[...].T)
        return x + gated @ self.down[...].T, cache

    def _attend(self, x, cache, index, positions):
        heads, base = self.config.num_kv_heads, self.config.rope_base
        query = rearrange(x @ self.query[...].T, "L (K G H) -> K G L H", K=heads, H=self._head)
        key = rearrange(x @ self.key[...].T, "L (K H) -> K L H", K=heads)
        value = rearrange(x @ self.value[...].T, "L (K H) -> K L H", K=heads)
        query, key = _rotate(query, positions, base), _rotate(key, positions, base)
        at = (index, 0, positions[0], 0)
        cache = KVCache(
            jax.lax.dynamic_update_slice(cache.keys, key[None], at),
            jax.lax.dynamic_update_slice(cache.values, value[None], at),
        )
        scores = jnp.einsum("KGLH,KSH->KGLS", query, cache.keys[index])
        seen = jnp.arange(scores.shape[-1]) <= positions[:, None]
        scores = jnp.where(seen, scores / math.sqrt(self._head), -jnp.inf)
        attended = jnp.einsum("KGLS,KSH->KGLH", jax.nn.softmax(scores), cache.values[index])
        return rearrange(attended, "K G L H -> L (K G H)"), cache

    @property
    def _head(self) -> int:
        return self.config.head_size


class SmolLM(nnx.Module):
    """A Llama; its layers are one stacked module, so that they compile once."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (config.vocab_size, config.hidden_size))
        )
        stack = nnx.vmap(lambda rngs: LlamaLayer(config, rngs=rngs))
        self.layers = nnx.split_rngs(splits=config.num_layers)(stack)(rngs)
        self.norm = nnx.Param(jnp.ones(config.hidden_size))

    def __call__(
        self, ids: Int[Array, "L"], cache: KVCache, start: Int[Array, ""] | int
    ) -> tuple[Float[Array, "L D"], KVCache]:
        """Runs the tokens at positions start, start + 1, ... after those already in the cache.

        Args:
          ids: [L] int32 tokens.
          cache: of S >= start + L positions; what it holds from `start` on is not read.
          start: position of the first of them.

        Returns:
          [L, D] float32 states, for `logits`; and the cache with these positions written.
        """
        positions = start + jnp.arange(len(ids))
        graphdef, layers = nnx.split(self.layers)

        def layer(carry, weights_and_index):
            weights, index = weights_and_index
            return nnx.merge(graphdef, weights)(*carry, index, positions), None

        # Accelerators would round the inputs of float32 products; what is said should not depend on
        # the machine that says it.
        with jax.default_matmul_precision("highest"):
            indices = jnp.arange(self.config.num_layers)
            (x, cache), _ = jax.lax.scan(
                layer, (self.embedding[...][ids], cache), (layers, indices)
            )
        return _rms_norm(x, self.norm[...], self.config.norm_eps), cache

    def logits(self, states: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns float32 scores of the next token over the vocabulary."""
        with jax.default_matmul_precision("highest"):
            return states @ self.embedding[...].T


def init_cache(config: LlamaConfig, length: int) -> KVCache:
    """Returns an empty cache of `length` positions, float32."""
    shape = (config.num_layers, config.num_kv_heads, length, config.head_size)
    return KVCache(jnp.zeros(shape), jnp.zeros(shape))


def prefill(
    model: SmolLM, tokens: Int[Array, " S"], length: Int[Array, ""], cache: KVCache
) -> tuple[Float[Array, " V"], KVCache]:
    """Runs the first `length` (at least 1) of S tokens, S a multiple of CHUNK, chunk by chunk.

    Returns:
      [V] float32 logits of the token after them; and the cache that holds them.
    """

    def run(number, carry):
        chunk = jax.lax.dynamic_slice(tokens, (number * CHUNK,), (CHUNK,))
        return model(chunk, carry[1], number * CHUNK)

    states = jnp.zeros((CHUNK, model.config.hidden_size))
    states, cache = jax.lax.fori_loop(0, (length + CHUNK - 1) // CHUNK, run, (states, cache))
    return model.logits(states[(length - 1) % CHUNK]), cache


def decode(
    model: SmolLM, token: Int[Array, ""], position: Int[Array, ""], cache: KVCache
) -> tuple[Float[Array, " V"], KVCache]:
    """Runs one token; returns the [V] float32 logits of the next, and the cache."""
    states, cache = model(token[None], cache, position)
    return model.logits(states[0]), cache


@nnx.jit
def generate_tokens(
    model: SmolLM,
    tokens: Int[Array, " S"],
    length: Int[Array, ""],
    limit: Int[Array, ""],
    stop: Int[Array, ""],
) -> tuple[Int[Array, " S"], Int[Array, ""]]:
    """Continues the first `length` tokens with the likeliest next ones, in one program per S.

    Args:
      model: the language model.
      tokens: [S] int32, S a multiple of CHUNK; what follows the prompt is overwritten.
      length: of the prompt, at least 1.
      limit: length < limit <= S, of the prompt and what is generated.
      stop: the token after which to stop.

    Returns:
      tokens with the continuation in place, and where it ends (the stop token, if any, included).
    """
    logits, cache = prefill(model, tokens, length, init_cache(model.config, len(tokens)))

    def goes_on(carry):
        tokens, _, position = carry
        return (position + 1 < limit) & (tokens[position] != stop)

    def step(carry):
        tokens, cache, position = carry
        logits, cache = decode(model, tokens[position], position, cache)
        return tokens.at[position + 1].set(jnp.argmax(logits)), cache, position + 1

    tokens = tokens.at[length].set(jnp.argmax(logits))
    tokens, _, position = jax.lax.while_loop(goes_on, step, (tokens, cache, length))
    return tokens, position + 1


def chat_tokens(tokenizer: Tokenizer, prompt: str, *, system: str = SYSTEM_PROMPT) -> list[int]:
    """Returns a user's turn and the opening of the assistant's, as ChatML.

    Whatever `prompt` and `system` spell, they cannot hold control tokens.
    """
    start, end = (tokenizer.token_to_id(token) for token in (_START, _END))
    ids: list[int] = []
    for role, content in (("system", system), ("user", prompt)):
        ids += [start, *_encode(tokenizer, f"{role}\n{content}"), end, *_encode(tokenizer, "\n")]
    return [*ids, start, *_encode(tokenizer, "assistant\n")]


def generate(
    model: SmolLM,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    system: str = SYSTEM_PROMPT,
) -> str:
    """Answers `prompt`, always with the likeliest next token.

    Args:
      model: from load_small_lm, as is `tokenizer`.
      tokenizer: encodes the prompt and decodes the answer.
      prompt: the user's turn, plain text.
      max_new_tokens: at least 1; the answer ends there, or before at the end of the turn.
      system: the system's turn.

    Returns:
      the assistant's turn, without surrounding blanks.

    Raises:
      UserError: prompt and answer do not fit the model's positions.
    """
    ids = chat_tokens(tokenizer, prompt, system=system)
    limit = len(ids) + max_new_tokens
    tokens = _pad(ids, limit, model.config)
    stop = tokenizer.token_to_id(_END)
    tokens, end = generate_tokens(model, tokens, len(ids), limit, stop)
    return tokenizer.decode(np.asarray(tokens)[len(ids) : int(end)]).strip()


def option_log_probs(
    model: SmolLM, tokenizer: Tokenizer, prompt: str, options: Sequence[str]
) -> np.ndarray:
    """Returns float32 [O]: log-probabilities of each option as the start of the answer.

    The sum over the option's tokens, in nats, so that longer options score lower: compare them by
    `option_information`.

    Raises:
      UserError: an option is empty, or prompt and option do not fit the model's positions.
    """
    ids = chat_tokens(tokenizer, prompt)
    encoded = [_encode(tokenizer, option) for option in options]
    if not all(encoded):
        raise UserError("an option is empty; give every option a text")
    longest = max(map(len, encoded))
    width = next((n for n in _OPTION_LENGTHS if n >= longest), longest)
    padded = np.zeros((len(options), width), np.int32)
    for row, option in zip(padded, encoded, strict=True):
        row[: len(option)] = option
    lengths = np.array([len(option) for option in encoded], np.int32)
    tokens = _pad(ids, len(ids) + width, model.config)
    return np.asarray(_score_options(model, tokens, len(ids), padded, lengths))


def option_information(
    model: SmolLM,
    tokenizer: Tokenizer,
    prompt: str,
    options: Sequence[str],
    *,
    neutral_prompt: str = NEUTRAL_PROMPT,
) -> np.ndarray:
    """Returns float32 [O]: pointwise mutual information of each option with `prompt`, in nats.

    log p(option | prompt) - log p(option | neutral_prompt), which makes up for options that are
    likely, or short, whatever was asked (arXiv 2104.08315, eq. 2).

    Raises:
      UserError: as option_log_probs.
    """
    asked = option_log_probs(model, tokenizer, prompt, options)
    return asked - option_log_probs(model, tokenizer, neutral_prompt, options)


def load_small_lm(folder: str | Path) -> tuple[SmolLM, Tokenizer]:
    """Loads a Llama and its tokenizer from the one GGUF file in `folder`.

    Raises:
      UserError: there is not one such file; it is cut off, not a Llama with tied embeddings, or a
        tensor is missing, unknown or of the wrong shape.
    """
    files = sorted(Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{folder} has {len(files)} .gguf files, not one; give a model's folder")
    file = open_gguf(files[0])
    config = _read_config(file)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: SmolLM(config, rngs=nnx.Rngs(0))))
    state = _read_state(file, abstract, config.num_layers)
    tokenizer = gguf_tokenizer(file)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise UserError(
            f"{file.path} has {tokenizer.get_vocab_size()} tokens and {config.vocab_size}"
            " embeddings; fetch it again"
        )
    for token in (_START, _END):
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{file.path} has no token {token}; a ChatML model is needed")
    return nnx.merge(graphdef, state), tokenizer


@nnx.jit
def _score_options(
    model: SmolLM,
    tokens: Int[Array, " S"],
    length: Int[Array, ""],
    options: Int[Array, "O M"],
    option_lengths: Int[Array, "O"],
) -> Float[Array, "O"]:
    first, cache = prefill(model, tokens, length, init_cache(model.config, len(tokens)))

    def score(cache, option_and_length):
        option, option_length = option_and_length
        states, cache = model(option, cache, length)
        logits = jnp.concatenate([first[None], model.logits(states[:-1])])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), option[:, None], axis=1)[:, 0]
        return cache, jnp.sum(chosen, where=jnp.arange(len(option)) < option_length)

    return jax.lax.scan(score, cache, (options, option_lengths))[1]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _pad(ids: Sequence[int], limit: int, config: LlamaConfig) -> np.ndarray:
    if limit > config.max_positions:
        raise UserError(
            f"prompt and answer are {limit} tokens, the language model takes"
            f" {config.max_positions}; give less evidence"
        )
    length = next((n for n in _CACHE_LENGTHS if n >= limit), -(-limit // CHUNK) * CHUNK)
    return np.pad(np.array(ids, np.int32), (0, length - len(ids)))


def _matrix(rows: int, columns: int, rngs: nnx.Rngs) -> nnx.Param:
    init = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2)
    return nnx.Param(init(rngs.params(), (rows, columns)))


def _rms_norm(x: Float[Array, "L D"], scale: Float[Array, "D"], eps: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def _rotate(x: Float[Array, "... L H"], positions: Int[Array, "L"], base: float) -> Array:
    """Rotates neighbouring pairs: llama.cpp orders the rows of Q and K for this when it converts.

    (Hugging Face pairs entry i with i + H / 2, and orders its rows for that.)
    """
    frequencies = base ** -(jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = positions[:, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    even, odd = x[..., ::2], x[..., 1::2]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape)


def _read_config(file: Gguf) -> LlamaConfig:
    if (found := file.value("general.architecture", str)) != "llama":
        raise UserError(f"{file.path} has general.architecture {found!r}; only 'llama' is read")
    sizes = {
        "vocab_size": "vocab_size",
        "hidden_size": "embedding_length",
        "num_layers": "block_count",
        "num_heads": "attention.head_count",
        "num_kv_heads": "attention.head_count_kv",
        "intermediate_size": "feed_forward_length",
        "max_positions": "context_length",
    }
    numbers = {"rope_base": "rope.freq_base", "norm_eps": "attention.layer_norm_rms_epsilon"}
    config = LlamaConfig(
        **{name: file.value(f"llama.{key}", int) for name, key in sizes.items()},
        **{name: file.value(f"llama.{key}", float) for name, key in numbers.items()},
    )
    fits = (
        all(0 < getattr(config, name) < 2**20 for name in sizes)
        and all(0 < getattr(config, name) < 1e9 for name in numbers)
        and config.hidden_size % (2 * config.num_heads) == 0
        and config.num_heads % config.num_kv_heads == 0
        and file.metadata.get("llama.rope.dimension_count") in (None, config.head_size)
    )
    if not fits:
        raise UserError(f"{file.path} has sizes that no Llama can have; fetch it again")
    return config


def _read_state(file: Gguf, abstract: nnx.State, num_layers: int) -> nnx.State:
    """Fills the parameters, one at a time, after every tensor's name and shape was checked."""
    sources = {("embedding",): ["token_embd.weight"], ("norm",): ["output_norm.weight"]}
    for name, attribute in _LAYER_TENSORS.items():
        names = [f"blk.{index}.{name}.weight" for index in range(num_layers)]
        sources["layers", attribute] = names
    for path, leaf in (flat := nnx.to_flat_state(abstract)):
        for name in sources[path]:
            shape = leaf.shape[1:] if path[0] == "layers" else leaf.shape
            if name not in file.tensors:
                raise UserError(f"{file.path} has no tensor {name}; fetch it again")
            if file.shape(name) != shape:
                raise UserError(
                    f"{file.path}: {name} has shape {file.shape(name)}, its metadata says {shape}"
                )
    known = {name for names in sources.values() for name in names}
    if unknown := sorted(file.tensors.keys() - known):
        raise UserError(f"{file.path} holds an unknown tensor {unknown[0]}; it is not a SmolLM")

    def read(path, leaf):
        values = np.empty(leaf.shape, np.float32)
        for row, name in zip(values.reshape(len(sources[path]), -1), sources[path], strict=True):
            row[:] = file.to_float32(name).ravel()
        return leaf.replace(jnp.asarray(values))

    return nnx.from_flat_state([(path, read(path, leaf)) for path, leaf in flat])
