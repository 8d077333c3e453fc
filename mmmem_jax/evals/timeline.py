"""Geometry of one stream drawn as its pyramid: what report.html.jinja draws, in pixels.

`example` is plain JSON in which any key may be missing. `step` of a slot is the index, in `steps`,
at which it became evidence; steps are shown counted from 1.
"""

import math

import numpy as np

from mmmem_jax.evals.table import finite
from mmmem_jax.memory.types import LEVELS

MAX_MARKS = 600  # of a row: of more, an even sample is drawn
MAX_TEXT = 240  # characters of one text
MAX_IMAGE_BYTES = 1_500_000  # of all images together, base64
MINUTE, HOUR, DAY = 60, 3600, 86_400
TIME_STEPS = (
    *(1, 2, 5, 10, 15, 30),
    *(k * MINUTE for k in (1, 2, 5, 10, 15, 30)),
    *(k * HOUR for k in (1, 2, 3, 6, 12)),
    *(k * DAY for k in (1, 2, 7, 14, 28, 91, 365, 3650)),
)


def _text(value) -> str:
    text = "" if value is None else " ".join(str(value).split())
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _sample(items: list, count: int) -> list:
    if len(items) <= count:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int)]


def _thin(items: list, keep) -> list:
    """At most MAX_MARKS of the items in their order: those to keep, then a sample of the rest."""
    kept = _sample([i for i, item in enumerate(items) if keep(item)], MAX_MARKS)
    rest = [i for i, item in enumerate(items) if not keep(item)]
    return [items[i] for i in sorted(kept + _sample(rest, MAX_MARKS - len(kept)))]


def _clock(seconds: float, duration: float) -> str:
    """A time of the stream: "day 2, 06:30", or h:mm:ss in streams of less than a day."""
    total = int(seconds)
    hours, minutes = total // HOUR, total // MINUTE % 60
    if duration >= DAY:
        return f"day {total // DAY + 1}, {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{total % 60:02}"


def _span(item: dict) -> tuple[float, float] | None:
    t0, t1 = finite(item.get("t0")), finite(item.get("t1"))
    return None if t0 is None or t1 is None else (min(t0, t1), max(t0, t1))


def _lanes(boxes: list[tuple[float, float]], most: int) -> tuple[list[int], int]:
    """First free lane of every box (x0, x1), at most that many lanes, and how many are used."""
    ends, lanes = [], []
    for x0, x1 in boxes:
        lane = next((i for i, end in enumerate(ends) if end <= x0), len(ends))
        if lane == most:  # all taken: over the box that ends first
            lane = min(range(most), key=ends.__getitem__)
        ends[lane : lane + 1] = [x1]
        lanes.append(lane)
    return lanes, len(ends)


def _slots(example: dict) -> dict[str, list[dict]]:
    """The slots of each level in order of time, with what is shown of them.

    A slot is read if it became evidence no later than the step at which the search stopped.
    """
    steps = example.get("steps") or []
    stop = next((i for i, s in enumerate(steps) if s.get("stopped")), len(steps) - 1)
    levels, room = {}, MAX_IMAGE_BYTES
    for level in LEVELS:
        slots = []
        for slot in (example.get("levels") or {}).get(level) or []:
            step = finite(slot.get("step"))
            read = step is not None and (not steps or step <= stop)
            count = finite(slot.get("mentions") if level == "schema" else slot.get("count"))
            image = slot.get("image") if read else None
            room -= len(image or "")
            slots.append(
                {
                    "level": level,
                    "text": _text(slot.get("label") or slot.get("text")) or "(no text)",
                    "span": _span(slot),
                    "count": None if count is None else int(count),
                    "unit": "mention" if level == "schema" else "chunk",
                    "number": int(step) + 1 if read else None,
                    "image": image if room >= 0 else None,
                }
            )
        levels[level] = sorted(slots, key=lambda slot: slot["span"] or (math.inf, math.inf))
    return levels


