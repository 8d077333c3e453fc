"""One video on disk: clips appended one by one, the memory read back as it was at any time."""

import dataclasses
import fcntl
import json
import math
import os
import re
import shutil
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

import jax.numpy as jnp
import numpy as np

from mmmem_jax import memory
from mmmem_jax.errors import UserError
from mmmem_jax.memory import DISCARD, MemoryConfig, MemoryState
from mmmem_jax.store import arrays, layout, traces
from mmmem_jax.store.replay import replay
from mmmem_jax.store.traces import ClipRecord, Mention, Row

FORMAT = "mmmem"
SNAPSHOT_EVERY = 64  # clips
_SNAPSHOT_NAME = re.compile(r"state-\d{6,}\.safetensors")


@dataclasses.dataclass(frozen=True)
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


class Progress(NamedTuple):
    """How far a video is."""

    clips: int
    end: float  # seconds, end of the last clip, 0 before the first
    finished: bool


class Counts(NamedTuple):
    """What became of the clips: seen = kept + merged + discarded."""

    seen: int
    kept: int  # opened an episode
    merged: int  # joined one
    discarded: int  # by decision, or too weak for a full memory
    forgotten: int  # of the kept and merged: evicted since, and pruned
    frames_dropped: int  # that a live source gave and nobody looked at


class Entity(NamedTuple):
    """An entity of the schema, with what it was called."""

    slot: int
    name: str  # the most frequent, "" where unknown
    names: tuple[tuple[str, int], ...]  # with counts, most frequent first
    mentions: int
    span: tuple[float, float]  # seconds, first and last mention


def _claim(folder: Path) -> IO:
    """The lock of a folder's one writer; a killed process loses it."""
    path = folder / layout.LOCK
    try:
        lock = open(path, "wb")
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
            path.unlink() if path.is_file() else shutil.rmtree(path)
    (folder / layout.FRAMES).mkdir()
    meta = {"header": header, "clips": 0, "finished": 0, "frames_dropped": 0, "snapshot": "null"}
    traces.make(folder / layout.DATABASE, meta)
    layout.write_whole(folder / layout.HEADER, header.encode())


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
    except BaseException:
        store.close()
        raise
    return store


def _read_header(path: Path) -> tuple[str, MemoryConfig, dict]:
    try:
        text = path.read_text()
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
    snapshot = _snapshot(store)
    frames = layout.join(store.folder, layout.FRAMES)
    named = store.database.execute(
        "SELECT json_extract(f.value, '$[1]') FROM clips, json_each(clips.frames) AS f "
        "WHERE clips.item IS NOT NULL"
    )
    keep = {name for (name,) in named}
    stale = [p for p in frames.iterdir() if p.name not in keep and p.is_file()]
    for path in store.folder.iterdir():
        if path.suffix == ".tmp" or _SNAPSHOT_NAME.fullmatch(path.name):
            if snapshot is None or path.name != snapshot["name"]:
                stale.append(path)
    for path in stale:
        path.unlink()


def append(
    store: VideoStore, record: ClipRecord, state: MemoryState, *, frames_dropped: int = 0
) -> None:
    """Adds one clip; when this returns, no kill can lose it.

    Args:
      store: opened for writing.
      record: the clip after the last one. Its item is `rounded`, and what the memory read.
      state: the memory after this clip (`advance`), saved every `SNAPSHOT_EVERY` clips.
      frames_dropped: frames that were dropped since the last clip.

    Raises:
      UserError: if the disk is full; the clips before are whole then, and so is this one if only
        the snapshot failed.
      ValueError: for a record or a state that does not follow the clip before.
    """
    path = store.folder / layout.DATABASE
    with traces.guard(path):
        clips = traces.get(store.database, "clips")
        if record.index != clips or int(state.num_items) != clips + 1:
            raise ValueError(
                f"clip {record.index} with a memory of {int(state.num_items)} items after "
                f"{clips} clips"
            )
        row, files = _row_of(record, store.config)
        try:
            for name, data in files.items():
                layout.write_whole(traces.frame_path(store.folder, name), data)
            if files:
                layout.sync_folder(store.folder / layout.FRAMES)
            with traces.transaction(store.database, write=True):
                traces.insert(store.database, row)
                if row.item is not None:
                    _insert_mentions(store, record, state)
                traces.put(store.database, "clips", clips + 1)
                dropped = traces.get(store.database, "frames_dropped")
                traces.put(store.database, "frames_dropped", dropped + frames_dropped)
                traces.put(store.database, "finished", 0)
        except (UserError, OSError, sqlite3.DatabaseError):
            for name in files:
                traces.frame_path(store.folder, name).unlink(missing_ok=True)
            raise
        if (clips + 1) % SNAPSHOT_EVERY == 0:
            _save_snapshot(store, state, clips + 1)


