"""Subtitles beside a video: SubRip (.srt) and WebVTT (.vtt) files as plain timed text.

Formats: SubRip as players read it; WebVTT, https://www.w3.org/TR/webvtt1/.
"""

import codecs
import html
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from mmmem_jax.errors import UserError

_SUFFIXES = (".srt", ".vtt")
_MAX_BYTES = 64 * 2**20
_LATEST = 1e7  # seconds, some 16 weeks; a later time is a mistake
_ROLLING_GAP = 0.1  # seconds between two captions of which the second repeats the first one's end
_TIME = r"(?:(\d{1,6}):)?([0-5]?\d):([0-5]?\d)[.,](\d{1,3})"
_TIMING = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")  # of HTML and WebVTT, and of SubStation Alpha


class Cue(NamedTuple):
    """One caption: [t0, t1] in seconds since the start of the video, plain text without tags."""

    t0: float
    t1: float
    text: str


def read_subtitles(path: str | Path) -> tuple[Cue, ...]:
    """Reads an .srt or .vtt file; cues in the order of their starts, those without text left out.

    UTF-8, UTF-16 and, where it is neither, Windows-1252. Rolling captions, which repeat the lines
    shown before and add one, are told once.

    Raises:
      UserError: the file is no subtitle file, is empty, or has a time that cannot be (the line is
        told).
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{path} is no subtitle file that can be read: it must be .srt or .vtt")
    blocks = sorted(_blocks(path, _read_text(path).splitlines()), key=itemgetter(0, 1))
    cues = tuple(_unroll(blocks))
    if not cues:
        raise UserError(f"{path} holds no captions; mend the file or take it away")
    return cues


def find_subtitles(video_path: str | Path) -> Path | None:
    """The subtitle file beside a video: STEM.srt, STEM.vtt, or the first STEM.LANG.srt or .vtt."""
    video_path = Path(video_path)
    for suffix in _SUFFIXES:
        beside = video_path.with_suffix(suffix)
        if os.path.isfile(beside):  # which takes a name that is too long for one that is not there
            return beside
    language = re.compile(re.escape(video_path.stem) + r"\.[\w-]+\.(srt|vtt)", re.IGNORECASE)
    try:
        beside = sorted(video_path.parent.iterdir())
    except OSError:  # no folder, or one that may not be listed
        return None
    return next((p for p in beside if language.fullmatch(p.name) and p.is_file()), None)


def overlapping(cues: Sequence[Cue], span: tuple[float, float]) -> tuple[Cue, ...]:
    """Those of `cues`, sorted by start, that share more than a moment with `span` (seconds)."""
    begun = bisect_left(cues, span[1], key=itemgetter(0))
    return tuple(cue for cue in cues[:begun] if cue.t1 > span[0])


def plain_text(text: str) -> str:
    """`text` without tags, escapes and control characters, every run of white space one space."""
    words = html.unescape(_TAG.sub("", text.replace(r"\N", " "))).split()
    return _CONTROL.sub("", " ".join(words))  # a terminal would obey them


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read the subtitles {path}: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise UserError(f"{path} is over {_MAX_BYTES >> 20} MB: this is no subtitle file")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    if b"\0" in data:
        raise UserError(f"{path} is no text (it has NUL bytes): this is no subtitle file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _blocks(path: Path, lines: Sequence[str]) -> Iterable[tuple[float, float, list[str]]]:
    """(t0, t1, lines of plain text) of each timing line and the lines below it to the next gap."""
    if path.suffix.lower() == ".vtt" and not (lines and lines[0].startswith("WEBVTT")):
        raise UserError(f"{path}:1: a .vtt file must begin with WEBVTT")
    block = None
    for number, line in enumerate(lines, 1):
        if "-->" in line:
            if block:
                if block[2] and block[2][-1].isdigit():  # the next number, with no gap before it
                    block[2].pop()
                yield block
            block = (*_timing(line, f"{path}:{number}"), [])
        elif block and not line.strip():
            yield block
            block = None
        elif block and (text := plain_text(line)):
            block[2].append(text)
    if block:
        yield block


def _timing(line: str, where: str) -> tuple[float, float]:
    found = _TIMING.fullmatch(line)
    if found is None:
        shown = line.strip()[:60]
        raise UserError(
            f"{where}: {shown!r} is no time range such as 00:00:01,000 --> 00:00:02,500"
        )
    t0, t1 = (_seconds(*found.groups()[i : i + 4]) for i in (0, 4))
    if not t0 <= t1 <= _LATEST:
        raise UserError(f"{where}: a caption from {t0:g} s to {t1:g} s cannot be; mend this line")
    return t0, t1


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    whole = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)
    return (whole * 1000 + int(fraction.ljust(3, "0"))) / 1000


def _unroll(blocks: Iterable[tuple[float, float, list[str]]]) -> list[Cue]:
    """Cues of sorted blocks, without the lines that the caption just before has shown already."""
    cues: list[Cue] = []
    shown: list[str] = []
    shown_until = 0.0
    for t0, t1, lines in blocks:
        if not lines or t1 == t0:
            continue
        again = 0
        if t0 <= shown_until + _ROLLING_GAP:
            sizes = range(min(len(shown), len(lines)), 0, -1)
            again = next((n for n in sizes if shown[-n:] == lines[:n]), 0)
        if lines[again:]:
            cues.append(Cue(t0, t1, " ".join(lines[again:])))
        else:
            cues[-1] = cues[-1]._replace(t1=max(cues[-1].t1, t1))
        shown, shown_until = lines, t1
    return cues
