"""What was asked of a memory: one JSON object a line, only ever added to."""

import fcntl
import json
import os
from pathlib import Path

from mmmem_jax.errors import UserError
from mmmem_jax.store import layout

QUESTIONS = "questions.jsonl"


def append_question(memory_dir: str | os.PathLike, row: dict) -> None:
    """Adds one question with its answer and search trace.

    A line that a kill cut short is removed first: it was never reported.

    Raises:
      UserError: if the file cannot be written; then it is as it was before.
    """
    path = layout.join(Path(memory_dir), QUESTIONS)
    line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    try:
        with open(path, "a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = _end_of_lines(file)
            file.truncate(end)
            try:
                _write_all(file, line)
            except OSError:
                file.truncate(end)
                raise
            os.fsync(file.fileno())
    except OSError as error:
        raise layout.unwritten(path, error) from None


def _write_all(file, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def _end_of_lines(file) -> int:
    """Where the last whole line ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def read_questions(memory_dir: str | os.PathLike) -> list[dict]:
    """The questions asked, oldest first; a last line that is not whole yet is left out.

    Raises:
      UserError: naming the line that is no JSON object.
    """
    path = layout.join(Path(memory_dir), QUESTIONS)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    return [_parse(path, number, line) for number, line in enumerate(lines, 1)]


def _parse(path: Path, number: int, line: bytes) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested without end
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{path} line {number} is no JSON object; delete that line")
    return row
