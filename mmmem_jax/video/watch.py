"""Watching: a stream is remembered while it plays, and may be asked about meanwhile.

A thread of its own takes frames from the source as they come and puts them into a queue of
QUEUE_SECONDS; a frame that finds it full is dropped and counted, so that the memory is never more
than that behind and nothing grows however long it runs. The memory folder is the only thing that
`mmmem ask` in another process needs.
"""

import contextlib
import itertools
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mmmem_jax import store
from mmmem_jax.perception import decode, lite, segment
from mmmem_jax.perception.decode import Frame
from mmmem_jax.perception.subtitles import Cue
from mmmem_jax.video import build

QUEUE_SECONDS = 10.0
_POLL = 0.1  # s between two looks at whether to stop


class Watched(NamedTuple):
    """What became of a stream."""

    video_id: str
    counts: store.Counts
    seconds_of_video: float
    frames_dropped: int  # of this watch alone


class Remembered(NamedTuple):
    """One clip that has just been written."""

    record: store.ClipRecord
    delay: float  # s from its last frame's arrival to the disk
    seconds_per_frame: float  # of perception and memory
    frames_dropped: int  # so far


class Feed:
    """Frames handed from the thread that takes them in to the one that looks at them.

    Args:
      stream: where they come from; read on a thread that starts now.
      stop: once set, nothing more is taken in, and a source that says nothing is not waited for.
      speed: at which the stream is played; None takes frames as they come.
    """

    def __init__(
        self, stream: Iterable[Frame | Cue], stop: threading.Event, *, speed: float | None
    ):
        self.dropped = 0  # frames that found the queue full
        self.handed = 0  # frames handed on
        self.arrived = 0.0  # time.monotonic() at which the newest frame handed on came in
        self._stop = stop
        self._waiting: list[Cue] = []  # go with the next frame that finds room
        self._queue: queue.Queue = queue.Queue(int(QUEUE_SECONDS * lite.SENSORY_FPS))
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._take, args=(stream, speed), daemon=True)
        self._thread.start()

    def _take(self, stream: Iterable[Frame | Cue], speed: float | None) -> None:
        try:
            waiting = self._waiting
            for thing in _paced(stream, speed, self._stop):
                if isinstance(thing, Cue):
                    waiting.append(thing)
                    continue
                try:
                    self._queue.put_nowait((time.monotonic(), tuple(waiting), thing))
                    waiting.clear()
                except queue.Full:
                    self.dropped += 1
        except BaseException as error:  # raised again where the frames are looked at
            self._error = error
        finally:
            self._ended.set()

    def __iter__(self) -> Iterator[Frame | Cue]:
        while not (self._queue.empty() and (self._ended.is_set() or self._stop.is_set())):
            with contextlib.suppress(queue.Empty):
                self.arrived, cues, frame = self._queue.get(timeout=_POLL)
                self.handed += 1
                yield from cues
                yield frame
        if self._ended.is_set():  # else the thread may still add to them
            yield from self._waiting
        if self._error is not None:
            raise self._error


def _paced(
    stream: Iterable[Frame | Cue], speed: float | None, stop: threading.Event
) -> Iterator[Frame | Cue]:
    """`stream` until `stop` is set, each frame not before its time at `speed`."""
    started = first = None
    for thing in stream:
        if speed is not None and isinstance(thing, Frame):
            if started is None:
                started, first = time.monotonic(), thing.time
            stop.wait(max(started + (thing.time - first) / speed - time.monotonic(), 0.0))
        if stop.is_set():
            return
        yield thing


def watch(
    builder: build.Builder,
    source: str,
    memory_dir: Path,
    name: str | None = None,
    *,
    speed: float = 1.0,
    again: bool = False,
    on_clip: Callable[[Remembered], None] = lambda _: None,
) -> Watched:
    """Remembers a stream until it ends, or until Ctrl-C (SIGINT) or SIGTERM.

    A file is played at `speed`, and goes on at its last clip where it was stopped. Any other source
    is live: it is taken as it comes, and put after what the memory already has of it.

    Args:
      builder: networks and policy.
      source: a file, a camera such as /dev/video0, or a URL.
      memory_dir: made if it is not there.
      name: of the video in the memory; None takes the source's.
      speed: of a file.
      again: forget what is remembered of it first.
      on_clip: called after each clip.

    Raises:
      UserError: if the source cannot be read or the memory cannot be written.
    """
    live = not os.path.isfile(source)
    if live:
        begun, cues = _begin(source), ()  # before a memory is made of nothing
        made_of = {"source": store.video_id_of(source), "fingerprint": "live"}
    else:
        decode.probe(source)
        made_of, cues = build.file_and_cues(source, None)
    video_id, header = name or store.video_id_of(source), builder.header | made_of
    with (
        build.open_video(memory_dir, video_id, header, builder.config, again=again) as video,
        _stopping_on_signals() as stop,
    ):
        rest = _after(video, begun) if live else build.rest_of_file(video, source, cues)
        feed = Feed(rest.stream, stop, speed=_live_speed(source) if live else speed)
        clips = segment.clips(
            feed, cues, fps=lite.SENSORY_FPS, first_index=rest.index, first_end=rest.end
        )
        if not live:
            clips = _whole_clips(clips, stop)
        for done in remembered(builder, video, clips, feed):
            on_clip(done)
        if live or not stop.is_set():
            store.finish(video, store.load_state(video))
        return Watched(video_id, store.counts(video), store.progress(video).end, feed.dropped)


