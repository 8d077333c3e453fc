"""Clips to items: what is looked at, what the memory gets."""

import numpy as np
import pytest

from mmmem_jax.perception import lite, segment
from mmmem_jax.perception.decode import Frame, read
from mmmem_jax.perception.subtitles import Cue
from mmmem_jax.testing.perception import NAMES, toy_perception
from mmmem_jax.testing.videos import scene_image, write_video


@pytest.fixture(scope="module")
def perception():
    return toy_perception()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    video = write_video(tmp_path_factory.mktemp("lite") / "a.mp4", scenes=(3.0, 3.0, 3.0))
    return list(segment.clips(read(str(video))))


def test_items_are_what_the_memory_takes(perception, clips):
    percepts = lite.perceive(perception, clips)
    for clip, percept in zip(clips, percepts, strict=True):
        item = percept.item
        for vector in (item.visual, item.coarse, item.text):
            assert vector.shape == (lite.DIM,)
            assert vector.dtype == np.float32
            assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
        assert item.mention.shape == (lite.NUM_MENTIONS, lite.DIM)
        assert item.mention_valid.sum() == len(percept.labels) == 1
        assert percept.labels[0][0] == NAMES[clip.index % len(NAMES)]
        assert tuple(item.span) == pytest.approx(clip.span)
        assert item.trace_id == clip.index
        assert item.tokens > 0
        assert percept.key_frames
        assert all(any(k is f for f in clip.frames) for k in percept.key_frames)


def test_clips_seen_together_or_one_by_one_are_the_same(perception, clips):
    together = lite.perceive(perception, clips)
    before = None
    for clip, whole in zip(clips, together, strict=True):
        (alone,) = lite.perceive(perception, [clip], before)
        before = alone.item.coarse
        assert alone.caption == whole.caption
        for name in ("visual", "coarse", "text", "change"):
            np.testing.assert_allclose(
                getattr(alone.item, name), getattr(whole.item, name), atol=1e-5
            )


def test_change_is_told_of_the_clip_before(perception, clips):
    first, second, _ = lite.perceive(perception, clips)
    assert first.item.change == 1.0
    assert second.item.change == pytest.approx(1 - first.item.coarse @ second.item.coarse)


def test_a_caption_that_two_cues_share_is_told_once(perception, clips):
    cues = (Cue(0.0, 1.0, "hello"), Cue(1.0, 2.0, "hello"), Cue(2.0, 3.0, "bread"))
    (percept,) = lite.perceive(perception, [clips[0]._replace(cues=cues)])
    assert percept.subtitles == "hello bread"


def test_each_level_sees_its_own_rate():
    frames = tuple(Frame(3.0 + i / 5, scene_image(0, i)) for i in range(50))
    views = lite._choose_views(segment.Clip(0, (3.0, 13.0), frames, ()))
    times = np.array([frame.time for frame in views.frames])
    assert len(views.episodic) == 20
    assert np.diff(times[views.episodic]).max() <= 0.6 + 1e-6
    assert np.diff(times[views.schema]) == pytest.approx([1.0] * 9)
    assert (np.diff(times[views.sensory]) == pytest.approx(0.2)) or len(views.key) > 1
    assert {frame.time for frame in views.key} <= set(times[views.sensory])
    assert len(set(times)) == len(times)


def test_one_frame_is_a_clip(perception):
    clip = segment.Clip(0, (0.0, 0.2), (Frame(0.0, scene_image(1, 0)),), ())
    (percept,) = lite.perceive(perception, [clip])
    assert percept.key_frames == clip.frames
    assert percept.caption == "A green field, mostly green, not moving."
