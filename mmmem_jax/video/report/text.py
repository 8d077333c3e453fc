"""Bounded texts and even choices: what keeps the page small."""

import math
from collections.abc import Sequence

import numpy as np

MAX_TEXT, MAX_NAME = 280, 40  # characters of one text, of a name
MINUTE, HOUR, DAY = 60, 3600, 86_400


def sample(items: Sequence, count: int) -> list:
    """All items, or an even choice of `count` of them that has the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def fair(counts: Sequence[int], most: int) -> int:
    """How many each may have, at least 1, so that together they have no more than `most`."""
    for number, count in enumerate(sorted(counts)):
        share = most // (len(counts) - number)
        if count > share:
            return max(share, 1)
        most -= count
    return max(counts, default=1)


def shorten(text: object, most: int = MAX_TEXT) -> str:
    """One line of at most that many characters."""
    line = " ".join(("" if text is None else str(text)).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def clock(seconds: float | None) -> str:
    """m:ss, h:mm:ss, or those of a day, counted from 1, where there are several."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    day, rest = divmod(max(int(seconds), 0), DAY)
    hours, minutes = rest // HOUR, rest // MINUTE % 60
    if day:
        return f"day {day + 1}, {hours}:{minutes:02}:{rest % 60:02}"
    return f"{hours}:{minutes:02}:{rest % 60:02}" if hours else f"{minutes}:{rest % 60:02}"


def during(span: Sequence[float] | None) -> str:
    """A span as two times."""
    return f"{clock(span[0])}–{clock(span[1])}" if span else "?"
