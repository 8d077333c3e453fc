"""Damage, full disks and hostile folders: one line that says what to do, never wrong memory."""

import errno
import json
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys

import jax
import numpy as np
import pytest

from mmmem_jax import memory, store
from mmmem_jax.errors import UserError
from mmmem_jax.memory import ADD_NEW
from mmmem_jax.store import layout, traces
from tests.conftest import REPO
from tests.store import filling
from tests.store.filling import HEADER, SMALL, fill, last, same


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A memory of one video with a snapshot and clips after it, and what it holds."""
    folder = tmp_path_factory.mktemp("whole")
    with store.create(folder, "toy", HEADER, SMALL) as video:
        last(fill(video, memory.init(SMALL), 70))
    return folder, read_all(folder)


@pytest.fixture
def copy(whole, tmp_path):
    """The same folder, free to be damaged."""
    shutil.copytree(whole[0], tmp_path / "memory")
    return tmp_path / "memory"


def read_all(folder):
    """Everything a memory gives, in plain values."""
    with store.open_store(folder, "toy") as video:
        state = store.load_state(video)
        return (
            [np.asarray(x).tobytes() for x in jax.tree.leaves(state)],
            [np.asarray(x).tobytes() for x in jax.tree.leaves(store.state_at(video, 30.0))],
            [plain(video, clip) for clip in store.read_clips(video)],
            store.entities(video, state),
            store.progress(video),
            store.counts(video),
            store.failures(video),
            store.node_clips(video, range(60)),
            video.header,
            video.config,
        )


def plain(video, clip):
    item = [np.asarray(x).tobytes() for x in jax.tree.leaves(clip.item)]
    frames = [(when, store.read_frame(video, path)) for when, path in clip.frames]
    return (*clip._replace(item=None, frames=()), item, frames)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


class TestDamage:
    @pytest.mark.parametrize("cut", [0, 20, 3000, 9000])
    def test_truncated_database(self, cut, copy):
        path = copy / "toy/memory.sqlite"
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(UserError, match="memory.sqlite .*build") as error:
            read_all(copy)
        one_line(error)

    def test_missing_database(self, copy):
        (copy / "toy/memory.sqlite").unlink()
        with pytest.raises(UserError, match="memory.sqlite is missing"):
            store.open_store(copy, "toy")

    def test_no_database_at_all(self, copy):
        (copy / "toy/memory.sqlite").write_text("this is a text\n" * 999)
        with pytest.raises(UserError, match="damaged .*delete .*build"):
            store.open_store(copy, "toy")

    @pytest.mark.parametrize(
        ("pragma", "said"),
        [("user_version = 3", "is of version 3"), ("application_id = 1", "is no memory of mmmem")],
    )
    def test_another_version_or_program(self, pragma, said, copy):
        database = sqlite3.connect(copy / "toy/memory.sqlite")
        database.execute(f"PRAGMA {pragma}")
        database.close()
        with pytest.raises(UserError, match=said):
            store.open_store(copy, "toy")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"version": 3}, "is of version 3"),
            ({"format": "other"}, "damaged"),
            ({"memory": {"slots": 3}}, "damaged"),
            ({"memory": {"dim": "large"}}, "damaged"),
            ({"memory": {"dim": 10**9}}, "over the limit"),
            ({"header": {"source": "another.mp4"}}, "is not what the build wrote"),
        ],
    )
    def test_header_of_another_kind(self, change, said, copy):
        path = copy / "toy/video.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(UserError, match=said) as error:
            store.open_store(copy, "toy")
        assert "build" in one_line(error)

    @pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"format": "mmmem"}', "[" * 10**5])
    def test_header_that_is_none(self, text, copy):
        (copy / "toy/video.json").write_text(text)
        with pytest.raises(UserError, match="video.json is damaged"):
            store.open_store(copy, "toy")

    def test_damaged_snapshot_is_said_plainly(self, copy):
        (path,) = (copy / "toy").glob("state-*")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with store.open_store(copy, "toy") as video:
            with pytest.raises(UserError, match="state-000064.* damaged .*its clips are whole"):
                store.load_state(video)
            assert store.read_clips(video)

    def test_missing_snapshot_is_said_plainly(self, copy):
        (path,) = (copy / "toy").glob("state-*")
        path.unlink()
        with store.open_store(copy, "toy") as video:
            with pytest.raises(UserError, match="state-000064.* missing, though its clips"):
                store.load_state(video)

    def test_damaged_or_missing_frame(self, copy):
        with store.open_store(copy, "toy") as video:
            first, second = (clip.frames[0][1] for clip in store.read_clips(video)[:2])
            first.write_bytes(b"another picture")
            second.unlink()
            with pytest.raises(UserError, match="damaged"):
                store.read_frame(video, first)
            with pytest.raises(UserError, match="cannot read"):
                store.read_frame(video, second)
            with pytest.raises(UserError):
                store.read_frame(video, video.folder / "video.json")

    @pytest.mark.parametrize("column", traces.Row._fields[1:])
    def test_changed_value_is_no_other_memory(self, column, copy, whole):
        """Through SQLite itself, so that the file is sound and only the checksum tells."""
        database = sqlite3.connect(copy / "toy/memory.sqlite")
        other = {"caption": "another", "item": b"x", "labels": "[]", "frames": "[]"}
        database.execute(f"UPDATE clips SET {column} = ?", (other.get(column, 7),))
        database.commit()
        database.close()
        with pytest.raises(UserError, match=r"damaged \(clip \d+\)"):
            read_all(copy)

    def test_lost_rows_are_missed(self, copy):
        for where in ("clip = 69", "clip = 3", "1"):
            folder = copy.parent / f"lost {where}"
            shutil.copytree(copy, folder)
            database = sqlite3.connect(folder / "toy/memory.sqlite")
            database.execute(f"DELETE FROM clips WHERE {where}")
            database.commit()
            database.close()
            with pytest.raises(UserError, match="clips are missing"):
                store.open_store(folder, "toy")

    def test_sealed_row_that_is_no_clip(self, copy):
        database = sqlite3.connect(copy / "toy/memory.sqlite", isolation_level=None)
        row = traces.rows(database, "clip = 69")[0]._replace(labels='{"a": 1}', item=b"nothing")
        traces.insert(database, row)
        database.close()
        with pytest.raises(UserError, match="damaged"):
            read_all(copy)

    @pytest.mark.parametrize("failed", ["", "7", "[7]", '"trace"', "[" * 10**5])
    def test_sealed_row_with_failures_that_are_none(self, failed, copy):
        database = sqlite3.connect(copy / "toy/memory.sqlite", isolation_level=None)
        traces.insert(database, traces.rows(database, "clip = 69")[0]._replace(failed=failed))
        database.close()
        with store.open_store(copy, "toy") as video, pytest.raises(UserError, match="damaged"):
            store.failures(video)


class TestHostileFolders:
    @pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "x.jpg", "\0"])
    def test_frame_outside_the_folder(self, name, copy):
        database = sqlite3.connect(copy / "toy/memory.sqlite", isolation_level=None)
        (row,) = traces.rows(
            database, "clip = (SELECT max(clip) FROM clips WHERE item IS NOT NULL)"
        )
        frames = json.dumps([[0.0, name, 0]])
        traces.insert(database, row._replace(frames=frames))
        database.close()
        with pytest.raises(UserError, match="outside") as error:
            read_all(copy)
        one_line(error)

    @pytest.mark.parametrize(
        "name", ["frames", "memory.sqlite", "video.json", "lock", "memory.sqlite-wal"]
    )
    def test_link_out_of_the_folder(self, name, copy, tmp_path):
        inside, outside = copy / "toy" / name, tmp_path / "outside"
        if inside.exists():
            inside.rename(outside)
        else:
            outside.write_bytes(b"precious")
        inside.symlink_to(outside)
        before = sorted(outside.iterdir()) if outside.is_dir() else outside.read_bytes()
        with pytest.raises(UserError, match="outside"):
            with store.open_store(copy, "toy", writable=True) as video:
                store.read_clips(video)
        assert (sorted(outside.iterdir()) if outside.is_dir() else outside.read_bytes()) == before

    def test_linked_video(self, copy, tmp_path):
        (copy / "toy").rename(tmp_path / "elsewhere")
        (copy / "toy").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UserError, match="outside"):
            store.open_store(copy, "toy")

    def test_link_where_a_file_is_made(self, copy, tmp_path):
        precious = tmp_path / "precious"
        precious.write_text("precious")
        (copy / "toy/state-000128.safetensors.tmp").symlink_to(precious)
        (copy / "toy/frames/000070-0.jpg.tmp").symlink_to(precious)
        with store.open_store(copy, "toy", writable=True) as video:
            last(fill(video, store.load_state(video), 128))
        assert precious.read_text() == "precious"

    def test_read_only_folder(self, copy, whole, monkeypatch):
        with store.open_store(copy, "toy", writable=True):
            pass  # the last to close leaves no WAL
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert read_all(copy) == whole[1]
        assert not list((copy / "toy").glob("*-shm"))


class TestFullDisk:
    @pytest.mark.parametrize("suffix", [".jpg.tmp", ".safetensors.tmp"])
    def test_full_while_a_file_is_written(self, suffix, copy, monkeypatch):
        real = os.fsync

        def full(handle):
            if os.readlink(f"/proc/self/fd/{handle}").endswith(suffix):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        with store.open_store(copy, "toy", writable=True) as video:
            state = store.load_state(video)
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", full)
                with pytest.raises(UserError, match="No space left.*make room"):
                    last(fill(video, state, 128, decisions=[(ADD_NEW, 9.0)] * 128))
            assert not list(video.folder.rglob("*.tmp"))
            clips = store.progress(video).clips
            assert clips == (70 if "jpg" in suffix else 128)
            frames = {p.name for p in (video.folder / "frames").iterdir()}
            named = {p.name for clip in store.read_clips(video) for _, p in clip.frames}
            assert frames == named
            state = store.load_state(video)
            done = last(fill(video, state, 140))
            assert same(store.load_state(video), done)

    def test_full_database(self, copy, whole):
        with store.open_store(copy, "toy", writable=True) as video:
            state = store.load_state(video)
            pages = video.database.execute("PRAGMA page_count").fetchone()[0]
            video.database.execute(f"PRAGMA max_page_count = {pages}")
            with pytest.raises(UserError, match="full.*make room"):
                last(fill(video, state, 300))
            clips = store.progress(video).clips
            assert 70 <= clips < 300
            kept = store.load_state(video)
            assert int(kept.num_items) == clips
            video.database.execute("PRAGMA max_page_count = 99999")
            last(fill(video, kept, clips + 3))

    def test_file_size_limit_of_the_system(self, copy):
        """A real refusal of the kernel, in a process of its own."""
        code = (
            "import resource, sys\n"
            "from mmmem_jax import store\n"
            "from mmmem_jax.errors import UserError\n"
            "from tests.store import filling\n"
            f"video = store.open_store({str(copy)!r}, 'toy', writable=True)\n"
            "state = store.load_state(video)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))\n"
            "try:\n"
            "    filling.last(filling.fill(video, state, 300))\n"
            "except UserError as error:\n"
            "    sys.exit(str(error))\n"
        )
        environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("cannot write"), done.stderr
        with store.open_store(copy, "toy") as video:
            clips = store.progress(video).clips
            assert clips >= 70
            live = memory.init(SMALL)
            for index in range(clips):
                live = store.advance(live, filling.items()[index], *filling.decide(0, index))
            assert same(store.load_state(video), live)
        assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY

    def test_create_on_a_full_disk_leaves_nothing(self, tmp_path, monkeypatch):
        def full(path, data):
            raise layout.unwritten(path, OSError(errno.ENOSPC, "No space left on device"))

        monkeypatch.setattr(layout, "write_whole", full)
        with pytest.raises(UserError, match="No space left"):
            store.create(tmp_path, "toy", HEADER, SMALL)
        assert not list(tmp_path.iterdir())


def test_crash_between_any_two_writes(copy, tmp_path, monkeypatch):
    """The folder as it lies before and after each write of a snapshot's clip, opened anew."""
    moments = []

    def watched(real):
        def write(*args):
            shutil.copytree(copy, tmp_path / f"moment {len(moments)}")
            moments.append(None)
            real(*args)
            shutil.copytree(copy, tmp_path / f"moment {len(moments)}")
            moments.append(None)

        return write

    with store.open_store(copy, "toy", writable=True) as video:
        before = last(fill(video, store.load_state(video), 127))
        with monkeypatch.context() as patch:
            patch.setattr(layout, "write_whole", watched(layout.write_whole))
            patch.setattr(layout, "sync_folder", watched(layout.sync_folder))
            patch.setattr(traces, "put", watched(traces.put))
            after = last(fill(video, before, 128, decisions=[(ADD_NEW, 9.0)] * 128))
        shutil.copytree(copy, tmp_path / f"moment {len(moments)}")
    assert len(moments) >= 14
    found = []
    for moment in range(len(moments) + 1):
        with store.open_store(tmp_path / f"moment {moment}", "toy", writable=True) as video:
            state = store.load_state(video)
            found.append(int(state.num_items))
            assert same(state, before if found[-1] == 127 else after)
            named = {p.name for clip in store.read_clips(video) for _, p in clip.frames}
            assert {p.name for p in (video.folder / "frames").iterdir()} == named
            assert len(list(video.folder.glob("state-*"))) == 1
    assert found == sorted(found)
    assert set(found) == {127, 128}


