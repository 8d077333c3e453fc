"""The memory beside evidence that is chosen without one, at equal evidence tokens.

Question: at the tokens that the memory's search reads, how well does its evidence answer questions
about real videos, and find moments, beside frames or captions taken from the whole video?

    python data/videos.py --to VIDEOS
    python benchmarks/video_baselines.py --videos VIDEOS [--full] [--workdir DIR]

Each question of benchmarks/queries is asked of its own video. One reader serves all: an option
counts by the best calibrated cosine of question and option with any piece of evidence, a moment by
that of the query. A text costs its tokens, a frame 16 (`RetrievalConfig.visual_tokens`, a full
view), and every baseline may read as many tokens as the memory read for the same question:

    memory       the policy lite with 512 slots, searched top down (`mmmem ask`)
    quarter      the same with as many slots as a quarter of the most clips of a video, which has to
                 compress; it reads what its own search reads
    uniform      frames at equal distances
    text_only    captions and subtitles, the nearest to the question first, of all clips
    vision_only  views of clips (the mean of their key frames), the nearest first, of all clips
    recent       the last 4 frames: 64 tokens, whatever the memory reads

A frame that is found stands for its clip. The memories are those of video_retrieval.py if DIR is
the same, else they take minutes. Without --full: the validation videos.
Keys: for each of these: accuracy (choices), hit1 and hit5 (moments; `chance1` and `chance5` are of
moments as long), se (over queries, given these videos: 42 of the 62 test moments are of one film),
tokens (read a question); n_choices, n_moments, quarter_slots; longest: the hits within Big Buck
Bunny, since most other videos are hardly longer than five clips.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import not_found, video_memories, video_queries
from benchmarks.video_retrieval import AMPLE, DEFAULT, LONGEST, num_clips
from mmmem_jax import store
from mmmem_jax.perception import decode, lite
from mmmem_jax.retrieval.video_search import CALIBRATION, RETRIEVAL
from mmmem_jax.video import ask, build

KEEPS_ALL = "keep_recent"  # with more slots than clips
FRAME_TOKENS = RETRIEVAL.visual_tokens[1]
MEMORIES = ("memory", "quarter")
RECENT = 4  # frames
FRAME_BATCH = 64


class Piece(NamedTuple):
    """A piece of evidence of one kind, "text" or "visual"."""

    kind: str
    key: np.ndarray  # [D]
    tokens: int
    span: video_memories.Span  # s, of its clip


class Sources(NamedTuple):
    """All that there is of a video to choose evidence from, in order of time."""

    frames: list[Piece]  # one a second
    texts: list[Piece]  # of each clip
    visuals: list[Piece]


def read_sources(path: Path, memory_dir: Path, name: str, perception: lite.Perception) -> Sources:
    """Looks at a video again, and at what a memory of all its clips has."""
    with store.open_store(memory_dir, name) as video:
        clips = store.read_clips(video)
    frames = [x for x in decode.read(str(path), fps=1.0) if isinstance(x, decode.Frame)]
    keys = np.concatenate(
        [
            perception.see(np.stack([frame.image for frame in frames[i : i + FRAME_BATCH]]))[0]
            for i in range(0, len(frames), FRAME_BATCH)
        ]
    )
    starts = np.array([clip.span[0] for clip in clips])
    of_frame = np.maximum(np.searchsorted(starts, [f.time for f in frames], "right") - 1, 0)
    return Sources(
        [
            Piece("visual", key, FRAME_TOKENS, clips[i].span)
            for key, i in zip(keys, of_frame, strict=True)
        ],
        [Piece("text", clip.item.text, int(clip.item.tokens), clip.span) for clip in clips],
        [Piece("visual", clip.item.visual, FRAME_TOKENS, clip.span) for clip in clips],
    )


def score(space: ask.Space, texts: Sequence[str], pieces: Sequence[Piece]) -> np.ndarray:
    """Calibrated cosines [texts, pieces], as `video_search.slot_scores` has them."""
    calibration = np.array([getattr(CALIBRATION, piece.kind) for piece in pieces])
    keys = np.stack([piece.key for piece in pieces])
    return (not_found.standardised(space, texts, keys) - calibration[:, 0]) / calibration[:, 1]


def within_budget(order: Sequence[int], pieces: Sequence[Piece], budget: int) -> list[int]:
    """The first of `order` that cost no more than `budget` tokens together; one at least."""
    cost = np.cumsum([pieces[i].tokens for i in order])
    return list(order[: max(int(np.searchsorted(cost, budget, "right")), 1)])


def choose(name: str, sources: Sources, scores: dict[str, np.ndarray], budget: int):
    """The evidence of a baseline: pieces, and their scores [texts, pieces]."""
    kind = {"text_only": "texts", "vision_only": "visuals"}.get(name, "frames")
    pieces, found = getattr(sources, kind), scores[kind]
    if name == "recent":
        taken = list(range(len(pieces)))[-RECENT:]
    elif name == "uniform":
        number = min(max(budget // FRAME_TOKENS, 1), len(pieces))
        taken = [int((i + 0.5) * len(pieces) / number) for i in range(number)]
    else:
        taken = within_budget(np.argsort(-found.max(0), kind="stable"), pieces, budget)
    return [pieces[i] for i in taken], found[:, taken]


BASELINES = ("uniform", "text_only", "vision_only", "recent")


def clips_found(pieces: Sequence[Piece], scores: np.ndarray) -> list[video_memories.Span]:
    """The first five clips by their best piece."""
    spans = [pieces[i].span for i in np.argsort(-scores, kind="stable")]
    return list(dict.fromkeys(spans))[:5]


def ask_video(
    loaded: dict[str, ask.Loaded], sources: Sources, moments: Sequence, choices: Sequence
) -> dict[str, dict[str, list]]:
    """For both memories and each baseline, what its evidence gives: lists "moments", "choices"."""
    found = {name: {"moments": [], "choices": []} for name in (*MEMORIES, *BASELINES)}
    (video,) = (opened.video_id for opened in loaded["memory"].stores)
    space, seconds = loaded["memory"].space, {video: video_queries.read_seconds()[video]}
    for query in moments:
        answers = {k: ask.answer(x, query.query, found_at=-np.inf) for k, x in loaded.items()}
        spans = {name: [m.span for m in answer.moments] for name, answer in answers.items()}
        tokens = {name: answer.tokens_read for name, answer in answers.items()}
        for name, pieces, scores in _evidence(space, sources, [query.query], tokens["memory"]):
            spans[name] = clips_found(pieces, scores[0])
            tokens[name] = sum(piece.tokens for piece in pieces)
        for name, rows in found.items():
            hits = [(video, span) for span in spans[name]]
            scored = video_memories.score_moments(query, hits, seconds)
            rows["moments"].append(scored | {"tokens": tokens[name]})
    for row in choices:
        answers = {
            name: ask.answer(one, row.question, row.options, found_at=-np.inf)
            for name, one in loaded.items()
        }
        chosen = {name: int(np.argmax(answer.probabilities)) for name, answer in answers.items()}
        tokens = {name: answer.tokens_read for name, answer in answers.items()}
        texts = [f"{row.question} {option}" for option in row.options]
        for name, pieces, scores in _evidence(space, sources, texts, tokens["memory"]):
            chosen[name] = int(scores.max(1).argmax())
            tokens[name] = sum(piece.tokens for piece in pieces)
        for name, rows in found.items():
            right = float(chosen[name] == row.answer)
            rows["choices"].append({"accuracy": right, "tokens": tokens[name]})
    return found


def _evidence(space, sources, texts, budget):
    scores = {kind: score(space, texts, getattr(sources, kind)) for kind in Sources._fields}
    for name in BASELINES:
        yield name, *choose(name, sources, scores, budget)


def summary(by_video: dict[str, dict[str, list]]) -> dict:
    """The result's entry of the memory or a baseline, from its lists by video."""
    moments = [score for rows in by_video.values() for score in rows["moments"]]
    choices = [score for rows in by_video.values() for score in rows["choices"]]
    right = [row["accuracy"] for row in choices]
    out = video_memories.summary(moments)
    tokens = {
        "moments": out.pop("tokens"),
        "choices": float(np.mean([x["tokens"] for x in choices])),
    }
    out["se"]["accuracy"] = video_memories.error(right)
    out |= {"accuracy": float(np.mean(right)), "tokens": tokens}
    if LONGEST in by_video:
        out["longest"] = video_memories.summary(by_video[LONGEST]["moments"])
    return out


