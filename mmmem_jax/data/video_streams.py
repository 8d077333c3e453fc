"""Streams of one's own videos as Qwen3-VL learns from them: their clips, and questions about them.

The clips are those of a memory that kept them all, with captions written and scenes cut already:

    mmmem build VIDEO --memory DIR --backbone qwen3_vl --policy keep_recent --slots 4096 ...

The questions are a qa.jsonl of `timed_text`, whose videos are the ids that the memory gave. A
stream is the last T clips that ended before a question is asked, each as its caption and one key
frame, squeezed to a square; questions asked at the same time share a stream.
"""

import hashlib
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer
from tqdm import tqdm

from mmmem_jax import store
from mmmem_jax.data import timed_text
from mmmem_jax.data.timed_text import Question
from mmmem_jax.data.token_streams import LETTERS, TokenStream, Widths, padded
from mmmem_jax.errors import UserError
from mmmem_jax.memory.types import ADD_NEW, DISCARD, MERGE
from mmmem_jax.models.qwen3_vl.images import PixelConfig, normalise, patchify
from mmmem_jax.models.qwen3_vl.resizing import resize
from mmmem_jax.store import ClipRecord, VideoStore

LOG = logging.getLogger(__name__)
TEST_SHARE = 0.2  # of the videos


class Shape(NamedTuple):
    """What all streams of a run have in common."""

    num_clips: int  # T
    num_options: int  # O
    image_size: int  # pixels along the edge of a frame
    widths: Widths


class Asked(NamedTuple):
    """Clips `first` to `end` of a video, and the questions that are asked after them."""

    first: int
    end: int
    questions: tuple[Question, ...]


def from_memory(
    memory_dir: str | Path,
    questions: str | Path,
    split: str,
    tokenizer: Tokenizer,
    pixels: PixelConfig,
    shape: Shape,
    dtype=np.float16,
) -> TokenStream:
    """The streams of a split, stacked: leaves [S, ...].

    Left out, counted and told are questions whose answer is unknown, that are asked before a clip
    has ended, or that may be about more than the last T clips. They have no `subject` and no words
    of options: they are for a reader that reads. The teacher knows which clips are evidence.

    Args:
      memory_dir: that holds the videos asked about, all their clips kept.
      questions: a qa.jsonl.
      split: "train" or "test".
      tokenizer: of the language model.
      pixels: what its vision tower takes.
      shape: of the streams.
      dtype: of the patches.

    Raises:
      UserError: as `questions_by_video` does; if a question is too long, a clip is missing, or no
        question is left.
    """
    asked = questions_by_video(memory_dir, questions, split, shape.num_options)
    streams = []
    for video_id in tqdm(asked, desc=split, unit="video", disable=not sys.stderr.isatty()):
        with store.open_store(memory_dir, video_id) as video:
            streams += _streams_of(video, asked[video_id], tokenizer, pixels, shape, dtype)
    used = sum(int(stream.asked.sum()) for stream in streams)
    total = sum(map(len, asked.values()))
    if used < total:
        LOG.warning(
            "%d of %d questions of the %s split are left out: no answer is given, no clip has ended"
            " before, or they may be about more than the last %d clips (num_clips)",
            *(total - used, total, split, shape.num_clips),
        )
    if not streams:
        raise UserError(f"no question of {questions} can be used for the {split} split")
    return _stacked(streams)


def questions_by_video(
    memory_dir: str | Path, questions: str | Path, split: str, num_options: int
) -> dict[str, list[Question]]:
    """The questions about the videos of a split; every video is in one.

    Raises:
      UserError: if there is no such memory, the questions cannot be read, have another number of
        options, or are about fewer than two videos.
    """
    asked = timed_text.read_questions(questions, set(store.list_videos(memory_dir)))
    for question in asked:
        if len(question.options) != num_options:
            raise UserError(
                f"question {question.qid} has {len(question.options)} options, not {num_options}"
                " (num_options); give all equally many"
            )
    videos = split_videos({question.video for question in asked})[split]
    return {video: [q for q in asked if q.video == video] for video in videos}


def split_videos(videos: Iterable[str]) -> dict[str, list[str]]:
    """Deals videos out in the order of their ids' SHA-256, so that the same are always held out.

    Raises:
      UserError: if there are fewer than two.
    """
    order = sorted(videos, key=lambda video: hashlib.sha256(video.encode()).digest())
    if len(order) < 2:
        raise UserError(f"there are questions about {len(order)} videos; one must be held out")
    test = max(1, round(TEST_SHARE * len(order)))
    return {"train": order[:-test], "test": order[-test:]}


def ask_after(
    spans: Sequence[tuple[float, float]], questions: Iterable[Question], num_clips: int
) -> list[Asked]:
    """Which clips questions are asked after, by time; those that cannot be used are left out.

    Args:
      spans: seconds of the clips of a video, in order.
      questions: about it.
      num_clips: T, the most clips of a stream.
    """
    by_end = defaultdict(list)
    for question in questions:
        time = np.inf if question.query_time is None else question.query_time
        end = sum(stop <= time for _, stop in spans)
        first = max(end - num_clips, 0)
        earliest = min((start for start, _ in question.evidence), default=-np.inf)
        whole = first == 0 or earliest >= spans[first][0]
        if end and whole and question.answer is not None:
            by_end[end].append(question)
    return [Asked(max(end - num_clips, 0), end, tuple(by_end[end])) for end in sorted(by_end)]


