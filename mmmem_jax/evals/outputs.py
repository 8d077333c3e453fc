"""The files that every evaluation leaves in WORKDIR/eval."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from mmmem_jax import provenance
from mmmem_jax.evals import follow
from mmmem_jax.train.metrics import read_metrics


def without_nan(value):
    """Plain JSON with null for every number that is not finite: JSON has no word for these."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_outputs(
    workdir: Path,
    results: dict,
    rows: Iterable[dict],
    *,
    write_report: Callable[[dict, list[dict], Path], None],
    plot_summary: Callable[[dict, Path], None],
) -> None:
    """Writes questions.jsonl (one of `rows` a line), results.json, report.html and summary.png."""
    out = workdir / "eval"
    out.mkdir(exist_ok=True)
    with (out / "questions.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps(without_nan(row), allow_nan=False) + "\n")
    provenance.write_json(out / "results.json", without_nan(results))
    metrics = read_metrics(workdir / "metrics.jsonl") + follow.read_curve(workdir)
    write_report(results, metrics, out / "report.html")
    plot_summary(results, out / "summary.png")
