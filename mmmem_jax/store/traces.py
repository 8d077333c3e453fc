"""The SQLite tables of one video: clips, mentions, and what is known of the whole.

Each row carries a checksum of its values, because SQLite has none: a flipped bit is an error, not
another caption. Version and kind of the file are in its `user_version` and `application_id`.
"""

import contextlib
import json
import math
import os
import re
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mmmem_jax.errors import UserError
from mmmem_jax.memory import Item
from mmmem_jax.store import arrays, layout

VERSION = 2
APPLICATION_ID = int.from_bytes(b"mmem")
BUSY_SECONDS = 10.0
FRAME_NAME = re.compile(r"\d{6,}-\d+\.jpg")

_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
CREATE TABLE meta (key TEXT PRIMARY KEY, value, crc INTEGER) WITHOUT ROWID;
CREATE TABLE clips (
  clip INTEGER PRIMARY KEY, start REAL, stop REAL, action INTEGER, strength REAL, node INTEGER,
  log_prob REAL, caption TEXT, subtitles TEXT, trace TEXT, labels TEXT, frames TEXT, failed TEXT,
  item BLOB, crc INTEGER
);
CREATE INDEX clips_of_node ON clips (node, (item IS NOT NULL));
CREATE TABLE mentions (
  slot INTEGER, opened INTEGER, clip INTEGER, name TEXT, count INTEGER, crc INTEGER,
  PRIMARY KEY (slot, opened, clip, name)
) WITHOUT ROWID;
"""


class ClipRecord(NamedTuple):
    """What became of one clip. Of one that is not kept no texts, frames and item are stored."""

    index: int  # 0, 1, 2, ...
    span: tuple[float, float]  # seconds
    caption: str
    subtitles: str
    labels: tuple[tuple[str, float], ...]  # name, probability
    frames: tuple[tuple[float, bytes | Path], ...]  # seconds, JPEG: bytes or a file when given
    action: int  # as decided
    strength: float  # float32, rank for eviction
    node_id: int  # episode that took it, -1: not kept
    item: Item | None  # what the memory read, `store.rounded`; None where not kept
    entities: tuple[tuple[int, str], ...]  # schema slot and name of each mention, -1: no slot
    log_prob: float = 0.0  # of the action, nats
    trace: str = ""  # what the policy wrote with its decision
    failed: tuple[str, ...] = ()  # what could not be found out, such as "extraction"


class Row(NamedTuple):
    """A line of the table `clips`."""

    clip: int
    start: float
    stop: float
    action: int
    strength: float
    node: int
    log_prob: float
    caption: str
    subtitles: str
    trace: str
    labels: str  # JSON [[name, probability], ...]
    frames: str  # JSON [[seconds, name, crc32], ...]
    failed: str  # JSON [name, ...]
    item: bytes | None


# Types of the columns and of `meta`; the bounds below are those of int32 and float32.
_ROW = (int, float, float, int, float, int, float, str, str, str, str, str, str, bytes | None)
_MENTION = (int, int, int, str, int)
_META = {"header": str, "clips": int, "finished": int, "frames_dropped": int, "snapshot": str}
MOST_NAMED = 1024  # times that one clip gives an entity a name


def seal(values: tuple) -> int:
    """CRC-32 over the values of a row (integers, floats, text, None, and the CRC-32 of bytes)."""
    plain = tuple(zlib.crc32(x) if isinstance(x, bytes) else x for x in values)
    return zlib.crc32(repr(plain).encode())


def _possible(values: Iterable, types: Iterable) -> bool:
    """Whether a row can be ours: a checksum is no proof of that, anyone may compute it."""
    return all(
        isinstance(x, kind)
        and not (isinstance(x, int) and not -(2**31) <= x < 2**31)
        and not (isinstance(x, float) and not abs(x) < 3.4e38)
        for x, kind in zip(values, types, strict=True)
    )


def connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    """A connection to a database of this version; readers and one writer at the same time.

    Raises:
      UserError: if the file is missing, damaged, of another version or of another program.
    """
    options = "mode=rw" if writable else "mode=ro"
    for suffix in ("-wal", "-shm", "-journal"):
        layout.join(path.parent, path.name + suffix)
    wal = path.with_name(path.name + "-wal")
    if not writable and not os.access(path.parent, os.W_OK) and not _size(wal):
        options += "&immutable=1"  # nobody writes here, and SQLite cannot make its own files
    with guard(path):
        database = sqlite3.connect(
            f"{path.absolute().as_uri()}?{options}",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            _check(database, path)
        except BaseException:
            database.close()
            raise
    return database


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _check(database: sqlite3.Connection, path: Path) -> None:
    """Refuses another program's file, another version, and damage."""
    application, version = (
        database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("application_id", "user_version")
    )
    if application != APPLICATION_ID:
        raise UserError(f"{path} is no memory of mmmem; build the video again")
    if version != VERSION:
        raise UserError(
            f"{path} is of version {version}, this program reads {VERSION}; build again"
        )
    with contextlib.closing(sqlite3.connect(":memory:")) as blank:
        blank.executescript(_SCHEMA)
        if _tables(database) != _tables(blank):
            raise damaged(path, "other tables than those of its version")
    found = database.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise damaged(path, found)
    with transaction(database, write=False):
        counted = database.execute("SELECT count(*), max(clip) + 1 FROM clips").fetchone()
        if counted != (get(database, "clips"), counted[0] or None):
            raise damaged(path, "clips are missing")
    database.execute("PRAGMA synchronous = FULL")


