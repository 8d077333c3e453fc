"""Geometry of the reports' charts: what macros.html.jinja draws, in pixels of each chart.

`results` and `metrics` are plain JSON in which any key may be missing; a chart without a point is
None.
"""

import math

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from mmmem_jax.evals import table
from mmmem_jax.evals.table import finite
from mmmem_jax.memory.types import LEVELS

MAX_POINTS = 300  # of a curve: more are averaged

# Phase, title of the panel, and what it shows: name in metrics.jsonl -> name in the legend.
CURVES = (
    ("perception", "loss", {"loss": "loss"}),
    ("perception", "recall", {"recall_fine": "fine", "recall_coarse": "coarse"}),
    ("reader", "loss", {"loss": "loss"}),
    ("reader", "accuracy", {"accuracy": "accuracy"}),
    ("manager", "reward (eq. 10)", {"reward": "reward", "task_reward": "task"}),
    (
        "manager",
        "weighted costs in the reward",
        {"reward_length_weighted": "length", "reward_log_ratio_weighted": "log-ratio"},
    ),
    (
        "manager",
        "share of actions",
        {"share_add": "add", "share_merge": "merge", "share_discard": "discard"},
    ),
    ("manager", "policy entropy, nats", {"policy_entropy": "entropy"}),
    ("manager", "KL to the reference (k3)", {"kl_ref_k3": "KL"}),
    ("manager", "largest ratio", {"ratio_max": "ratio"}),
    ("manager", "slots held", {"slots_held": "slots"}),
    ("manager", "tokens held", {"tokens_held": "tokens"}),
    ("manager", "compression", {"compression": "compression"}),
    ("manager", "share of zero-variance groups", {"zero_std_share": "share"}),
    ("manager", "relevance bound on I(M;Y)", {"bound_relevance": "bound"}),
    (
        "manager",
        "rate bounds of action traces, nats",
        {"bound_rate": "prior of eq. 9", "bound_rate_ref": "reference"},
    ),
    ("manager", "decisions per second", {"decisions_per_s": "decisions/s"}),
    ("held-out", "by checkpoint", {"accuracy": "accuracy", "recall": "evidence recall"}),
)


def _label(value: float) -> str:
    return EngFormatter(sep="")(value) if abs(value) >= 10_000 else f"{value:.5g}"


def _ticks(lo: float, hi: float, log: bool, integer: bool) -> list[float]:
    """Round numbers from at or below lo to at or above hi."""
    if not log:
        return list(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=integer).tick_values(lo, hi))
    factors = (1, 2, 5) if hi < 300 * lo else (1,)
    powers = range(math.floor(math.log10(lo)) - 1, math.ceil(math.log10(hi)) + 2)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    first = max(i for i, tick in enumerate(ticks) if tick <= lo)
    last = min(i for i, tick in enumerate(ticks) if tick >= hi)
    return ticks[first : last + 1]


def _axis(values, start: float, end: float, *, log=False, integer=False):
    """A function from values to pixels in start .. end, and its ticks as (pixel, label)."""
    lo, hi = min(values), max(values)
    if lo == hi:
        pad = abs(lo) / 10 or 1.0
        lo, hi = lo - pad, hi + pad
    ticks = _ticks(lo, hi, log, integer)
    bend = math.log10 if log else float
    first, last = bend(ticks[0]), bend(ticks[-1])

    def place(value):
        return round(start + (bend(value) - first) / (last - first) * (end - start), 1)

    return place, [(place(tick), _label(tick)) for tick in ticks]


