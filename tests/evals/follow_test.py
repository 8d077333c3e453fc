"""The loop that follows a run, on a folder that a made-up trainer fills."""

import json
import shutil

import pytest

from mmmem_jax.errors import UserError
from mmmem_jax.evals import follow


def save(workdir, step):
    """A finished checkpoint, as far as `checkpoints.steps` looks."""
    folder = workdir / "checkpoints" / "manager" / str(step)
    folder.mkdir(parents=True)
    (folder / "commit_success.txt").touch()
    return folder


def curve(workdir):
    return [json.loads(line) for line in (workdir / "eval/curve.jsonl").read_text().splitlines()]


def test_each_checkpoint_is_evaluated_once_until_the_last(tmp_path):
    save(tmp_path, 2)

    def evaluate(step):
        if step < 6:
            save(tmp_path, step + 2)
        return {"accuracy": step / 10}

    follow.follow(tmp_path, 6, evaluate, poll_seconds=0.0, timeout=0.0)
    assert curve(tmp_path) == [{"step": s, "accuracy": s / 10} for s in (2, 4, 6)]


def test_a_checkpoint_replaced_before_it_was_read_is_passed_over(tmp_path):
    folder = save(tmp_path, 2)

    def evaluate(step):
        if step == 2:
            save(tmp_path, 4)
            shutil.rmtree(folder)
            raise FileNotFoundError(folder)
        return {"accuracy": 0.5}

    follow.follow(tmp_path, 4, evaluate, poll_seconds=0.0, timeout=0.0)
    assert [row["step"] for row in curve(tmp_path)] == [4]


def test_what_fails_on_a_checkpoint_that_is_there_is_not_hidden(tmp_path):
    save(tmp_path, 2)

    def evaluate(step):
        raise UserError("no data")

    with pytest.raises(UserError, match="no data"):
        follow.follow(tmp_path, 2, evaluate, poll_seconds=0.0, timeout=0.0)


def test_a_run_that_stands_still_is_given_up(tmp_path):
    save(tmp_path, 2)
    with pytest.raises(UserError, match="no new checkpoint in .*; is main running"):
        follow.follow(tmp_path, 4, lambda step: {}, poll_seconds=0.01, timeout=0.02)
    assert [row["step"] for row in curve(tmp_path)] == [2]


def test_a_line_that_a_kill_cut_short_hides_nothing_after_it(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/curve.jsonl").write_text('{"step": 1, "recall": 0.1}\n{"step": 2, "rec')
    follow.follow(tmp_path, 2, lambda step: {"recall": 0.2}, poll_seconds=0, timeout=0)
    assert curve(tmp_path) == [{"step": 1, "recall": 0.1}, {"step": 2, "recall": 0.2}]
    assert [row["step"] for row in follow.read_curve(tmp_path)] == [1, 2]


def test_the_curve_has_one_row_a_step_the_newest(tmp_path):
    assert follow.read_curve(tmp_path) == []
    save(tmp_path, 2)
    for value in (0.1, 0.2):
        follow.follow(tmp_path, 2, lambda step, v=value: {"recall": v}, poll_seconds=0, timeout=0)
    assert follow.read_curve(tmp_path) == [{"phase": "held-out", "step": 2, "recall": 0.2}]
