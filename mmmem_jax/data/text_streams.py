"""Timed text as streams for the memory: embeddings, plain features, questions, training segments.

A stream is what one memory reads from empty: a day of a person, or a video (or its part in a split
by time). Times on the device are seconds since the stream began; the host keeps absolute ones.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from mmmem_jax.data import egolife, stream_questions, timed_text
from mmmem_jax.data.batches import batches
from mmmem_jax.data.encoded import EncodedStream
from mmmem_jax.data.stream_questions import StreamStatistics
from mmmem_jax.data.timed_text import SPLITS, Event, Question, TimedText
from mmmem_jax.errors import UserError

SPOKEN_KINDS = ("transcript", "subtitle", "speech")
FEATURES = (*stream_questions.DESCRIPTION, "spoken")
IDF_SUM, SPOKEN = FEATURES.index("idf_sum"), FEATURES.index("spoken")
# Bring features near 0, and 1 in spread; fixed, so that nothing need be kept beside the manager.
FEATURE_CENTRE = np.array([11.0, 6.0, 5.5, 1.7, 0.1, 0.3, 0.5, 0.5], np.float32)
FEATURE_SCALE = np.array([8.0, 3.0, 3.0, 1.2, 0.3, 0.5, 0.5, 0.5], np.float32)
MAX_EVIDENCE = 8  # rows of one question that training counts

_log = logging.getLogger(__name__)

EmbedFn = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]  # texts -> [n, E], tokens [n]


class Asked(NamedTuple):
    """Q questions in the order of their times, with embeddings of length 1."""

    questions: tuple[Question, ...]
    query: np.ndarray  # [Q, E] float32
    options: tuple[np.ndarray, ...]  # Q of [O, E] float32, question and option as one text


class TextStream(NamedTuple):
    """T rows in the order of their ends, and what is asked while they pass."""

    name: str
    video: str
    split: str
    embedding: np.ndarray  # [T, E] float32
    span: np.ndarray  # [T, 2] float64 s, absolute
    tokens: np.ndarray  # [T] int32 word pieces
    features: np.ndarray  # [T, F] float32, see FEATURES
    askable: np.ndarray  # [T] bool, for the oracle line alone; no policy reads it
    made: Asked  # questions made from this stream alone
    labelled: Asked  # questions of the data set asked while the stream runs


class TextSpace(NamedTuple):
    """The affine map from sentence embeddings to the memory's D dimensions."""

    mean: np.ndarray  # [E]
    basis: np.ndarray  # [E, D]


def read_egolife_parts(folder, *, skip_bad_rows: bool = True) -> list[tuple]:
    """(name, video, split, data) of every day of the one person of an EgoLife folder.

    Raises:
      UserError: if the folder holds several persons: "I" is somebody else in each one's rows.
    """
    data = egolife.read_egolife(folder, skip_bad_rows=skip_bad_rows)
    persons = sorted({event.video for event in data.events})
    if len(persons) > 1:
        raise UserError(
            f"{folder} holds {', '.join(persons)}; keep one person's files, for a memory is of one"
            " wearer of the camera"
        )
    parts = []
    for split, days in egolife.DAY_SPLITS.items():
        for day in days:
            for video, part in _by_video(egolife.cut_days(data, (day,)), f"day {day}"):
                parts.append((f"{video} day {day}", video, split, part))
    return parts


def read_timed_text_parts(folder, *, skip_bad_rows: bool = False) -> list[tuple]:
    """(name, video, split, data) of every video, or part of one, of a timed-text folder."""
    data = timed_text.read_timed_text(folder, skip_bad_rows=skip_bad_rows)
    parts = []
    for split, cut in timed_text.split_by_video_or_time(data).items():
        for video, part in _by_video(cut, f"the {split} split"):
            parts.append((f"{video} {split}", video, split, part))
    return parts


def _by_video(data: TimedText, where: str) -> Iterator[tuple[str, TimedText]]:
    """Each video with rows; a question of another video has no memory to be asked of."""
    videos = {event.video for event in data.events}
    silent = [q.video for q in data.questions if q.video not in videos]
    if silent:
        _log.warning(
            "left out %d question(s) of %s, without rows in %s",
            len(silent), ", ".join(sorted(set(silent))), where,
        )  # fmt: skip
    for video in sorted(videos):
        yield (
            video,
            TimedText(
                tuple(event for event in data.events if event.video == video),
                tuple(question for question in data.questions if question.video == video),
            ),
        )


