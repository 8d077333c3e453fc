"""Tests of mmmem_jax/eval_main.py on a small finished run."""

import json
import shutil
import subprocess
import sys
import types

import pytest

from configs import sib_grpo
from mmmem_jax import eval_main
from mmmem_jax.errors import UserError
from mmmem_jax.policies import rules
from mmmem_jax.train import checkpoints
from mmmem_jax.train.metrics import read_metrics
from tests.conftest import REPO, TINY, run_module

SLOTS = sib_grpo.get_config().memory.episodic_slots
NAMES = {"learned", "unlimited"} | {
    rule.name
    for rule in rules.fixed_rules(8, 2, similarity=0.5, surprise_change=0.5, half_life=1.0)
}


@pytest.fixture(scope="module")
def evaluated(tiny_run, tmp_path_factory):
    """The workdir that --follow was started on while it was empty, and what the binary printed."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    command = [sys.executable, "-m", "mmmem_jax.eval_main", f"--workdir={workdir}", "--follow"]
    with subprocess.Popen(
        [*command, "--timeout=300"], cwd=REPO, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            workdir.mkdir()
            for awaited, name in (("config.json", "config.json"), ("reader", "checkpoints")):
                said = process.stderr.readline()
                assert "waiting for" in said, said
                assert awaited in said
                copy = shutil.copytree if (tiny_run / name).is_dir() else shutil.copy
                part = workdir.with_name("part")
                copy(tiny_run / name, part)
                part.rename(workdir / name)  # whole at once
            stdout, stderr = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 0, stderr
    return workdir, stdout


def test_follow_ends_when_training_has_ended(evaluated):
    rows = (evaluated[0] / "eval" / "curve.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [TINY["manager.num_steps"]]


def test_prints_the_table_and_the_path_of_the_report(evaluated):
    workdir, said = evaluated
    *table, last = said.strip().splitlines()
    assert last == f"report: {workdir / 'eval' / 'report.html'}"
    assert {line.split()[0] for line in table[-len(NAMES) :]} == NAMES


def test_results_hold_every_policy_on_the_same_questions(evaluated):
    results = json.loads((evaluated[0] / "eval" / "results.json").read_text())
    assert {policy["name"] for policy in results["policies"]} == NAMES
    assert results["num_streams"] == TINY["streams.test"]
    assert results["step"] == TINY["manager.num_steps"]
    assert results.keys() >= {"date", "device", "versions", "command", "seed", "reader_ece"}
    for policy in results["policies"]:
        assert 0 <= policy["accuracy"] <= 1
        assert sum(row["n"] for row in policy["by_family"]) == results["num_questions"]
        assert policy["name"] == "unlimited" or policy["slots"] <= SLOTS


def test_every_question_has_a_row(evaluated):
    folder = evaluated[0] / "eval"
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    assert len(rows) == results["num_questions"] * len(NAMES)
    right = [
        row["log_probs"].index(max(row["log_probs"])) == row["answer"]
        for row in rows
        if row["policy"] == "learned"
    ]
    (learned,) = (p for p in results["policies"] if p["name"] == "learned")
    assert sum(right) / len(right) == pytest.approx(learned["accuracy"])


def test_the_report_needs_nothing_else(evaluated):
    text = (evaluated[0] / "eval" / "report.html").read_text()
    assert "<svg" in text
    for outside in ('src="http', 'href="http', "<link", "@import"):
        assert outside not in text


def assert_one_line(done, says):
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("eval_main: ")
    assert says in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--workdir is missing"),
        (["--workdir={tmp}"], "has no config.json"),
        (["--workdir={run}", "--folow"], "did you mean --follow?"),
        (["--workdir={run}", "--follow", "--step=16"], "leave out --step or --follow"),
        (["--workdir={run}", "--num_streams=0"], "is not a positive integer"),
    ],
)
def test_a_mistake_is_one_line(tiny_run, tmp_path, options, says):
    options = [option.format(run=tiny_run, tmp=tmp_path) for option in options]
    assert_one_line(run_module("mmmem_jax.eval_main", *options), says)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ("3", "no step 3 (steps there: ["),
        ("bset", "--step is 'bset'; it must be a number or best"),
    ],
)
def test_a_step_that_is_not_there_is_one_line(tiny_run, call_main, step, says):
    assert_one_line(call_main(eval_main, f"--workdir={tiny_run}", f"--step={step}"), says)


def test_the_best_step_had_the_highest_task_reward(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_main, "STEP", types.SimpleNamespace(value="best"))
    rows = [r for r in read_metrics(tiny_run / "metrics.jsonl") if r["phase"] == "manager"]
    rows = rows[TINY["manager.save_every"] - 1 :: TINY["manager.save_every"]]
    best = max(rows, key=lambda row: (row["task_reward"], row["step"]))["step"]
    assert eval_main.wanted_step(tiny_run) == best
    assert best in checkpoints.steps(tiny_run / "checkpoints" / "manager")
    with pytest.raises(UserError, match="no checkpoint with a score to be best by"):
        eval_main.wanted_step(tmp_path)


def test_a_flag_of_the_world_is_refused_by_a_text_run(tmp_path, call_main):
    (tmp_path / "config.json").write_text('{"job": "text"}')
    done = call_main(eval_main, f"--workdir={tmp_path}", "--num_streams=3")
    assert_one_line(done, "eval_main: --num_streams does not apply to a text run")


def test_follow_gives_up_on_a_run_that_stands_still(tiny_run, tmp_path, call_main):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "manager" / "16")
    assert checkpoints.steps(workdir / "checkpoints" / "manager")[-1] == 14
    done = call_main(eval_main, f"--workdir={workdir}", "--follow", "--timeout=1")
    assert done.returncode == 2
    assert "no new checkpoint" in done.stderr.strip().splitlines()[-1]
