"""A world run's evaluation as one HTML file that needs nothing else: no script, font or network.

Input is plain JSON in which any key may be missing or empty: the page then says what is not there.
"""

import functools
import math
import os
from pathlib import Path

import jinja2

from mmmem_jax.evals import charts, table, timeline
from mmmem_jax.evals.table import finite
from mmmem_jax.memory.types import LEVELS


def _against_rule(learned: dict, rule: dict, does: str) -> str:
    ours = table.plus_minus(learned["accuracy"], learned.get("se"))
    theirs = f"{rule['name']}, {table.plus_minus(rule['accuracy'], rule.get('se'))}"
    gain = 100 * (learned["accuracy"] - rule["accuracy"])
    errors = finite(learned.get("se")), finite(rule.get("se"))
    error = None if None in errors else 100 * math.hypot(*errors)
    points = f"{abs(gain):.1f}" + ("" if error is None else f" ± {error:.1f}") + " points"
    if gain <= 0:
        gap = f"{points} below" if gain else "level with"
        return (
            f"The learned manager is not better than the best fixed rule: {ours}, {gap} {theirs}."
        )
    if error is not None and gain <= 2 * error:
        return (
            f"The learned manager is not clearly better than the best fixed rule: {ours} against "
            f"{theirs}, a difference of {points}, within two standard errors."
        )
    return (
        f"The learned manager {does} {ours} of the questions, {points} above the best fixed rule "
        f"({theirs})."
    )


def headline(results: dict, *, does: str = "answers") -> str:
    """What the results say about learned against the best rule against unlimited memory.

    `does` is what a policy does with the share of the questions that `accuracy` holds.

    Errors of a difference are those of two independent samples, larger than for shared questions.
    """
    found = {
        role: policy
        for role, policy in table.compared(results)
        if finite(policy.get("accuracy")) is not None
    }
    learned, rule, unlimited = (found.get(role) for role in ("learned", "rule", "unlimited"))
    if not found:
        return "No policy was evaluated."
    said = []
    if learned and rule:
        said.append(_against_rule(learned, rule, does))
    elif learned:
        ours = table.plus_minus(learned["accuracy"], learned.get("se"))
        said.append(
            f"The learned manager {does} {ours} of the questions; no fixed rule was evaluated."
        )
    else:
        said.append("No learned manager was evaluated.")
        if rule:
            best = table.plus_minus(rule["accuracy"], rule.get("se"))
            said.append(f"The best fixed rule ({rule['name']}) {does} {best} of the questions.")
    if unlimited:
        reach = table.plus_minus(unlimited["accuracy"], unlimited.get("se"))
        said.append(f"Unlimited memory {does} {reach} of them.")
        if learned and rule and learned["accuracy"] > rule["accuracy"] < unlimited["accuracy"]:
            gap = unlimited["accuracy"] - rule["accuracy"]
            closed = (learned["accuracy"] - rule["accuracy"]) / gap
            part = f"{closed:.0%} of" if closed <= 1 else "more than"
            said.append(f"Learning closes {part} the gap from that rule to it.")
    return " ".join(said)


@functools.cache
def template(name: str) -> jinja2.Template:
    """A template of this folder, everything escaped, with the helpers that the macros use."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmmem_jax.evals", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = table.number
    environment.globals |= {"plus_minus": table.plus_minus, "role": table.role}
    return environment.get_template(name)


def render(results: dict, metrics: list[dict]) -> str:
    """The page as text; see `write_report`."""
    example = results.get("example") or {}
    return template("report.html.jinja").render(
        results=results,
        headline=headline(results),
        policies=table.ordered(results),
        best=table.best_rule(results),
        curves=charts.curves(metrics),
        frontier=charts.frontier(results),
        families=charts.families(results),
        ages=charts.ages(results),
        stops=charts.stops(results),
        example=example,
        options=timeline.options(example),
        steps=timeline.steps_taken(example),
        pyramid=timeline.pyramid(example),
        level_names=LEVELS,
    )


def write_report(results: dict, metrics: list[dict], path: Path) -> None:
    """Writes the evaluation as one self-contained HTML file.

    Args:
      results: what the evaluation protocol measured, plain JSON. In `example`, `step` of a slot is
        the index in `steps` at which it became evidence; the page counts steps from 1.
      metrics: rows of metrics.jsonl: {"phase": "perception" | "reader" | "manager", "step", ...}.
      path: the file to write; its folder exists.
    """
    write_page(render(results, metrics), path)


def write_page(page: str, path: Path) -> None:
    """Writes a page, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
