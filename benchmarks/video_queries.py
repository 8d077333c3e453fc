"""Reads the hand-checked queries about real videos that lie in queries/.

    moments.jsonl   {"qid", "video", "query", "windows", "split", "checked"}
    absent.jsonl    {"qid", "query", "absent": true, "split"}
    choices.jsonl   {"qid", "video", "question", "options", "answer", "windows", "split"}

A video is named as in data/videos.json. `windows` are all spans [t0, t1] of it, in seconds since
its first frame, in which what is asked is seen, within about a second; `checked` says what is seen
there. What an absent query names is in none of the videos. `answer` is the index of the right one
of four options. The splits are validation (to set thresholds on) and test: no video is in both.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmmem_jax.errors import UserError

FOLDER = Path(__file__).resolve().parent / "queries"
VIDEOS = Path(__file__).resolve().parent.parent / "data/videos.json"
SPLITS = ("validation", "test")
NUM_OPTIONS = 4

Windows = tuple[tuple[float, float], ...]


class Moment(NamedTuple):
    """A description of what is seen in the windows of one video, and nowhere else."""

    qid: str
    video: str
    query: str
    windows: Windows
    split: str
    checked: str


class Absent(NamedTuple):
    """A description of something that is in none of the videos."""

    qid: str
    query: str
    split: str


class Choice(NamedTuple):
    """A question with four options about one video; the windows show the answer."""

    qid: str
    video: str
    question: str
    options: tuple[str, ...]
    answer: int
    windows: Windows
    split: str


def read_moments(split: str | None = None, path: Path = FOLDER / "moments.jsonl") -> list[Moment]:
    """Returns the text-to-moment queries of a split, or of both."""
    return _of(split, _read(path, Moment))


def read_absent(split: str | None = None, path: Path = FOLDER / "absent.jsonl") -> list[Absent]:
    """Returns the queries about what is not there, of a split or of both."""
    return _of(split, _read(path, Absent))


def read_choices(split: str | None = None, path: Path = FOLDER / "choices.jsonl") -> list[Choice]:
    """Returns the multiple-choice questions of a split, or of both."""
    return _of(split, _read(path, Choice))


def read_seconds() -> dict[str, float]:
    """Returns the length of each video by its name."""
    table = json.loads(VIDEOS.read_text("utf-8"))
    return {video["name"]: video["seconds"] for video in table["videos"]}


def read_files() -> dict[str, str]:
    """Returns the file name of each video by its name, as data/videos.py writes it."""
    table = json.loads(VIDEOS.read_text("utf-8"))
    return {video["name"]: video["file"] for video in table["videos"]}


def coverage(windows: Windows, seconds: float) -> float:
    """The share of the video in the windows: how often a random instant is a hit."""
    return sum(t1 - t0 for t0, t1 in windows) / seconds


def _of(split: str | None, rows: Sequence) -> list:
    if split not in (None, *SPLITS):
        raise UserError(f"no split {split!r}; take one of {', '.join(SPLITS)}")
    return [row for row in rows if split in (None, row.split)]


def _read(path: Path, row_type: type) -> list:
    """Returns the file's rows in their order.

    Raises:
      UserError: the first row that is not of the type, as file:line: reason.
    """
    seconds = read_seconds()
    rows, qids = [], set()
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = _parse(line, row_type, seconds)
            if row.qid in qids:
                raise ValueError(f"qid {row.qid} is there twice")
        except (ValueError, TypeError) as error:
            raise UserError(f"{path.name}:{number}: {error}") from error
        qids.add(row.qid)
        rows.append(row)
    return rows


def _parse(line: str, row_type: type, seconds: dict[str, float]) -> Moment | Absent | Choice:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    if row_type is Absent and fields.pop("absent", None) is not True:
        raise ValueError("absent must be true")
    if fields.keys() != set(row_type._fields):
        raise ValueError(f"the fields must be {', '.join(row_type._fields)}")
    texts = [fields[name] for name in ("qid", "query", "question", "checked") if name in fields]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("a text is empty")
    if fields["split"] not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}")
    if "video" in fields:
        if fields["video"] not in seconds:
            raise ValueError(f"no video {fields['video']!r} in {VIDEOS.name}")
        fields["windows"] = _parse_windows(fields["windows"], seconds[fields["video"]])
    if "options" in fields:
        fields["options"] = tuple(fields["options"])
        _check_options(fields["options"], fields["answer"])
    return row_type(**fields)


def _parse_windows(windows: list, seconds: float) -> Windows:
    parsed = tuple((float(t0), float(t1)) for t0, t1 in windows)
    times = [0.0, *(time for window in parsed for time in window), seconds]
    if not parsed or times != sorted(times) or any(t0 == t1 for t0, t1 in parsed):
        raise ValueError(f"windows must be spans in order, apart, within 0 to {seconds} s")
    return parsed


def _check_options(options: tuple[str, ...], answer: int) -> None:
    if len(set(options)) != NUM_OPTIONS or len(options) != NUM_OPTIONS:
        raise ValueError(f"there must be {NUM_OPTIONS} different options")
    if answer not in range(NUM_OPTIONS):
        raise ValueError(f"answer must be 0 to {NUM_OPTIONS - 1}")
