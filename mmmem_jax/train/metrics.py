"""Metrics on disk (JSONL, TensorBoard) and on screen: a bar on a terminal, lines in a log."""

import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from mmmem_jax import remote
from mmmem_jax.errors import UserError
from mmmem_jax.train import distributed

LOG = logging.getLogger("mmmem_jax")

# Depend on the machine, not on the run: two runs that agree may differ here.
TIMINGS = ("seconds_data", "seconds_update", "decisions_per_s")


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def rewrite(path: Path, rows: list[dict]) -> None:
    """Replaces a JSONL file by these rows, at once or not at all."""
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(path)


class MetricsWriter:
    """Writes the rows of one phase, in process 0; those past the step it resumes from go first.

    TensorBoard's points of these steps stay in its files, and TensorBoard hides them.
    """

    def __init__(self, workdir: Path, phase: str, first_step: int):
        self._phase, self._path, self._tensorboard = phase, workdir / "metrics.jsonl", None
        if not distributed.is_first():
            return
        rows = read_metrics(self._path)
        rewrite(self._path, [r for r in rows if r["phase"] != phase or r["step"] <= first_step])
        # A folder each: TensorBoard hides what a folder has from the purge step on, of any phase.
        folder = workdir / "tensorboard" / phase
        self._tensorboard = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one row."""
        if self._tensorboard is None:
            return
        remote.append(self._path, json.dumps({"phase": self._phase, "step": step, **values}))
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{self._phase}/{name}", value, step)

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def check_finite(phase: str, step: int, values: dict[str, float], last_good: int | None) -> None:
    """Raises UserError naming the first values that are NaN or infinite."""
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        saved = f"step {last_good} is saved" if last_good is not None else "no step is saved"
        raise UserError(
            f"{phase} step {step}: {', '.join(bad[:3])}{more} not finite; {saved}; "
            f"lower config.{phase}.learning_rate"
        )


class Progress:
    """A bar with ETA on a terminal; elsewhere one log line a report."""

    def __init__(self, phase: str, total: int, first_step: int):
        self._phase, self._total = phase, total
        self._start, self._first = time.monotonic(), first_step
        self._bar = None
        if sys.stderr.isatty() and distributed.is_first():
            self._bar = tqdm(total=total, initial=first_step, desc=phase, unit="step")

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def report(self, step: int, values: dict[str, float]) -> None:
        """Shows the values of a step."""
        text = " ".join(f"{name}={value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            return
        spent = time.monotonic() - self._start
        left = spent / max(step - self._first, 1) * (self._total - step)
        LOG.info("%s %d/%d %s (%.0f s left)", self._phase, step, self._total, text, left)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
