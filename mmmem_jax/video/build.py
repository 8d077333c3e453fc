"""Building a memory: a video passes once through perception and the manager, clip by clip.

A backbone is what perceives clips; each comes with a manager of its own, and with either the fixed
rules decide as well. `make_builder` puts them together.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from mmmem_jax import store
from mmmem_jax.errors import UserError
from mmmem_jax.memory import Item, MemoryConfig, MemoryState, schema
from mmmem_jax.memory.pyramid import draw_noise
from mmmem_jax.perception import decode, lite, segment, subtitles
from mmmem_jax.perception.types import Percept, Work, total
from mmmem_jax.policies import shipped
from mmmem_jax.policies.shipped import Policy
from mmmem_jax.policies.types import Decision

BATCH = 4  # clips looked at together: what a kill can cost
AHEAD = 2 * BATCH  # clips decoded ahead of the networks
JPEG_QUALITY = 85
STAGES = ("decode", "segment", "perceive", "remember")

_T = TypeVar("_T")


class Settings(NamedTuple):
    """What a memory is made with; a memory is only continued with the same."""

    policy: str = "lite"  # "qwen3_vl" with that backbone, or a fixed rule
    slots: int = 512
    backbone: str = "lite"
    checkpoint: str = ""  # of backbone qwen3_vl: a folder or repo id, as are the next two folders
    adapter: str = ""  # "": none
    text_encoder: str = ""  # "": all-MiniLM-L6-v2
    context: int | None = None  # tokens; None: `conversation.default_context`

    def memory_config(self) -> MemoryConfig:
        """Text is kept verbatim, so tokens are bounded by slots and by `max_node_tokens`."""
        return MemoryConfig(
            sensory_slots=self.slots,
            episodic_slots=self.slots,
            schema_slots=self.slots // 2,
            num_relations=self.slots,
            dim=lite.DIM,
            merge_keep=1.0,
            max_node_tokens=256,
        )


DecideFn = Callable[[MemoryState, Percept], Decision]


class Builder(NamedTuple):
    """The networks and the policy, loaded once for any number of videos, one after the other.

    `header` tells what a memory is made with.
    """

    config: MemoryConfig
    perceive: Callable[[Sequence[segment.Clip], np.ndarray | None], list[Percept]]
    begin: Callable[[store.VideoStore, MemoryState], DecideFn]  # for the clips that follow
    header: dict


class Taken(NamedTuple):
    """A clip that is on disk, and what it took."""

    record: store.ClipRecord
    work: Work


class Built(NamedTuple):
    """What a build did, and how long its stages took (s, on their own threads)."""

    video_id: str
    counts: store.Counts  # of the whole memory
    failures: dict[str, int]  # clips of the whole memory that could not be given something
    seconds_of_video: float  # that this build read; 0 where all was remembered already
    seconds: float
    stages: dict[str, float]
    work: Work  # of this build


def make_builder(settings: Settings, perception: lite.Perception | None = None) -> Builder:
    """Loads the policy, and the networks where none are given.

    Raises:
      UserError: if weights cannot be fetched or read, or there is no such policy or backbone.
    """
    if settings.backbone == "qwen3_vl":
        return _make_qwen3_vl_builder(settings)
    if settings.backbone != "lite":
        raise UserError(f"there is no backbone {settings.backbone!r}; give lite or qwen3_vl")
    policy = shipped.load_policy(settings.policy)
    networks = perception or lite.load_perception()
    return Builder(
        policy.configure(settings.memory_config()),
        lambda clips, before: lite.perceive(networks, clips, before),
        _make_begin(policy),
        {"perception": "lite", "policy": _name(policy), "slots": settings.slots},
    )


def _make_qwen3_vl_builder(settings: Settings) -> Builder:
    """The paper's own model, as eye and as manager."""
    from mmmem_jax.models.qwen3_vl import conversation
    from mmmem_jax.perception import qwen3_vl
    from mmmem_jax.policies import qwen3_vl as manager

    names = (manager.NAME, *(name for name in shipped.NAMES if name != "lite"))
    if settings.policy not in names:
        raise UserError(
            f"policy {settings.policy!r} does not read backbone qwen3_vl; give {', '.join(names)}"
        )
    rule = None if settings.policy == manager.NAME else shipped.load_policy(settings.policy)
    folders = qwen3_vl.locate(settings.checkpoint, settings.adapter, settings.text_encoder)
    speaker = conversation.load_speaker(folders.checkpoint, adapter=folders.adapter)
    context = settings.context or conversation.default_context(speaker.config)
    embedder = qwen3_vl.load_embedder(speaker, folders.text_encoder)
    config = dataclasses.replace(settings.memory_config(), dim=embedder.dim)
    header = {
        "perception": "qwen3_vl",
        "policy": manager.NAME if rule is None else _name(rule),
        "slots": settings.slots,
        "context": context,
        "prompts": [*qwen3_vl.PROMPTS, manager.PROMPT],
        **qwen3_vl.fingerprints(folders),
    }
    if rule is None:
        begin = manager.make_begin_fn(speaker, context)
        # The length of an episode is bounded by the frames that a decision looks at.
        config = dataclasses.replace(config, max_node_tokens=None)
    else:
        begin, config = _make_begin(rule), rule.configure(config)
    return Builder(config, qwen3_vl.make_perceive_fn(speaker, embedder, context), begin, header)


