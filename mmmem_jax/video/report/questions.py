"""A question with its answer and search, as page.html.jinja draws it.

Rows come from a file, in which any key may be missing and any value of another kind.
"""

from collections.abc import Mapping, Sequence

from mmmem_jax.memory.types import LEVELS
from mmmem_jax.store import ClipRecord
from mmmem_jax.video.report.pictures import Pictures
from mmmem_jax.video.report.pyramid import Drawn
from mmmem_jax.video.report.text import MAX_NAME, MAX_TEXT, sample, shorten

MAX_OPTIONS, MAX_STEPS = 12, 16  # of a question
MAX_EVIDENCE = 8  # of a step, or moments of an answer
_REASONS = (
    ("patience", "reading no longer lowered the answer entropy"),
    ("end", "there was nothing more to read"),
)
_EITHER = "there was nothing more to read, or reading no longer lowered the answer entropy"


def _number(value) -> float | None:
    """A finite number, or None: rows of a file may hold anything."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and abs(value) < 1e300 else None


def _rows(value) -> list[Mapping]:
    """Those of a list that are JSON objects."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _span_of(row: Mapping) -> tuple[float, float] | None:
    span = row.get("span")
    times = [_number(t) for t in span] if isinstance(span, list) else []
    return (times[0], times[1]) if len(times) == 2 and None not in times else None


def _clips_of(drawn: Drawn, row: Mapping, span: tuple[float, float]) -> list[ClipRecord]:
    """The clip that a moment names, else the kept ones whose middle lies in the span."""
    if row.get("clip") is not None:
        return [clip for clip in drawn.kept if clip.index == row["clip"]]
    return [clip for clip in drawn.kept if span[0] <= sum(clip.span) / 2 <= span[1]]


def _place(drawn: Drawn, row: Mapping, clips: Sequence[ClipRecord], span) -> dict:
    """Link to where evidence is drawn; a slot may have got another entity or episode since."""
    if row.get("level") == "schema":
        found = drawn.entities.values()
        found = [e for e in found if e.slot == row.get("slot") and e.name == row.get("text")]
        return drawn.entity_link(found[0].slot, "") if found else {}
    if row.get("level") == "episodic":
        found = [e for e in drawn.episodes.values() if abs(e.span[0] - span[0]) < 0.1]
        return drawn.episode_link(found[0].node_id) if found else {}
    shown = clips and any(clip.index == clips[0].index for clip in drawn.clips)
    return drawn.clip_link(clips[0]) if shown else {}


def _evidence(row: Mapping, chosen: Sequence[Drawn], pictures: Pictures) -> dict:
    """A slot that was read, or a moment: with a link, key frames and what its clips tell."""
    span, level = _span_of(row), row.get("level")
    drawn = next((d for d in chosen if d.view.video_id == row.get("video")), None)
    clips, place = [], {}
    if drawn and span:
        clips = [] if level == "schema" else _clips_of(drawn, row, span)
        place = _place(drawn, row, clips, span)
    few = sample(clips, 2)
    return {
        "level": level if level in LEVELS else None,
        "video": shorten(row.get("video"), MAX_NAME) if len(chosen) > 1 else "",
        "span": span,
        "text": shorten(row.get("text") or " … ".join(clip.caption for clip in few)),
        "score": _number(row.get("score")),
        "pictures": [p for clip in few if (p := pictures.of(drawn.number, clip))],
        "href": place.get("href"),
    }


def draw_question(row: Mapping, chosen: Sequence[Drawn], pictures: Pictures) -> dict:
    """One question as the template draws it; entropies as percent of the largest."""
    gamma = _number(row.get("gamma"))
    mark = None if gamma is None or gamma < 0 else gamma  # under 0 no entropy stops the search
    steps = _rows(row.get("trace"))[:MAX_STEPS]
    entropies = [_number(step.get("answer_entropy")) for step in steps]
    most = max([mark or 0.0, *(h for h in entropies if h is not None)]) or 1.0
    options = row.get("options") if isinstance(row.get("options"), list) else []
    probabilities = row.get("probabilities")
    probabilities = probabilities if isinstance(probabilities, list) else []
    return {
        "question": shorten(row.get("question")) or "(no question)",
        "at": _number(row.get("at")),
        "found": row.get("found") is not False,
        "score": _number(row.get("score")),
        "answer": shorten(row.get("text"), 2 * MAX_TEXT),
        "options": [
            {"text": shorten(option), "p": _number(p), "percent": round(100 * (_number(p) or 0), 1)}
            for option, p in zip(options[:MAX_OPTIONS], probabilities, strict=False)
        ],
        "moments": [
            _evidence(moment, chosen, pictures)
            for moment in _rows(row.get("moments"))[:MAX_EVIDENCE]
        ],
        "gamma": mark,
        "gamma_percent": None if mark is None else round(100 * mark / most, 1),
        "steps": [
            {
                "level": step.get("level") if step.get("level") in LEVELS else None,
                "entropy": h,
                "percent": None if h is None else round(100 * h / most, 1),
                "tokens": _number(step.get("tokens")),
                "evidence": [
                    _evidence(slot, chosen, pictures)
                    for slot in _rows(step.get("slots"))[:MAX_EVIDENCE]
                ],
            }
            for step, h in zip(steps, entropies, strict=True)
        ],
        "why": _why(row, entropies, gamma),
    }


def _why(row: Mapping, entropies: Sequence[float | None], gamma: float | None) -> str:
    """Where the search stopped, and why."""
    if not entropies:
        return ""
    where = f"The search stopped after step {len(entropies)}"
    if row.get("stop_level") in LEVELS:
        where += f", at the {row['stop_level']} level"
    last = entropies[-1]
    if gamma is None or last is None:
        return f"{where}."
    if last <= gamma:
        return f"{where}: the answer entropy {last:.3f} is at most gamma, {gamma:.3f}."
    why = next((text for key, text in _REASONS if row.get("stopped_by") == key), _EITHER)
    if gamma < 0:
        return f"{where}: {why}; there was one moment at most to tell of, which no entropy decides."
    return (
        f"{where}: {why}; the answer entropy is {last:.3f}, which is still over gamma, {gamma:.3f}."
    )
