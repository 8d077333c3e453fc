"""Perceived streams as plain arrays, the form in which every data set reaches the memory."""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from mmmem_jax.data.batches import batches, valid_first
from mmmem_jax.memory.types import Item


class EncodedStream(NamedTuple):
    """A stream of T chunks and its M questions with O options; embeddings are float16."""

    visual: np.ndarray  # [T, D]
    coarse: np.ndarray  # [T, D]
    text: np.ndarray  # [T, D]
    span: np.ndarray  # [T, 2] float32 s
    tokens: np.ndarray  # [T] int32
    mention: np.ndarray  # [T, E, D]
    mention_valid: np.ndarray  # [T, E] bool
    change: np.ndarray  # [T] float32
    relation: np.ndarray  # [T] int32
    valid: np.ndarray  # [T] bool
    relevant: np.ndarray  # [T] bool, for analysis; no policy reads it
    query: np.ndarray  # [M, D]
    options: np.ndarray  # [M, O, D]
    answer: np.ndarray  # [M] int32
    family: np.ndarray  # [M] int32
    evidence: np.ndarray  # [M, S] int32 chunks, -1 padding
    query_time: np.ndarray  # [M] float32 s
    question_valid: np.ndarray  # [M] bool


QUESTION_FIELDS = (
    "query",
    "options",
    "answer",
    "family",
    "evidence",
    "query_time",
    "question_valid",
)


class QuestionBatch(NamedTuple):
    """Questions on the device, float32; see EncodedStream for shapes."""

    query: jax.Array
    options: jax.Array
    answer: jax.Array
    family: jax.Array
    query_time: jax.Array
    valid: jax.Array


def to_items(batch: EncodedStream) -> Item:
    """The chunks as float32 memory items, any leading axes."""

    def f32(x):
        return jnp.asarray(x, jnp.float32)

    return Item(
        visual=f32(batch.visual),
        coarse=f32(batch.coarse),
        text=f32(batch.text),
        span=f32(batch.span),
        tokens=jnp.asarray(batch.tokens, jnp.int32),
        mention=f32(batch.mention),
        mention_valid=jnp.asarray(batch.mention_valid),
        change=f32(batch.change),
        relation=jnp.asarray(batch.relation, jnp.int32),
        trace_id=jnp.broadcast_to(
            jnp.arange(batch.tokens.shape[-1], dtype=jnp.int32), batch.tokens.shape
        ),
        valid=jnp.asarray(batch.valid),
    )


def to_questions(batch: EncodedStream) -> QuestionBatch:
    """The questions as float32 arrays, any leading axes."""
    return QuestionBatch(
        query=jnp.asarray(batch.query, jnp.float32),
        options=jnp.asarray(batch.options, jnp.float32),
        answer=jnp.asarray(batch.answer, jnp.int32),
        family=jnp.asarray(batch.family, jnp.int32),
        query_time=jnp.asarray(batch.query_time, jnp.float32),
        valid=jnp.asarray(batch.question_valid),
    )


def shapes(
    batch_size: int,
    *,
    num_chunks: int,
    dim: int,
    num_questions: int,
    num_evidence: int,
    num_mentions: int = 0,
    num_options: int = 0,
) -> EncodedStream:
    """A batch [B, ...] of shapes and dtypes alone, to compile for: as `make_loader` would give."""

    def array(*shape: int, dtype=np.float16):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    chunks, questions = (num_chunks,), (num_questions,)
    return EncodedStream(
        visual=array(*chunks, dim),
        coarse=array(*chunks, dim),
        text=array(*chunks, dim),
        span=array(*chunks, 2, dtype=np.float32),
        tokens=array(*chunks, dtype=np.int32),
        mention=array(*chunks, num_mentions, dim),
        mention_valid=array(*chunks, num_mentions, dtype=bool),
        change=array(*chunks, dtype=np.float32),
        relation=array(*chunks, dtype=np.int32),
        valid=array(*chunks, dtype=bool),
        relevant=array(*chunks, dtype=bool),
        query=array(*questions, dim),
        options=array(*questions, num_options, dim),
        answer=array(*questions, dtype=np.int32),
        family=array(*questions, dtype=np.int32),
        evidence=array(*questions, num_evidence, dtype=np.int32),
        query_time=array(*questions, dtype=np.float32),
        question_valid=array(*questions, dtype=bool),
    )


def stack(streams: list[EncodedStream]) -> EncodedStream:
    """Streams of one shape stacked along a new leading axis."""
    return EncodedStream(*(np.stack(column) for column in zip(*streams, strict=True)))


def _draw_questions(stream: EncodedStream, rng: np.random.Generator, size: int) -> EncodedStream:
    """`size` of the stream's questions, valid ones first, in random order."""
    order = valid_first(stream.question_valid, rng, size)
    return stream._replace(**{name: getattr(stream, name)[order] for name in QUESTION_FIELDS})


def make_loader(
    streams: EncodedStream,
    *,
    seed: int,
    batch_size: int,
    questions_per_stream: int,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """An endless, shuffled, resumable iterator of batches EncodedStream [B, ...], or `rows` of B.

    Each visit of a stream draws other questions; order and draws follow from `seed`, and
    `get_state` / `set_state` put the iterator anywhere.
    """
    num_streams = len(streams.valid)
    elements = (
        grain.MapDataset.range(num_streams)
        .seed(seed)
        .shuffle()
        .repeat()
        .map(lambda i: EncodedStream(*(x[i] for x in streams)))
        .random_map(lambda s, rng: _draw_questions(s, rng, questions_per_stream))
    )
    return batches(elements, batch_size, rows)
