"""The results as a table for the terminal and as one picture for the README.

`results` is the plain JSON that the evaluation protocol writes. Any key may be missing: what is not
there is shown as "-". Errors are one standard error.
"""

import math
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

LEARNED, ORACLE, UNLIMITED = "learned", "oracle_askable", "unlimited"
NOT_RULES = (LEARNED, ORACLE, UNLIMITED)
COLORS = {"learned": "#1d5fd1", "rule": "#c2570c", "unlimited": "#5b6472", "other": "#aab2be"}


def finite(value) -> float | None:
    """`value` as a float, None where it is no finite number (JSON has null and NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def number(value, digits: int | None = None) -> str:
    """A number to `digits` decimals, or to three figures with thousands marked; "-" for none."""
    value = finite(value)
    if value is None:
        return "-"
    if digits is not None:
        return f"{value:.{digits}f}"
    if value.is_integer() or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def plus_minus(value, se, sign: str = "±") -> str:
    """ "0.712 ± 0.008", without the error where it is missing."""
    if finite(value) is None or finite(se) is None:
        return number(value, 3)
    return f"{value:.3f} {sign} {se:.3f}"


def _accuracy(policy: dict) -> float:
    accuracy = finite(policy.get("accuracy"))
    return -math.inf if accuracy is None else accuracy


def find(results: dict, name: str) -> dict | None:
    """The policy of that name, None if it was not evaluated."""
    return next((p for p in results.get("policies") or [] if p.get("name") == name), None)


def best_rule(results: dict) -> dict | None:
    """The fixed rule of highest accuracy, None if no rule has one."""
    named = [p for p in results.get("policies") or [] if p.get("name")]
    rules = [p for p in named if p["name"] not in NOT_RULES]
    best = max(rules, key=_accuracy, default=None)
    return best if best and finite(best.get("accuracy")) is not None else None


def ordered(results: dict) -> list[dict]:
    """Policies as shown everywhere: learned, the rules by falling accuracy, oracle, unlimited."""
    place = {LEARNED: 0, ORACLE: 2, UNLIMITED: 3}
    return sorted(
        results.get("policies") or [], key=lambda p: (place.get(p.get("name"), 1), -_accuracy(p))
    )


def compared(results: dict) -> list[tuple[str, dict]]:
    """(role, policy) of learned, the best rule and unlimited, those of them that there are."""
    roles = {
        "learned": find(results, LEARNED),
        "rule": best_rule(results),
        "unlimited": find(results, UNLIMITED),
    }
    return [(role, policy) for role, policy in roles.items() if policy]


def role(name, best: dict | None) -> str:
    """The role that a policy's name plays in a figure: learned, rule (the best), unlimited, other.

    Args:
      name: the policy's name.
      best: what `best_rule` returned.
    """
    if name in (LEARNED, UNLIMITED):
        return name
    return "rule" if best and name == best.get("name") else "other"


def format_table(results: dict) -> str:
    """The results table in aligned ASCII, one line a policy under a header and a rule."""
    rows = [
        (
            "policy",
            "accuracy",
            "slots",
            "|m|",
            "all levels",
            "compression",
            "top-down",
            "tokens read",
        )
    ]
    for policy in ordered(results):
        name = str(policy.get("name") or "-").encode("ascii", "backslashreplace").decode()
        rows.append(
            (
                name,
                plus_minus(policy.get("accuracy"), policy.get("se"), "+-"),
                number(policy.get("slots")),
                number(policy.get("tokens")),
                number(policy.get("tokens_all_levels")),
                number(policy.get("compression"), 4),
                number(policy.get("accuracy_top_down"), 3),
                number(policy.get("tokens_read")),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    if len(rows) == 2:
        lines.append("(no policy was evaluated)")
    return "\n".join(lines)


def _draw_policies(ax, results: dict, value_name: str) -> None:
    """One bar a policy, learned at the top."""
    shown = [p for p in ordered(results) if finite(p.get("accuracy")) is not None]
    best = best_rule(results)
    accuracy = [p["accuracy"] for p in shown]
    errors = [finite(p.get("se")) or 0.0 for p in shown]
    colors = [COLORS[role(p.get("name"), best)] for p in shown]
    ax.barh(range(len(shown)), accuracy, xerr=errors, color=colors, ecolor="#222222", height=0.7)
    for i, (value, error) in enumerate(zip(accuracy, errors, strict=True)):
        ax.text(value + error + 0.01, i, f"{value:.3f}", va="center", fontsize=9)
    ax.set_yticks(range(len(shown)), [str(p.get("name")) for p in shown])
    ax.invert_yaxis()
    ax.set_xlim(0, max([1.0, *(a + e + 0.1 for a, e in zip(accuracy, errors, strict=True))]))
    ax.set(xlabel=f"{value_name} ± one standard error", title="At the same budget")


def _draw_families(ax, results: dict, value_name: str, group_name: str) -> None:
    """One group of bars a family: learned, the best rule, unlimited."""
    shown = compared(results)
    names = [row.get("family") for _, p in shown for row in p.get("by_family") or []]
    names = list(dict.fromkeys(names))
    width = 0.8 / max(len(shown), 1)
    for i, (kind, policy) in enumerate(shown):
        rows = {row.get("family"): row for row in policy.get("by_family") or []}
        here = [n for n in names if n in rows and finite(rows[n].get("accuracy")) is not None]
        at = [names.index(n) - 0.4 + (i + 0.5) * width for n in here]
        errors = [finite(rows[n].get("se")) or 0.0 for n in here]
        heights = [rows[n]["accuracy"] for n in here]
        style = {"color": COLORS[kind], "label": str(policy.get("name"))}
        ax.bar(at, heights, width, yerr=errors, ecolor="#222222", **style)
    ax.set_xticks(range(len(names)), [str(n).replace("_", " ") for n in names], rotation=30)
    ax.set_ylim(0, 1)
    ax.set(ylabel=f"{value_name} ± one standard error", title=f"By {group_name}")
    if names:
        ax.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def plot_summary(
    results: dict, path: Path, *, value_name: str = "accuracy", group_name: str = "question family"
) -> None:
    """Writes a PNG of 1200 x 500 pixels: every policy, and the compared ones by group.

    Args:
      results: plain JSON; drawn are `accuracy` and `by_family`, whatever they are called.
      path: the file to write.
      value_name: what the values are, on the axes.
      group_name: what the groups are, in the title.
    """
    with matplotlib.rc_context({"text.parse_math": False}):  # a family may be named "$x$"
        figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_policies(left, results, value_name)
        _draw_families(right, results, value_name, group_name)
        for ax in (left, right):
            ax.spines[["top", "right"]].set_visible(False)
            if not ax.patches:
                ax.text(0.5, 0.5, "no results", ha="center", transform=ax.transAxes)
        with path.open("wb") as file:
            figure.savefig(file, format="png")