def _tables(database: sqlite3.Connection) -> list[tuple]:
    """What makes the tables, their indices, and no triggers or views besides."""
    query = "SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'"
    return sorted(database.execute(query))


def damaged(path: Path, why: object) -> UserError:
    """What to tell of a database that holds what was never written."""
    why = " ".join(str(why).split())
    return UserError(f"{path} is damaged ({why}); delete {path.parent} and build the video again")


@contextlib.contextmanager
def guard(path: Path) -> Iterator[None]:
    """Turns what SQLite says of a file into one line for the user."""
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
        raise  # the caller's mistake, not the file's
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY):
            raise layout.unwritten(path, error) from None
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise UserError(f"{path} is busy ({error}); try again in a moment") from None
        if code == sqlite3.SQLITE_CANTOPEN and path.exists():
            raise UserError(f"cannot open {path}; copy its folder to where you may write") from None
        if not path.exists():
            raise UserError(f"{path} is missing; delete {path.parent} and build again") from None
        raise damaged(path, error) from None
    except UnicodeDecodeError:  # SQLite names what it found, as it found it
        raise damaged(path, "its text is no UTF-8") from None


@contextlib.contextmanager
def transaction(database: sqlite3.Connection, *, write: bool) -> Iterator[None]:
    """All or nothing; a reader sees one moment."""
    database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
    try:
        yield
        database.execute("COMMIT")
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def make(path: Path, meta: dict[str, object]) -> None:
    """A new database with these values of `meta`."""
    with guard(path), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.executescript(_SCHEMA)
        for key, value in meta.items():
            put(database, key, value)


def put(database: sqlite3.Connection, key: str, value: object) -> None:
    """Sets one value of `meta`."""
    database.execute("REPLACE INTO meta VALUES (?, ?, ?)", (key, value, seal((key, value))))


def get(database: sqlite3.Connection, key: str) -> object:
    """One value of `meta`; raises sqlite3.DatabaseError where it is damaged."""
    found = database.execute("SELECT value, crc FROM meta WHERE key = ?", (key,)).fetchone()
    sealed = found is not None and found[1] == seal((key, found[0]))
    if not sealed or not _possible(found[:1], (_META[key],)):
        raise sqlite3.DatabaseError(f"meta {key}")
    return found[0]


def insert(database: sqlite3.Connection, row: Row) -> None:
    """Adds one clip, or replaces it."""
    marks = ", ".join("?" * (len(row) + 1))
    database.execute(f"REPLACE INTO clips VALUES ({marks})", (*row, seal(row)))


def rows(database: sqlite3.Connection, where: str, values: tuple = ()) -> list[Row]:
    """Clips by index, whole; `where` is a condition of this package, never of a user."""
    found = database.execute(f"SELECT * FROM clips WHERE {where} ORDER BY clip", values).fetchall()
    for *row, crc in found:
        if crc != seal(row) or not _possible(row, _ROW):
            raise sqlite3.DatabaseError(f"clip {row[0]}")
    return [Row(*row) for *row, _ in found]


