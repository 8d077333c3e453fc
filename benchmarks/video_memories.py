"""Memories of the videos that the queries ask about, and how what is found in them is scored.

A hit is a moment that shares half a second (or all of it, where it is shorter) with a window of the
query. Its chance is that of a moment of the same length at a random time of the same videos.
Standard errors are over queries, given these videos, and 42 of the 62 test moments are of one film.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks import common, video_queries
from mmmem_jax.errors import UserError
from mmmem_jax.perception.lite import Perception
from mmmem_jax.video import ask, build

SHARED_SECONDS = 0.5
STOPS = ("stopped_by", "stopped_at")

Span = tuple[float, float]


def find_videos(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The files of videos by name.

    Raises:
      UserError: if one is not there.
    """
    files = video_queries.read_files()
    paths = {name: folder / files[name] for name in names}
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing)}; run data/videos.py")
    return paths


def videos_of(rows: Sequence) -> list[str]:
    """Names of the videos that rows of queries are about."""
    return sorted({row.video for row in rows})


def remembering(perception: Perception) -> Perception:
    """The same networks, which know a batch of frames again: policies look at the same ones."""
    known = {}

    def see(images):
        key = hashlib.blake2b(images.tobytes(), digest_size=16).digest()
        if key not in known:
            known[key] = perception.see(images)
        return known[key]

    return perception._replace(see=see)


def build_memory(
    folder: Path, videos: dict[str, Path], settings: build.Settings, perception: Perception
) -> Path:
    """One memory of all the videos, below `folder`; what is built already is kept."""
    memory_dir = folder / f"{settings.policy}-{settings.slots}"
    builder = build.make_builder(settings, perception)
    for name, path in videos.items():
        build.build(builder, str(path), memory_dir, name=name)
    return memory_dir


def is_hit(span: Span, windows: Sequence[Span]) -> bool:
    """Whether a span shares enough with any window."""
    return any(min(span[1], t1) - max(span[0], t0) >= _wanted(span, (t0, t1)) for t0, t1 in windows)


def chance(length: float, windows: Sequence[Span], seconds: float) -> float:
    """How often a span of `length` somewhere in a video of `seconds` is a hit."""
    length = min(length, seconds)
    room = seconds - length  # where it may start
    starts = []
    for t0, t1 in windows:
        wanted = _wanted((0.0, length), (t0, t1))
        starts.append((max(t0 + wanted - length, 0.0), min(t1 - wanted, room)))
    if room <= 0:
        return float(any(first <= last for first, last in starts))
    covered, end = 0.0, 0.0
    for first, last in sorted(starts):
        covered += max(last - max(first, end), 0.0)
        end = max(end, last)
    return covered / room


def score_moments(
    query: video_queries.Moment, found: Sequence[tuple[str, Span]], seconds: dict[str, float]
) -> dict[str, float]:
    """hit and chance, each 0 to 1, of the first and of the first five (video, span) found.

    Args:
      query: what was asked.
      found: what was returned, best first.
      seconds: lengths of the videos searched.
    """
    share = seconds[query.video] / sum(seconds.values())
    hits = [video == query.video and is_hit(span, query.windows) for video, span in found]
    lengths = [span[1] - span[0] for _, span in found]
    misses = [1 - share * chance(x, query.windows, seconds[query.video]) for x in lengths]
    out = {"seconds": float(np.mean(lengths)) if lengths else 0.0}
    for k in (1, 5):
        out[f"hit{k}"] = float(any(hits[:k]))
        out[f"chance{k}"] = 1.0 - float(np.prod(misses[:k]))
    return out


def summary(scores: Sequence[dict[str, float]]) -> dict:
    """Mean of each score, and shares of searches by what stopped them, and at which level.

    Under "se" are standard errors of the hits, and of hit less chance; under "hit1_by_stop" how
    often the first moment hits by what stopped the search.
    """
    shares = {key: _shares([score[key] for score in scores]) for key in STOPS if key in scores[0]}
    if shares:
        rows = {name: [x for x in scores if x["stopped_by"] == name] for name in shares[STOPS[0]]}
        shares["hit1_by_stop"] = {
            name: float(np.mean([x["hit1"] for x in there])) for name, there in rows.items()
        }
    numbers = [key for key in scores[0] if key not in STOPS]
    mean = {key: float(np.mean([score[key] for score in scores])) for key in numbers}
    hits = {key: [score[key] for score in scores] for key in mean if key.startswith("hit")}
    se = {key: error(values) for key, values in hits.items()}
    for key, values in hits.items():
        lifted = np.subtract(values, [score[key.replace("hit", "chance")] for score in scores])
        se[f"{key} - {key.replace('hit', 'chance')}"] = error(lifted)
    return mean | shares | {"n": len(scores), "se": se}


def error(values: Sequence[float]) -> float:
    """Standard error of a mean."""
    return float(np.std(values) / np.sqrt(len(values)))


def ask_moments(loaded: ask.Loaded, queries: Sequence[video_queries.Moment]) -> list[dict]:
    """Of queries asked of a memory: scores, as of `score_moments`, tokens read and `STOPS`."""
    lengths = video_queries.read_seconds()
    seconds = {video.video_id: lengths[video.video_id] for video in loaded.stores}
    scores = []
    for query in queries:
        answer = ask.answer(loaded, query.query, found_at=-np.inf)
        found = [(moment.video, moment.span) for moment in answer.moments]
        stops = {
            "stopped_by": answer.stopped_by or "nothing",  # of an empty memory
            "stopped_at": answer.stop_level or "nothing",
        }
        score = score_moments(query, found, seconds) | {"tokens": answer.tokens_read}
        scores.append(score | stops)
    return scores


def _shares(values: Sequence[str]) -> dict[str, float]:
    """How often each value is there."""
    return {value: n / len(values) for value, n in sorted(Counter(values).items())}


def _wanted(span: Span, window: Span) -> float:
    return min(SHARED_SECONDS, span[1] - span[0], window[1] - window[0])


def run(name: str, doc: str, measure: Callable[[bool, Path, Path], dict]) -> None:
    """The whole of a benchmark on such memories: `measure(full, workdir, videos)` gives the keys.

    They share a workdir, so that a memory is built once.
    """
    parser = common.make_parser(doc)
    parser.add_argument("--videos", type=Path, required=True, help="folder of data/videos.py")
    args = parser.parse_args()
    folder = common.workdir(args, "video_memories")
    common.report(name, args, lambda: measure(args.full, folder, args.videos))