def measure(full: bool, workdir: Path, videos: Path) -> dict:
    """Builds the memories and asks all questions of all evidence."""
    split = "test" if full else "validation"
    moments, choices = video_queries.read_moments(split), video_queries.read_choices(split)
    paths = video_memories.find_videos(videos, video_memories.videos_of([*moments, *choices]))
    perception = video_memories.remembering(lite.load_perception())

    def built(policy: str, slots: int) -> Path:
        settings = build.Settings(policy, slots)
        return video_memories.build_memory(workdir, paths, settings, perception)

    all_dir, memory_dir = built(KEEPS_ALL, AMPLE), built(DEFAULT, AMPLE)
    few = max(max(num_clips(all_dir, video) for video in paths) // 4, 2)
    dirs = dict(zip(MEMORIES, (memory_dir, built(DEFAULT, few)), strict=True))
    space = ask.load_space()
    found: dict[str, dict] = {name: {} for name in (*MEMORIES, *BASELINES)}
    for video, path in paths.items():
        sources = read_sources(path, all_dir, video, perception)
        asked = [[row for row in rows if row.video == video] for rows in (moments, choices)]
        with contextlib.ExitStack() as stack:
            loaded = {
                name: stack.enter_context(ask.load(folder, videos=[video], space=space))
                for name, folder in dirs.items()
            }
            for name, rows in ask_video(loaded, sources, *asked).items():
                found[name][video] = rows
    return {
        **{name: summary(by_video) for name, by_video in found.items()},
        "quarter_slots": few,
        "n_choices": len(choices),
        "n_moments": len(moments),
        "split": split,
        "seeds": [0],
    }


if __name__ == "__main__":
    video_memories.run("video_baselines", __doc__, measure)