def _whole_clips(clips: Iterator[segment.Clip], stop: threading.Event) -> Iterator[segment.Clip]:
    """Without the clip that a stop cuts short: the next watch of the file sees it whole."""
    for clip in clips:
        if stop.is_set():
            return
        yield clip


def remembered(
    builder: build.Builder,
    video: store.VideoStore,
    clips: Iterator[segment.Clip],
    feed: Feed,
) -> Iterator[Remembered]:
    """Takes clips into the memory as they come; yields what each cost."""
    stages = dict.fromkeys(build.STAGES, 0.0)
    spent, handed = 0.0, 0
    bar = tqdm(desc=video.video_id, unit="clip", disable=not sys.stderr.isatty())
    records = build.remember(
        builder, video, clips, stages, batch=1, frames_dropped=lambda: feed.dropped
    )
    with bar:
        for taken in records:
            seconds = stages["perceive"] + stages["remember"] - spent
            spent += seconds
            frames, handed = max(feed.handed - handed, 1), feed.handed
            delay = time.monotonic() - feed.arrived
            bar.set_postfix_str(f"{delay:.1f} s behind, {feed.dropped} frames dropped")
            bar.update()
            yield Remembered(taken.record, delay, seconds / frames, feed.dropped)


def _begin(source: str) -> Iterator[Frame | Cue]:
    """A live source, of which the first frame has come; Ctrl-C does not wait for that."""
    camera = source.startswith("/dev/")
    stream = decode.read(
        source, fps=lite.SENSORY_FPS, format="v4l2" if camera else None, options=_options(source)
    )
    begun: queue.SimpleQueue = queue.SimpleQueue()

    def take() -> None:
        try:
            begun.put((next(stream), None))
        except BaseException as error:  # raised again below
            begun.put((None, error))

    # FFmpeg, which waits for seconds on a peer that says nothing, heeds no signal.
    threading.Thread(target=take, daemon=True).start()
    first, error = begun.get()
    if error is not None:
        raise error
    return itertools.chain([first], stream)


def _options(source: str) -> dict[str, str]:
    """RTSP over TCP loses no packets; a peer that says nothing for 10 s is gone."""
    if source.startswith("rtsp://"):
        return {"rtsp_transport": "tcp", "timeout": "10000000"}
    return {"rw_timeout": "10000000"} if "://" in source else {}


def _live_speed(source: str) -> float | None:
    """A recording, and what a live list begins with, come as fast as they can be fetched."""
    return 1.0 if source.startswith(("http://", "https://")) else None


def _after(video: store.VideoStore, stream: Iterator[Frame | Cue]) -> build.Rest:
    """A live stream, put after what is stored."""
    done = store.progress(video)
    return build.Rest(_shifted(stream, done.end), done.clips, None)


def _shifted(stream: Iterator[Frame | Cue], seconds: float) -> Iterator[Frame | Cue]:
    for thing in stream:
        if isinstance(thing, Cue):
            yield thing._replace(t0=thing.t0 + seconds, t1=thing.t1 + seconds)
        else:
            yield thing._replace(time=thing.time + seconds)


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C interrupts as ever."""
    stop = threading.Event()

    def handle(number, frame):
        stop.set()
        for kind, handler in before.items():
            signal.signal(kind, handler)

    if threading.current_thread() is not threading.main_thread():  # signals go to that one
        yield stop
        return
    before = {kind: signal.signal(kind, handle) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        stop.set()  # for whoever still takes frames in
        for kind, handler in before.items():
            signal.signal(kind, handler)


def told(watched: Watched) -> str:
    """One line for people."""
    n = watched.counts
    return (
        f"{watched.video_id}: {watched.seconds_of_video:.0f} s remembered, {n.seen} clips: {n.kept}"
        f" episodes opened, {n.merged} clips merged, {n.discarded} discarded;"
        f" {watched.frames_dropped} frames dropped"
    )
