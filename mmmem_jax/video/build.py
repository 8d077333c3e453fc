"""Building a memory: a video passes once through perception and the manager, clip by clip."""

import contextlib
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
from mmmem_jax.policies.shipped import Policy, load_policy

BATCH = 4  # clips looked at together: what a kill can cost
AHEAD = 2 * BATCH  # clips decoded ahead of the networks
JPEG_QUALITY = 85
STAGES = ("decode", "segment", "perceive", "remember")

_T = TypeVar("_T")


class Settings(NamedTuple):
    """What a memory is made with; a memory is only continued with the same."""

    policy: str = "lite"
    slots: int = 512

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


class Builder(NamedTuple):
    """The networks and the policy, loaded once for any number of videos.

    `decide` gives action and strength of an item; `header` tells what a memory is made with.
    """

    config: MemoryConfig
    perception: lite.Perception
    decide: Callable[[MemoryState, Item], tuple[jax.Array, jax.Array]]
    header: dict


class Built(NamedTuple):
    """What a build did, and how long its stages took (s, on their own threads)."""

    video_id: str
    counts: store.Counts  # of the whole memory
    seconds_of_video: float  # that this build read; 0 where all was remembered already
    seconds: float
    stages: dict[str, float]


def make_builder(settings: Settings, perception: lite.Perception | None = None) -> Builder:
    """Loads the policy, and the networks where none are given.

    Raises:
      UserError: if weights cannot be fetched, or there is no such policy.
    """
    policy = load_policy(settings.policy)
    config = policy.configure(settings.memory_config())
    name = f"{policy.name}-{_digest(policy.params)}"  # a run trained on is another policy
    header = {"perception": "lite", "policy": name, "slots": settings.slots}
    return Builder(config, perception or lite.load_perception(), _make_decide(policy), header)


def _digest(params) -> str:
    """Tells parameters apart."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:8]


def _make_decide(policy: Policy):
    """decide(state, item) -> (action, strength), jitted with the policy bound."""
    rng_key = jax.random.key(0)

    @jax.jit
    def decide(params, state: MemoryState, item: Item):
        noise = draw_noise(rng_key, state.num_items[None])[0]
        decision = policy.decide_fn(params, noise, state, item)
        return decision.action, decision.strength

    return lambda state, item: decide(policy.params, state, item)


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
    started, stages = time.perf_counter(), dict.fromkeys(STAGES, 0.0)
    with open_video(memory_dir, video_id, header, builder.config, again=again) as video:
        done = store.progress(video)
        if not done.finished:
            with _progress_bar(video_id, info.duration, done.end) as bar:
                for record in remember(
                    builder, video, _read_ahead(source, video, cues, stages), stages
                ):
                    bar.update(round(record.span[1] - bar.n, 1))
            store.finish(video, store.load_state(video))
        counts, new = store.counts(video), store.progress(video).end - done.end
    return Built(video_id, counts, new, time.perf_counter() - started, stages)


def told(built: Built) -> str:
    """One line for people."""
    n, seconds = built.counts, max(built.seconds, 1e-3)
    did = "was remembered already"
    if built.seconds_of_video:
        speed = built.seconds_of_video / seconds
        did = (
            f"{built.seconds_of_video:.0f} s of video in {seconds:.0f} s ({speed:.0f} x real time)"
        )
    return (
        f"{built.video_id}: {did}, {n.seen} clips: {n.kept} episodes opened, {n.merged} clips"
        f" merged, {n.discarded} discarded"
    )


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
) -> Iterator[store.ClipRecord]:
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
    dropped = 0
    with contextlib.closing(clips):
        while group := tuple(itertools.islice(clips, batch)):
            with _timed(stages, "perceive"):
                percepts = lite.perceive(builder.perception, group, before)
            before = percepts[-1].item.coarse
            for percept in percepts[max(done - group[0].index, 0) :]:
                with _timed(stages, "remember"):
                    state, record = _take(builder, state, percept)
                    new = frames_dropped() - dropped
                    store.append(video, record, state, frames_dropped=new)
                    dropped += new
                yield record


def _take(
    builder: Builder, state: MemoryState, percept: lite.Percept
) -> tuple[MemoryState, store.ClipRecord]:
    """The memory after a clip, and the clip's record."""
    item = store.rounded(percept.item)
    action, strength = jax.device_get(builder.decide(state, item))
    state = store.advance(state, item, action, strength)
    slots = np.asarray(_entity_slots(state, item))
    names = (name for name, _ in percept.labels)
    record = store.ClipRecord(
        index=percept.index,
        span=percept.span,
        caption=percept.caption,
        subtitles=percept.subtitles,
        labels=percept.labels,
        frames=tuple((frame.time, _jpeg(frame.image)) for frame in percept.key_frames),
        action=int(action),
        strength=float(strength),
        node_id=store.node_of(state, percept.index),
        item=item,
        entities=tuple((int(slot), name) for slot, name in zip(slots, names, strict=False)),
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
