"""Streams of the world as a language model reads them: captions and questions as token ids, frames
as patches for its vision tower, and what a supervised teacher would decide.

Every word is tokenised with a space before it, so that it has the same ids wherever it stands.
"""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np
from flax import struct
from jaxtyping import Int
from tokenizers import Tokenizer

from mmmem_jax.data import worlds
from mmmem_jax.data.batches import batches, valid_first
from mmmem_jax.errors import UserError
from mmmem_jax.memory.types import ADD_NEW, DISCARD, MERGE
from mmmem_jax.models.qwen3_vl.images import PixelConfig, normalise, patchify

LETTERS = tuple("ABCDEFGH")  # of the options, in order
BATCHES_AHEAD = 4  # that a loader holds: with their frames they are large


@struct.dataclass
class TokenStream:
    """A stream of T clips and its Q questions with O options; padding is on the right.

    The words of `subject` and `option` are parted by one slot that is not valid, so that a word of
    several tokens is known to be one.
    """

    caption: np.ndarray  # [T, C] int32, what the clip tells and shows
    caption_valid: np.ndarray  # [T, C] bool
    patches: np.ndarray  # [T, P, patch_dim] of any float dtype, one frame a clip
    valid: np.ndarray  # [T] bool
    teacher: np.ndarray  # [T] int32, action of the supervised teacher
    question: np.ndarray  # [Q, L] int32, the question's words, then the options, one a line
    question_valid: np.ndarray  # [Q, L] bool
    subject: np.ndarray  # [Q, S] int32, what is asked about, in words
    subject_valid: np.ndarray  # [Q, S] bool
    option: np.ndarray  # [Q, O, W] int32, words of the options
    option_valid: np.ndarray  # [Q, O, W] bool
    answer: np.ndarray  # [Q] int32
    asked: np.ndarray  # [Q] bool, False for padding

    def with_questions(self, rows: Int[np.ndarray, "R"]) -> "TokenStream":
        """The stream with these of its questions, in this order."""
        return self.replace(**{name: getattr(self, name)[rows] for name in QUESTION_FIELDS})


QUESTION_FIELDS = (
    "question",
    "question_valid",
    "subject",
    "subject_valid",
    "option",
    "option_valid",
    "answer",
    "asked",
)


class Widths(NamedTuple):
    """Most tokens of each text."""

    caption: int  # C
    question: int  # L
    subject: int  # S
    option: int  # W


class _Texts(NamedTuple):
    """Token ids of what is read of a stream, -1 between words that are kept apart."""

    caption: list[list[int]]  # T
    question: list[list[int]]  # Q
    subject: list[list[int]]  # Q
    option: list[list[list[int]]]  # Q, O


