"""What a video holds: its clips, its entities, and the memory as it was at any time."""

import io
import json
import math
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmmem_jax import memory
from mmmem_jax.errors import UserError
from mmmem_jax.memory import MemoryState
from mmmem_jax.store import arrays, layout, traces
from mmmem_jax.store.replay import replay
from mmmem_jax.store.traces import ClipRecord, Row
from mmmem_jax.store.video_store import VideoStore, snapshot_of


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


def progress(store: VideoStore) -> Progress:
    """Clips done, the end of the last one and whether the video is finished."""
    path = store.folder / layout.DATABASE
    with traces.guard(path), traces.transaction(store.database, write=False):
        clips = traces.get(store.database, "clips")
        finished = bool(traces.get(store.database, "finished"))
        end = traces.stop_of(store.database, clips - 1) if clips else 0.0
    return Progress(clips, end, finished)


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
                snapshot = snapshot_of(store)
                clips, clock = traces.ended(store.database, time)
                if snapshot is not None and snapshot["clips"] > clips:
                    snapshot = None
                first = snapshot["clips"] if snapshot else 0
                rows = traces.rows(
                    store.database, "item IS NOT NULL AND clip >= ? AND clip < ?", (first, clips)
                )
            try:
                state = _base(store, snapshot)
            except FileNotFoundError:
                if snapshot_of(store) != snapshot:
                    continue  # a newer one took its place meanwhile
                name = store.folder / snapshot["name"]
                raise UserError(
                    f"{name} is missing, though its clips are whole: copy it back, or delete "
                    f"{store.folder} and build the video again"
                ) from None
            return _replayed(store, state, rows, clips, clock)


def _base(store: VideoStore, snapshot: dict | None) -> MemoryState:
    if snapshot is None:
        return memory.init(store.config)
    path = layout.join(store.folder, snapshot["name"])
    return arrays.read_state(path, snapshot["sha256"], store.config)


def _replayed(store, state: MemoryState, rows: list[Row], clips: int, clock: float) -> MemoryState:
    """`state` after the kept clips `rows`, with the number and the end of all clips until then."""
    steps = []
    for row in rows:
        record = traces.record_of(row, (), store.folder, store.config.dim)
        steps.append((record.item, record.action, record.strength, record.node_id))
    state = replay(state, steps)
    return state.replace(
        num_items=jnp.asarray(clips, jnp.int32), clock=jnp.asarray(clock, jnp.float32)
    )


def read_clips(store: VideoStore, indices: Iterable[int] | None = None) -> list[ClipRecord]:
    """Clips in the order of `indices`; by default all that are still held, in order of time.

    A clip that was discarded or forgotten has no texts, frames, entities and item.

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
                if m.count > traces.MOST_NAMED:
                    raise sqlite3.DatabaseError(f"mention of clip {m.clip}")
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


def read_image(store: VideoStore, path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """`read_frame`, decoded to red, green, blue.

    Raises:
      UserError: as `read_frame` does.
    """
    with Image.open(io.BytesIO(read_frame(store, path))) as image:
        return np.asarray(image.convert("RGB"))


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
        newest = {slot: by_entity[max(by_entity)] for slot, by_entity in given.items()}
        last_clip = {slot: max(m.clip for m in found) for slot, found in newest.items()}
        ends = {clip: traces.stop_of(store.database, clip) for clip in set(last_clip.values())}
    out = []
    for slot in np.flatnonzero(valid).tolist():
        names = Counter()
        if slot in newest and np.float32(ends[last_clip[slot]]) == span[slot, 1]:
            for m in newest[slot]:
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
        seen = traces.get(store.database, "clips")
        taken, kept, forgotten = store.database.execute(
            "SELECT count(*), count(DISTINCT node), coalesce(sum(item IS NULL), 0) FROM clips "
            "WHERE node >= 0"
        ).fetchone()
        dropped = traces.get(store.database, "frames_dropped")
    return Counts(seen, kept, taken - kept, seen - taken, forgotten, dropped)


def failures(store: VideoStore) -> dict[str, int]:
    """How many clips so far could not be given something, by what that is; empty where all were."""
    with traces.guard(store.folder / layout.DATABASE):
        found = traces.rows(store.database, "failed != '[]'")
        return dict(Counter(name for row in found for name in traces.failed_of(row)))