def _name(policy: Policy) -> str:
    """A run trained on is another policy."""
    return f"{policy.name}-{_digest(policy.params)}"


def _digest(params) -> str:
    """Tells parameters apart."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:8]


def _make_begin(policy: Policy) -> Callable[[store.VideoStore, MemoryState], DecideFn]:
    """A policy over items, jitted; it knows no more of a video than the memory does."""
    rng_key = jax.random.key(0)

    @jax.jit
    def decide_item(params, state: MemoryState, item: Item):
        noise = draw_noise(rng_key, state.num_items[None])[0]
        decision = policy.decide_fn(params, noise, state, item)
        return decision.action, decision.strength, decision.log_prob

    def decide(state: MemoryState, percept: Percept) -> Decision:
        return Decision(*jax.device_get(decide_item(policy.params, state, percept.item)))

    return lambda video, state: decide


@jax.jit
def _entity_slots(state: MemoryState, item: Item) -> jax.Array:
    """The schema slot of each mention, -1 where it has none. [E]"""
    graph = state.schema

    def slot(mention, valid):
        near = jnp.where(graph.valid, schema.similarity(graph, mention), -1.0)
        return jnp.where(valid & jnp.any(graph.valid), jnp.argmax(near), -1)

    return jax.vmap(slot)(item.mention, item.mention_valid)


def check(videos: Sequence[str]) -> None:
    """Looks at every file before the first one is built.

    Raises:
      UserError: naming the first that cannot be read as a video.
    """
    for video in videos:
        _probe(video)


def _probe(source: str) -> decode.VideoInfo:
    if "://" in source:
        raise UserError(f"{decode.shown(source)} is no file; mmmem watch takes streams")
    return decode.probe(source)


def build(
    builder: Builder,
    source: str,
    memory_dir: Path,
    *,
    name: str | None = None,
    subtitle_file: Path | None = None,
    again: bool = False,
) -> Built:
    """Remembers one video file, or goes on where an earlier build was stopped.

    Args:
      builder: networks and policy.
      source: the file.
      memory_dir: made if it is not there.
      name: of the video in the memory; None takes the file's.
      subtitle_file: None takes one beside the video, else the video's own.
      again: forget what is remembered of it first.

    Raises:
      UserError: if the video, its subtitles or the memory folder cannot be read or written.
    """
    info = _probe(source)
    video_id = name or store.video_id_of(source)
    made_of, cues = file_and_cues(source, subtitle_file)
    header = builder.header | made_of
    started, stages, work = time.perf_counter(), dict.fromkeys(STAGES, 0.0), Work()
    with open_video(memory_dir, video_id, header, builder.config, again=again) as video:
        done = store.progress(video)
        if not done.finished:
            with _progress_bar(video_id, info.duration, done.end) as bar:
                clips = _read_ahead(source, video, cues, stages)
                for taken in remember(builder, video, clips, stages):
                    work = total(work, taken.work)
                    bar.update(round(taken.record.span[1] - bar.n, 1))
            store.finish(video, store.load_state(video))
        counts, failures = store.counts(video), store.failures(video)
        new = store.progress(video).end - done.end
    seconds = time.perf_counter() - started
    return Built(video_id, counts, failures, new, seconds, stages, work)


def told(built: Built) -> str:
    """A line for people, and one each for what a language model did and what failed."""
    n, seconds = built.counts, max(built.seconds, 1e-3)
    did = "was remembered already"
    if built.seconds_of_video:
        speed = built.seconds_of_video / seconds
        did = (
            f"{built.seconds_of_video:.0f} s of video in {seconds:.0f} s ({speed:.0f} x real time)"
        )
    lines = [
        f"{built.video_id}: {did}, {n.seen} clips: {n.kept} episodes opened, {n.merged} clips"
        f" merged, {n.discarded} discarded"
    ]
    if built.work.tokens:
        work = built.work
        lines.append(
            f"  read {work.tokens} tokens and encoded {work.frames} frames; without reuse"
            f" {work.tokens_anew} and {work.frames_anew}"
        )
    for what, count in sorted(built.failures.items()):
        lines.append(f"  {what} failed for {count} of {n.seen} clips")
    return "\n".join(lines)


def file_and_cues(
    source: str, subtitle_file: Path | None
) -> tuple[dict, tuple[subtitles.Cue, ...]]:
    """What tells a file and its subtitles (size, SHA-256 of the first and last MB), and the cues.

    Subtitles are those of `subtitle_file`, else of one beside the video, else the video's own.
    """
    digest = hashlib.sha256()
    with open(source, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(file.read(1 << 20))
        file.seek(max(size - (1 << 20), 0))
        digest.update(file.read(1 << 20))
    beside = subtitle_file or subtitles.find_subtitles(source)
    cues = subtitles.read_subtitles(beside) if beside else ()
    header = {
        "source": Path(source).name,
        "fingerprint": f"{size}-{digest.hexdigest()[:32]}",
        "subtitles": hashlib.sha256(beside.read_bytes()).hexdigest()[:32] if beside else "",
    }
    return header, cues


def open_video(
    memory_dir: Path, video_id: str, header: dict, config: MemoryConfig, *, again: bool = False
) -> store.VideoStore:
    """Opens a video for writing: a new one, or one made of the same source with the same settings.

    Raises:
      UserError: if the memory has another video of that name, or one made with other settings.
    """
    exists = memory_dir.is_dir() and video_id in store.list_videos(memory_dir)
    if exists and again:
        store.remove(memory_dir, video_id)
    elif exists:
        video = store.open_store(memory_dir, video_id, writable=True)
        if video.header == header and video.config == config:
            return video
        video.close()
        others = [key for key in header if video.header.get(key) != header[key]]
        other = f"{others[0]} ({video.header.get(others[0])})" if others else "size of memory"
        raise UserError(
            f"{video.folder} was made with another {other};"
            " --again makes it anew, --name NAME keeps both"
        )
    return store.create(memory_dir, video_id, header, config)


def remember(
    builder: Builder,
    video: store.VideoStore,
    clips: Iterator[segment.Clip],
    stages: dict[str, float],
    *,
    batch: int = BATCH,
    frames_dropped: Callable[[], int] = lambda: 0,
) -> Iterator[Taken]:
    """Takes clips into the memory and onto the disk; yields what became of each.

    Args:
      builder: networks and policy.
      video: open for writing.
      clips: from the last one that is stored on, or from the first; closed at the end.
      stages: where the seconds of each stage are added.
      batch: clips looked at together.
      frames_dropped: how many frames were dropped so far, by a live source.
    """
    done, state, before = store.progress(video).clips, store.load_state(video), None
    decide, dropped, untold = builder.begin(video, state), 0, Work()
    with contextlib.closing(clips):
        while group := tuple(itertools.islice(clips, batch)):
            with _timed(stages, "perceive"):
                percepts = builder.perceive(group, before)
            before = percepts[-1].item.coarse
            for percept in percepts:
                untold = total(untold, percept.work)
                if percept.index < done:
                    continue
                with _timed(stages, "remember"):
                    percept = percept._replace(item=store.rounded(percept.item))
                    decision = decide(state, percept)
                    state, record = _take(state, percept, decision)
                    new = frames_dropped() - dropped
                    store.append(video, record, state, frames_dropped=new)
                    dropped += new
                yield Taken(record, total(untold, decision.work))
                untold = Work()


def _take(
    state: MemoryState, percept: Percept, decision: Decision
) -> tuple[MemoryState, store.ClipRecord]:
    """The memory after a clip, and the clip's record."""
    item = percept.item
    state = store.advance(state, item, decision.action, decision.strength)
    slots = np.asarray(_entity_slots(state, item))
    names = (name for name, _ in percept.labels)
    record = store.ClipRecord(
        index=percept.index,
        span=percept.span,
        caption=percept.caption,
        subtitles=percept.subtitles,
        labels=percept.labels,
        frames=tuple((frame.time, _jpeg(frame.image)) for frame in percept.key_frames),
        action=int(decision.action),
        strength=float(decision.strength),
        node_id=store.node_of(state, percept.index),
        item=item,
        entities=tuple((int(slot), name) for slot, name in zip(slots, names, strict=False)),
        log_prob=float(decision.log_prob),
        trace=decision.trace,
        failed=percept.failed + decision.failed,
    )
    return state, record


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