def _rows(levels: dict, x_at, top: float) -> tuple[list[dict], float]:
    """Rows of the pyramid: slots read as numbered bars, the others in thin lanes below."""
    rows, y = [], top
    for level, slots in levels.items():
        drawn = _thin([s for s in slots if s["span"]], keep=lambda s: s["number"])
        row = {"level": level, "y": y, "total": len(slots), "drawn": len(drawn), "bars": []}
        for read, lane_height, least, most in ((True, 20, 18, 12), (False, 8, 3, 24)):
            part = [s for s in drawn if bool(s["number"]) == read]
            boxes = []
            for slot in part:
                x0, x1 = map(x_at, slot["span"])
                grow = max(least - (x1 - x0), 0) / 2
                boxes.append((x0 - grow, x1 + grow))
            lanes, used = _lanes(boxes, most)
            for slot, (x0, x1), lane in zip(part, boxes, lanes, strict=True):
                place = {"x": round(x0, 1), "y": y + lane * lane_height, "slot": slot}
                row["bars"].append(place | {"width": round(x1 - x0, 1), "height": lane_height - 3})
            y += used * lane_height
        y = max(y, row["y"] + 24)
        row["height"] = y - row["y"]
        rows.append(row)
        y += 14
    return rows, y


def pyramid(example: dict) -> dict | None:
    """One stream over its time line: slots, chunks, and the evidence of the question."""
    chunks = [c for c in example.get("chunks") or [] if _span(c)]
    levels = _slots(example)
    slots = [slot for level in levels.values() for slot in level]
    spans = [_span(c) for c in chunks] + [s["span"] for s in slots if s["span"]]
    if not spans:
        return None
    first, last = min(t0 for t0, _ in spans), max(t1 for _, t1 in spans)
    last = max(last, first + 1e-3)
    width, left, right = 1040, 96, 1030

    def x_at(t):
        share = (min(max(t, first), last) - first) / (last - first)
        return round(left + share * (right - left), 1)

    rows, y = _rows(levels, x_at, top=8)
    drawn = _thin(chunks, keep=lambda c: c.get("relevant"))
    least = 0.9 * (right - left) / max(len(drawn), 1) if len(drawn) == MAX_MARKS else 1.0
    marks = []
    for chunk in drawn:
        t0, t1 = _span(chunk)
        said = [_clock(t0, last), chunk.get("kind"), _text(chunk.get("text")), chunk.get("action")]
        relevant = bool(chunk.get("relevant"))
        title = " · ".join(str(s) for s in (*said, relevant and "relevant") if s)
        size = max(round((x_at(t1) - x_at(t0)) * 0.9, 1), round(least, 1))
        style = str(chunk.get("action") or "none").lower()
        mark = {"x": x_at(t0), "width": size, "title": title, "relevant": relevant}
        marks.append(mark | {"style": style, "center": round(x_at(t0) + size / 2, 1)})
    bands = [
        {"x": x_at(t0) - 1, "width": max(x_at(t1) - x_at(t0), 1) + 2}
        for t0, t1 in example.get("evidence_spans") or []
    ]
    step = next((s for s in TIME_STEPS if (last - first) / s <= 7), TIME_STEPS[-1])
    ticks = np.arange(math.ceil(first / step) * step, last + 1e-6, step)
    return {
        "width": width,
        "height": y + 62,
        "left": left,
        "right": right,
        "rows": rows,
        "chunks": marks,
        "chunks_y": y + 12,
        "num_chunks": len(chunks),
        "bands": bands,
        "ticks": [(x_at(t), _clock(t, last)) for t in ticks],
        "levels": {level: _sample(slots, MAX_MARKS) for level, slots in levels.items()},
        "read": sorted((s for s in slots if s["number"]), key=lambda s: s["number"]),
        "clock": lambda span: span and f"{_clock(span[0], last)} to {_clock(span[1], last)}",
    }


def options(example: dict) -> list[dict]:
    probabilities = example.get("probabilities") or []
    return [
        {
            "text": option,
            "probability": finite(probabilities[i]) if i < len(probabilities) else None,
            "correct": i == example.get("answer"),
            "chosen": i == example.get("predicted"),
        }
        for i, option in enumerate(example.get("options") or [])
    ]


def steps_taken(example: dict) -> list[dict]:
    """Steps of the search up to its stop, with their share of the entropy of a uniform answer."""
    most = math.log(max(len(example.get("options") or []), 2))
    steps = []
    for number, step in enumerate(example.get("steps") or [], start=1):
        entropy, stopped = finite(step.get("answer_entropy")), bool(step.get("stopped"))
        share = min((entropy or 0.0) / most, 1.0)
        row = {"number": number, "level": step.get("level"), "entropy": entropy, "share": share}
        steps.append(row | {"stopped": stopped})
        if stopped:
            break
    return steps
