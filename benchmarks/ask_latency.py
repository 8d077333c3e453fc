"""How long a question takes, and that it does not depend on how much was remembered.

Claim: with the memory loaded, retrieval (embedding the question, the top-down search, reading the
rows of the best moments) takes less than 30 ms at the median and 100 ms at the 95th percentile on
a CPU, for ten minutes and for a week of video alike.

    python benchmarks/ask_latency.py [--full]

Both memories are made by passing clips of 10 s through the memory (512/512/256 slots, forgetting
curve): 60 clips, and 60,480 of them (2,016 without --full). The clips' embeddings are made: scenes
of a few of 200 things, drawn at random. Questions are sentences, embedded by MiniLM. A few minutes.
Keys: p50_ms, p95_ms (10 minutes), p50_ms_week, p95_ms_week, lm_ms (the small language model wording
one answer, which is in none of the others); embed_ms, search_ms, read_ms are medians of the parts,
options_p50_ms is the median with four options; load is the machine's, 1 minute, as it starts.
"""

import functools
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from benchmarks import common
from mmmem_jax import memory, store
from mmmem_jax.memory import Item, MemoryConfig
from mmmem_jax.policies import rules
from mmmem_jax.store import arrays, traces
from mmmem_jax.video import ask, wording

CLIP_SECONDS = 10.0
TEN_MINUTES, DAY, WEEK = 60, 8_640, 60_480  # clips
SEGMENT = 2_016  # clips made, and scanned, at once
NUM_THINGS, NUM_MENTIONS, CLIP_TOKENS = 200, 4, 20
SAME_SCENE = 0.6  # similarity of clips
CONFIG = MemoryConfig(
    sensory_slots=512, episodic_slots=512, schema_slots=256, num_relations=512, dim=384,
    merge_keep=1.0, max_node_tokens=256,
)  # fmt: skip
QUESTIONS = [
    f"{start} {thing}?"
    for start in ("Where is", "When did somebody hold", "What happened to", "Who looked at")
    for thing in (
        "the red car", "a small dog in the park", "the cup on the kitchen table",
        "an umbrella", "the man who was playing the guitar", "my keys", "a boat near the shore",
        "the book with the blue cover", "a birthday cake", "the laptop",
    )
]  # fmt: skip


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@functools.cache
def things() -> np.ndarray:
    """What is seen and told of, [NUM_THINGS, D]."""
    return _unit(np.random.default_rng(0).normal(size=(NUM_THINGS, CONFIG.dim)))