class Rest(NamedTuple):
    """What is left of a source: frames and cues, and index and end of the first clip to cut."""

    stream: Iterator[decode.Frame | subtitles.Cue]
    index: int
    end: float | None  # s; None: where the pictures say


def rest_of_file(video: store.VideoStore, source: str, cues: tuple[subtitles.Cue, ...]) -> Rest:
    """A file from its last stored clip on; without its own subtitles, where there are other `cues`.

    The last stored clip comes again, as it was: what changed since it can be told of the next one.
    """
    done, start, end = store.progress(video).clips, 0.0, None
    if done:
        start, end = store.read_clips(video, [done - 1])[0].span
    stream = decode.read(source, fps=lite.SENSORY_FPS, start=start)
    stream = (x for x in stream if not (cues and isinstance(x, subtitles.Cue)))
    return Rest(stream, max(done - 1, 0), end)


def _read_ahead(source: str, video: store.VideoStore, cues, stages) -> Iterator[segment.Clip]:
    """The clips that are left of a file, made on a thread of their own."""
    rest = rest_of_file(video, source, cues)
    frames = _timed_items(rest.stream, stages, "decode")
    clips = segment.clips(
        frames, cues, fps=lite.SENSORY_FPS, first_index=rest.index, first_end=rest.end
    )
    return ahead(_timed_items(clips, stages, "segment", less="decode"), AHEAD)