def ended(database: sqlite3.Connection, time: float) -> tuple[int, float]:
    """How many clips end by `time`, and the end of the last of them (0 if none does)."""
    low, high = 0, get(database, "clips")
    while low < high:
        middle = (low + high) // 2
        if stop_of(database, middle) <= time:
            low = middle + 1
        else:
            high = middle
    return low, stop_of(database, low - 1) if low else 0.0


def stop_of(database: sqlite3.Connection, clip: int) -> float:
    """End of one clip, in seconds."""
    found = rows(database, "clip = ?", (clip,))
    if not found:
        raise sqlite3.DatabaseError(f"clip {clip} is missing")
    return found[0].stop


class Mention(NamedTuple):
    """A line of `mentions`: a name that the entity in `slot` was given in `clip`, how often."""

    slot: int
    opened: int  # clip that opened the entity; the newest in a slot is the one that lives
    clip: int
    name: str
    count: int


def mentions(database: sqlite3.Connection, where: str, values: tuple = ()) -> list[Mention]:
    """Mentions in the order of slot, entity, clip, name."""
    found = database.execute(f"SELECT * FROM mentions WHERE {where}", values).fetchall()
    for *row, crc in found:
        if crc != seal(row) or not _possible(row, _MENTION):
            raise sqlite3.DatabaseError(f"mention of clip {row[2]}")
    return sorted(Mention(*row) for *row, _ in found)


def insert_mentions(database: sqlite3.Connection, found: Iterable[Mention]) -> None:
    """Adds mentions."""
    database.executemany(
        "REPLACE INTO mentions VALUES (?, ?, ?, ?, ?, ?)", ((*m, seal(m)) for m in found)
    )


def fold_mentions(database: sqlite3.Connection) -> None:
    """Sums up what clips no longer held mentioned, one row an entity and name; dead ones go."""
    chosen = "clip NOT IN (SELECT clip FROM clips WHERE item IS NOT NULL)"
    live = dict(database.execute("SELECT slot, max(opened) FROM mentions GROUP BY slot"))
    sums, last = Counter(), {}
    for m in mentions(database, chosen):
        if m.opened == live[m.slot]:
            key = (m.slot, m.opened, m.name)
            sums[key] += m.count
            last[key] = max(m.clip, last.get(key, 0))
    database.execute(f"DELETE FROM mentions WHERE {chosen}")
    folded = (Mention(s, o, last[s, o, n], n, count) for (s, o, n), count in sums.items())
    insert_mentions(database, folded)


def record_of(row: Row, entities: tuple, folder: Path, dim: int) -> ClipRecord:
    """A clip as it was recorded, its frames as paths below `folder`.

    Raises:
      UserError: where a frame would lie outside the folder.
      sqlite3.DatabaseError: where the row holds no clip.
    """
    try:
        labels = tuple((str(name), float(p)) for name, p in json.loads(row.labels))
        frames = tuple((float(time), str(name)) for time, name, _ in json.loads(row.frames))
        if not all(math.isfinite(x) for x in (*(p for _, p in labels), *(t for t, _ in frames))):
            raise ValueError("a number that is none")
        item = None if row.item is None else arrays.item_from_bytes(row.item, dim)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise sqlite3.DatabaseError(f"clip {row.clip}: {error}") from None
    return ClipRecord(
        index=row.clip,
        span=(row.start, row.stop),
        caption=row.caption,
        subtitles=row.subtitles,
        labels=labels,
        frames=tuple((time, frame_path(folder, name)) for time, name in frames),
        action=row.action,
        strength=row.strength,
        node_id=row.node,
        item=item,
        entities=entities,
        log_prob=row.log_prob,
        trace=row.trace,
        failed=failed_of(row),
    )


def failed_of(row: Row) -> tuple[str, ...]:
    """What could not be found out of a clip; raises sqlite3.DatabaseError where that is no list."""
    try:
        found = json.loads(row.failed)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise sqlite3.DatabaseError(f"clip {row.clip}: failed")
    return tuple(found)


def frame_path(folder: Path, name: str) -> Path:
    """Where a key frame lies; raises UserError if its name or a link leads elsewhere."""
    path = folder / layout.FRAMES / name
    if not FRAME_NAME.fullmatch(name) or path.is_symlink() or path.parent.is_symlink():
        raise UserError(f"{folder} names {name!r}, which lies outside it; build the video again")
    return path
