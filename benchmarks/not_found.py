"""Whether a memory says that it does not hold what it does not hold, and where that is set.

Asks a memory of the videos of one split about moments that are there and things that are not
(benchmarks/queries), and counts what is found and what is refused (`ask.threshold`). The constants
of `retrieval.video_search.Calibration` and the threshold are those that this prints for the
validation split; the test split only shows what they are worth.

    mmmem build VIDEO... --memory DIR        # the videos of the split, named as in data/videos.json
    python benchmarks/not_found.py --memory DIR [--split validation|test] [--full]

Keys: found (share of the moments there that are not refused), refused (share of what is not there),
auc (how often a moment there scores over a thing that is not there), found_at (the threshold in
this memory), best (the one with the most of found + refused here, the middle of the gap), slots
(episodes and clips held), n_there, n_absent, se (of found and refused), text and visual (mean and
deviation of the scores of unrelated pairs, before calibration).
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import common, video_queries
from benchmarks.video_memories import error
from mmmem_jax import store
from mmmem_jax.errors import UserError
from mmmem_jax.video import ask


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
        held = sum(int(x.sensory.valid.sum() + x.episodic.valid.sum()) for x in loaded.states)
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
