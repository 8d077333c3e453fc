"""The training loop that every phase shares: resumable to the bit, logged, stopped by NaN."""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np

from mmmem_jax.errors import UserError
from mmmem_jax.train import checkpoints, distributed, preemption
from mmmem_jax.train.metrics import LOG, MetricsWriter, Progress, check_finite
from mmmem_jax.train.profile import OnUpdate


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long a phase runs and how often it reports; `save_every` is a multiple of `log_every`.

    `best` names the metric whose best checkpoint is kept, "-loss" that whose smallest is best.
    """

    num_steps: int
    log_every: int
    save_every: int
    shown: tuple[str, ...] = ()
    decisions_per_step: int = 0
    best: str = ""

    def score(self, values: dict[str, float]) -> float | None:
        """How good these metrics are, higher is better; None where no metric is named."""
        if not self.best:
            return None
        return -values[self.best[1:]] if self.best.startswith("-") else values[self.best]

    def __post_init__(self):
        if self.num_steps < 1:
            raise UserError(f"num_steps is {self.num_steps}; it must be at least 1")
        if self.log_every < 1 or self.save_every < 1 or self.save_every % self.log_every:
            raise UserError(
                f"save_every = {self.save_every} must be a multiple of log_every = {self.log_every}"
            )


class _Window:
    """The metrics of the steps since the last report, and how long these steps took.

    Args:
      saved: steps before the run was stopped, as `columns` gave them; they count, but not in time.
    """

    def __init__(self, saved: dict[str, np.ndarray] | None = None):
        columns = {} if saved is None else {name: np.asarray(x) for name, x in saved.items()}
        values = zip(*columns.values(), strict=True)
        self._rows = [dict(zip(columns, row, strict=True)) for row in values]
        self._num_saved, self._since, self._loading = len(self._rows), time.monotonic(), 0.0

    def load(self, load_fn: Callable):
        """What `load_fn()` returns, timed."""
        start = time.monotonic()
        batch = load_fn()
        self._loading += time.monotonic() - start
        return batch

    def add(self, metrics: dict) -> None:
        """Takes the metrics of one more step."""
        self._rows.append(metrics)

    def reduced(self) -> dict[str, float]:
        """One value a metric: extremes stay extremes, the rest are means."""

        def reduce_fn(name):
            if name.endswith("_max") or name == "ratio_first":
                return np.max
            return np.min if name.endswith("_min") else np.mean

        rows = jax.device_get(self._rows)
        return {name: float(reduce_fn(name)([row[name] for row in rows])) for name in rows[0]}

    def timings(self, decisions_per_step: int) -> dict[str, float]:
        """Seconds a step spent on data and on the update, and decisions a second if there are any.

        To be asked after `reduced`, which waits for the updates.
        """
        num_steps, seconds = len(self._rows) - self._num_saved, time.monotonic() - self._since
        found = {
            "seconds_data": self._loading / num_steps,
            "seconds_update": (seconds - self._loading) / num_steps,
        }
        if decisions_per_step:
            found["decisions_per_s"] = num_steps * decisions_per_step / seconds
        return found

    def columns(self) -> dict[str, np.ndarray]:
        """The metrics of every step, an array each, to be saved with the position in the data."""
        rows = jax.device_get(self._rows)
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _check_state(phase: str, step: int, state, last_good: int | None) -> None:
    """Raises UserError naming the float leaves that are not finite.

    A step's metrics are of the parameters before it, so the last update shows in the state alone.
    """
    leaves = {
        "state." + jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree.leaves_with_path(distributed.to_host(state))
        if jnp.issubdtype(x.dtype, jnp.inexact)
    }
    broken = {name: np.nan for name, x in leaves.items() if not np.isfinite(x).all()}
    check_finite(phase, step, broken, last_good)


def _warn_of_collapse(phase: str, step: int, values: dict[str, float]) -> None:
    for name in (n for n, x in values.items() if n.startswith("collapse_") and x == 1.0):
        LOG.warning("%s step %d: %s, the policy does one thing only", phase, step, name)


def fit(
    phase: str,
    state,
    update_fn: Callable,
    loader: grain.DatasetIterator,
    *,
    workdir: Path,
    config: dict,
    fit_config: FitConfig,
    put_batch: Callable = jax.device_put,
    on_update: OnUpdate | None = None,
    frozen: tuple = (),
):
    """Runs `update_fn(state, batch, *frozen) -> (state, metrics)` until `num_steps`, or resumes.

    What is random must follow from `state` and the batch, so a killed run that resumes from its
    newest checkpoint goes through the same states and logs the same rows. Metrics are means over
    the steps since the last report; names that end in `_max` and `ratio_first` are the largest
    value of these steps, names that end in `_min` the smallest. A `collapse_*` metric that stays 1
    is warned of. A state is only saved if all its floats are finite. On SIGTERM the step that runs
    is the last: it is saved, `preemption.mark` says so, and the program ends.

    Of many processes each calls this with its part of the batches; process 0 writes.

    Args:
      phase: name of the checkpoint folder, of the metrics and of the config section.
      state: initial state, a pytree of arrays.
      update_fn: jitted here; donates its state.
      loader: endless iterator with get_state / set_state.
      workdir: folder of the run.
      config: whole config of the run, kept beside every checkpoint.
      fit_config: steps and intervals.
      put_batch: host batch to device batch.
      on_update: called as `on_update(step, state)` before the first update and after each.
      frozen: trees of arrays that updates read and nothing changes; they are not saved.

    Raises:
      UserError: if a metric, or a state about to be saved, is not finite.
      SystemExit: with 0, after SIGTERM.
    """
    folder = workdir / "checkpoints" / phase
    step, window, stops = 0, _Window(), False
    last_good = checkpoints.newest(folder)
    if last_good is not None:
        state, data_state, step = checkpoints.load(folder, state, last_good)
        window = _Window(data_state.pop("window", None))
        loader.set_state(data_state)
    if step >= fit_config.num_steps:
        return state
    preemption.unmark(workdir)
    saved = checkpoints.open_checkpoints(folder)
    update = jax.jit(update_fn, donate_argnums=0)
    writer = MetricsWriter(workdir, phase, step)
    progress = Progress(phase, fit_config.num_steps, step)
    try:
        with preemption.notice() as asked_to_stop:
            if on_update:
                on_update(step, state)
            while step < fit_config.num_steps and not stops:
                batch = window.load(lambda: put_batch(next(loader)))
                with jax.transfer_guard("disallow"):
                    state, metrics = update(state, batch, *frozen)
                step += 1
                if on_update:
                    on_update(step, state)
                window.add(metrics)
                progress.advance()
                last = step == fit_config.num_steps
                stops = asked_to_stop(step) and not last
                reports = last or step % fit_config.log_every == 0
                saves = last or stops or step % fit_config.save_every == 0
                if not (reports or saves):
                    continue
                values = window.reduced()
                check_finite(phase, step, values, last_good)
                if saves:
                    _check_state(phase, step, state, last_good)
                data_state, score = loader.get_state(), None
                if reports:
                    values |= window.timings(fit_config.decisions_per_step)
                    _warn_of_collapse(phase, step, values)
                    writer.write(step, values)
                    progress.report(step, {k: values[k] for k in fit_config.shown})
                    window, score = _Window(), fit_config.score(values)
                else:
                    data_state |= {"window": window.columns()}
                if saves:
                    checkpoints.save(saved, step, state, data_state, config, score)
                    last_good = step
    finally:
        progress.close()
        writer.close()
        saved.close()
    if stops:
        preemption.mark(workdir, phase, step)
        LOG.info("%s step %d is saved; stopped by SIGTERM, the same command goes on", phase, step)
        sys.exit(0)
    return state
