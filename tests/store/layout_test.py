"""Names of videos and paths inside a memory folder."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmmem_jax.errors import UserError
from mmmem_jax.store import layout


@pytest.mark.parametrize(
    ("path", "video_id"),
    [
        ("/videos/holiday.mp4", "holiday"),
        ("holiday.2024-05.mkv", "holiday.2024-05"),
        ("my holiday.mp4", "my_holiday"),
        ("/dev/video0", "video0"),
        ("rtsp://user:secret@camera.local/stream/1", "camera.local_stream_1"),
    ],
)
def test_plain_names_stay(path, video_id):
    assert layout.video_id_of(path) == video_id


@pytest.mark.parametrize("path", ["été.mp4", "猫.mp4", "...", "", "x" * 300, "a:b.mp4", ".hidden"])
def test_other_names_are_told_apart(path):
    found = layout.video_id_of(path)
    assert layout.video_folder("memory", found).name == found


def test_names_that_only_differ_in_what_is_lost_stay_apart():
    assert len({layout.video_id_of(x) for x in ("ete.mp4", "été.mp4", "猫.mp4", "犬.mp4")}) == 4
    assert layout.video_id_of("y" * 100 + "1.mp4") != layout.video_id_of("y" * 100 + "2.mp4")


def test_cameras_of_one_host_stay_apart():
    ends = ("/live", ":8554/live", ":8555/live", "/live?channel=2", ":8554/live?channel=2")
    found = [layout.video_id_of(f"rtsp://camera{end}") for end in ends]
    assert len(set(found)) == len(ends)
    assert all(re.fullmatch("camera_live(-[0-9a-f]{8})?", name) for name in found)
    # Not by who asks.
    assert [layout.video_id_of(f"rtsp://user:secret@camera{end}") for end in ends] == found


def test_a_wrong_port_is_refused():
    with pytest.raises(UserError, match="is no URL"):
        layout.video_id_of("rtsp://camera:99999/live")


@given(st.text())
def test_ids_are_safe_names(path):
    found = layout.video_id_of(path)
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", found)
    assert found == layout.video_id_of(path)


@pytest.mark.parametrize("name", ["..", "a/../..", "/etc/passwd", "a\0b", "../a"])
def test_paths_that_leave_the_folder(name, tmp_path):
    with pytest.raises(UserError, match="outside"):
        layout.join(tmp_path, name)


@given(st.text())
def test_joined_paths_lie_inside(name):
    folder = Path("/nowhere/memory")
    with contextlib.suppress(UserError):
        assert layout.join(folder, name).resolve().is_relative_to(folder)


def test_only_videos_are_listed(tmp_path):
    for name in ("b", "a", ".c.new", "no video", "d"):
        (tmp_path / name).mkdir()
    for name in ("b", "a", ".c.new", "no video"):
        (tmp_path / name / "video.json").write_text("{}")
    (tmp_path / "questions.jsonl").write_text("")
    assert layout.list_videos(tmp_path) == ("a", "b")


def test_the_nearest_ids_are_named(tmp_path):
    for name in ("holiday", "birthday", *(f"v{i}" for i in range(9))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "video.json").write_text("{}")
    with pytest.raises(UserError, match="'holyday'; it holds holiday"):
        layout.find_video(tmp_path, "holyday")
    with pytest.raises(UserError, match="and 6 more"):
        layout.find_video(tmp_path, "zzz")
