"""Names and paths of a memory folder: which are allowed, how a file gets there whole."""

import contextlib
import difflib
import errno
import hashlib
import os
import re
import unicodedata
from pathlib import Path
from urllib.parse import urlsplit

from mmmem_jax.errors import UserError

HEADER, DATABASE, LOCK, FRAMES = "video.json", "memory.sqlite", "lock", "frames"
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
# Where more room on the disk would not help.
_MISPLACED = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


def video_id_of(path: str | os.PathLike) -> str:
    """A folder name for a video: letters, digits, `.`, `_`, `-`; 1 to 64, no leading dot.

    The stem of a file's name; host and path of a URL, so that no password or token gets on disk.
    What the alphabet cannot hold, and port and query of a URL, are told apart by eight digits of
    a hash.
    """
    text = os.fspath(path)
    rest = ""
    if "://" in text:
        try:
            url = urlsplit(text)
            port = url.port
        except ValueError as error:
            raise UserError(f"the source is no URL ({error}); mend it") from None
        name = (url.hostname or "") + url.path
        if port is not None or url.query:
            rest = f":{port}?{url.query}"
    else:
        name = Path(text).stem
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._")
    ascii_name = re.sub(r"[ /]", "_", name).strip("._")
    if not rest and plain == ascii_name and _ID.fullmatch(plain):
        return plain
    digest = hashlib.sha256((name + rest).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{plain[:55] or 'video'}-{digest}"


def list_videos(memory_dir: str | os.PathLike) -> tuple[str, ...]:
    """Ids of the videos in a memory folder, sorted.

    Raises:
      UserError: if there is no such folder, or it cannot be read.
    """
    folder = Path(memory_dir)
    try:
        found = sorted(p.name for p in folder.iterdir() if (p / HEADER).is_file())
    except OSError as error:
        raise UserError(
            f"{folder} is no memory folder ({error.strerror}); make one with mmmem build --memory"
        ) from None
    return tuple(name for name in found if _ID.fullmatch(name))


def join(folder: Path, name: str) -> Path:
    """`folder / name`, if that lies inside `folder`, links followed.

    Raises:
      UserError: for an absolute path, for `..`, and for a link that leads outside.
    """
    path = folder / name
    inside = "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
    # Not Path.resolve, which raises RuntimeError for a link to itself.
    if not inside or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{folder} names {name!r}, which lies outside it; build the memory again")
    return path


def video_folder(memory_dir: str | os.PathLike, video_id: str) -> Path:
    """The folder of a video that a memory may or may not hold.

    Raises:
      UserError: if the id is none, or its folder lies outside the memory folder.
    """
    if not _ID.fullmatch(video_id):
        raise UserError(f"{video_id!r} is no video id: 1 to 64 of letters, digits, . _ -")
    return join(Path(memory_dir), video_id)


def find_video(memory_dir: str | os.PathLike, video_id: str) -> Path:
    """The folder of a video that a memory holds.

    Raises:
      UserError: naming the ids that are there, the nearest first.
    """
    known = list_videos(memory_dir)
    if video_id in known:
        return video_folder(memory_dir, video_id)
    if not known:
        raise UserError(f"{memory_dir} holds no video; make one with mmmem build")
    near = difflib.get_close_matches(video_id, known, n=3)
    shown = near or list(known[:5])
    more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    raise UserError(f"{memory_dir} holds no video {video_id!r}; it holds {', '.join(shown)}{more}")


def unwritten(path: Path, error: Exception) -> UserError:
    """What to tell of a write that failed."""
    why = getattr(error, "strerror", None) or error
    misplaced = getattr(error, "errno", None) in _MISPLACED
    what = "choose a folder that can be written" if misplaced else "make room, run again"
    return UserError(f"cannot write {path} ({why}); what was finished is kept: {what}")


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file at once or not at all, and waits until it is on disk.

    Raises:
      UserError: if the disk is full or the folder cannot be written; nothing is left behind then.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:  # never through a link
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may never have been there
            partial.unlink()
        raise unwritten(path, error) from None


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk; raises UserError if that fails."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise unwritten(folder, error) from None