def _plot(series: list[dict], *, width, height, names=None, log_x=False, **labels) -> dict | None:
    """A chart of lines: what the template draws, None if there is no point.

    Args:
      series: {"name", "style", "points": [(x, y, standard error or None)]}, drawn in this order.
      width, height: pixels.
      names: what the whole numbers on the x axis are called, for an axis of categories.
      log_x: whether the x axis is logarithmic.
      **labels: x_label, y_label, alt, passed on.
    """
    points = [point for line in series for point in line["points"]]
    if not points:
        return None
    left, right, top, bottom = 54, width - 20, 12, height - 42
    spread = [y + sign * (e or 0.0) for _, y, e in points for sign in (-1, 1)]
    y_at, y_ticks = _axis(spread, bottom, top)
    if names:
        step = (right - left) / len(names)
        x_ticks = [(round(left + (i + 0.5) * step, 1), name) for i, name in enumerate(names)]
        x_at = [x for x, _ in x_ticks].__getitem__
    else:
        x_at, x_ticks = _axis([x for x, *_ in points], left, right, log=log_x, integer=not log_x)
    lines = []
    for line in series:
        dots = [
            {
                "x": x_at(x),
                "y": y_at(y),
                "bar": e and (y_at(y - e), y_at(y + e)),
                "title": f"{line['name']}, {names[x] if names else _label(x)}: "
                + table.plus_minus(y, e),
            }
            for x, y, e in sorted(line["points"], key=lambda point: point[0])
        ]
        path = " ".join(f"{dot['x']},{dot['y']}" for dot in dots)
        lines.append({"name": line["name"], "style": line["style"], "dots": dots, "path": path})
    box = {"left": left, "right": right, "top": top, "bottom": bottom}
    ticks = {"x_ticks": x_ticks, "y_ticks": y_ticks}
    return {"width": width, "height": height, "lines": lines} | box | ticks | labels


def _averaged(points: list[tuple[float, float]]) -> list[tuple[float, float, None]]:
    """The curve as at most MAX_POINTS means of neighbours."""
    if not points:
        return []
    parts = np.array_split(np.array(points), min(len(points), MAX_POINTS))
    return [(*part.mean(axis=0).tolist(), None) for part in parts]


def curves(metrics: list[dict]) -> list[dict]:
    """Panels of the learning curves that have a point."""
    panels = []
    for phase, title, names in CURVES:
        series, rows = [], [m for m in metrics if m.get("phase") == phase]
        for i, (key, name) in enumerate(names.items()):
            points = [
                (finite(row.get("step")), finite(row.get(key)))
                for row in rows
                if None not in (finite(row.get("step")), finite(row.get(key)))
            ]
            if points:
                ends = {"first": points[0], "last": points[-1]}
                line = {"name": name, "style": f"c{i}", "points": _averaged(points)}
                series.append(line | ends)
        alt = f"{phase}: {title} by step. " + " ".join(
            f"{line['name']}: {line['first'][1]:.4g} at step {line['first'][0]:g}, "
            f"{line['last'][1]:.4g} at step {line['last'][0]:g}."
            for line in series
        )
        chart = _plot(series, width=330, height=190, x_label="step", y_label="", alt=alt)
        if chart:
            panels.append({"phase": phase, "title": title, "chart": chart, "series": series})
    return panels


def frontier(
    results: dict,
    *,
    x: str = "tokens",
    x_label: str = "tokens held (log scale)",
    y_label: str = "accuracy",
    width: int = 760,
    height: int = 360,
) -> dict | None:
    """Accuracy by the budget `x` of each row, one line a policy, the compared ones on top."""
    best, lines = table.best_rule(results), {}
    for row in results.get("frontier") or []:
        budget, accuracy = finite(row.get(x)), finite(row.get("accuracy"))
        if budget and budget > 0 and accuracy is not None:
            points = lines.setdefault(str(row.get("policy")), [])
            points.append((budget, accuracy, finite(row.get("se"))))
    order = ("other", "unlimited", "rule", "learned")
    series = [
        {"name": name, "style": table.role(name, best), "points": points}
        for name, points in lines.items()
    ]
    series.sort(key=lambda line: order.index(line["style"]))
    alt = f"{y_label} against {x_label}; the numbers are in the table of the section."
    labels = {"x_label": x_label, "y_label": y_label, "alt": alt}
    return _plot(series, width=width, height=height, log_x=True, **labels)