def ahead(items: Iterator[_T], size: int) -> Iterator[_T]:
    """Makes items on a thread, at most `size` ahead; its exceptions are raised here."""
    made: queue.Queue = queue.Queue(size)
    closed = threading.Event()
    end = object()

    def put(thing) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return made.put(thing, timeout=0.1)

    def make() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    put((item, None))
                    if closed.is_set():
                        return
            put((end, None))
        except BaseException as error:  # handed to who asked for the items
            put((end, error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        closed.set()
        thread.join()


@contextlib.contextmanager
def _timed(stages: dict[str, float], stage: str):
    started = time.perf_counter()
    try:
        yield
    finally:
        stages[stage] += time.perf_counter() - started


def _timed_items(
    items: Iterable[_T], stages: dict[str, float], stage: str, less: str = ""
) -> Iterator[_T]:
    """`items`, the time to make them added to a stage; without that of the stage `less`."""
    iterator = iter(items)
    while True:
        before = stages.get(less, 0.0)
        with _timed(stages, stage):
            item = next(iterator, None)
        stages[stage] -= stages.get(less, 0.0) - before
        if item is None:
            return
        yield item


def _progress_bar(name: str, duration: float | None, done: float) -> tqdm:
    return tqdm(
        total=None if duration is None else round(duration, 1),
        initial=round(done, 1),
        desc=name,
        unit="s",
        disable=not sys.stderr.isatty(),
    )