def make_clips(first: int) -> Item:
    """`SEGMENT` clips from number `first` on; a scene of four things lasts a minute."""
    rng = np.random.default_rng(first + 1)
    index = first + np.arange(SEGMENT)
    scenes = things()[rng.integers(NUM_THINGS, size=(SEGMENT // 6 + 1, NUM_MENTIONS))]
    mention = scenes[np.arange(SEGMENT) // 6]
    noise = _unit(rng.normal(size=(3, SEGMENT, CONFIG.dim)))
    visual, coarse, text = _unit(_unit(mention.sum(1)) + 0.4 * noise)
    before = np.concatenate([coarse[:1], coarse[:-1]])
    item = Item(
        visual=visual, coarse=coarse, text=text,
        span=CLIP_SECONDS * np.stack([index, index + 1], 1).astype(np.float32),
        tokens=np.full(SEGMENT, CLIP_TOKENS, np.int32),
        mention=mention, mention_valid=np.ones(mention.shape[:2], bool),
        change=(1 - (before * coarse).sum(1)).astype(np.float32),
        relation=np.zeros(SEGMENT, np.int32), trace_id=index.astype(np.int32),
        valid=np.ones(SEGMENT, bool),
    )  # fmt: skip
    return store.rounded(item)


def remember(num_clips: int):
    """The memory of `num_clips` clips, with the action, strength and node of each."""
    rule = rules.forgetting_curve(DAY * CLIP_SECONDS, SAME_SCENE)
    scan = jax.jit(functools.partial(memory.scan, decide_fn=rule.decide_fn))
    state, decisions = memory.init(rule.configure(CONFIG)), []
    for first in range(0, num_clips, SEGMENT):
        items = make_clips(first)
        items = items.replace(valid=items.trace_id < num_clips)
        state, out = scan(rule.params, jax.random.key(0), state, items)
        decisions.append(jax.device_get((out.action, out.strength, out.node_id)))
    actions, strengths, nodes = (
        np.concatenate(x)[:num_clips] for x in zip(*decisions, strict=True)
    )
    return state, actions, strengths, nodes


def write_memory(folder: Path, num_clips: int) -> None:
    """A video of that memory; in one transaction, since waiting for the disk at each of 60,480
    clips would take an hour."""
    state, actions, strengths, nodes = remember(num_clips)
    stream, buffer = state.episodic, state.sensory
    held = np.isin(nodes, np.asarray(stream.node_id)[np.asarray(stream.valid)])
    held[np.asarray(buffer.trace_id)[np.asarray(buffer.valid)]] = True
    with store.create(folder, "made", {"source": "made by a benchmark"}, CONFIG) as video:
        with traces.transaction(video.database, write=True):
            for i in range(num_clips):
                if i % SEGMENT == 0:
                    items = make_clips(i)
                item = jax.tree.map(lambda x, i=i: x[i % SEGMENT], items)
                row = traces.Row(
                    clip=i, start=CLIP_SECONDS * i, stop=CLIP_SECONDS * (i + 1),
                    action=int(actions[i]), strength=float(strengths[i]), node=int(nodes[i]),
                        log_prob=0.0, trace="", failed="[]",
                    caption=f"Four things, moving slowly, in clip {i}." if held[i] else "",
                    subtitles="", labels="[]", frames="[]",
                    item=arrays.item_to_bytes(item) if held[i] else None,
                )  # fmt: skip
                traces.insert(video.database, row)
            traces.put(video.database, "clips", num_clips)
        store.finish(video, state)


def ask_once(loaded: ask.Loaded, question: str, options=()) -> tuple[float, dict]:
    """Seconds of an answer whose rows are read whatever its score, and those of its parts."""
    started = time.perf_counter()
    answered = ask.answer(loaded, question, options, found_at=-np.inf)
    seconds = time.perf_counter() - started
    if not answered.moments:
        raise AssertionError("a question read no row: the memory on disk is not the one searched")
    return seconds, answered.seconds


def time_lm(loaded: ask.Loaded, rounds: int) -> float:
    """Median milliseconds of the small language model for one answer."""
    word_fn = wording.load_word_fn()
    seconds = []
    for question in [QUESTIONS[0], *QUESTIONS[:rounds]]:  # the first one compiles
        answered = ask.answer(loaded, question, word_fn=word_fn, found_at=-np.inf)
        seconds.append(answered.seconds["word"])
    return 1e3 * float(np.median(seconds[1:]))


def measure(full: bool, workdir: Path) -> dict:
    """Both memories are asked the same questions in turns, so that a busy moment meets both."""
    load = os.getloadavg()[0]
    num_clips, rounds = (WEEK, 5) if full else (SEGMENT, 1)
    space = ask.load_space()
    times = {name: [] for name in ("minutes", "week", "options")}
    parts = {name: [] for name in ("embed", "search", "read")}
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workdir) as folder:
        write_memory(Path(folder, "minutes"), TEN_MINUTES)
        write_memory(Path(folder, "week"), num_clips)
        with (
            ask.load(Path(folder, "minutes"), space=space) as minutes,
            ask.load(Path(folder, "week"), space=space) as week,
        ):
            memories, options = {"minutes": minutes, "week": week}, QUESTIONS[:4]
            for question in QUESTIONS:  # compiles every length of question
                ask_once(minutes, question)
                ask_once(minutes, question, options)
            for question in QUESTIONS * rounds:
                for name, loaded in memories.items():
                    seconds, by_part = ask_once(loaded, question)
                    times[name].append(1e3 * seconds)
                    for part, values in parts.items():
                        values.append(1e3 * by_part[part])
                times["options"].append(1e3 * ask_once(minutes, question, options)[0])
            lm_ms = time_lm(minutes, rounds)
            slots = [int(level.valid.sum()) for level in _levels(week)]
    p50, p95 = ({k: float(np.quantile(v, q)) for k, v in times.items()} for q in (0.5, 0.95))
    return {
        "p50_ms": p50["minutes"],
        "p95_ms": p95["minutes"],
        "p50_ms_week": p50["week"],
        "p95_ms_week": p95["week"],
        "options_p50_ms": p50["options"],
        "lm_ms": lm_ms,
        **{f"{part}_ms": float(np.median(values)) for part, values in parts.items()},
        "n": len(times["week"]),
        "week_clips": num_clips,
        "week_slots": slots,
        "load": load,
        "seeds": [0],
    }


def _levels(loaded: ask.Loaded):
    (state,) = loaded.states
    return state.sensory, state.episodic, state.schema


if __name__ == "__main__":
    common.run("ask_latency", __doc__, measure)
