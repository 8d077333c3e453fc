"""Follows a run: each checkpoint of the manager is evaluated as it appears, to the last."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from mmmem_jax.errors import UserError
from mmmem_jax.train import checkpoints
from mmmem_jax.train.metrics import read_metrics

LOG = logging.getLogger("mmmem_jax")


def read_curve(workdir: Path) -> list[dict]:
    """What following has found so far, one row a step, as rows of metrics of a phase "held-out"."""
    rows = {row["step"]: row for row in read_metrics(workdir / "eval" / "curve.jsonl")}
    return [{"phase": "held-out"} | rows[step] for step in sorted(rows)]


def follow(
    workdir: Path,
    num_steps: int,
    evaluate_fn: Callable[[int], dict],
    *,
    poll_seconds: float,
    timeout: float,
) -> None:
    """Appends {"step", ...} to eval/curve.jsonl for the newest checkpoint, again and again.

    A checkpoint that training replaces before it was read is passed over.

    Args:
      workdir: of the run.
      num_steps: the step that ends training.
      evaluate_fn: what a checkpoint's step is worth, as plain JSON.
      poll_seconds: between looks at the folder.
      timeout: seconds without a new checkpoint after which to give up.

    Raises:
      UserError: if nothing new appears for `timeout` seconds.
    """
    folder, curve = workdir / "checkpoints" / "manager", workdir / "eval" / "curve.jsonl"
    curve.parent.mkdir(exist_ok=True)
    seen, waited = -1, 0.0
    while seen < num_steps:
        newest = max(checkpoints.steps(folder), default=-1)
        if newest <= seen:
            if waited >= timeout:
                raise UserError(
                    f"no new checkpoint in {folder} for {timeout:.0f} s; is main running?"
                )
            time.sleep(poll_seconds)
            waited += poll_seconds
            continue
        waited = 0.0
        try:
            row = {"step": newest} | evaluate_fn(newest)
        except (UserError, FileNotFoundError):
            if newest in checkpoints.steps(folder):
                raise
            continue
        seen = newest
        shown = " ".join(f"{k}={v:.4g}" for k, v in row.items() if isinstance(v, float))
        LOG.info("step %d: %s", seen, shown)
        with curve.open("a") as file:
            file.write(json.dumps(row) + "\n")