def _row_of(record: ClipRecord, config: MemoryConfig) -> tuple[Row, dict[str, bytes]]:
    """The row of a clip and its key frames by name."""
    kept = record.action != DISCARD and record.node_id >= 0
    # Under a token budget an item that was let in, then thrown out, may have pushed out others.
    changed = record.action != DISCARD and config.token_budget is not None
    if kept and record.item is None:
        raise ValueError(f"clip {record.index} is kept, so it needs its item")
    frames, files = [], {}
    for number, (time, image) in enumerate(record.frames if kept else ()):
        name = f"{record.index:06d}-{number}.jpg"
        files[name] = image.read_bytes() if isinstance(image, Path) else image
        frames.append([float(time), name, zlib.crc32(files[name])])
    labels = [[name, float(p)] for name, p in record.labels] if kept else []
    row = Row(
        clip=record.index,
        start=float(record.span[0]),
        stop=float(record.span[1]),
        action=int(record.action),
        strength=float(record.strength),
        node=int(record.node_id),
        caption=record.caption if kept else "",
        subtitles=record.subtitles if kept else "",
        labels=json.dumps(labels, ensure_ascii=False),
        frames=json.dumps(frames),
        item=arrays.item_to_bytes(record.item) if record.item and (kept or changed) else None,
    )
    if not all(math.isfinite(x) for x in (row.start, row.stop, row.strength)):
        raise ValueError(f"clip {record.index} has a span or a strength that is no number")
    return row, files


def _insert_mentions(store: VideoStore, record: ClipRecord, state: MemoryState) -> None:
    """A mention each; an entity with no more mentions than this clip made was opened by it."""
    held = np.asarray(state.schema.mentions)
    names = {}
    for slot, name in record.entities:
        if slot >= 0:
            names.setdefault(int(slot), []).append(name)
    for slot, given in names.items():
        opened = record.index
        if held[slot] > len(given):
            query = "SELECT max(opened) FROM mentions WHERE slot = ?"
            found = store.database.execute(query, (slot,)).fetchone()[0]
            opened = record.index if found is None else found
        newest = Counter(given[-int(held[slot]) :])
        traces.insert_mentions(
            store.database,
            (Mention(slot, opened, record.index, name, n) for name, n in newest.items()),
        )


def _snapshot(store: VideoStore) -> dict | None:
    """Name, clips and sha256 of the newest snapshot, None before the first."""
    found = json.loads(traces.get(store.database, "snapshot"))
    if found is not None and not _SNAPSHOT_NAME.fullmatch(found["name"]):
        raise sqlite3.DatabaseError("meta snapshot")
    return found


def _save_snapshot(store: VideoStore, state: MemoryState, clips: int) -> None:
    """The whole state in a new file; the old one goes when the database names the new one."""
    old = _snapshot(store)
    name = f"state-{clips:06d}.safetensors"
    data = arrays.state_to_bytes(state)
    layout.write_whole(store.folder / name, data)
    layout.sync_folder(store.folder)
    snapshot = {"name": name, "clips": clips, "sha256": arrays.digest(data)}
    with traces.transaction(store.database, write=True):
        traces.put(store.database, "snapshot", json.dumps(snapshot))
        gone = _forget(store, state)
    for path in gone:
        path.unlink(missing_ok=True)
    if old is not None and old["name"] != name:
        (store.folder / old["name"]).unlink(missing_ok=True)


def prune(store: VideoStore, state: MemoryState) -> None:
    """Writes a snapshot, and forgets the clips whose episode and sensory slot are gone.

    `append` and `finish` do it on their own.
    """
    with traces.guard(store.folder / layout.DATABASE):
        _save_snapshot(store, state, traces.get(store.database, "clips"))


