"""Adds clips to a video, so that a kill at any moment loses none that was added."""

import json
import math
import sqlite3
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from mmmem_jax.errors import UserError
from mmmem_jax.memory import DISCARD, MemoryConfig, MemoryState
from mmmem_jax.store import arrays, layout, traces
from mmmem_jax.store.traces import ClipRecord, Mention, Row
from mmmem_jax.store.video_store import VideoStore, snapshot_of

SNAPSHOT_EVERY = 64  # clips


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
        if clips and row.stop < traces.stop_of(store.database, clips - 1):
            raise ValueError(f"clip {record.index} ends before the one before")
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
        except (UserError, sqlite3.DatabaseError):
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
        log_prob=float(record.log_prob) + 0.0,  # SQLite has no -0.0
        caption=record.caption if kept else "",
        subtitles=record.subtitles if kept else "",
        trace=record.trace if kept else "",
        labels=json.dumps(labels, ensure_ascii=False),
        frames=json.dumps(frames),
        failed=json.dumps(record.failed),
        item=arrays.item_to_bytes(record.item) if record.item and (kept or changed) else None,
    )
    if not all(math.isfinite(x) for x in (row.start, row.stop, row.strength, row.log_prob)):
        raise ValueError(f"clip {record.index} has a span, strength or log_prob that is no number")
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


def _save_snapshot(store: VideoStore, state: MemoryState, clips: int) -> None:
    """The whole state in a new file; the old one goes when the database names the new one."""
    old = snapshot_of(store)
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
        empty = row._replace(
            caption="", subtitles="", trace="", labels="[]", frames="[]", item=None
        )
        traces.insert(store.database, empty)
    if evicted:
        traces.fold_mentions(store.database)
    frames = (name for row in evicted for _, name, _ in json.loads(row.frames))
    return [traces.frame_path(store.folder, name) for name in frames]


def finish(store: VideoStore, state: MemoryState) -> None:
    """Saves the memory of a whole video, so that reading it replays nothing."""
    with traces.guard(store.folder / layout.DATABASE):
        clips = traces.get(store.database, "clips")
        if int(state.num_items) != clips:
            raise ValueError(f"a memory of {int(state.num_items)} items after {clips} clips")
        snapshot = snapshot_of(store)
        if snapshot is None or snapshot["clips"] != clips:
            _save_snapshot(store, state, clips)
        traces.put(store.database, "finished", 1)
