"""Readers of a memory of text: q(y | m) of eq. 6 from Traces and the questions of a TokenStream.

Each gives log-probabilities [B, G, Q, O] for memories with leading axes [B, G] and a batch of B
streams; those of questions that are not asked mean nothing.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mmmem_jax.data.token_streams import TokenStream
from mmmem_jax.memory import traces as memory
from mmmem_jax.memory.traces import Traces
from mmmem_jax.models.qwen3_vl.generate import repeat
from mmmem_jax.models.qwen3_vl.modeling import Tokens, init_cache


def overlap_reader(
    traces: Traces, stream: TokenStream, *, temperature: float = 0.1, recency: float = 0.5
) -> Float[Array, "B G Q O"]:
    """A baseline without parameters, for models too small to read: the words that a node shares.

    A node is worth to an option the share of the subject's words in it times the share of the
    option's; an option is worth what its best node is. Of options worth most, the one that the
    memory names last gains `recency`. Where no node matches, or nothing is asked about, options are
    equally likely. It cannot count, order, or tell the time.

    Args:
      traces: memories [B, G, ...].
      stream: questions [B, ...].
      temperature: divides what options are worth, from 0 to 1, to give logits.
      recency: what naming it last adds to an option.
    """

    def ask(traces: Traces, subject, subject_valid, option, option_valid):
        find = partial(_find, traces)
        about, _ = find(subject, subject_valid)  # [N]
        share, place = jax.vmap(find)(option, option_valid)  # [O, N]
        worth = about * share
        best = worth.max(-1, keepdims=True)
        place = place + memory.numbers(traces) * traces.ids.shape[1]
        last = jnp.max(jnp.where((worth == best) & (best > 0), place, -1), -1)
        last = jnp.where(best[:, 0] == best.max(), last, -1)
        newest = (last == last.max()) & (last >= 0)
        return jax.nn.log_softmax((best[:, 0] + recency * newest) / temperature)

    over_questions = jax.vmap(ask, in_axes=(None, 0, 0, 0, 0))
    over_group = jax.vmap(over_questions, in_axes=(0, None, None, None, None))
    return jax.vmap(over_group)(
        traces, stream.subject, stream.subject_valid, stream.option, stream.option_valid
    )


def _find(
    traces: Traces, words: Int[Array, "W"], valid: Bool[Array, "W"]
) -> tuple[Float[Array, "N"], Int[Array, "N"]]:
    """Share of the words that each node holds, 0 of none, and where the last one ends in it.

    Slots of `words` that are not valid part the words; the tokens of a word must follow each other.
    """
    place = jnp.arange(traces.ids.shape[1])
    starts = valid & ~jnp.concatenate([jnp.zeros(1, bool), valid[:-1]])
    ends = valid & ~jnp.concatenate([valid[1:], jnp.zeros(1, bool)])

    def step(held, token):  # [N, L], whether the word so far ends here
        word, counts, first = token
        before = jnp.pad(held[:, :-1], ((0, 0), (1, 0)))
        held = (traces.ids == word) & traces.valid & counts & (before | first)
        return held, jnp.max(jnp.where(held, place, -1), axis=1)

    _, last = jax.lax.scan(step, jnp.zeros_like(traces.valid), (words, valid, starts))
    last = jnp.where(ends[:, None], last, -1)  # [W, N]
    return jnp.sum(last >= 0, axis=0) / jnp.maximum(ends.sum(), 1), last.max(0)


def make_likelihood_reader(
    graphdef: nnx.GraphDef,
    *,
    prefix_ids: Sequence[int],
    suffix_ids: Sequence[int],
    letter_ids: Sequence[int],
    separator_ids: Sequence[int] = (),
    max_memory_tokens: int | None = None,
) -> Callable[[nnx.State, Traces, TokenStream], Float[Array, "B G Q O"]]:
    """A reader that is a Qwen3VL: the likelihood of each option's letter as the next token.

    It reads the prefix and the nodes, oldest first, once for a memory, and from there each question
    and the suffix.

    Args:
      graphdef: of the model; the parameters are those it is given, without an adapter.
      prefix_ids: before the memory, one at least.
      suffix_ids: after the question, up to where a letter is expected.
      letter_ids: of options, in order, for as many as a question ever has; the probabilities of
        those that it has add up to 1.
      separator_ids: after every node that says anything.
      max_memory_tokens: read at most so many tokens of a memory, separators included, the newest;
        fewer cost less. None: all that a memory can hold.

    Returns:
      (params, traces, stream) -> log-probabilities, to be jitted.

    Raises:
      ValueError: if the prefix is empty.
    """
    if not prefix_ids:
        raise ValueError("the reader needs a prefix of a token or more")

    def read(params: nnx.State, traces: Traces, stream: TokenStream):
        model = nnx.merge(graphdef, params)
        b, g = traces.count.shape
        num_questions = stream.question.shape[1]
        rows = jax.tree.map(lambda x: x.reshape(b * g, *x.shape[2:]), traces)
        said = jax.vmap(partial(_said, separator_ids=separator_ids, most=max_memory_tokens))(rows)
        before = _joined(_always(prefix_ids, b * g), said)
        asked = (stream.question, stream.question_valid)
        asked = tuple(jnp.repeat(x, g, axis=0).reshape(-1, x.shape[-1]) for x in asked)
        after = _joined(asked, _always(suffix_ids, b * g * num_questions))
        slots = before[0].shape[1] + after[0].shape[1]
        cache = init_cache(model.config.text, b * g, slots, model.dtype)
        _, cache = model(_tokens(*before, cache.next_position), None, cache)
        cache = repeat(cache, num_questions)
        _, cache = model(_tokens(*after, cache.next_position), None, cache)
        letters = jnp.array(letter_ids[: stream.option.shape[2]])
        log_probs = jax.nn.log_softmax(model.logits(cache.hidden)[:, letters])
        return log_probs.reshape(b, g, num_questions, -1)

    return read


def _said(
    traces: Traces, *, separator_ids: Sequence[int], most: int | None
) -> tuple[Int[Array, "L"], Bool[Array, "L"]]:
    """What one memory says, oldest node first, with what is not valid in between or before."""
    order = jnp.argsort(memory.numbers(traces))
    ids, valid = traces.ids[order], traces.valid[order]
    after = jnp.broadcast_to(jnp.array(separator_ids, jnp.int32), (len(ids), len(separator_ids)))
    says = jnp.broadcast_to(valid.any(1, keepdims=True), after.shape)
    ids = jnp.concatenate([ids, after], axis=1).ravel()
    valid = jnp.concatenate([valid, says], axis=1).ravel()
    if most is not None:
        newest = jnp.argsort(valid, stable=True)[-most:]
        ids, valid = ids[newest], valid[newest]
    return ids, valid


def _always(ids: Sequence[int], num_rows: int) -> tuple[Int[Array, "R L"], Bool[Array, "R L"]]:
    """Text that is the same for all rows, valid throughout."""
    ids = jnp.broadcast_to(jnp.array(ids, jnp.int32), (num_rows, len(ids)))
    return ids, jnp.ones(ids.shape, bool)


def _joined(a, b) -> tuple[Int[Array, "R L"], Bool[Array, "R L"]]:
    """Pieces (ids, valid) of every row, one after the other."""
    return tuple(jnp.concatenate(pair, axis=1) for pair in zip(a, b, strict=True))


def _tokens(ids: Int[Array, "R L"], valid: Bool[Array, "R L"], start: Int[Array, "R"]) -> Tokens:
    """Text whose positions, from `start`, count what is valid."""
    positions = jnp.maximum(start[:, None] + jnp.cumsum(valid, axis=1) - 1, 0)
    return Tokens(
        ids=ids,
        positions=jnp.broadcast_to(positions[..., None], (*ids.shape, 3)).astype(jnp.int32),
        valid=valid,
        visual_index=jnp.full(ids.shape, -1, jnp.int32),
    )
