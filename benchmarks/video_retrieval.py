"""Finding moments of real videos by words.

Claim: a memory of real videos, made of small pretrained parts, finds the moment that a description
is about several times as often as chance. It is the names of ImageNet and of colours that tell its
moments apart: enough between videos, little within an animated film.

    python data/videos.py --to VIDEOS        # fetches the videos (about 200 MB)
    python benchmarks/video_retrieval.py --videos VIDEOS [--full] [--workdir DIR]

One memory holds all test videos of benchmarks/queries; each query is asked of all of them together,
and those about Big Buck Bunny of it alone (`within`). What `mmmem ask` returns as its first and its
first five moments is scored: clips of at most 10 s, or whole episodes, which may be longer and hit
more easily; chance is that of as many moments of the same lengths at random times.

Rows: the shipped policy and a rule that keeps everything with room for it (512 slots); the policy
and fixed rules with as many slots as a quarter of the longest video's clips. The memories stay in
DIR (take another one after a change to perception or policy); all take about five minutes. Without
--full: the default alone, of the validation videos.
Keys: hit1, hit5, chance1, chance5, n, seconds (mean length of a moment), se (over queries, given
these videos: 42 of the 62 test moments are of one film), stopped_by and stopped_at (shares of the
searches stopped by the entropy gate, by patience or at the end, and of the levels they stopped at),
hit1_by_stop (the gate asks for 0.8) of the default (the policy lite, 512 slots); rows has these of
all.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import video_memories, video_queries
from mmmem_jax import store
from mmmem_jax.perception import lite
from mmmem_jax.video import ask, build

AMPLE = build.Settings().slots
DEFAULT = "lite"
RULES = ("keep_recent", "reservoir", "kmeans", "forgetting_curve")
LONGEST = "bbb"


def num_clips(memory_dir: Path, video: str) -> int:
    """Clips that a video was cut into."""
    with store.open_store(memory_dir, video) as opened:
        return store.counts(opened).seen


def measure_row(memory_dir: Path, settings: build.Settings, queries, space: ask.Space) -> dict:
    """The scores of a memory, over all its videos and within the longest one."""
    with ask.load(memory_dir, videos=video_memories.videos_of(queries), space=space) as loaded:
        scores = video_memories.summary(video_memories.ask_moments(loaded, queries))
        tokens = sum(int(state.tokens) for state in loaded.states)
    row = {"policy": settings.policy, "slots": settings.slots, **scores, "tokens_held": tokens}
    within = [query for query in queries if query.video == LONGEST]
    if within:
        with ask.load(memory_dir, videos=[LONGEST], space=space) as loaded:
            asked = video_memories.ask_moments(loaded, within)
        row["within"] = video_memories.summary(asked)
    return row


def measure(full: bool, workdir: Path, videos: Path) -> dict:
    """Builds the memories and asks the queries."""
    split = "test" if full else "validation"
    queries = video_queries.read_moments(split)
    paths = video_memories.find_videos(videos, video_memories.videos_of(queries))
    perception = video_memories.remembering(lite.load_perception())
    space = ask.load_space()

    def row(settings: build.Settings) -> dict:
        memory_dir = video_memories.build_memory(workdir, paths, settings, perception)
        return measure_row(memory_dir, settings, queries, space)

    default = build.Settings(DEFAULT, AMPLE)
    rows = [row(default)]
    if full:
        few = num_clips(workdir / f"{DEFAULT}-{AMPLE}", LONGEST) // 4
        rows.append(row(build.Settings(RULES[0], AMPLE)))  # keeps every clip
        rows += [row(build.Settings(policy, few)) for policy in (DEFAULT, *RULES)]
    keys = ("hit1", "hit5", "chance1", "chance5", "n", "seconds", "se")
    keys += (*video_memories.STOPS, "hit1_by_stop")
    return {key: rows[0][key] for key in keys} | {"rows": rows, "split": split, "seeds": [0]}


if __name__ == "__main__":
    video_memories.run("video_retrieval", __doc__, measure)
