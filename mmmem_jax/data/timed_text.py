"""Timed text: what was said or described when, and questions about it.

A folder holds two JSON-lines files, times in seconds::

    events.jsonl  {"video", "t0", "t1", "kind", "text"}
    qa.jsonl      {"qid", "video", "question", "options", "answer", "query_time", "evidence",
                   "type"}

`answer` is the index of the right option; `evidence` a list of [t0, t1]; `answer`, `query_time` and
`evidence` may be null. An empty qa.jsonl means that there are no questions.

Reading is strictly causal downstream: a question sees an event only if ``event.t1 <= query_time``,
and everything when its query time is null.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmem_jax.errors import UserError

SPLITS = ("train", "validation", "test")
_LATEST = 1e12  # seconds; a later time is a unit mistake (milliseconds, nanoseconds)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """One stretch of text: [t0, t1] in seconds, kind such as "caption" or "transcript"."""

    video: str
    t0: float
    t1: float
    kind: str
    text: str


@dataclass(frozen=True)
class Question:
    """A multiple-choice question about one video.

    Attributes:
      answer: index of the right option; None if unknown.
      query_time: seconds; None if the whole video may be used.
      evidence: (t0, t1) windows in seconds that hold the answer; for analysis, never for the agent.
    """

    qid: str
    video: str
    question: str
    options: tuple[str, ...]
    answer: int | None
    query_time: float | None
    evidence: tuple[tuple[float, float], ...]
    type: str


@dataclass(frozen=True)
class TimedText:
    """Events sorted by (video, t1, t0), and the questions about them."""

    events: tuple[Event, ...]
    questions: tuple[Question, ...]


def timed_text(events: Iterable[Event], questions: Iterable[Question]) -> TimedText:
    """Puts events in the order of their ends, the order in which a causal reader meets them."""
    return TimedText(
        tuple(sorted(events, key=lambda event: (event.video, event.t1, event.t0))), tuple(questions)
    )


def read_timed_text(folder: str | Path, *, skip_bad_rows: bool = False) -> TimedText:
    """Reads events.jsonl and qa.jsonl of `folder`.

    Args:
      folder: where the two files are.
      skip_bad_rows: log each bad row and go on, instead of refusing the folder.

    Raises:
      UserError: a file is missing, there are no events, or rows are bad (all are counted, the first
        few told as ``file:line: reason``).
    """
    folder = Path(folder)
    for name in ("events.jsonl", "qa.jsonl"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}; a timed-text folder holds events.jsonl and qa.jsonl"
                " (qa.jsonl may be empty)"
            )
    problems: list[str] = []
    events = list(_parse_rows(folder / "events.jsonl", _parse_event, problems))
    videos = {event.video for event in events}
    questions = _parse_questions(folder / "qa.jsonl", videos, "events", problems)
    report_bad_rows(problems, skip=skip_bad_rows)
    if not events:
        raise UserError(
            f"{folder / 'events.jsonl'} holds no events; it needs one JSON row per event"
        )
    return timed_text(events, questions)


def read_questions(path: str | Path, videos: set[str]) -> list[Question]:
    """Reads a qa.jsonl alone, whose questions are about videos of a memory.

    Raises:
      UserError: the file is missing, or rows are bad (told as `read_timed_text` does).
    """
    path, problems = Path(path), []
    if not path.is_file():
        raise UserError(f"{path} is not there; give a qa.jsonl of questions")
    questions = _parse_questions(path, videos, "memory", problems)
    report_bad_rows(problems, skip=False)
    return questions


def report_bad_rows(problems: Sequence[str], *, skip: bool) -> None:
    """Raises one UserError that names the first few problems, or logs all of them if `skip`."""
    if skip:
        for problem in problems:
            _log.warning("skipped %s", problem)
    elif problems:
        first, *rest = problems
        told = "; ".join(rest[:3]) + ("; ..." if len(rest) > 3 else "")
        more = f" (and {len(rest)} more bad row{'s' * (len(rest) > 1)}: {told})" if rest else ""
        raise UserError(f"{first}{more}")


def split_by_video_or_time(data: TimedText) -> dict[str, TimedText]:
    """Splits 60/20/20 into train, validation and test; the same input always splits the same way.

    With three videos or more, whole videos are dealt out in the order of their names' SHA-256.
    With fewer, each video's span is cut by time: an event belongs to the split its end falls in, a
    question to the one its query time falls in (test, if it has none). A question may still look at
    everything before its query time, so read its past from `data.events`, not from its split.
    """
    videos = {event.video for event in data.events}
    if len(videos) >= 3:
        return _split_by_video(data, videos)
    spans = {}
    for video in videos:
        ends = [event.t1 for event in data.events if event.video == video]
        spans[video] = (min(e.t0 for e in data.events if e.video == video), max(ends))

    def split_of(video: str, time: float | None) -> str:
        start, end = spans[video]
        if time is None or time > start + 0.8 * (end - start):
            return "test"
        return "validation" if time > start + 0.6 * (end - start) else "train"

    return {
        split: TimedText(
            tuple(e for e in data.events if split_of(e.video, e.t1) == split),
            tuple(q for q in data.questions if split_of(q.video, q.query_time) == split),
        )
        for split in SPLITS
    }


def _split_by_video(data: TimedText, videos: set[str]) -> dict[str, TimedText]:
    order = sorted(videos, key=lambda video: (hashlib.sha256(video.encode()).digest(), video))
    held_out = max(1, round(0.2 * len(order)))
    cuts = {
        "train": order[: -2 * held_out],
        "validation": order[-2 * held_out : -held_out],
        "test": order[-held_out:],
    }
    return {
        split: TimedText(
            tuple(e for e in data.events if e.video in names),
            tuple(q for q in data.questions if q.video in names),
        )
        for split, names in ((split, set(cuts[split])) for split in SPLITS)
    }


def _parse_rows(
    path: Path, parse: Callable[[dict[str, Any]], Any], problems: list[str]
) -> Iterator[Any]:
    """Yields the parsed rows of a JSON-lines file; adds "file:line: reason" for each bad one."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError("is not a JSON object")
            yield parse(row)
        except UnicodeDecodeError:
            problems.append(f"{path.name}:{number}: is not UTF-8 text")
        except json.JSONDecodeError as error:
            problems.append(f"{path.name}:{number}: is not JSON ({error.msg})")
        except (ValueError, RecursionError) as error:
            problems.append(f"{path.name}:{number}: {error}")


