"""The evaluation of a text run as one HTML file and one picture, drawn as a world run's are.

Charts and tables draw `accuracy`, whatever that is: here one of the measures of the table, such as
evidence recall, takes its place (`view`).
"""

from pathlib import Path

from mmmem_jax.evals import charts, report, table

MEASURES = {
    "recall": "evidence recall@{top_k}",
    "accuracy": "accuracy",
    "official_recall": "evidence recall@{top_k}, labelled questions",
    "official_accuracy": "accuracy, labelled questions",
}
DAY = 86_400


def shown(results: dict) -> tuple[str, str] | None:
    """(split, share) that the headline and the figures are about: the last split, first share."""
    by_split = results.get("table") or {}
    split = next(reversed(by_split), None)
    return (split, next(iter(by_split[split]))) if split and by_split[split] else None


def view(results: dict, split: str, share: str, measure: str = "recall") -> dict:
    """One measure of a split and share in the form that a world run's results have.

    Its `policies` hold the measure as `accuracy`, by question type as `by_family`, by age of the
    evidence as `by_age`; its `frontier` has a row per policy and share, the oracle left out.
    """
    prefix = "official_" if measure.startswith("official_") else ""
    plain = measure.removeprefix(prefix)
    count = "n" if plain == "recall" else "accuracy_n"

    def value(row: dict, key: str) -> dict:
        return {"accuracy": row.get(key), "se": row.get(f"{key}_se")}

    def grouped(row: dict) -> dict:
        return value(row, plain) | {"n": row.get(count)}

    by_share = results["table"][split]
    policies = [
        {"name": e["name"], "slots": e.get("slots"), "tokens": e.get("tokens")}
        | value(e, measure)
        | {
            "by_family": [
                {"family": row["type"]} | grouped(row) for row in e.get(f"{prefix}by_type") or []
            ],
            "by_age": [
                {"lo": row["lo"], "hi": row["hi"]} | grouped(row)
                for row in e.get(f"{prefix}by_age") or []
            ],
        }
        for e in by_share[share]
    ]
    frontier = [
        {"policy": e["name"], "share": float(at)} | value(e, measure)
        for at, entries in by_share.items()
        for e in entries
        if e["name"] != table.ORACLE
    ]
    return {"policies": policies, "frontier": frontier}


def headline(results: dict) -> str:
    """What the evidence recall of made questions says of learned against the rules."""
    if shown(results) is None:
        return "No policy was evaluated."
    split, share = shown(results)
    said = report.headline(view(results, split, share), does="finds the evidence of")
    return f"{said} ({split} split, {share} of the tokens kept, recall@{results['top_k']}.)"


def _sections(results: dict) -> list[dict]:
    """Tables and share charts of every split, the one of the headline first."""
    out = []
    for split, by_share in reversed((results.get("table") or {}).items()):
        if not by_share:
            continue
        tables = []
        for share, entries in by_share.items():
            views = {measure: view(results, split, share, measure) for measure in MEASURES}
            ordered = table.ordered(views["recall"])
            values = {
                measure: {p["name"]: p for p in found["policies"]}
                for measure, found in views.items()
            }
            best = {measure: table.best_rule(found) for measure, found in views.items()}
            tables.append(
                {"share": share, "policies": ordered, "values": values, "best": best}
                | {"share_of_seen": _share_of_seen(entries)}
            )
        out.append({"split": split, "tables": tables, "charts": _charts(results, split)})
    return out


def _share_of_seen(entries: list[dict]) -> float | None:
    """That of the policies with a budget, which share it."""
    limited = [e for e in entries if e["name"] != table.UNLIMITED]
    return limited[0].get("share_of_seen") if limited else None


def _charts(results: dict, split: str) -> list[dict]:
    """Every measure against the share of tokens kept, those of them that have a point."""
    share = next(iter(results["table"][split]))
    drawn = [
        charts.frontier(
            view(results, split, share, measure),
            x="share",
            x_label="share of tokens kept (log scale)",
            y_label=name.format(top_k=results["top_k"]),
            width=520,
            height=320,
        )
        for measure, name in MEASURES.items()
    ]
    return [chart for chart in drawn if chart]


def clock(seconds) -> str:
    """A time of the data: h:mm:ss, with the day, counted from 1, where there are several."""
    if table.finite(seconds) is None:
        return "the end"
    day, rest = divmod(int(seconds), DAY)
    time = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"day {day + 1}, {time}" if day else time


def render(results: dict, metrics: list[dict]) -> str:
    """The page as text; see `write_report`."""
    where = shown(results)
    recall = view(results, *where) if where else {}
    labelled = view(results, *where, "official_recall") if where else {}
    value_name = MEASURES["recall"].format(top_k=results.get("top_k"))
    return report.template("text_report.html.jinja").render(
        results=results,
        headline=headline(results),
        where=where,
        measures={k: v.format(top_k=results.get("top_k")) for k, v in MEASURES.items()},
        curves=charts.curves(metrics),
        splits=_sections(results),
        types=charts.families(recall, value_name=value_name),
        labelled_types=charts.families(labelled, value_name=value_name),
        ages=charts.ages(recall, unit="hours", value_name=value_name),
        example=results.get("example") or {},
        clock=clock,
    )


def write_report(results: dict, metrics: list[dict], path: Path) -> None:
    """Writes the evaluation as one self-contained HTML file.

    Args:
      results: what `text_eval.full_evaluation` writes to results.json.
      metrics: rows of metrics.jsonl and of the followed curve.
      path: the file to write; its folder exists.
    """
    report.write_page(render(results, metrics), path)


def plot_summary(results: dict, path: Path) -> None:
    """Writes the picture of `table.plot_summary`: evidence recall by policy and question type."""
    where = shown(results)
    found = view(results, *where) if where else {}
    name = MEASURES["recall"].format(top_k=results.get("top_k"))
    table.plot_summary(found, path, value_name=name, group_name="question type")
