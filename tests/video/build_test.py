"""From a file to a memory: what is kept, what is refused, what a kill costs."""

import itertools
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from mmmem_jax import store
from mmmem_jax.errors import UserError
from mmmem_jax.testing.perception import NAMES, toy_perception
from mmmem_jax.testing.videos import write_video
from mmmem_jax.video import build

KILLED = """
import os, signal, sys
from pathlib import Path
from mmmem_jax import store
from mmmem_jax.testing.perception import toy_perception
from mmmem_jax.video import build

append, left = store.append, int(sys.argv[3])

def append_and_die(*args, **kwargs):
    global left
    append(*args, **kwargs)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

store.append = append_and_die
builder = build.make_builder(build.Settings("keep_recent", slots=64), toy_perception())
build.build(builder, sys.argv[1], Path(sys.argv[2]))
"""


def _records(memory, video_id="scenes"):
    with store.open_store(memory, video_id) as video:
        return store.read_clips(video), store.load_state(video), store.progress(video)


def test_clips_follow_each_other_and_name_what_is_seen(toy_builder, scenes_video, tmp_path):
    built = build.build(toy_builder, str(scenes_video), tmp_path / "memory")
    records, state, progress = _records(tmp_path / "memory")
    assert built.counts.seen == len(records) == progress.clips == 10
    assert progress.finished
    assert built.seconds_of_video == pytest.approx(20.0, abs=0.2)
    for before, after in itertools.pairwise(records):
        assert before.span[1] == after.span[0]
    for i, record in enumerate(records):
        assert record.labels[0][0] == NAMES[i % 5]
        assert NAMES[i % 5] in record.caption
        assert record.frames
        assert all(record.span[0] <= time < record.span[1] for time, _ in record.frames)
        with store.open_store(tmp_path / "memory", "scenes") as video:
            assert store.read_frame(video, record.frames[0][1])[:3] == b"\xff\xd8\xff"
    with store.open_store(tmp_path / "memory", "scenes") as video:
        named = {e.name: e.mentions for e in store.entities(video, state)}
    assert named == dict.fromkeys(NAMES, 2)
    assert set(built.stages) == set(build.STAGES)
    assert "10 clips" in build.told(built)


