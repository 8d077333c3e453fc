"""Watching: nothing is lost but what is counted, a stop is clean, others may ask meanwhile."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mmmem_jax import store
from mmmem_jax.errors import UserError
from mmmem_jax.perception.decode import Frame
from mmmem_jax.perception.subtitles import Cue
from mmmem_jax.testing.perception import toy_perception
from mmmem_jax.video import build, watch

WATCHING = """
import sys
from pathlib import Path
from mmmem_jax.testing.perception import toy_perception
from mmmem_jax.video import build, watch

watch.QUEUE_SECONDS = 1000.0
builder = build.make_builder(build.Settings("keep_recent", slots=64), toy_perception())
def tell(done):
    print("clip", done.record.index, flush=True)
    if done.record.index == 2:
        sys.stdin.readline()  # until the signal was sent
print(watch.told(watch.watch(builder, sys.argv[1], Path(sys.argv[2]), speed=4.0, on_clip=tell)))
"""


def _frames(number: int):
    image = np.zeros((4, 4, 3), np.uint8)
    return (Frame(i / 5, image) for i in range(number))


def _start(video, memory):
    script = [sys.executable, "-c", WATCHING, str(video), str(memory)]
    return subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def long_queue(monkeypatch):
    """Nothing is dropped, however busy the machine."""
    monkeypatch.setattr(watch, "QUEUE_SECONDS", 1000.0)


def _clips_of(memory):
    with store.open_store(memory, "scenes") as video:
        return store.read_clips(video), store.progress(video)


@pytest.mark.usefixtures("long_queue")
def test_a_file_is_played_to_its_end(toy_builder, scenes_video, tmp_path):
    seen = []
    started = time.monotonic()
    done = watch.watch(toy_builder, str(scenes_video), tmp_path, speed=10.0, on_clip=seen.append)
    assert time.monotonic() - started >= 19.8 / 10.0
    assert done.counts.seen == len(seen) == 10
    assert done.frames_dropped == 0
    assert all(r.delay >= 0 and r.seconds_per_frame > 0 for r in seen)
    build.build(toy_builder, str(scenes_video), tmp_path / "built")
    watched, built = _clips_of(tmp_path), _clips_of(tmp_path / "built")
    assert [r.span for r in watched[0]] == [r.span for r in built[0]]
    assert watched[1] == built[1]


@pytest.mark.usefixtures("long_queue")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_started_again_loses_nothing(toy_builder, scenes_video, tmp_path, kind):
    process = _start(scenes_video, tmp_path)
    for line in process.stdout:
        if line.startswith("clip 2"):
            process.send_signal(kind)
            break
    process.stdin.close()
    rest = process.stdout.read()
    process.stdout.close()
    assert process.wait() == (0 if kind != signal.SIGKILL else -9)
    clips, progress = _clips_of(tmp_path)
    assert 3 <= progress.clips < 10
    assert not progress.finished
    assert (kind == signal.SIGKILL) or "remembered" in rest
    watch.watch(toy_builder, str(scenes_video), tmp_path, speed=1000.0)
    clips, progress = _clips_of(tmp_path)
    assert progress.clips == 10
    assert progress.finished
    for before, after in itertools.pairwise(clips):
        assert before.span[1] == after.span[0]


def test_a_file_that_dropped_frames_goes_on(toy_builder, scenes_video, tmp_path, monkeypatch):
    read = build.decode.read

    def with_holes(source, **keys):  # as a full queue leaves them
        return (f for f in read(source, **keys) if not 1.5 <= f.time % 4.0 < 3.0)

    def stop_after_three(done):
        if done.record.index == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(build.decode, "read", with_holes)
        watch.watch(toy_builder, str(scenes_video), tmp_path, speed=50.0, on_clip=stop_after_three)
    before, progress = _clips_of(tmp_path)
    assert not progress.finished
    build.build(toy_builder, str(scenes_video), tmp_path)
    clips, progress = _clips_of(tmp_path)
    assert progress.finished
    assert [c.span for c in clips[: len(before)]] == [c.span for c in before]
    for earlier, later in itertools.pairwise(clips):
        assert earlier.span[1] == later.span[0]


@pytest.mark.usefixtures("long_queue")
def test_subtitles_beside_a_watched_file_are_read(toy_builder, scenes_video, tmp_path):
    video = tmp_path / "scenes.mp4"
    video.write_bytes(scenes_video.read_bytes())
    video.with_suffix(".srt").write_text("1\n00:00:01,000 --> 00:00:03,000\nhello bread\n")
    watch.watch(toy_builder, str(video), tmp_path / "memory", speed=1000.0)
    clips, _ = _clips_of(tmp_path / "memory")
    assert [clip.index for clip in clips if clip.subtitles] == [0, 1]


def test_a_recording_at_a_url_is_played_not_gulped():
    assert watch._live_speed("https://somewhere/film.mp4") == 1.0
    assert watch._live_speed("rtsp://somewhere/live") is None


@pytest.mark.usefixtures("long_queue")
def test_others_read_the_memory_meanwhile(toy_builder, scenes_video, tmp_path):
    found = []

    def look(done):
        with store.open_store(tmp_path, "scenes") as video:
            found.append(int(store.load_state(video).num_items))

    watch.watch(toy_builder, str(scenes_video), tmp_path, speed=1000.0, on_clip=look)
    assert found == list(range(1, 11))


class TestFeed:
    def test_frames_that_find_the_queue_full_are_dropped_and_counted(self):
        size = int(watch.QUEUE_SECONDS * 5)
        feed = watch.Feed(_frames(size + 7), threading.Event(), speed=None)
        feed._thread.join()
        assert len(list(feed)) == size
        assert feed.dropped == 7

    def test_captions_of_dropped_frames_are_kept(self):
        size = int(watch.QUEUE_SECONDS * 5)
        frames = list(_frames(size + 4))
        stream = [*frames[: size + 2], Cue(1.0, 2.0, "hello"), *frames[size + 2 :]]
        full, arrived = threading.Event(), threading.Event()

        def slowly():
            yield from stream[:-1]
            full.set()
            arrived.wait()
            yield stream[-1]

        feed = watch.Feed(slowly(), threading.Event(), speed=None)
        full.wait()
        items = iter(feed)
        first = [next(items) for _ in range(size)]
        arrived.set()
        rest = list(items)
        assert all(isinstance(x, Frame) for x in first)
        assert rest == [Cue(1.0, 2.0, "hello"), frames[-1]]

    def test_captions_after_the_last_frame_are_kept(self):
        stream = [*_frames(2), Cue(0.3, 2.0, "bye")]
        assert list(watch.Feed(iter(stream), threading.Event(), speed=None)) == stream

    def test_a_stop_ends_an_endless_source(self):
        stop = threading.Event()
        image = np.zeros((4, 4, 3), np.uint8)
        endless = (Frame(i / 5, image) for i in itertools.count())
        feed = watch.Feed(endless, stop, speed=50.0)
        items = iter(feed)
        next(items)
        stop.set()
        assert len(list(items)) <= int(watch.QUEUE_SECONDS * 5)

    def test_a_stop_does_not_wait_for_a_source_that_says_nothing(self):
        stop, silence = threading.Event(), threading.Event()

        def stalled():
            yield from _frames(3)
            silence.wait()

        items = iter(watch.Feed(stalled(), stop, speed=None))
        seen = [next(items) for _ in range(3)]
        stop.set()
        started = time.monotonic()
        assert list(items) == []
        assert time.monotonic() - started < 5.0
        silence.set()
        assert len(seen) == 3

    def test_what_goes_wrong_there_is_raised_here(self):
        def broken():
            yield from _frames(2)
            raise UserError("the camera is gone")

        with pytest.raises(UserError, match="the camera is gone"):
            list(watch.Feed(broken(), threading.Event(), speed=None))


@pytest.mark.usefixtures("long_queue")
def test_a_live_source_is_put_after_what_is_there(tmp_path, scenes_video, monkeypatch):
    builder = build.make_builder(build.Settings("keep_recent", slots=64), toy_perception())
    read = watch.decode.read
    monkeypatch.setattr(watch, "_options", lambda source: {})
    monkeypatch.setattr(
        watch.decode, "read", lambda source, **keys: read(scenes_video, fps=keys["fps"])
    )
    for clips in (10, 20):
        done = watch.watch(builder, "rtsp://somewhere/live", tmp_path)
        assert done.counts.seen == clips
    with store.open_store(tmp_path, done.video_id) as video:
        records = store.read_clips(video)
    for before, after in itertools.pairwise(records):
        assert before.span[1] == pytest.approx(after.span[0])
    assert records[-1].span[1] == pytest.approx(40.0, abs=0.5)


def test_an_unreachable_source_is_one_line(toy_builder, tmp_path):
    with pytest.raises(UserError, match="rtsp://127.0.0.1:9"):
        watch.watch(toy_builder, "rtsp://127.0.0.1:9/none", tmp_path)
    assert os.listdir(tmp_path) == []
