"""One video on disk: clips appended one by one, the memory read back as it was at any time."""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import sqlite3
from pathlib import Path
from typing import IO

from mmmem_jax.errors import UserError
from mmmem_jax.memory import MemoryConfig
from mmmem_jax.store import arrays, layout, traces

FORMAT = "mmmem"
SNAPSHOT_NAME = re.compile(r"state-\d{6,}\.safetensors")


@dataclasses.dataclass(frozen=True, eq=False)
class VideoStore:
    """An open video; close it, or use it in a `with`. Threads take turns."""

    folder: Path
    video_id: str
    header: dict  # video.json, without format, version and memory
    config: MemoryConfig
    database: sqlite3.Connection
    lock: IO | None  # None: opened to read

    def __enter__(self) -> "VideoStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files; a second call does nothing."""
        self.database.close()
        if self.lock is not None:
            self.lock.close()


def _claim(folder: Path) -> IO:
    """The lock of a folder's one writer; a killed process loses it."""
    path = layout.join(folder, layout.LOCK)
    try:
        lock = open(path, "ab")
    except OSError as error:
        raise layout.unwritten(path, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(
            f"{folder} is being written by another process; wait for it, or stop it"
        ) from None
    return lock


def create(
    memory_dir: str | os.PathLike, video_id: str, header: dict, config: MemoryConfig
) -> VideoStore:
    """Makes the folder of a new video, whole or not at all, and opens it for writing.

    Args:
      memory_dir: made if it is not there.
      video_id: of `video_id_of`.
      header: plain JSON: source name, fingerprint, settings.
      config: of the memory.

    Raises:
      UserError: if the memory already holds that id, or cannot be written.
    """
    folder = layout.video_folder(memory_dir, video_id)
    if folder.exists():
        raise UserError(f"{folder} is already there; continue it, or delete it to build anew")
    text = json.dumps(
        {"format": FORMAT, "version": traces.VERSION, "memory": dataclasses.asdict(config)}
        | {"header": header},
        indent=1,
        allow_nan=False,
    )
    new = layout.join(Path(memory_dir), f".{video_id}.new")
    try:
        new.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise layout.unwritten(new, error) from None
    with _claim(new):
        try:
            _fill(new, text)
            new.rename(folder)
            layout.sync_folder(folder.parent)
        except OSError as error:
            raise layout.unwritten(folder, error) from None
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return open_store(memory_dir, video_id, writable=True)


def _fill(folder: Path, header: str) -> None:
    """The files of a video without clips."""
    for path in folder.iterdir():  # what a kill left
        if path.name != layout.LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / layout.FRAMES).mkdir()
    meta = {"header": header, "clips": 0, "finished": 0, "frames_dropped": 0, "snapshot": "null"}
    traces.make(folder / layout.DATABASE, meta)
    layout.write_whole(folder / layout.HEADER, header.encode())


def remove(memory_dir: str | os.PathLike, video_id: str) -> None:
    """Deletes a video, damaged or not; it is gone at once, even if a kill leaves files behind.

    Raises:
      UserError: if the id is unknown, another process writes it, or it cannot be deleted.
    """
    folder = layout.find_video(memory_dir, video_id)
    gone = layout.join(Path(memory_dir), f".{video_id}.old")
    with _claim(folder):
        shutil.rmtree(gone, ignore_errors=True)
        try:
            folder.rename(gone)
            shutil.rmtree(gone)
        except OSError as error:
            raise layout.unwritten(folder, error) from None


def open_store(
    memory_dir: str | os.PathLike, video_id: str, *, writable: bool = False
) -> VideoStore:
    """Opens a video of a memory; any number may read while one process writes.

    Raises:
      UserError: if the id is unknown, another process writes it too, or it is damaged or of
        another version.
    """
    folder = layout.find_video(memory_dir, video_id)
    path = layout.join(folder, layout.DATABASE)
    text, config, header = _read_header(layout.join(folder, layout.HEADER))
    lock = _claim(folder) if writable else None
    try:
        database = traces.connect(path, writable=writable)
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    store = VideoStore(folder, video_id, header, config, database, lock)
    try:
        with traces.guard(path):
            if traces.get(database, "header") != text:
                raise UserError(
                    f"{folder / layout.HEADER} is not what the build wrote; restore it, or delete "
                    f"{folder} and build the video again"
                )
            if writable:
                _sweep(store)
    except OSError as error:
        store.close()
        raise layout.unwritten(folder, error) from None
    except BaseException:
        store.close()
        raise
    return store


def _read_header(path: Path) -> tuple[str, MemoryConfig, dict]:
    try:
        text = path.read_text("utf-8")
        table = json.loads(text)
        if table["format"] != FORMAT:
            raise ValueError(f"its format is {table['format']!r}")
        version = table["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete {path.parent} and build the video again"
        ) from None
    if version != traces.VERSION:
        raise UserError(
            f"{path} is of version {version!r}, this program reads {traces.VERSION}; build again"
        )
    try:
        config = MemoryConfig(**table["memory"])
        arrays.expected_state(config)
        return text, config, dict(table["header"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete {path.parent} and build the video again"
        ) from None


def _sweep(store: VideoStore) -> None:
    """Removes files that a killed writer left: those that no row names."""
    snapshot = snapshot_of(store)
    frames = layout.join(store.folder, layout.FRAMES)
    named = store.database.execute(
        "SELECT json_extract(f.value, '$[1]') FROM clips, json_each(clips.frames) AS f "
        "WHERE clips.item IS NOT NULL"
    )
    keep = {name for (name,) in named}
    stale = [p for p in frames.iterdir() if p.name not in keep and p.is_file()]
    for path in store.folder.iterdir():
        if path.suffix == ".tmp" or SNAPSHOT_NAME.fullmatch(path.name):
            if snapshot is None or path.name != snapshot["name"]:
                stale.append(path)
    for path in stale:
        path.unlink()


def snapshot_of(store: VideoStore) -> dict | None:
    """Name, clips and sha256 of the newest snapshot, None before the first."""
    try:
        found = json.loads(traces.get(store.database, "snapshot"))
        if found is None:
            return None
        name, clips, sha256 = found["name"], found["clips"], found["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise sqlite3.DatabaseError("meta snapshot") from None
    kinds = isinstance(name, str) and isinstance(clips, int) and isinstance(sha256, str)
    if not kinds or not SNAPSHOT_NAME.fullmatch(name):
        raise sqlite3.DatabaseError("meta snapshot")
    return found