class _Words:
    """Token ids of the world's words, and of those that only join them."""

    def __init__(self, tokenizer: Tokenizer):
        def spell(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        self.ids = [spell(f" {word}") if word else [] for word in worlds.WORDS]
        self.seen = spell(" seen:")
        self.letters = [spell(f"\n{letter}.") for letter in LETTERS]

    def text(self, words) -> list[int]:
        """Words one after the other."""
        return [i for word in words for i in self.ids[word]]

    def apart(self, words) -> list[int]:
        """Content words, -1 between them."""
        content = (word for word in words if word and word not in _FUNCTION_WORDS)
        return [i for word in content for i in [-1, *self.ids[word]]][1:]


_FUNCTION_WORDS = frozenset(worlds.WORD_ID[word] for word in worlds.FUNCTION_WORDS)


def _texts(stream: worlds.Stream, questions: worlds.Questions, words: _Words) -> _Texts:
    """What a stream and its questions say."""

    def caption(told, visible):
        shown = words.text(dict.fromkeys(visible))  # a thing put into the room is seen in it once
        return words.text(told) + (words.seen + shown if shown else [])

    def question(asked, options):
        lines = zip(words.letters, options, strict=False)
        return words.text(asked) + [i for letter, o in lines for i in letter + words.text(o)]

    return _Texts(
        caption=[caption(*clip) for clip in zip(stream.words, stream.visible, strict=True)],
        question=[question(*q) for q in zip(questions.words, questions.options, strict=True)],
        subject=[words.apart(asked) for asked in questions.words],
        option=[[words.apart(o) for o in options] for options in questions.options],
    )


def _widths(texts: Sequence[_Texts]) -> Widths:
    """The most tokens of each text, 1 at least."""

    def longest(rows) -> int:
        return max(map(len, rows), default=0)

    return Widths(
        *(max([1, *(longest(getattr(t, name)) for t in texts)]) for name in Widths._fields[:3]),
        max([1, *(longest(o) for t in texts for o in t.option)]),
    )


def teach(stream: worlds.Stream) -> Int[np.ndarray, "T"]:
    """What a teacher that knows what matters decides, int32.

    ADD_NEW for a clip that a question could need; MERGE if its entity (the thing, or for a routine
    the phase of the day) is that of the last clip kept; DISCARD for all else.
    """
    out, kept = np.full(len(stream.kind), DISCARD, np.int32), -1
    for t in np.flatnonzero(stream.relevant):
        entity = int(stream.mention[t, 0])
        out[t] = MERGE if entity == kept else ADD_NEW
        kept = entity
    return out


def frame_patches(
    frames: np.ndarray, pixels: PixelConfig, image_size: int, dtype=np.float16
) -> np.ndarray:
    """Each world frame [T, 16, 16, 3] uint8 as patches [T, P, patch_dim], pixels repeated.

    P is (image_size / patch_size)^2; the grid of a frame has that many rows and columns.

    Raises:
      UserError: if frames or whole tokens do not fill the size.
    """
    size = worlds.FRAME_SIZE
    if image_size < 1 or image_size % size or image_size % pixels.factor:
        raise UserError(
            f"image_size is {image_size}; it must be a multiple of {size} and {pixels.factor}"
        )
    times = image_size // size
    large = frames.repeat(times, axis=1).repeat(times, axis=2)
    patches, _ = patchify(large.repeat(pixels.temporal_patch_size, axis=0), pixels)
    per_frame = (image_size // pixels.patch_size) ** 2
    shape = (len(frames), per_frame, patches.shape[-1])
    return normalise(patches, pixels).reshape(shape).astype(dtype)


def from_worlds(
    streams: Sequence[tuple[worlds.Stream, worlds.Questions]],
    tokenizer: Tokenizer,
    pixels: PixelConfig,
    *,
    image_size: int = 32,
    dtype=np.float16,
    widths: Widths | None = None,
) -> TokenStream:
    """Streams of one length, stacked: leaves [S, ...].

    Args:
      streams: S streams and their questions.
      tokenizer: of the language model.
      pixels: what its vision tower takes.
      image_size: pixels along the edge of a frame.
      dtype: of the patches.
      widths: to pad to; None: as wide as these streams need.

    Raises:
      UserError: if a text is longer than `widths`, or no frame has `image_size`.
    """
    words = _Words(tokenizer)
    texts = [_texts(*s, words) for s in streams]
    needed = _widths(texts)
    widths = widths or needed
    for name, most, found in zip(Widths._fields, widths, needed, strict=True):
        if found > most:
            raise UserError(f"a {name} has {found} tokens; widths.{name} is {most}, raise it")
    made = [
        _one(*s, t, widths, frame_patches(worlds.render(s[0]), pixels, image_size, dtype))
        for s, t in zip(streams, texts, strict=True)
    ]
    return jax.tree.map(lambda *x: np.stack(x), *made)


def _one(
    stream: worlds.Stream,
    questions: worlds.Questions,
    texts: _Texts,
    widths: Widths,
    patches: np.ndarray,
) -> TokenStream:
    caption, caption_valid = padded(texts.caption, widths.caption)
    question, question_valid = padded(texts.question, widths.question)
    subject, subject_valid = padded(texts.subject, widths.subject)
    option, option_valid = padded([o for row in texts.option for o in row], widths.option)
    options = (len(questions.answer), worlds.NUM_OPTIONS, widths.option)
    return TokenStream(
        caption=caption,
        caption_valid=caption_valid,
        patches=patches,
        valid=np.ones(len(stream.kind), bool),
        teacher=teach(stream),
        question=question,
        question_valid=question_valid,
        subject=subject,
        subject_valid=subject_valid,
        option=option.reshape(options),
        option_valid=option_valid.reshape(options),
        answer=questions.answer,
        asked=questions.valid,
    )


def padded(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of at most `width` ids, -1 for none, as int32 [R, width], and which count [R, width]."""
    ids = np.full((len(rows), width), -1, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return np.maximum(ids, 0), ids >= 0


def shapes(
    batch_size: int,
    *,
    num_chunks: int,
    num_questions: int,
    widths: Widths,
    num_patches: int,
    patch_dim: int,
    num_options: int = worlds.NUM_OPTIONS,
    dtype=np.float16,
) -> TokenStream:
    """A batch [B, ...] of shapes and dtypes alone, to compile for: as `make_loader` would give."""

    def array(*shape: int, dtype=np.int32):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    caption, question = (num_chunks, widths.caption), (num_questions, widths.question)
    subject = (num_questions, widths.subject)
    option = (num_questions, num_options, widths.option)
    return TokenStream(
        caption=array(*caption),
        caption_valid=array(*caption, dtype=bool),
        patches=array(num_chunks, num_patches, patch_dim, dtype=dtype),
        valid=array(num_chunks, dtype=bool),
        teacher=array(num_chunks),
        question=array(*question),
        question_valid=array(*question, dtype=bool),
        subject=array(*subject),
        subject_valid=array(*subject, dtype=bool),
        option=array(*option),
        option_valid=array(*option, dtype=bool),
        answer=array(num_questions),
        asked=array(num_questions, dtype=bool),
    )


def _draw_questions(stream: TokenStream, rng: np.random.Generator, size: int) -> TokenStream:
    """`size` of the stream's questions, those that are asked first, in random order."""
    return stream.with_questions(valid_first(stream.asked, rng, size))


def make_loader(
    streams: TokenStream,
    *,
    seed: int,
    batch_size: int,
    questions_per_stream: int,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """An endless, shuffled, resumable iterator of batches TokenStream [B, ...], or `rows` of B.

    As `encoded.make_loader`: each visit of a stream draws other questions; order and draws follow
    from `seed`, and `get_state` / `set_state` put the iterator anywhere.
    """
    elements = (
        grain.MapDataset.range(len(streams.valid))
        .seed(seed)
        .shuffle()
        .repeat()
        .map(lambda i: jax.tree.map(lambda x: x[i], streams))
        .random_map(lambda s, rng: _draw_questions(s, rng, questions_per_stream))
    )
    return batches(elements, batch_size, rows, ahead=BATCHES_AHEAD)
