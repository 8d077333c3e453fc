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


def read_from(frames, start):
    """As `decode.read` starts: with the picture on screen, if the next one comes much later."""
    rest = [f for f in frames if f.time >= start]
    held = [f for f in frames if f.time < start][-1:]
    if rest and held and decode.is_held(start, rest[0].time, FPS):
        rest.insert(0, held[0]._replace(time=start))
    return rest


@settings(deadline=None, max_examples=40)
@given(scenes, gaps)
def test_clips_tile_the_stream(scenes, gaps):
    frames = stream_of(scenes, gaps)
    found = list(clips(frames, fps=FPS))
    assert [clip.index for clip in found] == list(range(len(found)))
    times = {f.time for f in frames}
    shown = [f for clip in found for f in clip.frames]
    assert [f.time for f in shown if f.time in times] == [f.time for f in frames]
    for clip, after in zip(found, found[1:], strict=False):
        assert clip.span[1] == after.span[0]
    for clip in found:
        assert clip.span[0] == clip.frames[0].time
        assert all(clip.span[0] <= f.time < clip.span[1] for f in clip.frames)
        assert all(f.time in times for f in clip.frames[1:])
        assert clip.span[1] - clip.span[0] < 10.0 + 1.0
        if clip.frames[0].time not in times:
            last = max(f.time for f in frames if f.time < clip.span[0])
            np.testing.assert_array_equal(
                clip.frames[0].image, next(f.image for f in frames if f.time == last)
            )
    assert found[0].span[0] == 0.0
    assert found[-1].span[1] == pytest.approx(frames[-1].time + 0.2)


def frames_at(*times):
    return [Frame(time, scene_image(0, 0)) for time in times]


def test_a_picture_is_held_until_the_next_one():
    found = list(clips(frames_at(0.0, 25.0, 35.5), [Cue(15.0, 18.0, "a")], fps=FPS))
    assert [c.span for c in found] == [(0, 10), (10, 20), (20, 30), (30, pytest.approx(35.7))]
    assert [len(c.cues) for c in found] == [0, 1, 0, 0]
    # What comes soon after the longest clip's end makes it a little longer.
    found = list(clips(frames_at(0.0, 10.9, 12.0), fps=FPS))
    assert [c.span for c in found] == [(0, 10.9), (10.9, 12.2)]


def test_nothing_is_shown_where_no_picture_comes_for_hours():
    cue = Cue(2000.0, 2001.0, "off")
    found = list(clips(frames_at(0.0, 3610.5), [cue], fps=FPS))
    assert [c.span for c in found] == [(0, 10), (3610.5, 3610.7)]
    assert [c.cues for c in found] == [(cue,), ()]
    assert len(list(clips(frames_at(0.0, 3609.5), [cue], fps=FPS))) == 361


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=4).map(np.cumsum),
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 50)), max_size=8),
)
def test_every_cue_is_in_some_clip(times, rows):
    cues = [Cue(float(t), float(t + d), f"{t}+{d}") for t, d in rows]
    found = list(clips(frames_at(0.0, *map(float, times)), cues, fps=FPS))
    assert {cue for clip in found for cue in clip.cues} == set(cues)


@settings(deadline=None, max_examples=40)
@given(scenes, gaps, st.data())
def test_going_on_at_any_clip_gives_the_same_clips(scenes, gaps, data):
    frames = stream_of(scenes, gaps)
    cues = [Cue(i * 3.0, i * 3.0 + 7.0, str(i)) for i in range(20)]
    whole = list(clips(frames, cues, fps=FPS))
    done = data.draw(st.integers(0, len(whole) - 1))
    rest = read_from(frames, whole[done].span[1])
    again = list(clips(rest, cues, fps=FPS, first_index=done + 1))
    assert again == whole[done + 1 :]
    rest = read_from(frames, whole[done].span[0])
    again = list(clips(rest, cues, fps=FPS, first_index=done, first_end=whole[done].span[1]))
    assert again == whole[done:]


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
        end = clip.span[1] if clip.span[1] < 22.0 else np.inf  # of the last: all that are left
        expected = sorted(c for c in cues if c.t0 < end and c.t1 > clip.span[0])
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


def test_going_on_in_a_file_of_few_pictures_gives_the_same_clips(tmp_path):
    times = [0.0, 0.1, 4.0, 4.1, 40.0, 40.1, 63.3, 63.4, 64.0]
    path = write_video(
        tmp_path / "a.mkv", times=times, scenes=(4.0, 36.0, 30.0), options={"g": "1"},
        captions=[(20.0, 25.0, "held"), (62.0, 64.0, "both")],
    )  # fmt: skip
    whole = list(clips(decode.read(path)))
    assert [clip.span[0] for clip in whole] == pytest.approx([0, 4, 14, 24, 34, 40, 50, 60])
    assert [len(clip.cues) for clip in whole] == [0, 0, 1, 1, 0, 0, 0, 1]
    for clip in whole:
        rest = clips(
            decode.read(path, start=clip.span[0]), first_index=clip.index, first_end=clip.span[1]
        )
        for found, expected in zip(rest, whole[clip.index :], strict=True):
            assert found[:2] == expected[:2]
            assert found.cues == expected.cues
            assert [f.time for f in found.frames] == [f.time for f in expected.frames]
            np.testing.assert_array_equal(
                [f.image for f in found.frames], [f.image for f in expected.frames]
            )