def _grouped(results: dict, key: str, name_of) -> tuple[list, list[dict]]:
    """Names of the groups, and per compared policy {"role", "name", "rows": {name: row}}."""
    policies = [
        {"role": role, "name": policy.get("name"), "rows": {name_of(row): row for row in rows}}
        for role, policy in table.compared(results)
        if (rows := [r for r in policy.get(key) or [] if finite(r.get("accuracy")) is not None])
    ]
    return list(dict.fromkeys(name for policy in policies for name in policy["rows"])), policies


def families(results: dict, *, value_name: str = "accuracy") -> dict | None:
    """One row a family, one mark a compared policy."""
    names, policies = _grouped(results, "by_family", lambda row: row.get("family"))
    if not names:
        return None
    width, left, row_height = 760, 170, 40
    x_at, ticks = _axis([0.0, 1.0], left, width - 20)
    rows = []
    for i, name in enumerate(names):
        found = [(p, p["rows"][name]) for p in policies if name in p["rows"]]
        middle = 14 + row_height * i + row_height / 2
        marks = []
        for policy, row in found:
            y = middle + 9 * (policies.index(policy) - (len(policies) - 1) / 2)
            value, error = row["accuracy"], finite(row.get("se"))
            title = f"{name}, {policy['name']}: {table.plus_minus(value, error)}"
            bar = error and (x_at(value - error), x_at(value + error))
            style = policy["role"]
            marks.append({"x": x_at(value), "y": y, "bar": bar, "style": style, "title": title})
        level = next((row["level"] for _, row in found if row.get("level")), "")
        rows.append({"name": name, "level": level, "y": middle, "marks": marks})
    height = 14 + row_height * len(rows) + 40
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": width - 20,
        "bottom": height - 40,
        "ticks": ticks,
        "rows": rows,
        "names": names,
        "policies": policies,
        "value_name": value_name,
        "alt": f"{value_name} by group of questions; the numbers are in the table below.",
    }


def ages(results: dict, *, unit: str = "days", value_name: str = "accuracy") -> dict | None:
    """Accuracy by age of the evidence, one line a compared policy."""

    def bounds(row):
        return finite(row.get("lo")), finite(row.get("hi"))

    groups, policies = _grouped(results, "by_age", bounds)
    groups.sort(key=lambda b: tuple(math.inf if v is None else v for v in b))
    names = [
        f"{lo or 0:.3g} to {hi:.3g}" if hi is not None else f"over {lo or 0:.3g}"
        for lo, hi in groups
    ]
    series = [
        {
            "name": policy["name"],
            "style": policy["role"],
            "points": [
                (groups.index(group), row["accuracy"], finite(row.get("se")))
                for group, row in policy["rows"].items()
            ],
        }
        for policy in reversed(policies)
    ]
    alt = f"{value_name} by age of the evidence; the numbers are in the table below the figure."
    labels = {"x_label": f"age of the evidence, {unit}", "y_label": value_name, "alt": alt}
    chart = _plot(series, width=760, height=320, names=names, **labels)
    return chart and chart | {"names": names, "groups": groups, "policies": policies}


def stops(results: dict) -> dict | None:
    """Where the search stopped, one stacked bar a family, of the learned manager if it is there."""
    policies = sorted(
        (
            p
            for p in results.get("policies") or []
            if p.get("stop_levels") or p.get("stops_by_family")
        ),
        key=lambda p: p.get("name") != table.LEARNED,
    )
    if not policies:
        return None
    groups = {"all questions": policies[0].get("stop_levels")}
    groups |= policies[0].get("stops_by_family") or {}
    width, left, row_height = 760, 170, 30
    rows = []
    for i, (name, shares) in enumerate((n, s) for n, s in groups.items() if s):
        parts, start = [], 0.0
        for level in LEVELS:
            share = finite(shares.get(level)) or 0.0
            x, size = (round((width - 20 - left) * v, 1) for v in (start, share))
            parts.append({"level": level, "share": share, "x": left + x, "width": size})
            start += share
        rows.append({"name": name, "y": row_height * i, "parts": parts})
    height = row_height * len(rows)
    return {"policy": policies[0]["name"], "width": width, "height": height, "rows": rows}
