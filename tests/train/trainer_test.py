"""Tests of mmmem_jax/train/trainer.py on a loss whose course is known."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmmem_jax.data import encoded
from mmmem_jax.errors import UserError
from mmmem_jax.train import checkpoints, state, trainer
from mmmem_jax.train.metrics import TIMINGS, read_metrics

CONFIG = {"seed": 0}


def make_streams(num_streams: int = 6) -> encoded.EncodedStream:
    """Streams of one chunk whose only content is a number."""
    column = np.arange(num_streams, dtype=np.float32)[:, None]
    blank = {name: np.zeros((num_streams, 1), np.float32) for name in encoded.EncodedStream._fields}
    blank["question_valid"] = np.ones((num_streams, 1), bool)
    return encoded.EncodedStream(**(blank | {"visual": column}))


def fit(
    workdir, num_steps: int, *, loss_fn=None, seed: int = 0, rate=0.1, log_every: int = 1, **options
):
    """A phase that walks its parameters by random amounts and by what the batch holds."""

    def noisy(params, rng_key, batch):
        loss = params["w"] * (jax.random.normal(rng_key) + batch.visual.mean())
        return loss, {"loss": loss, "seen": batch.visual.sum()}

    optimizer = optax.adam(rate)
    loader = encoded.make_loader(make_streams(), seed=seed, batch_size=2, questions_per_stream=1)
    return trainer.fit(
        "phase",
        state.init_state({"w": jnp.ones(())}, optimizer, jax.random.key(seed)),
        state.make_update(loss_fn or noisy, optimizer),
        loader,
        workdir=workdir,
        config=CONFIG,
        fit_config=trainer.FitConfig(num_steps, log_every, 2, ("loss",), decisions_per_step=2),
        **options,
    )


def rows_of(workdir) -> list[dict]:
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def test_a_run_in_pieces_is_the_run_in_one(tmp_path):
    whole = fit(tmp_path / "whole", 7)
    for num_steps in (2, 3, 7):  # each goes on from where the one before ended
        pieces = fit(tmp_path / "pieces", num_steps)
    assert whole.step == pieces.step == 7
    jax.tree.map(np.testing.assert_array_equal, whole, pieces)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "pieces")
    assert len({row["loss"] for row in rows_of(tmp_path / "whole")}) == 7


def test_who_looks_on_sees_every_update(tmp_path):
    seen = []
    fit(tmp_path, 2, on_update=lambda step, state: seen.append((step, int(state.step))))
    fit(tmp_path, 4, on_update=lambda step, state: seen.append((step, int(state.step))))
    assert seen == [(0, 0), (1, 1), (2, 2), (2, 2), (3, 3), (4, 4)]


def test_a_step_after_the_checkpoint_is_done_again(tmp_path):
    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "killed", 2)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "phase", "step": 3, "lo')
    again = fit(tmp_path / "killed", 4)
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "killed")


def test_a_finished_phase_only_loads(tmp_path):
    done = fit(tmp_path, 4)
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    again = fit(tmp_path, 4, seed=1)  # another start is not even looked at
    jax.tree.map(np.testing.assert_array_equal, done, again)
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows


def test_rows_tell_the_time(tmp_path):
    fit(tmp_path, 2)
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert row.keys() >= set(TIMINGS)
    assert row["decisions_per_s"] > 0


def test_what_is_not_finite_stops_the_run(tmp_path):
    def breaks_at_5(params, rng_key, batch):
        loss = params["w"] ** 2
        broken = jnp.where(loss < 0.4, jnp.nan, 1.0)
        return loss, {"loss": loss, "term": broken}

    with pytest.raises(UserError, match=r"phase step \d+: term not finite; step \d+ is saved"):
        fit(tmp_path, 20, loss_fn=breaks_at_5)
    steps = checkpoints.steps(tmp_path / "checkpoints" / "phase")
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert steps
    assert all(np.isfinite(row["term"]) for row in rows)
    assert max(steps) <= rows[-1]["step"] < 20


@pytest.mark.parametrize("last", [4, 5])  # a multiple of save_every, and none
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, last):
    """The last update breaks the parameters; its metrics, of those before it, are finite."""

    def rate(count):
        return jnp.where(count == last - 1, jnp.nan, 0.1)

    with pytest.raises(UserError, match=rf"phase step {last}: state.params.w not finite; step"):
        fit(tmp_path, last, rate=rate)
    steps = checkpoints.steps(tmp_path / "checkpoints" / "phase")
    assert steps
    assert max(steps) < last
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, last))


def test_extremes_are_not_averaged(tmp_path):
    def loss_fn(params, rng_key, batch):  # 1.0 first, then 0.9
        names = ("loss", "ratio_max", "ratio_min", "ratio_first")
        return params["w"], dict.fromkeys(names, params["w"])

    fit(tmp_path, 2, loss_fn=loss_fn, log_every=2)
    (row,) = rows_of(tmp_path)
    assert row["loss"] == pytest.approx(0.95)
    assert row["ratio_max"] == row["ratio_first"] == 1.0
    assert row["ratio_min"] == pytest.approx(0.9)


def test_collapse_is_warned_of_where_it_lasts(tmp_path, caplog):
    def loss_fn(params, rng_key, batch):
        metrics = {"loss": 0.0, "collapse_add": 0, "collapse_merge": 1}
        metrics["collapse_discard"] = (batch.visual.mean() > 2).astype(jnp.int32)
        return params["w"] * 0.0, jax.tree.map(jnp.asarray, metrics)

    with caplog.at_level(logging.WARNING, "mmmem_jax"):
        fit(tmp_path, 6, loss_fn=loss_fn, log_every=2)
    assert [m.split(":")[0] for m in caplog.messages if "collapse_merge" in m] == [
        "phase step 2", "phase step 4", "phase step 6",
    ]  # fmt: skip
    lasting = [row["step"] for row in rows_of(tmp_path) if row["collapse_discard"] == 1]
    assert len([m for m in caplog.messages if "collapse_discard" in m]) == len(lasting) < 3
    assert not any("collapse_add" in m for m in caplog.messages)


@pytest.mark.parametrize(("log_every", "save_every"), [(2, 3), (0, 1), (10, 5), (2, 0)])
def test_intervals_must_fit(log_every, save_every):
    with pytest.raises(UserError, match="must be a multiple of log_every"):
        trainer.FitConfig(10, log_every, save_every)


def test_a_phase_has_steps():
    with pytest.raises(UserError, match="num_steps is 0; it must be at least 1"):
        trainer.FitConfig(0, 1, 1)