def _forget(store: VideoStore, state: MemoryState) -> list[Path]:
    """Leaves of evicted clips what a discarded one has; returns the key frames to remove."""
    stream, buffer = state.episodic, state.sensory
    nodes = np.asarray(stream.node_id)[np.asarray(stream.valid)]
    clips = np.asarray(buffer.trace_id)[np.asarray(buffer.valid)]
    evicted = traces.rows(
        store.database,
        "item IS NOT NULL AND node NOT IN (SELECT value FROM json_each(?)) "
        "AND clip NOT IN (SELECT value FROM json_each(?))",
        (json.dumps(nodes.tolist()), json.dumps(clips.tolist())),
    )
    for row in evicted:
        empty = row._replace(caption="", subtitles="", labels="[]", frames="[]", item=None)
        traces.insert(store.database, empty)
    if evicted:
        traces.fold_mentions(store.database, [row.clip for row in evicted])
    frames = (name for row in evicted for _, name, _ in json.loads(row.frames))
    return [traces.frame_path(store.folder, name) for name in frames]


def finish(store: VideoStore, state: MemoryState) -> None:
    """Saves the memory of a whole video, so that reading it replays nothing."""
    with traces.guard(store.folder / layout.DATABASE):
        clips = traces.get(store.database, "clips")
        if int(state.num_items) != clips:
            raise ValueError(f"a memory of {int(state.num_items)} items after {clips} clips")
        snapshot = _snapshot(store)
        if snapshot is None or snapshot["clips"] != clips:
            _save_snapshot(store, state, clips)
        traces.put(store.database, "finished", 1)


def progress(store: VideoStore) -> Progress:
    """Clips done, the end of the last one and whether the video is finished."""
    path = store.folder / layout.DATABASE
    with traces.guard(path), traces.transaction(store.database, write=False):
        clips = traces.get(store.database, "clips")
        finished = bool(traces.get(store.database, "finished"))
        last = traces.rows(store.database, "clip = ?", (clips - 1,))
        if clips and not last:
            raise sqlite3.DatabaseError("clips are missing")
    return Progress(clips, last[0].stop if clips else 0.0, finished)


def load_state(store: VideoStore) -> MemoryState:
    """The memory after the last clip: the newest snapshot and a replay of the clips after it.

    Raises:
      UserError: if something of it is damaged; nothing is left out silently.
    """
    return state_at(store, math.inf)


def state_at(store: VideoStore, time: float) -> MemoryState:
    """The memory after the clips that end by `time`, in seconds.

    Exact while all clips kept by then are still held. Where some were evicted since and pruned, it
    is the memory of the rest: what is known today of what was known then.
    """
    with traces.guard(store.folder / layout.DATABASE):
        while True:
            with traces.transaction(store.database, write=False):
                snapshot = _snapshot(store)
                ends = [end for _, end in traces.spans(store.database) if end <= time]
                if snapshot is not None and snapshot["clips"] > len(ends):
                    snapshot = None
                first = snapshot["clips"] if snapshot else 0
                rows = traces.rows(
                    store.database,
                    "item IS NOT NULL AND clip >= ? AND clip < ?",
                    (first, len(ends)),
                )
            try:
                state = _base(store, snapshot)
            except FileNotFoundError:
                if _snapshot(store) != snapshot:
                    continue  # a newer one took its place meanwhile
                name = store.folder / snapshot["name"]
                raise UserError(
                    f"{name} is missing, though its clips are whole: copy it back, or delete "
                    f"{store.folder} and build the video again"
                ) from None
            return _replayed(store, state, rows, ends)


def _base(store: VideoStore, snapshot: dict | None) -> MemoryState:
    if snapshot is None:
        return memory.init(store.config)
    path = layout.join(store.folder, snapshot["name"])
    return arrays.read_state(path, snapshot["sha256"], store.config)


def _replayed(store, state: MemoryState, rows: list[Row], ends: list[float]) -> MemoryState:
    """`state` after the kept clips `rows`, and with the count and clock of all that ended."""
    steps = []
    for row in rows:
        record = traces.record_of(row, (), store.folder, store.config.dim)
        steps.append((record.item, record.action, record.strength, record.node_id))
    clock = max([np.float32(0), np.float32(state.clock), *np.asarray(ends, np.float32)])
    state = replay(state, steps)
    return state.replace(
        num_items=jnp.asarray(len(ends), jnp.int32), clock=jnp.asarray(clock, jnp.float32)
    )