def make_streams(
    parts: Sequence[tuple],
    embed_fn: EmbedFn,
    *,
    wearer: str | None,
    num_questions: int,
    rng_seed: int,
    max_rows: int | None = None,
    with_options: bool = True,
) -> list[TextStream]:
    """Embeds rows and questions; statistics come from the training parts alone.

    Args:
      parts: from `read_egolife_parts` or `read_timed_text_parts`.
      embed_fn: texts to unit embeddings and token counts.
      wearer: name of the person who wears the camera, None if there is none.
      num_questions: most questions made from one stream.
      rng_seed: seeds the questions.
      max_rows: read no more rows of a stream than these, its first.
      with_options: embed the options of validation and test; training never reads an answer.

    Raises:
      UserError: if a split has no rows.
    """
    parts = [
        (name, video, split, TimedText(data.events[:max_rows], data.questions))
        for name, video, split, data in parts
    ]
    for split in SPLITS:
        if not any(part[2] == split and part[3].events for part in parts):
            raise UserError(
                f"the {split} split has no rows: each of {', '.join(SPLITS)} needs some;"
                " add videos, or days"
            )
    train_events = [e for _, _, split, data in parts if split == "train" for e in data.events]
    statistics = stream_questions.stream_statistics(train_events, wearer=wearer)
    embedding, tokens = embed_fn([e.text for *_, data in parts for e in data.events])
    streams, start = [], 0
    for name, video, split, data in parts:
        rows = slice(start, start + len(data.events))
        start = rows.stop
        made = stream_questions.make_questions(
            data.events, statistics, num_questions=num_questions, rng_seed=rng_seed
        )
        options = with_options and split != "train"
        streams.append(
            TextStream(
                name=name,
                video=video,
                split=split,
                embedding=embedding[rows],
                span=np.array([(e.t0, e.t1) for e in data.events], np.float64),
                tokens=np.maximum(tokens[rows], 1),
                features=row_features(data.events, statistics),
                askable=np.array([stream_questions.askable(e, statistics) for e in data.events]),
                made=_embed_questions(made, embed_fn, options),
                labelled=_embed_questions(data.questions, embed_fn, options),
            )
        )
    return streams


def row_features(events: Sequence[Event], statistics: StreamStatistics) -> np.ndarray:
    """Plain features of rows, float32 [T, F], centred and scaled."""
    rows = [
        (*stream_questions.describe(event, statistics), float(event.kind in SPOKEN_KINDS))
        for event in events
    ]
    raw = np.array(rows, np.float32).reshape(-1, len(FEATURES))
    return (raw - FEATURE_CENTRE) / FEATURE_SCALE


def _embed_questions(questions: Sequence[Question], embed_fn: EmbedFn, options: bool) -> Asked:
    """Embeds questions by time; a question without a time is asked at the end."""
    ordered = sorted(questions, key=lambda q: math.inf if q.query_time is None else q.query_time)
    if not ordered:
        return Asked((), embed_fn(["-"])[0][:0], ())
    query = embed_fn([_query_text(question) for question in ordered])[0]
    if not options:
        return Asked(tuple(ordered), query, ())
    choices = embed_fn([f"{q.question} {o}" for q in ordered for o in q.options])[0]
    cuts = np.cumsum([len(q.options) for q in ordered[:-1]])
    return Asked(tuple(ordered), query, tuple(np.split(choices, cuts)))


def _query_text(question: Question) -> str:
    """The question; with its options where these alone hold the subject."""
    if question.type == "order":
        return " ".join((question.question, *question.options))
    return question.question


def evidence_rows(span: np.ndarray, question: Question) -> np.ndarray:
    """Rows whose middle lies in an evidence window of the question, int64 [n]."""
    middle = (span[:, 0] + span[:, 1]) / 2
    inside = [(middle >= start) & (middle <= end) for start, end in question.evidence]
    return np.flatnonzero(np.any(inside, axis=0)) if inside else np.zeros(0, np.int64)


def fit_space(embedding: np.ndarray, dim: int) -> TextSpace:
    """Principal components of training rows [T, E]; the memory keeps `dim` of them."""
    if dim < len(FEATURES):
        raise UserError(f"config.dim = {dim} is too small; it must be at least {len(FEATURES)}")
    mean = embedding.mean(0)
    centred = embedding - mean
    _, vectors = np.linalg.eigh(centred.T.astype(np.float64) @ centred)
    basis = vectors[:, ::-1][:, :dim]
    if basis.shape[1] < dim:
        raise UserError(f"config.dim = {dim} is more than the encoder's {len(mean)} dimensions")
    # An eigenvector's sign is arbitrary: the largest entry is made positive.
    largest = np.take_along_axis(basis, np.abs(basis).argmax(0)[None], 0)
    return TextSpace(mean, (basis * np.sign(largest)).astype(np.float32))