def _parse_event(row: dict[str, Any]) -> Event:
    t0, t1 = parse_span((row.get("t0"), row.get("t1")), "t0, t1")
    text = parse_text(row, "text")
    return Event(parse_text(row, "video"), t0, t1, parse_text(row, "kind"), text)


def _parse_questions(
    path: Path, videos: set[str], what: str, problems: list[str]
) -> list[Question]:
    """Questions about `videos`; of others it is said that they have no `what`."""
    seen: set[str] = set()
    return list(_parse_rows(path, lambda row: _parse_question(row, videos, what, seen), problems))


def _parse_question(row: dict[str, Any], videos: set[str], what: str, seen: set[str]) -> Question:
    for field in ("answer", "query_time", "evidence"):
        if field not in row:  # a misspelt query_time must not open the future
            raise ValueError(f'has no "{field}" (write null where there is none)')
    qid, video = parse_text(row, "qid"), parse_text(row, "video")
    if qid in seen:
        raise ValueError(f'qid "{qid}" is used twice')
    if video not in videos:
        raise ValueError(f'video "{video}" has no {what}')
    options = row.get("options")
    if not isinstance(options, list) or len(options) < 2:
        raise ValueError('"options" is not a list of two or more')
    options = tuple(parse_text({"options": option}, "options") for option in options)
    answer = row["answer"]
    if answer is not None:
        if isinstance(answer, bool) or not isinstance(answer, int):
            raise ValueError(f"answer {answer!r} is not the index of an option")
        if not 0 <= answer < len(options):
            raise ValueError(f"answer {answer} is out of range for {len(options)} options")
    query_time = None if row["query_time"] is None else parse_time(row["query_time"], "query_time")
    evidence = [] if row["evidence"] is None else row["evidence"]
    if not isinstance(evidence, list):
        raise ValueError('"evidence" is not a list of [t0, t1]')
    question = Question(
        qid,
        video,
        parse_text(row, "question"),
        options,
        answer,
        query_time,
        tuple(parse_span(span, "evidence") for span in evidence),
        parse_text(row, "type"),
    )
    seen.add(qid)
    return question


def parse_text(row: dict[str, Any], field: str) -> str:
    """Returns row[field], stripped; ValueError unless it is text that can be written as UTF-8."""
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"{field}" is missing, empty or not text')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f'"{field}" holds half of a surrogate pair') from None
    return text.strip()


def parse_time(value: Any, field: str) -> float:
    """Returns seconds; ValueError unless `value` is a finite number of a plausible size."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{field} {value!r} is not a number of seconds")
    if not abs(value) <= _LATEST:  # written so that NaN fails too
        raise ValueError(f"{field} {value!r} is not a finite number of seconds")
    return float(value)


def parse_span(value: Any, field: str) -> tuple[float, float]:
    """Returns (t0, t1) in seconds; ValueError unless 2 finite times in order."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{field} {value!r} is not [t0, t1]")
    t0, t1 = (parse_time(time, field) for time in value)
    if t1 < t0:
        raise ValueError(f"{field} ends at {t1:g} before it starts at {t0:g}")
    return t0, t1