def read_clips(store: VideoStore, indices: Iterable[int] | None = None) -> list[ClipRecord]:
    """Clips in the order of `indices`; by default all that are still held, in order of time.

    A clip that was discarded or forgotten has index, span, action, node_id and nothing else.

    Raises:
      UserError: for an index that is no clip, and for damage.
    """
    path = store.folder / layout.DATABASE
    with traces.guard(path), traces.transaction(store.database, write=False):
        where, values = "item IS NOT NULL AND node >= 0", ()
        if indices is not None:
            indices = [int(i) for i in indices]
            where, values = "clip IN (SELECT value FROM json_each(?))", (json.dumps(indices),)
        rows = {row.clip: row for row in traces.rows(store.database, where, values)}
        named = {}
        chosen = "clip IN (SELECT value FROM json_each(?))"
        for m in traces.mentions(store.database, chosen, (json.dumps(sorted(rows)),)):
            if rows[m.clip].item is not None:
                named.setdefault(m.clip, []).extend([(m.slot, m.name)] * m.count)
        missing = set(indices or ()) - rows.keys()
        if missing:
            raise UserError(f"{store.folder} has no clip {min(missing)}; build the video again")
        return [
            traces.record_of(rows[i], tuple(named.get(i, ())), store.folder, store.config.dim)
            for i in (rows if indices is None else indices)
        ]


def read_frame(store: VideoStore, path: Path) -> bytes:
    """The JPEG of a key frame that a `ClipRecord` names.

    Raises:
      UserError: if it is missing or damaged.
    """
    with traces.guard(store.folder / layout.DATABASE):
        clip = int(path.name.split("-")[0]) if traces.FRAME_NAME.fullmatch(path.name) else -1
        rows = traces.rows(store.database, "clip = ?", (clip,))
    known = {name: crc for row in rows for _, name, crc in json.loads(row.frames)}
    try:
        data = traces.frame_path(store.folder, path.name).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the key frame {path} ({error.strerror})") from None
    if zlib.crc32(data) != known.get(path.name):
        raise UserError(f"the key frame {path} is damaged; delete {store.folder} and build again")
    return data


def node_clips(store: VideoStore, node_ids: Iterable[int]) -> dict[int, tuple[int, ...]]:
    """Indices of the clips held of each episode, in order of time; none for an unknown one."""
    out = {int(node): [] for node in node_ids}
    with traces.guard(store.folder / layout.DATABASE):
        found = store.database.execute(
            "SELECT node, clip FROM clips WHERE item IS NOT NULL "
            "AND node IN (SELECT value FROM json_each(?)) ORDER BY clip",
            (json.dumps(list(out)),),
        )
        for node, clip in found:
            out[node].append(clip)
    return {node: tuple(clips) for node, clips in out.items()}


def entities(store: VideoStore, state: MemoryState) -> list[Entity]:
    """The entities in the schema of `state`, by slot, with the names they were given until then.

    `state` is one of `load_state` or `state_at`. An entity whose last mention is not the one on
    disk (it was pruned, or its slot has another entity by now) gets no name rather than a wrong
    one.
    """
    schema, last = state.schema, int(state.num_items)
    valid, count, span = (np.asarray(x) for x in (schema.valid, schema.mentions, schema.span))
    path = store.folder / layout.DATABASE
    with traces.guard(path), traces.transaction(store.database, write=False):
        given = {}
        for m in traces.mentions(store.database, "clip < ?", (last,)):
            given.setdefault(m.slot, {}).setdefault(m.opened, []).append(m)
        ends = dict(traces.spans(store.database))
    out = []
    for slot in np.flatnonzero(valid).tolist():
        newest = given.get(slot, {0: []})
        newest = newest[max(newest)]
        names = Counter()
        if newest and np.float32(ends[max(m.clip for m in newest)]) == span[slot, 1]:
            for m in newest:
                names[m.name] += m.count
        ranked = tuple(sorted(names.items(), key=lambda pair: (-pair[1], pair[0])))
        name = ranked[0][0] if ranked else ""
        times = (float(span[slot, 0]), float(span[slot, 1]))
        out.append(Entity(slot, name, ranked, int(count[slot]), times))
    return out


def counts(store: VideoStore) -> Counts:
    """What became of the clips so far."""
    path = store.folder / layout.DATABASE
    with traces.guard(path), traces.transaction(store.database, write=False):
        seen = len(traces.spans(store.database))
        taken, kept, forgotten = store.database.execute(
            "SELECT count(*), count(DISTINCT node), coalesce(sum(item IS NULL), 0) FROM clips "
            "WHERE node >= 0"
        ).fetchone()
        dropped = traces.get(store.database, "frames_dropped")
    return Counts(seen, kept, taken - kept, seen - taken, forgotten, dropped)