def teach(
    spans: Sequence[tuple[float, float]], questions: Iterable[Question]
) -> Int[np.ndarray, "T"]:
    """What a teacher that knows the evidence decides about clips, int32.

    ADD_NEW for a clip that overlaps evidence; MERGE if the last clip kept overlaps the same;
    DISCARD for all else.
    """
    windows = [window for question in questions for window in question.evidence]
    out, kept = np.full(len(spans), DISCARD, np.int32), set()
    for t, (start, stop) in enumerate(spans):
        # A window without length is a moment: the clip that begins there has it.
        here = {(t0, t1) for t0, t1 in windows if t0 < stop and (start < t1 or start <= t0)}
        if here:
            out[t] = MERGE if here & kept else ADD_NEW
            kept = here
    return out


def _streams_of(
    video: VideoStore,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    pixels: PixelConfig,
    shape: Shape,
    dtype,
) -> list[TokenStream]:
    """The streams of one video; a clip that several have is read once."""
    clips = _all_clips(video)
    spans = [clip.span for clip in clips]
    groups = ask_after(spans, questions, shape.num_clips)
    needed = sorted({number for group in groups for number in range(group.first, group.end)})
    patches = {n: _frame_patches(video, clips[n], pixels, shape.image_size) for n in needed}
    encode = _encoder(tokenizer)
    captions = {n: encode(clips[n].caption) for n in needed}
    cut = sum(len(caption) > shape.widths.caption for caption in captions.values())
    if cut:
        LOG.warning(
            "%s: %d captions are cut to %d tokens (widths.caption)",
            *(video.video_id, cut, shape.widths.caption),
        )
    return [
        _stream(
            [captions[n][: shape.widths.caption] for n in range(group.first, group.end)],
            np.stack([patches[n] for n in range(group.first, group.end)]).astype(dtype),
            teach(spans[group.first : group.end], group.questions),
            group.questions,
            encode,
            shape,
        )
        for group in groups
    ]


def _all_clips(video: VideoStore) -> list[ClipRecord]:
    """All clips of a finished video."""
    progress = store.progress(video)
    if not progress.finished:
        raise UserError(f"{video.folder} is not finished; let mmmem build go on with it")
    clips = store.read_clips(video, range(progress.clips))
    gone = sum(clip.item is None for clip in clips)
    if gone:
        raise UserError(
            f"{video.folder} kept {len(clips) - gone} of {len(clips)} clips; build it with"
            f" --policy keep_recent --slots {len(clips)} or more"
        )
    return clips


def _frame_patches(
    video: VideoStore, clip: ClipRecord, pixels: PixelConfig, image_size: int
) -> np.ndarray:
    """The middle key frame of a clip as patches [P, patch_dim] float32."""
    if not clip.frames:
        raise UserError(f"clip {clip.index} of {video.folder} has no key frame; build it again")
    _, path = clip.frames[len(clip.frames) // 2]
    frame = resize(store.read_image(video, path), image_size, image_size)
    patches, _ = patchify(frame[None].repeat(pixels.temporal_patch_size, axis=0), pixels)
    return normalise(patches, pixels)


def _encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _stream(
    captions: Sequence[list[int]],
    patches: np.ndarray,
    teacher: Int[np.ndarray, "T"],
    questions: Sequence[Question],
    encode: Callable[[str], list[int]],
    shape: Shape,
) -> TokenStream:
    """A stream, padded to T clips; as many questions as there are."""
    count, missing = len(questions), shape.num_clips - len(captions)
    asked = [encode(_asked(question)) for question in questions]
    longest = max(map(len, asked))
    if longest > shape.widths.question:
        raise UserError(
            f"a question has {longest} tokens; widths.question is {shape.widths.question}, raise it"
        )
    caption, caption_valid = padded([*captions, *[[]] * missing], shape.widths.caption)
    question, question_valid = padded(asked, shape.widths.question)
    subject = np.zeros((count, shape.widths.subject), np.int32)
    option = np.zeros((count, shape.num_options, shape.widths.option), np.int32)
    return TokenStream(
        caption=caption,
        caption_valid=caption_valid,
        patches=np.pad(patches, ((0, missing), (0, 0), (0, 0))),
        valid=np.arange(shape.num_clips) < len(captions),
        teacher=np.pad(teacher, (0, missing), constant_values=DISCARD),
        question=question,
        question_valid=question_valid,
        subject=subject,
        subject_valid=subject.astype(bool),
        option=option,
        option_valid=option.astype(bool),
        answer=np.array([question.answer for question in questions], np.int32),
        asked=np.ones(count, bool),
    )


def _asked(question: Question) -> str:
    """A question and its options, one a line."""
    options = zip(LETTERS, question.options, strict=False)
    return "\n".join([question.question, *(f"{letter}. {option}" for letter, option in options)])


def _stacked(streams: Sequence[TokenStream]) -> TokenStream:
    """Streams [S, ...], each with as many questions as the one that has most, padding not asked."""
    most = max(len(stream.asked) for stream in streams)

    def fill(stream: TokenStream) -> TokenStream:
        rows = np.minimum(np.arange(most), len(stream.asked) - 1)
        return stream.with_questions(rows).replace(asked=np.arange(most) < len(stream.asked))

    return jax.tree.map(lambda *x: np.stack(x), *map(fill, streams))