def _outcome(folder):
    """What a memory gives, or the line that the user is told."""
    try:
        return read_all(folder)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_is_told_or_does_not_matter(seed, whole, tmp_path):
    """Random bytes of each file changed, cut off or doubled: an error, or the memory as it was."""
    folder, expected = whole
    rng = random.Random(seed)
    names = ["video.json", "memory.sqlite", "state-000064.safetensors", "frames"]
    told = 0
    for trial in range(24):
        target = tmp_path / str(trial)
        shutil.copytree(folder, target)
        path = target / "toy" / names[trial % len(names)]
        path = rng.choice(sorted(path.iterdir())) if path.is_dir() else path
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 1, 1, 8, 64))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data))]
        path.write_bytes(data)
        found = _outcome(target)
        assert found == expected or (isinstance(found, str) and "\n" not in found)
        told += isinstance(found, str)
        shutil.rmtree(target)
    assert told >= 8


def test_unknown_ids(copy):
    with pytest.raises(UserError, match="holds no video 'tot'; it holds toy"):
        store.open_store(copy, "tot")
    with pytest.raises(UserError, match="no memory folder"):
        store.open_store(copy / "nowhere", "toy")
    with pytest.raises(UserError, match="holds no video"):
        store.open_store(copy, "../memory/toy")