def project(space: TextSpace, embedding: np.ndarray) -> np.ndarray:
    """Embeddings [..., E] in the memory's space, unit float32 [..., D]."""
    x = (embedding - space.mean) @ space.basis
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def encode(space: TextSpace, stream: TextStream, *, questions: str = "made") -> EncodedStream:
    """The stream and its questions, as the memory and SIB-GRPO read them.

    Text has no pixels: `visual` carries the features of the row instead, `coarse` nothing.

    Args:
      space: the memory's.
      stream: T rows.
      questions: "made" from the stream, or the "labelled" ones asked while it runs; evidence that
        these have in earlier streams does not count.
    """
    asked: Asked = getattr(stream, questions)
    num_rows, num_questions = len(stream.tokens), len(asked.questions)
    dim = space.basis.shape[1]
    text = project(space, stream.embedding)
    features = np.zeros((num_rows, dim), np.float16)
    features[:, : len(FEATURES)] = stream.features
    evidence = np.full((num_questions, MAX_EVIDENCE), -1, np.int32)
    ends = stream.span[:, 1]
    times = [ends[-1] if q.query_time is None else q.query_time for q in asked.questions]
    for row, question, when in zip(evidence, asked.questions, times, strict=True):
        found = evidence_rows(stream.span, question)
        found = found[ends[found] <= when][:MAX_EVIDENCE]
        row[: len(found)] = found
    change = np.ones(num_rows, np.float32)
    change[1:] = 1.0 - np.sum(text[1:] * text[:-1], axis=-1)
    start = stream.span[0, 0]
    return EncodedStream(
        visual=features,
        coarse=np.zeros((num_rows, dim), np.float16),
        text=text.astype(np.float16),
        span=(stream.span - start).astype(np.float32),
        tokens=stream.tokens,
        mention=np.zeros((num_rows, 0, dim), np.float16),
        mention_valid=np.zeros((num_rows, 0), bool),
        change=change,
        relation=np.full(num_rows, -1, np.int32),
        valid=np.ones(num_rows, bool),
        relevant=stream.askable,
        query=project(space, asked.query).astype(np.float16),
        options=np.zeros((num_questions, 0, dim), np.float16),
        answer=np.zeros(num_questions, np.int32),
        family=np.zeros(num_questions, np.int32),
        evidence=evidence,
        query_time=np.array([when - start for when in times], np.float32).reshape(-1),
        question_valid=evidence[:, 0] >= 0,
    )


def cut_segment(
    stream: EncodedStream, start: int, num_rows: int, num_questions: int, rng: np.random.Generator
) -> EncodedStream:
    """Rows [start, start + num_rows) and questions that rest on them, drawn at random.

    What is missing is padded; evidence counts from the segment's first row.
    """
    stop = min(start + num_rows, len(stream.valid))
    shifted = np.where(
        (stream.evidence >= start) & (stream.evidence < stop), stream.evidence - start, -1
    )
    drawn = rng.permutation(np.flatnonzero(np.any(shifted >= 0, axis=1)))[:num_questions]

    def rows(x):
        return _padded(x[start:stop], num_rows)

    def questions(x):
        return _padded(x[drawn], num_questions)

    cut = EncodedStream(
        *(rows(x) if name in _ROW_FIELDS else questions(x) for name, x in stream._asdict().items())
    )
    return cut._replace(
        span=np.where(cut.valid[:, None], cut.span - stream.span[start, 0], 0.0).astype(np.float32),
        evidence=_padded(shifted[drawn], num_questions, fill=-1),
        question_valid=np.arange(num_questions) < len(drawn),
    )


_ROW_FIELDS = (
    "visual", "coarse", "text", "span", "tokens", "mention", "mention_valid", "change", "relation",
    "valid", "relevant",
)  # fmt: skip


def _padded(x: np.ndarray, size: int, fill=0) -> np.ndarray:
    return np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=fill)


def make_loader(
    streams: Sequence[EncodedStream],
    *,
    seed: int,
    batch_size: int,
    num_rows: int,
    num_questions: int,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """An endless, shuffled, resumable iterator of segments, EncodedStream [B, ...], or `rows` of B.

    A pass meets every row about once; each visit shifts the segment and draws other questions.
    """
    starts = [(i, s) for i, x in enumerate(streams) for s in range(0, len(x.valid), num_rows)]

    def segment(index: int, rng: np.random.Generator) -> EncodedStream:
        i, start = starts[index]
        last = max(len(streams[i].valid) - num_rows, 0)
        shift = rng.integers(-(num_rows // 2), num_rows // 2 + 1)
        return cut_segment(
            streams[i], int(np.clip(start + shift, 0, last)), num_rows, num_questions, rng
        )

    segments = grain.MapDataset.range(len(starts)).seed(seed).shuffle().repeat().random_map(segment)
    return batches(segments, batch_size, rows)
