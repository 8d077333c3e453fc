"""The training loop that every phase shares: resumable to the bit, logged, stopped by NaN."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np

from mmmem_jax.errors import UserError
from mmmem_jax.train import checkpoints
from mmmem_jax.train.metrics import LOG, MetricsWriter, Progress, check_finite


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long a phase runs and how often it reports; `save_every` is a multiple of `log_every`."""

    num_steps: int
    log_every: int
    save_every: int
    shown: tuple[str, ...] = ()
    decisions_per_step: int = 0

    def __post_init__(self):
        if self.num_steps < 1:
            raise UserError(f"num_steps is {self.num_steps}; it must be at least 1")
        if self.log_every < 1 or self.save_every < 1 or self.save_every % self.log_every:
            raise UserError(
                f"save_every = {self.save_every} must be a multiple of log_every = {self.log_every}"
            )


def _reduced(window: list[dict]) -> dict[str, float]:
    """One value a metric: extremes stay extremes, the rest are means."""

    def reduce_fn(name):
        if name.endswith("_max") or name == "ratio_first":
            return np.max
        return np.min if name.endswith("_min") else np.mean

    rows = jax.device_get(window)
    return {name: float(reduce_fn(name)([row[name] for row in rows])) for name in rows[0]}


def _check_state(phase: str, step: int, state, last_good: int | None) -> None:
    """Raises UserError naming the float leaves that are not finite.

    A step's metrics are of the parameters before it, so the last update shows in the state alone.
    """
    leaves = {
        "state." + jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree.leaves_with_path(jax.device_get(state))
        if jnp.issubdtype(x.dtype, jnp.inexact)
    }
    broken = {name: np.nan for name, x in leaves.items() if not np.isfinite(x).all()}
    check_finite(phase, step, broken, last_good)


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
):
    """Runs `update_fn(state, batch) -> (state, metrics)` until `num_steps`, or resumes.

    What is random must follow from `state` and the batch, so a killed run that resumes from its
    newest checkpoint goes through the same states and logs the same rows. Metrics are means over
    the steps since the last report; names that end in `_max` and `ratio_first` are the largest
    value of these steps, names that end in `_min` the smallest. A `collapse_*` metric that stays 1
    is warned of. A state is only saved if all its floats are finite.

    Args:
      phase: name of the checkpoint folder, of the metrics and of the config section.
      state: initial state, a pytree of arrays.
      update_fn: jitted here; donates its state.
      loader: endless iterator with get_state / set_state.
      workdir: folder of the run.
      config: whole config of the run, kept beside every checkpoint.
      fit_config: steps and intervals.
      put_batch: host batch to device batch.

    Raises:
      UserError: if a metric, or a state about to be saved, is not finite.
    """
    folder = workdir / "checkpoints" / phase
    restored = checkpoints.load(folder, state)
    step, last_good = 0, None
    if restored is not None:
        state, data_state, step = restored
        loader.set_state(data_state)
        last_good = step
    if step >= fit_config.num_steps:
        return state
    saved = checkpoints.open_checkpoints(folder)
    update = jax.jit(update_fn, donate_argnums=0)
    writer = MetricsWriter(workdir, phase, step)
    progress = Progress(phase, fit_config.num_steps, step)
    window, since, loading = [], time.monotonic(), 0.0
    try:
        while step < fit_config.num_steps:
            asked = time.monotonic()
            batch = put_batch(next(loader))
            loading += time.monotonic() - asked
            with jax.transfer_guard("disallow"):
                state, metrics = update(state, batch)
            step += 1
            window.append(metrics)
            progress.advance()
            last = step == fit_config.num_steps
            if step % fit_config.log_every and not last:
                continue
            values = _reduced(window)
            check_finite(phase, step, values, last_good)
            saves = last or step % fit_config.save_every == 0
            if saves:
                _check_state(phase, step, state, last_good)
            seconds = time.monotonic() - since
            values["seconds_data"] = loading / len(window)
            values["seconds_update"] = (seconds - loading) / len(window)
            if fit_config.decisions_per_step:
                values["decisions_per_s"] = len(window) * fit_config.decisions_per_step / seconds
            for name in (n for n, x in values.items() if n.startswith("collapse_") and x == 1.0):
                LOG.warning("%s step %d: %s, the policy does one thing only", phase, step, name)
            writer.write(step, values)
            progress.report(step, {k: values[k] for k in fit_config.shown})
            if saves:
                checkpoints.save(saved, step, state, loader.get_state(), config)
                last_good = step
            window, since, loading = [], time.monotonic(), 0.0
    finally:
        progress.close()
        writer.close()
        saved.close()
    return state
