"""EgoLife as timed text: narrations, transcripts and EgoLifeQA in the official layout.

::

    EgoLifeCap/Sync/**/A1_JAKE_DAY<d>_<HH>000000.json
        [{"video_file", "data": [{"start", "end", "text", "type"}]}]
    EgoLifeQA/**/EgoLifeQA_A1_JAKE.json
        [{"ID", "query_time", "target_time", "question", "choice_a".."choice_d", "answer", "type"}]

Times become seconds since day 1, 00:00. Source: https://egolife-ai.github.io (EgoLife, CVPR 2025).
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmmem_jax.data.timed_text import (
    Event,
    Question,
    TimedText,
    parse_text,
    report_bad_rows,
    timed_text,
)
from mmmem_jax.errors import UserError

DAY = 86_400.0  # seconds
# Train on days 1-2, choose on day 3, report on day 4.
DAY_SPLITS = {"train": (1, 2), "validation": (3,), "test": (4,)}

_FRAMES_PER_SECOND = 20
_CAPTION_FILE = re.compile(r"(A\d+_[A-Z]+)_DAY(\d+)_\d{8}\.json")
_QA_FILE = re.compile(r"EgoLifeQA_(A\d+_[A-Z]+)\.json")
# A target may join several moments: "DAY1" + "13444813DAY3_20222516".
_MOMENT = re.compile(r"(?:DAY(\d+)_?)?(\d{6,8})", re.IGNORECASE)

_log = logging.getLogger(__name__)


def read_egolife(
    folder: str | Path, *, evidence_seconds: float = 30.0, skip_bad_rows: bool = True
) -> TimedText:
    """Reads every person in `folder`; a video is a person's whole recording, such as "A1_JAKE".

    Exact repetitions of a row (same times, kind and text) are read once. Question ids are
    "<video>_<ID>". Each moment of a question's target becomes an evidence window of
    `evidence_seconds`, centred on it; a target that names no moment gives none. Bad rows of the
    official files are not the user's to mend, so by default each is logged and left out.

    Raises:
      UserError: `folder` is not in the official layout, or rows are bad and not to be skipped.
    """
    folder = Path(folder)
    caption_files = _named(folder / "EgoLifeCap" / "Sync", _CAPTION_FILE)
    qa_files = _named(folder / "EgoLifeQA", _QA_FILE)
    for files, name in (
        (caption_files, "EgoLifeCap/Sync/A1_JAKE_DAY1_11000000.json"),
        (qa_files, "EgoLifeQA/EgoLifeQA_A1_JAKE.json"),
    ):
        if not files:
            raise UserError(
                f"{folder} holds no file like {name}; point at the folder that EgoLife was"
                " downloaded to (data/README.md shows the layout)"
            )
    problems: list[str] = []
    events: dict[Event, None] = {}
    for path, match in caption_files:
        video, day = match[1], int(match[2])
        for row in _parse(_caption_rows(path, problems), problems, _event_of, video, day):
            events[row] = None
    questions: dict[str, Question] = {}
    videos = {event.video for event in events}
    for path, match in qa_files:
        if match[1] not in videos:
            _log.warning("%s: no captions of %s, questions left out", path.name, match[1])
            continue
        rows = _items(path.name, _load(path, problems), problems)
        for question in _parse(rows, problems, _question_of, match[1], evidence_seconds):
            if questions.setdefault(question.qid, question) is not question:
                problems.append(f"{path.name}: qid {question.qid} is used twice")
    report_bad_rows(problems, skip=skip_bad_rows)
    if not events:
        raise UserError(f"{folder / 'EgoLifeCap'} holds no events; download it again")
    return timed_text(events, questions.values())


def day_of(seconds: float) -> int:
    """Returns the day, counted from 1, that `seconds` since day 1, 00:00 falls on."""
    return int(seconds // DAY) + 1


def wearer_of(video: str) -> str:
    """Returns the name of the person who wears the camera: "Jake" for "A1_JAKE"."""
    return video.partition("_")[2].title()


def cut_days(data: TimedText, days: Sequence[int]) -> TimedText:
    """Keeps the events that end, and the questions asked, on `days`.

    A question may look at everything before its query time: read its past from `data.events`.
    """
    return replace(
        data,
        events=tuple(event for event in data.events if day_of(event.t1) in days),
        questions=tuple(
            question
            for question in data.questions
            if question.query_time is not None and day_of(question.query_time) in days
        ),
    )


def seconds_of(day: int, clock: str | int) -> float:
    """Returns seconds since day 1, 00:00 of a clock HHMMSS or HHMMSSFF (FF: frames, 20 a second).

    A few official clocks have FF over 19; they stay inside their second. ValueError if not a clock.
    """
    text = str(clock)
    if isinstance(clock, int):  # which has lost its leading zeros
        text = text.zfill(8 if len(text) > 6 else 6)
    if not re.fullmatch(r"\d{6}(\d\d)?", text, re.ASCII):
        raise ValueError(f"time {clock!r} is not HHMMSS or HHMMSSFF")
    hours, minutes, seconds, frames = (int(text[i : i + 2] or 0) for i in (0, 2, 4, 6))
    if hours > 23 or minutes > 59 or seconds > 59 or day < 1:
        raise ValueError(f"time {clock!r} of day {day} is out of range")
    fraction = min(frames, _FRAMES_PER_SECOND - 1) / _FRAMES_PER_SECOND
    return (day - 1) * DAY + hours * 3600 + minutes * 60 + seconds + fraction


def _named(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    matches = ((path, pattern.fullmatch(path.name)) for path in sorted(folder.rglob("*.json")))
    return [(path, match) for path, match in matches if match]


def _load(path: Path, problems: list[str]) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name}: is not UTF-8 JSON ({error})")
        return []


def _items(where: str, rows: Any, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(rows, list):
        problems.append(f"{where}: is not a list")
        return
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield f"{where}: row {number}", row
        else:
            problems.append(f"{where}: row {number}: is not a JSON object")


def _caption_rows(path: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, clip in _items(path.name, _load(path, problems), problems):
        yield from _items(f"{where} data", clip.get("data"), problems)


def _parse(
    rows: Iterator[tuple[str, dict[str, Any]]],
    problems: list[str],
    parse: Callable[..., Any],
    *args: Any,
) -> Iterator[Any]:
    for where, row in rows:
        try:
            yield parse(row, *args)
        except ValueError as error:
            problems.append(f"{where}: {error}")


def _event_of(row: dict[str, Any], video: str, day: int) -> Event:
    t0, t1 = seconds_of(day, row.get("start", "")), seconds_of(day, row.get("end", ""))
    if t1 < t0:
        raise ValueError(f"ends at {row['end']} before it starts at {row['start']}")
    return Event(video, t0, t1, parse_text(row, "type"), parse_text(row, "text"))


def _question_of(row: dict[str, Any], video: str, evidence_seconds: float) -> Question:
    number = str(row.get("ID") or "").strip()
    if not number:
        raise ValueError("ID is missing")
    qid = f"{video}_{number}"
    letter = str(row.get("answer", "")).strip().upper()
    if letter not in list("ABCD"):
        raise ValueError(f"answer {row.get('answer')!r} is not A, B, C or D")
    asked = _moments(row.get("query_time"))
    if len(asked) != 1:
        raise ValueError(f"query_time {row.get('query_time')!r} is not one moment")
    try:
        moments = sorted(set(_moments(row.get("target_time"))))
    except ValueError as error:  # the question stays usable without its evidence
        _log.warning("%s: no evidence window: target %s", qid, error)
        moments = []
    return Question(
        qid,
        video,
        parse_text(row, "question"),
        tuple(parse_text(row, f"choice_{letter}") for letter in "abcd"),
        "ABCD".index(letter),
        asked[0],
        tuple((moment - evidence_seconds / 2, moment + evidence_seconds / 2) for moment in moments),
        parse_text(row, "type"),
    )


def _moments(target: Any) -> list[float]:
    """Reads {"date", "time"} or {"date", "time_list"}; a string may join several moments."""
    if not isinstance(target, dict):
        return []
    clocks = target.get("time_list", [target.get("time", "")])
    moments = []
    for clock in clocks if isinstance(clocks, list) else [clocks]:
        day = 0
        for match in _MOMENT.finditer(f"{target.get('date', '')}_{clock}"):
            day = int(match[1] or day)
            moments.append(seconds_of(day, match[2]))
    return moments
