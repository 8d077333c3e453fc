"""Clips: they tile the stream, end at cuts, are the same after a restart, and hold their cues."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax.perception import decode
from mmmem_jax.perception.decode import Frame
from mmmem_jax.perception.segment import clips
from mmmem_jax.perception.subtitles import Cue
from mmmem_jax.testing.videos import scene_image, write_video

FPS = 5.0


def stream_of(scenes, gaps=()):
    """Frames of scenes of so many frames each; after each frame of `gaps` a long pause."""
    frames, number, time = [], 0, 0.0
    for scene, length in enumerate(scenes):
        for step in range(length):
            frames.append(Frame(time, scene_image(scene, step)))
            number += 1
            time = round(time + (13.0 if number in gaps else 0.2), 6)
    return frames


scenes = st.lists(st.integers(1, 70), min_size=1, max_size=6)
gaps = st.sets(st.integers(1, 100), max_size=2)


@settings(deadline=None, max_examples=40)
@given(scenes, gaps)
def test_clips_tile_the_stream(scenes, gaps):
    frames = stream_of(scenes, gaps)
    found = list(clips(frames, fps=FPS))
    assert [clip.index for clip in found] == list(range(len(found)))
    assert [f.time for clip in found for f in clip.frames] == [f.time for f in frames]
    for clip, after in zip(found, found[1:], strict=False):
        assert clip.span[1] == min(after.frames[0].time, clip.span[0] + 10.0)
    for clip in found:
        assert clip.span[0] == clip.frames[0].time
        assert all(clip.span[0] <= f.time < clip.span[1] for f in clip.frames)
        assert clip.span[1] - clip.span[0] <= 10.0 + 1e-9
    assert found[-1].span[1] == pytest.approx(frames[-1].time + 0.2)


@settings(deadline=None, max_examples=40)
@given(scenes, gaps, st.data())
def test_going_on_at_any_clip_gives_the_same_clips(scenes, gaps, data):
    frames = stream_of(scenes, gaps)
    cues = [Cue(i * 3.0, i * 3.0 + 7.0, str(i)) for i in range(20)]
    whole = list(clips(frames, cues, fps=FPS))
    done = data.draw(st.integers(0, len(whole) - 1))
    rest = [f for f in frames if f.time >= whole[done].span[1]]
    again = list(clips(rest, cues, fps=FPS, first_index=done + 1))
    assert again == whole[done + 1 :]


@settings(deadline=None, max_examples=40)
@given(scenes, st.integers(0, 80))
def test_the_first_clip_ends_where_it_is_told(scenes, after):
    frames = stream_of(scenes)
    end = round(after / FPS, 6)
    before = tuple(frame for frame in frames if frame.time < end)
    rest = list(clips([f for f in frames if f.time >= end], fps=FPS, first_index=8))
    found = list(clips(frames, fps=FPS, first_index=7, first_end=end))
    if before:
        assert found.pop(0) == (7, (0.0, end), before, ())
    assert found == rest


def test_a_clip_ends_at_a_cut_unless_it_is_short():
    starts = [clip.span[0] for clip in clips(stream_of([15, 3, 20, 60]), fps=FPS)]
    # Cuts at 3.0, 3.6 and 7.6; the scene of 0.6 s stays with what follows; the last is over 10 s.
    assert starts == pytest.approx([3.0 - 3.0, 3.0, 7.6, 17.6])


def test_a_higher_threshold_cuts_less():
    frames = [
        Frame(i / FPS, np.full((48, 64, 3), 90 + 60 * (i >= 10), np.uint8)) for i in range(20)
    ]
    assert len(list(clips(frames, fps=FPS, threshold=10.0))) == 2
    assert len(list(clips(frames, fps=FPS, threshold=60.0))) == 1


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), max_size=8, unique=True),
    st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_cues_go_with_every_clip_they_overlap(rows, embedded):
    cues = [Cue(t / 10, (t + d) / 10, f"{t}+{d}") for t, d in rows]
    inside = [cue for cue, is_inside in zip(cues, embedded, strict=False) if is_inside]
    beside = [cue for cue in cues if cue not in inside]
    stream = sorted(
        [*stream_of([30, 60, 20]), *inside],
        key=lambda item: item[0] + isinstance(item, Frame) / 1e6,
    )
    for clip in clips(stream, beside, fps=FPS):
        expected = sorted(c for c in cues if c.t0 < clip.span[1] and c.t1 > clip.span[0])
        assert list(clip.cues) == expected


def test_no_frames_give_no_clips():
    assert list(clips([Cue(0.0, 1.0, "unseen")])) == []


def test_going_on_in_a_file_gives_the_same_clips(tmp_path):
    path = write_video(
        tmp_path / "a.mkv", scenes=(3.0, 1.5, 12.0, 0.5, 2.0), options={"g": "25"},
        captions=[(0.5, 9.0, "long"), (3.2, 4.0, "short"), (10.0, 18.0, "late")],
    )  # fmt: skip
    whole = list(clips(decode.read(path)))
    assert [cue.text for cue in whole[1].cues] == ["long", "short"]
    for clip in whole:
        rest = clips(decode.read(path, start=clip.span[1]), first_index=clip.index + 1)
        for found, expected in zip(rest, whole[clip.index + 1 :], strict=True):
            assert found.index == expected.index
            assert found.span == expected.span
            assert found.cues == expected.cues
            np.testing.assert_array_equal(
                [f.image for f in found.frames], [f.image for f in expected.frames]
            )
