"""Decoding: which frames come, that a restart changes none, and that bad files end in one line."""

import logging
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmmem_jax.errors import UserError
from mmmem_jax.perception import decode
from mmmem_jax.perception.decode import Frame, probe, read
from mmmem_jax.perception.subtitles import Cue
from mmmem_jax.testing.videos import COLOURS, srt, write_audio, write_video

SCENES = (1.3, 2.0, 3.1)
# Name and how it is written: containers that tell times in different ways, codecs that reorder.
KINDS = {
    "h264.mp4": {"options": {"g": "20"}},
    "open.mp4": {"options": {"x264-params": "open-gop=1:keyint=24:bframes=5"}, "fps": 30},
    "turned.mov": {"codec": "mpeg4", "options": {"bf": "2", "g": "20"}, "turn": 90},
    "h264.mkv": {"options": {"g": "10"}, "times": [i / 7 + i % 3 / 50 for i in range(44)]},
    "late.ts": {"options": {"g": "12", "bf": "3"}, "first_time": 5.0},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}, "fps": 25},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "15"}},
    "mjpeg.avi": {"codec": "mjpeg"},
    "untimed.h264": {},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_video(folder / name, scenes=SCENES, **how) for name, how in KINDS.items()}


def frames_of(*args, **kwargs) -> list[Frame]:
    kwargs = {"short_side": 48, **kwargs}
    return [item for item in read(*args, **kwargs) if isinstance(item, Frame)]


def assert_same(found: list[Frame], expected: list[Frame]):
    assert [f.time for f in found] == [f.time for f in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.image, b.image)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fps", [5.0, 7.3])
def test_leaving_out_pictures_changes_no_frame(videos, name, fps, monkeypatch):
    found = frames_of(videos[name], fps=fps)
    monkeypatch.setattr(decode, "_SKIPPABLE", frozenset())
    assert_same(found, frames_of(videos[name], fps=fps))


@pytest.mark.parametrize("name", KINDS)
def test_reading_from_any_time_gives_the_same_frames(videos, name):
    whole = frames_of(videos[name])
    times = [frame.time for frame in whole]
    for start in [*times[1::4], *np.arange(0.1, 6.5, 0.77), 1000.0]:
        rest = frames_of(videos[name], start=float(start))
        assert_same(rest, [frame for frame in whole if frame.time >= start])


def test_seeks_in_what_can_be_sought(videos):
    for name in KINDS:
        with decode._open(str(videos[name])) as container:
            stream = decode._video_stream(container, name)
            assert decode._seek(container, stream, 5.0) == (name != "untimed.h264"), name


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12).map(lambda d: np.cumsum([0, *d]) / 40),
    st.sampled_from([2.0, 5.0, 10.0]),
    st.sampled_from([0.0, 3.0]),
)
def test_yields_the_first_frame_of_each_tick(tmp_path, times, fps, first_time):
    path = write_video(tmp_path / "a.mkv", times=times, scenes=(99,), fps=40, first_time=first_time)
    firsts = {}
    for time in np.round(times, 3):
        firsts.setdefault(int(time * fps + 1e-6), time)
    assert [f.time for f in frames_of(path, fps=fps)] == pytest.approx(list(firsts.values()))


