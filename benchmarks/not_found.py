"""Whether a memory says that it does not hold what it does not hold, and where that is set.

Asks a memory of the videos of one split about moments that are there and things that are not
(benchmarks/queries), and counts what is found and what is refused (`ask.threshold`). For the
validation split this prints `Calibration.text`, the mean and deviation of `Calibration.visual`
(retrieval/video_search.py) and the temperature, and `best`, which `ask.FOUND_AT` rounds. What a
view is worth beside a text, `Calibration.lift`, `ask.FOUND_RISE`, and the confidence and patience
of `video_search.RETRIEVAL` were chosen on the validation split by trying and are not printed. The
test split only shows what all of these are worth.

    mmmem build VIDEO... --memory DIR        # the videos of the split, named as in data/videos.json
    python benchmarks/not_found.py --memory DIR [--split validation|test] [--full]

Keys: found (share of the moments there that are not refused), refused (share of what is not there),
auc (how often a moment there scores over a thing that is not there), found_at (the threshold in
this memory), best (the one with the most of found + refused here, the middle of the gap), slots
(episodes and clips held), n_there, n_absent, se (of found and refused), text and visual (mean and
deviation of the scores of unrelated pairs, before calibration), temperature (of `TEMPERATURES` the
one under which the moments that hit and the right options are likeliest, when all steps are read),
log_likelihood (nats a question, under each of these). Errors are over queries, given these videos.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import common, video_queries
from benchmarks.video_memories import error, is_hit
from mmmem_jax import store
from mmmem_jax.errors import UserError
from mmmem_jax.retrieval.video_search import CALIBRATION, RETRIEVAL
from mmmem_jax.video import ask

TEMPERATURES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
UNIT = dataclasses.replace(CALIBRATION, temperature=1.0)  # probabilities are those of the scores
TO_THE_END = dataclasses.replace(RETRIEVAL, confidence=1.0, patience=99)


def standardised(space: ask.Space, texts, keys: np.ndarray) -> np.ndarray:
    """Cosines [texts, keys] in deviations over each text's mean with the background."""
    wanted = np.concatenate([space.embed([text]) for text in texts])
    usual = wanted @ space.background.T
    keys = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-6)
    return (wanted @ keys.T - usual.mean(1, keepdims=True)) / usual.std(1, keepdims=True)


def overlaps(windows, span) -> bool:
    """Whether a clip shows any of the windows."""
    return any(t0 < span[1] and span[0] < t1 for t0, t1 in windows)


def unrelated(loaded: ask.Loaded, there, absent) -> dict[str, tuple[float, float]]:
    """Mean and deviation of the scores of questions with clips that do not show what they ask."""
    clips = [(s.video_id, clip) for s in loaded.stores for clip in store.read_clips(s)]
    related = np.array(
        [[v == m.video and overlaps(m.windows, c.span) for v, c in clips] for m in there]
        + [[False] * len(clips)] * len(absent)
    )
    texts, out = [row.query for row in (*there, *absent)], {}
    for kind in ("text", "visual"):
        keys = np.stack([getattr(clip.item, kind) for _, clip in clips])
        found = standardised(loaded.space, texts, keys)[~related]
        out[kind] = (float(found.mean()), float(found.std()))
    return out


def log_likelihood(asked: Sequence[tuple[np.ndarray, np.ndarray]], temperature: float) -> float:
    """Mean log of the probability put on what is right, over pairs of scores [C], right [C]."""
    total = 0.0
    for scores, right in asked:
        shares = np.exp((scores - scores.max()) / temperature)
        total += float(np.log(shares[right].sum() / shares.sum() + 1e-6))
    return total / len(asked)


def read_to_the_end(loaded: ask.Loaded, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of scores and what is right: of the moments shown, and of the options, of questions."""
    asked = []
    last = {"config": TO_THE_END, "calibration": UNIT, "found_at": -np.inf}
    for row in video_queries.read_moments(split):
        found = ask.answer(loaded, row.query, **last).moments
        hits = [m.video == row.video and is_hit(m.span, row.windows) for m in found]
        asked.append((np.maximum([m.score for m in found], 0.0), np.array(hits)))
    choices = video_queries.read_choices(split)
    for video in sorted({row.video for row in choices}):
        with ask.load(loaded.memory_dir, videos=[video], space=loaded.space) as one:
            for row in (row for row in choices if row.video == video):
                shares = np.array(ask.answer(one, row.question, row.options, **last).probabilities)
                asked.append((np.log(shares), np.arange(len(shares)) == row.answer))
    return asked


def best_threshold(there: np.ndarray, absent: np.ndarray) -> float:
    """The threshold that gets the most of both right, in the middle where several do."""
    scores = np.unique(np.concatenate([there, absent]))
    between = (scores[1:] + scores[:-1]) / 2
    right = [(there >= t).mean() + (absent < t).mean() for t in between]
    return float(np.median(between[np.isclose(right, np.max(right))]))


def measure(memory_dir: Path, split: str) -> dict:
    """Asks a split's questions of the memory of its videos."""
    held = set(store.list_videos(memory_dir))
    there, absent = video_queries.read_moments(split), video_queries.read_absent(split)
    videos = sorted({row.video for row in there})
    if missing := [name for name in videos if name not in held]:
        raise UserError(
            f"{memory_dir} lacks {', '.join(missing)}: mmmem build them (data/README.md)"
        )
    with ask.load(memory_dir, videos=videos) as loaded:
        scores = [
            np.array([ask.answer(loaded, row.query).score for row in rows])
            for rows in (there, absent)
        ]
        kinds = unrelated(loaded, there, absent)
        asked = read_to_the_end(loaded, split)
        held = sum(int(x.sensory.valid.sum() + x.episodic.valid.sum()) for x in loaded.states)
    likelihood = {t: log_likelihood(asked, t) for t in TEMPERATURES}
    found, refused = scores[0] >= ask.threshold(held), scores[1] < ask.threshold(held)
    return {
        "found": float(found.mean()),
        "refused": float(refused.mean()),
        "auc": float((scores[0][:, None] > scores[1]).mean()),
        "found_at": ask.threshold(held),
        "best": best_threshold(*scores),
        "slots": held,
        "n_there": len(there),
        "n_absent": len(absent),
        "se": {"found": error(found), "refused": error(refused)},
        **kinds,
        "temperature": max(TEMPERATURES, key=likelihood.get),
        "log_likelihood": {str(t): likelihood[t] for t in TEMPERATURES},
        "split": split,
        "seeds": [0],
    }


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--memory", type=Path, required=True, help="folder that mmmem build made")
    parser.add_argument("--split", choices=video_queries.SPLITS, default="test")
    args = parser.parse_args()
    common.report("not_found", args, lambda: measure(args.memory, args.split))


if __name__ == "__main__":
    main()