@pytest.mark.parametrize("clips", [1, 6])
def test_killed_and_resumed_is_as_never_killed(toy_builder, scenes_video, tmp_path, clips):
    build.build(toy_builder, str(scenes_video), tmp_path / "whole")
    script = [sys.executable, "-c", KILLED, str(scenes_video), str(tmp_path / "killed"), str(clips)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    _, _, progress = _records(tmp_path / "killed")
    assert (progress.clips, progress.finished) == (clips, False)
    build.build(toy_builder, str(scenes_video), tmp_path / "killed")
    whole, killed = _records(tmp_path / "whole"), _records(tmp_path / "killed")
    assert whole[2] == killed[2]
    for a, b in zip(whole[0], killed[0], strict=True):
        plain = {"frames": (), "item": None}
        assert a._replace(**plain) == b._replace(**plain)
        jax.tree.map(np.testing.assert_array_equal, a.item, b.item)
    jax.tree.map(np.testing.assert_array_equal, whole[1], killed[1])


def test_a_finished_video_is_not_read_again(toy_builder, scenes_video, tmp_path):
    first = build.build(toy_builder, str(scenes_video), tmp_path)
    again = build.build(toy_builder._replace(perceive=None), str(scenes_video), tmp_path)
    assert again.counts == first.counts
    assert again.seconds_of_video == 0
    assert "was remembered already" in build.told(again)


def test_a_name_is_of_one_source_and_its_settings(toy_builder, scenes_video, tmp_path):
    build.build(toy_builder, str(scenes_video), tmp_path / "memory")
    other = write_video(tmp_path / "scenes.mp4", scenes=(1.0, 1.0))
    with pytest.raises(UserError, match="another fingerprint.*--again.*--name"):
        build.build(toy_builder, str(other), tmp_path / "memory")
    merging = build.make_builder(build.Settings("similarity_merge", 64), toy_perception())
    with pytest.raises(UserError, match="another policy"):
        build.build(merging, str(scenes_video), tmp_path / "memory")
    assert _records(tmp_path / "memory")[2].clips == 10
    build.build(toy_builder, str(other), tmp_path / "memory", name="second")
    assert store.list_videos(tmp_path / "memory") == ("scenes", "second")
    build.build(merging, str(scenes_video), tmp_path / "memory", again=True)
    assert _records(tmp_path / "memory")[2].clips == 10


def test_subtitles_go_with_the_clips_they_overlap(toy_builder, scenes_video, tmp_path):
    captions = tmp_path / "words.srt"
    captions.write_text("1\n00:00:01,000 --> 00:00:03,000\nhello bread\n")
    build.build(toy_builder, str(scenes_video), tmp_path / "memory", subtitle_file=captions)
    records, _, _ = _records(tmp_path / "memory")
    assert [i for i, r in enumerate(records) if r.subtitles] == [0, 1]
    assert 'Subtitle: "hello bread"' in records[0].caption


def test_other_subtitles_are_another_memory(toy_builder, scenes_video, tmp_path):
    captions = tmp_path / "words.srt"
    captions.write_text("1\n00:00:01,000 --> 00:00:03,000\nhello bread\n")
    build.build(toy_builder, str(scenes_video), tmp_path / "memory")
    with pytest.raises(UserError, match="another subtitles"):
        build.build(toy_builder, str(scenes_video), tmp_path / "memory", subtitle_file=captions)


def test_broken_subtitles_leave_no_memory(toy_builder, scenes_video, tmp_path):
    (tmp_path / "broken.srt").write_text("1\n00:00:99,000 --> soon\nhello\n")
    with pytest.raises(UserError, match="broken.srt"):
        build.build(
            toy_builder, str(scenes_video), tmp_path / "m", subtitle_file=tmp_path / "broken.srt"
        )
    assert not (tmp_path / "m").exists()


def test_a_bad_video_leaves_the_memory_as_it_was(toy_builder, scenes_video, tmp_path):
    build.build(toy_builder, str(scenes_video), tmp_path / "memory")
    before = {p: p.read_bytes() for p in (tmp_path / "memory").rglob("*") if p.is_file()}
    (tmp_path / "bad.mp4").write_bytes(scenes_video.read_bytes()[:100])
    with pytest.raises(UserError, match="bad.mp4"):
        build.build(toy_builder, str(tmp_path / "bad.mp4"), tmp_path / "memory")
    after = {p: p.read_bytes() for p in (tmp_path / "memory").rglob("*") if p.is_file()}
    assert before == after


class TestAhead:
    def test_gives_the_same_in_order(self):
        assert list(build.ahead((i for i in range(100)), 3)) == list(range(100))

    def test_is_at_most_so_far_ahead(self):
        made = []

        def make():
            for i in range(50):
                made.append(i)
                yield i

        items = build.ahead(make(), 2)
        for i in items:
            assert len(made) <= i + 5  # two wait, one is in the maker's hand, one in ours
        assert len(made) == 50

    def test_an_error_comes_out_where_the_items_do(self):
        def make():
            yield 1
            raise UserError("no more")

        items = build.ahead(make(), 2)
        assert next(items) == 1
        with pytest.raises(UserError, match="no more"):
            next(items)

    def test_closing_ends_the_thread(self):
        threads = threading.active_count()
        items = build.ahead(itertools.count(), 2)
        next(items)
        items.close()
        assert threading.active_count() == threads


def test_a_seeded_policy_decides_the_same_again(scenes_video, tmp_path):
    builder = build.make_builder(build.Settings("reservoir", slots=8), toy_perception())
    for name in ("a", "b"):
        build.build(builder, str(scenes_video), tmp_path / name)
    a, b = _records(tmp_path / "a"), _records(tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])
