"""Follows a run: each checkpoint of the manager is evaluated as it appears, to the last."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from mmmem_jax import remote
from mmmem_jax.errors import UserError
from mmmem_jax.train import checkpoints
from mmmem_jax.train.metrics import read_metrics, rewrite

LOG = logging.getLogger("mmmem_jax")


def read_curve(workdir: Path) -> list[dict]:
    """What following has found so far, one row a step, as rows of metrics of a phase "held-out"."""
    rows = {row["step"]: row for row in read_metrics(workdir / "eval" / "curve.jsonl")}
    return [{"phase": "held-out"} | rows[step] for step in sorted(rows)]


def wait_until(
    ready: Callable[[], bool], what: str, *, poll_seconds: float, timeout: float
) -> None:
    """Looks again and again until `ready()`.

    Raises:
      UserError: naming `what` was waited for, if it is not there after `timeout` seconds.
    """
    waited = 0.0
    if not ready():
        LOG.info("waiting for %s", what)
    while not ready():
        if waited >= timeout:
            raise UserError(f"no {what} for {timeout:.0f} s; is main running?")
        time.sleep(poll_seconds)
        waited += poll_seconds


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
    rewrite(curve, read_metrics(curve))  # readers would stop at a line that a kill cut short
    seen = -1

    def newest_step() -> int:
        return max(checkpoints.steps(folder), default=-1)

    while seen < num_steps:
        wait_until(
            lambda before=seen: newest_step() > before,
            f"new checkpoint in {folder}",
            poll_seconds=poll_seconds,
            timeout=timeout,
        )
        newest = newest_step()
        try:
            row = {"step": newest} | evaluate_fn(newest)
        except (UserError, FileNotFoundError):
            if newest in checkpoints.steps(folder):
                raise
            continue
        seen = newest
        shown = " ".join(f"{k}={v:.4g}" for k, v in row.items() if isinstance(v, float))
        LOG.info("step %d: %s", seen, shown)
        remote.append(curve, json.dumps(row))