def test_images_are_upright_rgb_of_the_scene_shown(tmp_path):
    path = write_video(tmp_path / "a.mp4", scenes=(1.0, 1.0, 1.0), size=(96, 48))
    for frame in read(path, short_side=64):
        assert frame.image.shape == (64, 128, 3)
        assert frame.image.dtype == np.uint8
        ground = COLOURS[int(frame.time + 1e-6)]
        np.testing.assert_allclose(frame.image[-8:].mean((0, 1)), ground, atol=12)


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_turns_the_picture_as_the_file_says(tmp_path, turn):
    plain = frames_of(write_video(tmp_path / "a.mp4", scenes=(1.0,)))
    path = write_video(tmp_path / "b.mp4", scenes=(1.0,), turn=turn)
    for frame, expected in zip(frames_of(path), plain, strict=True):
        np.testing.assert_array_equal(frame.image, np.rot90(expected.image, turn // 90))
    height, width = frame.image.shape[:2]
    assert probe(path)[1:3] == ((width, height) if turn == 180 else (48, 64))


def test_makes_pixels_square(tmp_path):
    path = write_video(tmp_path / "a.mp4", aspect=Fraction(2, 1))
    assert probe(path)[1:3] == (128, 48)
    assert frames_of(path)[0].image.shape == (48, 128, 3)


def test_probe_tells_what_the_header_says(videos):
    info = probe(videos["mjpeg.avi"])
    assert info == (pytest.approx(6.4), 64, 48, 10.0)
    assert probe(videos["untimed.h264"]).duration is None


CAPTIONS = [(0.5, 1.5, "<i>Hello</i> there"), (1.2, 3.9, "still here"), (3.5, 3.8, "bye")]
CUES = [Cue(0.5, 1.5, "Hello there"), Cue(1.2, 3.9, "still here"), Cue(3.5, 3.8, "bye")]


def test_embedded_captions_come_with_the_frames(tmp_path):
    path = write_video(tmp_path / "a.mkv", captions=CAPTIONS, options={"g": "10"})
    items = list(read(path))
    assert [item for item in items if isinstance(item, Cue)] == CUES
    for cue in CUES:
        before = [f.time for f in items[: items.index(cue)] if isinstance(f, Frame)]
        assert max(before) <= cue.t0
    for start in (0.7, 1.5, 3.0, 3.85):
        cues = [item for item in read(path, start=start) if isinstance(item, Cue)]
        assert cues == [cue for cue in CUES if cue.t1 > start]


@pytest.mark.parametrize("first_time", [0.0, 90000.0])
def test_goes_on_where_timestamps_jump(tmp_path, first_time):
    how = {"scenes": SCENES, "options": {"g": "12", "bf": "2"}}
    once = write_video(tmp_path / "a.ts", **how)
    other = write_video(tmp_path / "b.ts", first_time=first_time, **how)
    twice = tmp_path / "twice.ts"
    twice.write_bytes(once.read_bytes() + other.read_bytes())
    first, found = frames_of(once), frames_of(twice)
    assert_same(found[: len(first)], first)
    times = [frame.time for frame in found]
    assert max(np.diff(times)) < 0.35
    # But for the 25 frames that it takes to see the jump.
    assert times[-1] == pytest.approx(6.4 + 6.4 - 2.5 - 0.1, abs=0.3)
    np.testing.assert_array_equal(found[-1].image[-1, 0], first[-1].image[-1, 0])
    for start in (times[5], times[len(first) + 3], times[-2]):
        rest = [frame for frame in found if frame.time >= start]
        assert_same(frames_of(twice, start=start), rest)


@pytest.mark.parametrize("jump", [-50, -3, 3 * 86400])
def test_captions_jump_with_the_frames(jump):
    stream = SimpleNamespace(
        start_time=900, time_base=Fraction(1, 10), average_rate=Fraction(10), guessed_rate=None
    )
    clock = decode._Clock(stream)

    def stamped(seconds):
        return SimpleNamespace(pts=900 + round(seconds * 10), dts=None, time_base=Fraction(1, 10))

    told = [clock.next(stamped(i / 10)) for i in range(60)]
    assert told == pytest.approx(np.arange(60) / 10)
    told = [clock.next(stamped(6 + jump + i / 10)) for i in range(60)]
    lost = told.count(None)
    assert told[lost:] == pytest.approx(6 + np.arange(60 - lost) / 10)
    assert lost <= 30
    cue = stamped(6 + jump + 8.0)
    assert clock.of(cue) == pytest.approx(6 + 8.0 - lost / 10)


def refused(path) -> str:
    """The one line that both ways to open a video refuse `path` with."""
    messages = []
    for use in (probe, lambda source: next(read(source))):
        with pytest.raises(UserError, match=r"^[^\n]+$") as error:
            use(path)
        messages.append(str(error.value))
    assert len(set(messages)) == 1
    assert str(path) in messages[0]
    return messages[0]


def test_refuses_what_is_no_video(tmp_path, videos):
    assert "No such file" in refused(tmp_path / "absent.mp4")
    (tmp_path / "empty.mp4").touch()
    assert "empty" in refused(tmp_path / "empty.mp4")
    (tmp_path / "folder.mp4").mkdir()
    assert "Is a directory" in refused(tmp_path / "folder.mp4")
    assert "only audio" in refused(write_audio(tmp_path / "a.wav"))
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    assert "cannot be read as a video" in refused(tmp_path / "noise.mp4")
    (tmp_path / "note.txt").write_text("not a film\n" * 100)
    assert "is no video" in refused(tmp_path / "note.txt")
    (tmp_path / "a.srt").write_text(srt(CAPTIONS))
    assert "only subtitle" in refused(tmp_path / "a.srt")
    # Its index lies at the end.
    whole = videos["h264.mp4"].read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as a video" in refused(tmp_path / "cut.mp4")


def test_a_playlist_fetches_nothing(tmp_path):
    play = tmp_path / "a.mp4"
    play.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nhttp://127.0.0.1:9/x.ts\n")
    refused(play)


def blank_pictures(data: bytearray, count: int = -1) -> int:
    """Overwrites the JPEG pictures of `data` with zeros, from the middle if not all; how many."""
    blanked, at = 0, 0 if count < 0 else len(data) // 2
    while blanked != count and (at := data.find(b"\xff\xd8", at)) >= 0:
        end = data.index(b"\xff\xd9", at) + 2
        data[at:end] = bytes(end - at)
        blanked += 1
    return blanked


def test_refuses_huge_pictures_before_decoding(tmp_path, videos, monkeypatch):
    path = tmp_path / "a.avi"
    data = bytearray(videos["mjpeg.avi"].read_bytes())
    at = 0
    while (at := data.find(b"\xff\xc0", at + 1)) >= 0:  # start of frame: ..., height, width
        data[at + 5 : at + 9] = np.array([60000, 60000], ">u2").tobytes()
    path.write_bytes(data)
    assert "larger than 8192x8192" in refused(path)
    monkeypatch.setattr(decode, "_MAX_PIXELS", 64 * 48 - 1)
    assert "64x48 pixels are more than" in refused(videos["h264.mp4"])
    assert "larger than" in refused(videos["mpeg2.ts"])  # only its decoder tells the size


def test_yields_what_is_left_of_a_cut_file_and_warns_once(tmp_path, videos, caplog):
    whole = videos["h264.mkv"].read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        found = frames_of(tmp_path / "cut.mkv")
    expected = frames_of(videos["h264.mkv"])
    assert 3 < len(found) < len(expected)
    assert_same(found, expected[: len(found)])
    (record,) = caplog.records
    assert "cut short" in record.getMessage()


def test_skips_damage_and_counts_it(tmp_path, videos, caplog):
    data = bytearray(videos["mjpeg.avi"].read_bytes())
    assert blank_pictures(data, 1) == 1
    path = tmp_path / "a.avi"
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        found = frames_of(path, fps=10.0)
    assert len(found) == len(frames_of(videos["mjpeg.avi"], fps=10.0)) - 1
    (record,) = caplog.records
    assert "1 damaged" in record.getMessage()


def test_refuses_a_video_in_which_nothing_decodes(tmp_path, videos):
    data = bytearray(videos["mjpeg.avi"].read_bytes())
    assert blank_pictures(data) == 64
    path = tmp_path / "a.avi"
    path.write_bytes(data)
    assert "no picture that can be decoded" in refused(path)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["h264.mp4", "h264.mkv", "late.ts", "mpeg4.avi", "mjpeg.avi", "turned.mov"]),
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=8
    ),
    st.floats(0, 2).map(lambda share: min(share, 1.0)),
    st.sampled_from([0.0, 2.5]),
)
def test_any_damage_gives_frames_or_a_user_error(tmp_path, videos, name, edits, share, start):
    data = videos[name].read_bytes()
    for where, removed, added in edits:
        at = int(where * len(data))
        data = data[:at] + added + data[at + removed :]
    path = tmp_path / name
    path.write_bytes(data[: int(share * len(data))])
    last = -1.0
    try:
        for frame in frames_of(path, short_side=16, start=start):
            assert frame.time > last
            assert min(frame.image.shape[:2]) == 16
            last = frame.time
        probe(path)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 (no error is right as well)
