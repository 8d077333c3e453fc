"""The whole command line with bad input: one line, exit code 2, and earlier memories untouched."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmmem_jax import cli, store
from mmmem_jax.errors import UserError
from mmmem_jax.models.text_encoder import encode_texts
from mmmem_jax.perception import lite
from mmmem_jax.testing.perception import toy_perception
from mmmem_jax.testing.videos import write_audio, write_video
from mmmem_jax.video import ask as asking
from mmmem_jax.video import build
from tests.conftest import REPO

POLICY = ("--policy", "keep_recent", "--slots", "64")
QUESTION = "where was the red wall?"


@pytest.fixture(scope="module", autouse=True)
def toys():
    """Toy networks in place of the pretrained ones, and the space that these answer in."""
    perception = toy_perception()

    def embed(texts):
        return encode_texts(perception.encoder, perception.tokenizer, texts)[0]

    space = asking.Space(embed, perception.labels.embeddings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lite, "load_perception", lambda: perception)
        patch.setattr(asking, "load_space", lambda: space)
        # The toys were never taught, so that what they are sure of is no measure.
        patch.setattr(asking, "answer", functools.partial(asking.answer, found_at=0.0))
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """10 s: five colours of 2 s."""
    return write_video(tmp_path_factory.mktemp("video") / "scenes.mp4", scenes=(2.0,) * 5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, scenes, toys) -> Path:
    """A memory of one video, of which one question was asked."""
    memory = tmp_path_factory.mktemp("whole") / "memory"
    assert cli.main(["build", str(scenes), "--memory", str(memory), *POLICY]) == 0
    assert cli.main(["ask", QUESTION, "--memory", str(memory)]) == 0
    return memory


@pytest.fixture
def memory(whole, tmp_path) -> Path:
    """The same, free to be damaged."""
    return shutil.copytree(whole, tmp_path / "memory")


@pytest.fixture
def refused(capfd, caplog):
    """Runs a command that fails, and gives the one line it says of that."""

    def run(*args: object, code: int = 2) -> str:
        caplog.clear()
        capfd.readouterr()
        assert cli.main([str(arg) for arg in args]) == code
        said = capfd.readouterr()
        assert said.out == ""
        assert re.fullmatch(r"mmmem: [^\n]+\n", said.err), said.err
        assert said.err.rstrip("\n").isprintable()
        assert caplog.records == []
        return said.err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder (SQLite's shared memory apart, which is of open connections)."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.endswith(("-shm", "-wal"))
    }


def answered(capfd, *args: object) -> dict:
    """What `mmmem ask --json` prints, but for the time it took."""
    capfd.readouterr()
    assert cli.main(["ask", "--json", *map(str, args)]) == 0
    found = json.loads(capfd.readouterr().out)
    del found["seconds"]
    return found


# Videos.


def _scrambled(path: Path, scenes: Path) -> None:
    data = bytearray(scenes.read_bytes())
    start = data.index(b"mdat") + 4
    data[start : data.index(b"moov")] = b"\xa5" * (data.index(b"moov") - start)
    path.write_bytes(data)


BAD_VIDEOS = {
    "empty.mp4": lambda path, scenes: path.write_bytes(b""),
    "header.mp4": lambda path, scenes: path.write_bytes(scenes.read_bytes()[:40]),
    "cut.mp4": lambda path, scenes: path.write_bytes(scenes.read_bytes()[:-400]),
    "scrambled.mp4": _scrambled,
    "huge.y4m": lambda path, scenes: path.write_text("YUV4MPEG2 W65535 H65535 F25:1\nFRAME\n"),
    "sound.wav": lambda path, scenes: write_audio(path),
    "text.mp4": lambda path, scenes: path.write_text("not a video\n" * 100),
    "noise.avi": lambda path, scenes: path.write_bytes(random.Random(0).randbytes(5000)),
    "folder.mp4": lambda path, scenes: path.mkdir(),
    "pipe.mp4": lambda path, scenes: os.mkfifo(path),
    "absent.mp4": lambda path, scenes: None,
    "line\nbreak.mp4": lambda path, scenes: path.write_text("no"),
    "quo'te\".mp4": lambda path, scenes: path.write_text("no"),
    "\x1b[31mred.mp4": lambda path, scenes: path.write_text("no"),
    "été 🎥.mp4": lambda path, scenes: path.write_text("no"),
    os.fsdecode(b"\xff\xfe.mp4"): lambda path, scenes: path.write_text("no"),
    "x" * 250 + ".mp4": lambda path, scenes: path.write_text("no"),
    "x" * 300 + ".mp4": lambda path, scenes: None,
    "playlist.m3u8": lambda path, scenes: path.write_text("#EXTM3U\n#EXTINF:1,\nscenes.mp4\n"),
}


@pytest.mark.parametrize("command", ["build", "watch"])
@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_a_bad_video_changes_nothing(command, name, scenes, memory, tmp_path, refused):
    bad = tmp_path / name
    BAD_VIDEOS[name](bad, scenes)
    before = contents(memory)
    said = refused(command, bad, "--memory", memory, *POLICY)
    assert ascii(name)[1:5] in said or name[:4] in said or "break.mp4" in said
    assert contents(memory) == before
    refused(command, bad, "--memory", tmp_path / "new", *POLICY)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(scenes, tmp_path, refused):
    closed = Path(shutil.copy(scenes, tmp_path))
    closed.chmod(0)
    assert "Permission denied" in refused("build", closed, "--memory", tmp_path / "m", *POLICY)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "name", ["two\nlines.mp4", "quo'te\".mp4", "été 🎥.mp4", "-dash.mp4", os.fsdecode(b"\xff.mp4"),
             "x" * 251 + ".mp4", "a:b?c#d%20.mp4"],
)  # fmt: skip
def test_any_name_of_a_file_is_taken(name, scenes, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copy(scenes, name)
    assert cli.main(["build", "--memory", "m", *POLICY, "--", name]) == 0
    (video_id,) = store.list_videos("m")
    assert answered(capfd, QUESTION, "--memory", "m", f"--video={video_id}")["found"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.mp4", "file:///no/such/file.mp4"])
def test_a_url_is_watched_not_built(url, tmp_path, refused):
    assert "mmmem watch" in refused("build", url, "--memory", tmp_path / "m", *POLICY)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", ".", "..", ".x", "a b", "é", "x" * 65, "\n"])
@pytest.mark.parametrize("command", ["build", "watch"])
def test_a_bad_name(command, name, scenes, tmp_path, refused):
    memory = tmp_path / "sub" / "m"
    said = refused(command, scenes, "--memory", memory, "--name", name, *POLICY)
    assert "no video id" in said
    assert contents(tmp_path) == {}
    assert not memory.exists()


@pytest.mark.parametrize("command", ["build", "watch"])
@pytest.mark.parametrize("place", ["file", "file/below", "/proc/mmmem", "x" * 300, "loop"])
def test_a_memory_folder_that_cannot_be(command, place, scenes, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    said = refused(command, scenes, "--memory", tmp_path / place, *POLICY)
    assert place[:5] in said
    assert "make room" not in said
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.srt", b""),
        ("a.srt", b"1\n00:00:99,000 --> soon\nhello\n"),
        ("a.srt", b"\0\1\2\3" * 100),
        ("a.srt", random.Random(1).randbytes(2000).replace(b"\0", b"")),
        ("a.vtt", b"1\n00:00:01.000 --> 00:00:02.000\nhello\n"),
        ("a.txt", b"hello"),
        ("absent.srt", None),
    ],
)
def test_bad_subtitles(name, data, scenes, memory, tmp_path, refused):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    before = contents(memory)
    path = tmp_path / name
    for folder in (memory, tmp_path / "m"):
        assert name in refused(
            "build", scenes, "--memory", folder, *POLICY, "--again", "--subtitles", path
        )
    assert contents(memory) == before
    assert not (tmp_path / "m").exists()


def test_subtitles_steer_no_terminal(scenes, tmp_path, capfd):
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:09,000\nhello \x1b[2J\x07 bread\n")
    arguments = ["build", scenes, "--memory", tmp_path / "m", *POLICY, "--subtitles"]
    assert cli.main([str(x) for x in (*arguments, tmp_path / "a.srt")]) == 0
    assert cli.main(["ask", "hello bread", "--memory", str(tmp_path / "m")]) == 0
    out = capfd.readouterr().out
    assert "hello" in out
    assert out.replace("\n", "").isprintable()


@pytest.mark.parametrize("policy", ["nonsense", "/proc", "."])
def test_a_bad_policy(policy, scenes, tmp_path, refused):
    refused("build", scenes, "--memory", tmp_path / "m", "--policy", policy)
    assert not (tmp_path / "m").exists()


def test_a_memory_of_another_size_is_not_continued(scenes, memory, refused, monkeypatch):
    """As after an update of the program: the settings are the same, what they mean is not."""
    real = build.Settings.memory_config
    changed = lambda self: dataclasses.replace(real(self), max_node_tokens=128)  # noqa: E731
    monkeypatch.setattr(build.Settings, "memory_config", changed)
    assert "size of memory" in refused("build", scenes, "--memory", memory, *POLICY)


# A full disk, and an interrupt.


def test_an_interrupted_build_goes_on(scenes, whole, tmp_path, refused, monkeypatch):
    real = store.append

    def append(video, record, *args, **kwargs):
        if record.index == 3:
            signal.raise_signal(signal.SIGINT)
        real(video, record, *args, **kwargs)

    memory = tmp_path / "memory"
    with monkeypatch.context() as patch:
        patch.setattr(store, "append", append)
        assert "goes on" in refused("build", scenes, "--memory", memory, *POLICY, code=130)
    with store.open_store(memory, "scenes") as video:
        assert store.progress(video).clips == 3
    assert cli.main(["build", str(scenes), "--memory", str(memory), *POLICY]) == 0
    with store.open_store(memory, "scenes") as video, store.open_store(whole, "scenes") as expected:
        assert store.progress(video) == store.progress(expected)


@pytest.mark.parametrize("command", ["build", "watch"])
def test_an_interrupt_while_starting(command, scenes, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(lite, "load_perception", lambda: signal.raise_signal(signal.SIGINT))
    refused(command, scenes, "--memory", tmp_path / "memory", *POLICY, code=130)
    assert not (tmp_path / "memory").exists()


def test_a_watch_stopped_before_its_first_clip(scenes, tmp_path, capfd, monkeypatch):
    memory, real = str(tmp_path / "memory"), build.rest_of_file

    def stopped(*args):
        signal.raise_signal(signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(build, "rest_of_file", stopped)
        assert cli.main(["watch", str(scenes), "--memory", memory, *POLICY]) == 0
    assert not answered(capfd, QUESTION, "--memory", memory)["found"]
    assert cli.main(["report", "--memory", memory]) == 0
    assert cli.main(["build", str(scenes), "--memory", memory, *POLICY]) == 0
    assert answered(capfd, QUESTION, "--memory", memory)["found"]


def _full_after(monkeypatch, writes: int) -> None:
    """Only so many more files can be written."""
    real, left = os.fsync, [writes]

    def fsync(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("writes", [0, 1, 3, 8, 11])
def test_a_full_disk_loses_nothing(writes, scenes, whole, memory, tmp_path, refused, monkeypatch):
    second = Path(shutil.copy(scenes, tmp_path / "second.mp4"))
    before = contents(memory)
    with monkeypatch.context() as patch:
        _full_after(patch, writes)
        assert "No space left" in refused("build", second, "--memory", memory, *POLICY)
    after = contents(memory)
    assert {name: data for name, data in after.items() if not name.startswith("second")} == before
    assert cli.main(["ask", QUESTION, "--memory", str(memory)]) == 0
    assert cli.main(["build", str(second), "--memory", str(memory), *POLICY]) == 0
    with store.open_store(memory, "second") as video, store.open_store(whole, "scenes") as first:
        assert store.progress(video) == store.progress(first)
        assert [r.caption for r in store.read_clips(video)] == [
            r.caption for r in store.read_clips(first)
        ]


@pytest.mark.parametrize("limit", [1_000, 30_000, 100_000])
def test_a_file_that_may_not_grow(limit, scenes, memory, tmp_path, refused):
    """A real refusal of the kernel, at the database or at the snapshot."""
    second = Path(shutil.copy(scenes, tmp_path / "second.mp4"))
    before = contents(memory)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        assert "make room" in refused("build", second, "--memory", memory, *POLICY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    after = contents(memory)
    assert {name: data for name, data in after.items() if not name.startswith("second")} == before
    assert cli.main(["build", str(second), "--memory", str(memory), *POLICY]) == 0
    assert cli.main(["ask", QUESTION, "--memory", str(memory)]) == 0


# Asking.


def _sql(memory: Path, *commands: str) -> None:
    with contextlib.closing(sqlite3.connect(memory / "scenes/memory.sqlite")) as database:
        for command in commands:
            database.execute(command)
        database.commit()


def _edit(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def _json(memory: Path, **changes) -> None:
    path = memory / "scenes/video.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _elsewhere(memory: Path, name: str) -> None:
    """Moves a part of the video out of the memory, and links to it."""
    path = memory / "scenes" / name
    target = memory.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def _state(memory: Path) -> Path:
    return next((memory / "scenes").glob("state-*"))


def _name_frame(memory: Path, name: str) -> None:
    """A row that names another file, sealed as the program does it."""
    with store.open_store(memory, "scenes", writable=True) as video:
        for row in store.traces.rows(video.database, "item IS NOT NULL"):
            store.traces.insert(video.database, row._replace(frames=json.dumps([[0.0, name, 0]])))


DAMAGE = {
    "version of video.json": lambda m: _json(m, version=99),
    "version of the database": lambda m: _sql(m, "PRAGMA user_version = 99"),
    "another program's database": lambda m: _sql(m, "PRAGMA application_id = 7"),
    "no video.json": lambda m: (m / "scenes/video.json").unlink(),
    "cut video.json": lambda m: _edit(m / "scenes/video.json", lambda data: data[:50]),
    "list as video.json": lambda m: (m / "scenes/video.json").write_text("[" * 5000),
    "binary video.json": lambda m: (m / "scenes/video.json").write_bytes(b"\xff\0" * 50),
    "changed video.json": lambda m: _json(m, header={"source": "../../etc/passwd"}),
    "folder as video.json": lambda m: (
        (m / "scenes/video.json").unlink(), (m / "scenes/video.json").mkdir()
    ),
    "no database": lambda m: (m / "scenes/memory.sqlite").unlink(),
    "empty database": lambda m: (m / "scenes/memory.sqlite").write_bytes(b""),
    "cut database": lambda m: _edit(m / "scenes/memory.sqlite", lambda data: data[:9000]),
    "text as database": lambda m: (m / "scenes/memory.sqlite").write_text("no " * 999),
    "folder as database": lambda m: (
        (m / "scenes/memory.sqlite").unlink(), (m / "scenes/memory.sqlite").mkdir()
    ),
    "changed caption": lambda m: _sql(m, "UPDATE clips SET caption = 'x'"),
    "lost clips": lambda m: _sql(m, "DELETE FROM clips WHERE clip = 2"),
    "no state": lambda m: _state(m).unlink(),
    "cut state": lambda m: _edit(_state(m), lambda data: data[:-5]),
    "empty state": lambda m: _state(m).write_bytes(b""),
    "linked database": lambda m: _elsewhere(m, "memory.sqlite"),
    "linked state": lambda m: _elsewhere(m, _state(m).name),
    "linked video.json": lambda m: _elsewhere(m, "video.json"),
    "linked frames": lambda m: _elsewhere(m, "frames"),
    "linked video": lambda m: _elsewhere(m, "."),
    "link to itself": lambda m: (
        (m / "scenes/memory.sqlite").unlink(),
        (m / "scenes/memory.sqlite").symlink_to("memory.sqlite"),
    ),
    "frame outside": lambda m: _name_frame(m, "../../../etc/passwd"),
    "absolute frame": lambda m: _name_frame(m, "/etc/passwd"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_memory(damage, memory, tmp_path, refused):
    if damage == "linked video":
        (memory / "scenes").rename(tmp_path / "elsewhere")
        (memory / "scenes").symlink_to(tmp_path / "elsewhere")
    else:
        DAMAGE[damage](memory)
    before = contents(tmp_path)
    said = refused("ask", QUESTION, "--memory", memory)
    assert "scenes" in said or "holds no video" in said
    if damage != "no video.json" and damage != "folder as video.json":
        refused("report", "--memory", memory)
    assert not (memory / "report.html").exists()
    assert contents(tmp_path) == before


def _forged_row(field: str, value: object):
    def forge(video):
        for row in store.traces.rows(video.database, "1"):
            store.traces.insert(video.database, row._replace(**{field: value}))
        store.traces.put(video.database, "snapshot", "null")

    return forge


def _forged_mention(field: str, value: object):
    def forge(video):
        found = store.traces.mentions(video.database, "1")
        store.traces.insert_mentions(video.database, (m._replace(**{field: value}) for m in found))

    return forge


def _forged_state(video):
    state = jax.device_get(store.load_state(video))
    data = store.arrays.state_to_bytes(state.replace(clock=np.float32(np.nan)))
    snapshot = json.loads(store.traces.get(video.database, "snapshot"))
    (video.folder / snapshot["name"]).write_bytes(data)
    snapshot["sha256"] = store.arrays.digest(data)
    store.traces.put(video.database, "snapshot", json.dumps(snapshot))


FORGED = {
    "strength": _forged_row("strength", "x"),
    "time": _forged_row("stop", None),
    "endless time": _forged_row("stop", float("inf")),
    "start": _forged_row("start", b"x"),
    "action": _forged_row("action", 2**40),
    "node": _forged_row("node", "[]"),
    "caption": _forged_row("caption", b"x"),
    "labels": _forged_row("labels", "[" * 5000),
    "surest label": _forged_row("labels", '[["x", NaN]]'),
    "item": _forged_row("item", b"x"),
    "mention": _forged_mention("slot", b"x"),
    "mentions": _forged_mention("count", 2**30),
    "state": _forged_state,
} | {
    f"snapshot {value}": lambda video, value=value: store.traces.put(
        video.database, "snapshot", value
    )
    for value in (
        7,
        "x",
        "[]",
        '{"name": 7, "clips": 5, "sha256": ""}',
        '{"name": "../../x.safetensors", "clips": 5, "sha256": ""}',
        '{"name": "state-000005.safetensors", "clips": "x", "sha256": ""}',
    )
}


@pytest.mark.parametrize("part", FORGED)
def test_a_forged_memory(part, memory, refused):
    """Damage under a checksum that is right."""
    with store.open_store(memory, "scenes", writable=True) as video:
        FORGED[part](video)
    assert "scenes" in refused("ask", QUESTION, "--memory", memory)
    assert "scenes" in refused("report", "--memory", memory)


def test_a_memory_of_other_networks(memory, refused, monkeypatch):
    space = asking.load_space()
    other = space._replace(background=space.background[:, :16])
    monkeypatch.setattr(asking, "load_space", lambda: other)
    assert "networks of another kind" in refused("ask", QUESTION, "--memory", memory)


def test_damage_of_one_video_leaves_the_others(scenes, memory, tmp_path, refused, capfd):
    second = Path(shutil.copy(scenes, tmp_path / "second.mp4"))
    assert cli.main(["build", str(second), "--memory", str(memory), *POLICY]) == 0
    _state(memory).write_bytes(b"")
    assert "scenes" in refused("ask", QUESTION, "--memory", memory)
    assert answered(capfd, QUESTION, "--memory", memory, "--video", "second")["found"]
    assert cli.main(["build", str(scenes), "--memory", str(memory), "--again", *POLICY]) == 0
    assert len(answered(capfd, QUESTION, "--memory", memory)["videos"]) == 2


@pytest.mark.parametrize("damage", ["no frames", "damaged frames"])
def test_key_frames_that_are_gone_are_no_reason_to_say_nothing(damage, memory, capfd):
    expected = answered(capfd, QUESTION, "--memory", memory)
    for path in (memory / "scenes/frames").iterdir():
        path.unlink() if damage == "no frames" else path.write_bytes(b"\xff\xd8no")
    assert answered(capfd, QUESTION, "--memory", memory) == expected
    assert cli.main(["report", "--memory", str(memory)]) == 0


def test_the_folder_of_key_frames_is_gone(scenes, memory, refused):
    shutil.rmtree(memory / "scenes/frames")
    assert "frames" in refused("build", scenes, "--memory", memory, *POLICY)


@pytest.mark.parametrize("name", ["nowhere", "../memory/scenes", "", "a\nb", "scenes/"])
def test_an_unknown_video(name, memory, refused):
    assert "it holds scenes" in refused("ask", QUESTION, "--memory", memory, "--video", name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([""], "empty"),
        (["  \n\t"], "empty"),
        ([os.fsdecode(b"where \xff is it?")], "UTF-8"),
        ([QUESTION, "--options", "one"], "two or more"),
        ([QUESTION, "--options", "one", ""], "empty"),
        ([QUESTION, "--options", "one", " "], "empty"),
        ([QUESTION, "--options", "one", "two", "one"], "'one' twice"),
        ([QUESTION, "--options", "one", os.fsdecode(b"\xff")], "UTF-8"),
        ([QUESTION, "--options"], "--options"),
        ([QUESTION, "--at", "-1"], "-1"),
        ([QUESTION, "--at", "nan"], "nan"),
        ([QUESTION, "--at", "1e999"], "1e999"),
        ([QUESTION, "--at", ""], "''"),
        ([QUESTION, "more"], "more"),
    ],
)
def test_a_bad_question(arguments, said, memory, refused):
    before = contents(memory)
    assert said in refused("ask", "--memory", memory, *arguments)
    assert contents(memory) == before


@pytest.mark.parametrize(
    "question",
    [
        "red wall " * 11_000,
        "x" * 100_000,
        "\x1b[2J red \x07\0 wall",
        "\u202e 🎥 \U0010ffff",
        "-1 or 2",
    ],
    ids=["long", "one word", "control", "unicode", "dash"],
)
def test_an_odd_question_is_answered(question, memory, capfd):
    found = answered(capfd, "--memory", memory, "--", question)
    assert store.read_questions(memory)[-1]["question"] == found["question"] == question
    assert cli.main(["report", "--memory", str(memory)]) == 0


def test_at_beyond_the_end_is_now(memory, capfd):
    now = answered(capfd, QUESTION, "--memory", memory)
    assert answered(capfd, QUESTION, "--memory", memory, "--at", "99:00:00") == now | {
        "at": 99 * 3600
    }


@pytest.mark.parametrize("kind", ["folder", "link", "full"])
def test_a_question_that_cannot_be_written_down_is_answered(
    kind, memory, capfd, caplog, monkeypatch
):
    expected = answered(capfd, QUESTION, "--memory", memory)
    path = memory / "questions.jsonl"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(memory.parent / "outside")
    else:
        _full_after(monkeypatch, 0)
    assert answered(capfd, QUESTION, "--memory", memory) == expected
    (record,) = caplog.records
    assert "not written down" in record.getMessage()
    assert "questions.jsonl" in record.getMessage()
    assert not (memory.parent / "outside").exists()


def test_damaged_questions(memory, capfd, refused):
    path = memory / "questions.jsonl"
    path.write_bytes(b"\xff\0 no json\n" + path.read_bytes())
    assert "questions.jsonl line 1" in refused("report", "--memory", memory)
    before = path.read_bytes()
    answered(capfd, QUESTION, "--memory", memory)
    assert path.read_bytes().startswith(before)


@pytest.fixture(scope="module")
def undamaged(whole) -> dict:
    with asking.load(whole, space=asking.load_space()) as loaded:
        found = asking.as_json(asking.answer(loaded, QUESTION))
    assert found["found"]
    return {key: value for key, value in found.items() if key != "seconds"}


@settings(
    max_examples=30, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_any_flipped_byte_is_told_or_does_not_matter(data, whole, undamaged, tmp_path):
    target = tmp_path / "copy"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole, target)
    files = [p for p in sorted(target.rglob("*")) if p.is_file() and p.stat().st_size]
    path = data.draw(st.sampled_from(files))
    damaged = bytearray(path.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        found = asking.as_json(asking.ask(target, QUESTION))
    except UserError:
        pass  # that it is one line, the tests above show of each kind
    else:
        del found["seconds"]
        assert found == undamaged


# The report.


@pytest.mark.parametrize("out", ["missing/report.html", "file/report.html", ".", "", "pipe"])
def test_a_report_that_cannot_be_written(out, memory, refused, monkeypatch):
    monkeypatch.chdir(memory.parent)
    Path("file").write_text("mine")
    os.mkfifo("pipe")  # and no device of this machine: a failure of this test would replace it
    before = contents(memory.parent)
    refused("report", "--memory", memory, "--out", out)
    refused("report", "--memory", memory, "--out", memory)
    assert contents(memory.parent) == before
    assert Path("pipe").is_fifo()


# Watching.

SECRET = "hunter2"


@pytest.mark.parametrize(
    "source",
    [
        f"rtsp://user:{SECRET}@127.0.0.1:9/live",
        f"http://user:{SECRET}@127.0.0.1:9/live?token={SECRET}",
        f"http://127.0.0.1:9/live?token={SECRET}",
        f"rtsp://user:{SECRET}/{SECRET}@127.0.0.1:9/live",
        f"rtsp://user:{SECRET}@[::1/live",
        f"nonsense://user:{SECRET}@127.0.0.1/live",
        "/dev/video99",
        "/dev/null",
        "x://" + "y" * 5000,
    ],
)
def test_a_stream_that_is_not_there(source, tmp_path, refused):
    said = refused("watch", source, "--memory", tmp_path / "m", "--policy", "keep_recent")
    assert SECRET not in said
    assert not (tmp_path / "m").exists()


class _Server(threading.Thread):
    """Sends a file to each who asks for it by HTTP, or nothing at all."""

    def __init__(self, data: bytes | None):
        super().__init__(daemon=True)
        self.data = data
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.open = []
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                self.open.append(client)
                if self.data is not None:
                    client.recv(65536)
                    client.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + self.data)
                    client.close()

    def close(self):
        self.socket.close()
        for client in self.open:
            client.close()


@pytest.fixture
def server():
    started = []

    def start(data):
        started.append(_Server(data))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_a_password_is_neither_printed_nor_stored(server, tmp_path, capfd, caplog):
    video = write_video(tmp_path / "video.mkv", scenes=(1.0, 1.0))
    live = server(video.read_bytes()[:-100])
    source = f"http://user:{SECRET}@127.0.0.1:{live.port}/live.mkv?token={SECRET}"
    memory = tmp_path / "memory"
    assert cli.main(["watch", source, "--memory", str(memory), *POLICY]) == 0
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err + caplog.text
    assert store.list_videos(memory)
    assert not any(SECRET.encode() in data for data in contents(memory).values())
    assert not any(SECRET in name for name in contents(memory))


def test_a_stream_that_is_no_video(server, tmp_path, refused):
    live = server(b"<html>no</html>")
    said = refused("watch", f"http://127.0.0.1:{live.port}/", "--memory", tmp_path / "m", *POLICY)
    assert str(live.port) in said
    assert not (tmp_path / "m").exists()


def test_a_file_that_ends_at_once(tmp_path, capfd):
    video = write_video(tmp_path / "short.mp4", scenes=(0.1,))
    memory = str(tmp_path / "m")
    assert cli.main(["watch", str(video), "--memory", memory, *POLICY]) == 0
    assert "1 clips" in capfd.readouterr().out
    assert cli.main(["ask", QUESTION, "--memory", memory]) == 0
    assert cli.main(["watch", str(video), "--memory", memory, *POLICY]) == 0


def test_two_watchers_of_one_video(scenes, memory, refused):
    before = contents(memory)
    with store.open_store(memory, "scenes", writable=True):
        for command in (["watch"], ["build"], ["build", "--again"]):
            said = refused(*command, scenes, "--memory", memory, *POLICY)
            assert "another process" in said
        assert cli.main(["ask", QUESTION, "--memory", str(memory)]) == 0
    after = contents(memory)
    assert after.pop("questions.jsonl").startswith(before.pop("questions.jsonl"))
    assert after == before


def test_an_interrupt_while_a_stream_is_opened(server, tmp_path):
    silent = server(None)
    code = (
        "import sys\nfrom mmmem_jax import cli\nfrom mmmem_jax.perception import lite\n"
        "lite.load_perception = lambda: None\nsys.exit(cli.main(sys.argv[1:]))"
    )
    source = f"rtsp://127.0.0.1:{silent.port}/x"
    command = [sys.executable, "-c", code, "watch", source, "--memory", str(tmp_path / "m")]
    process = subprocess.Popen([*command, *POLICY], stderr=subprocess.PIPE, text=True)
    while not silent.open:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert re.fullmatch(r"mmmem: interrupted[^\n]*\n", said), said
    assert not (tmp_path / "m").exists()


# The surroundings: outputs, weights and caches.


def _program(*args: object, shell: str = "", **environment: str) -> subprocess.CompletedProcess:
    """`mmmem` in a process of its own; `shell` is what follows the command there."""
    command = ["sh", "-c", f'"$0" -m mmmem_jax.cli "$@" {shell}', sys.executable, *map(str, args)]
    return subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, env=os.environ | environment
    )


@pytest.mark.parametrize("arguments", [("--help",), ("build", "--help")])
def test_a_reader_that_leaves(arguments):
    done = _program(*arguments, shell="| true")
    assert (done.stdout, done.stderr) == ("", "")


def test_outputs_that_take_nothing():
    done = _program("--help", shell="> /dev/full", PYTHONUNBUFFERED="")
    assert done.returncode == 2
    assert re.fullmatch(r"mmmem: [^\n]*No space left on device\n", done.stderr)
    done = _program("--help", shell=">&-")
    assert done.returncode == 0
    assert done.stderr.startswith("usage: mmmem")  # for want of another place


def test_text_that_the_terminal_cannot_show(memory, tmp_path):
    done = _program(
        "report", "--memory", memory, "--out", tmp_path / "é.html",
        PYTHONIOENCODING="ascii", PYTHONUTF8="0",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_no_home(memory, refused, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MMMEM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert "MMMEM_CACHE" in refused("ask", QUESTION, "--memory", memory)


@pytest.mark.parametrize(
    ("command", "cache"), [("ask", "empty"), ("ask", "file"), ("build", "/proc/mmmem")]
)
def test_no_network_and_no_weights(command, cache, scenes, memory, tmp_path):
    before = contents(memory)
    (tmp_path / "file").write_text("mine")
    environment = {"MMMEM_CACHE": str(tmp_path / cache), "PIP_NO_INDEX": "1"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / cache / "programs")
    rest = (QUESTION,) if command == "ask" else (scenes, "--policy", "keep_recent")
    done = _program(command, *rest, "--memory", memory, **environment)
    assert done.returncode == 2
    assert re.fullmatch(r"mmmem: [^\n]*MMMEM_CACHE[^\n]*\n", done.stderr), done.stderr
    assert contents(memory) == before
