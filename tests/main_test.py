"""Tests of mmmem_jax/main.py as a user starts, kills and starts it again."""

import json
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import sib_grpo
from mmmem_jax import main
from mmmem_jax.sib import update as sib
from mmmem_jax.train import checkpoints, plan, world_job
from mmmem_jax.train.metrics import TIMINGS, read_metrics
from tests.conftest import REPO, TINY, TINY_CONFIG, run_module

PHASES = ("perception", "reader", world_job.CALIBRATED, "manager")  # as they follow each other


def final_state(workdir):
    """(manager's state, Grain position, step), eye and reader that the run ended with."""
    config = ConfigDict(checkpoints.read_config(workdir))
    models = world_job.make_models(config)
    start = sib.init_state(models.manager, world_job.manager_optimizer(config), jax.random.key(0))
    eye = world_job.load_eye(config, workdir, models.eye)
    reader = world_job.load_reader(workdir, models.reader)
    manager = checkpoints.load(workdir / "checkpoints" / "manager", start)
    return manager, nnx.state(eye), nnx.state(reader)


def rows_of(workdir) -> list[dict]:
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def before(phase, tiny_run, workdir):
    """A copy of the run as it was when this phase was to start."""
    later = PHASES[PHASES.index(phase) :]
    shutil.copytree(tiny_run, workdir, ignore=shutil.ignore_patterns(*later, "eval"))
    rows = [r for r in read_metrics(workdir / "metrics.jsonl") if r["phase"] not in later]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_a_run_logs_all_its_phases(tiny_run):
    steps = {}
    for row in read_metrics(tiny_run / "metrics.jsonl"):
        steps.setdefault(row["phase"], []).append(row["step"])
        assert all(np.isfinite(v) for k, v in row.items() if k != "phase")
    expected = {p: TINY[f"{p}.num_steps"] for p in ("perception", "reader", "manager")}
    assert steps == {phase: list(range(1, n + 1)) for phase, n in expected.items()}
    for phase in expected:
        assert list((tiny_run / "tensorboard" / phase).glob("events.*"))


def kill_when_saved(workdir, phase, log):
    """Runs the program until the first checkpoint of a phase is whole."""
    folder = workdir / "checkpoints" / phase
    command = [sys.executable, "-m", "mmmem_jax.main", *TINY_CONFIG, f"--workdir={workdir}"]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=REPO, stdout=output, stderr=output)
        deadline = time.monotonic() + 240
        while not checkpoints.steps(folder) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL, log.read_text()


def test_killed_in_every_phase_and_resumed_is_never_killed(tiny_run, tmp_path):
    workdir = tmp_path / "run"
    before("perception", tiny_run, workdir)
    for phase in ("perception", "reader", "manager"):
        kill_when_saved(workdir, phase, tmp_path / "log")
    saved = checkpoints.steps(workdir / "checkpoints" / "manager")
    assert max(saved, default=0) < TINY["manager.num_steps"]
    done = run_module("mmmem_jax.main", *TINY_CONFIG, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    whole, again = final_state(tiny_run), final_state(workdir)
    assert whole[0][1:] == again[0][1:]  # Grain position and step
    assert whole[0][2] == TINY["manager.num_steps"]
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert rows_of(tiny_run) == rows_of(workdir)


def test_a_workdir_of_another_config_is_refused(tiny_run, call_main):
    before = (tiny_run / "metrics.jsonl").read_bytes()
    options = [*TINY_CONFIG, "--config.sib.credit=state", f"--workdir={tiny_run}"]
    done = call_main(main, *options)
    assert done.returncode == 2
    assert "sib.credit: step there, state here" in done.stderr
    assert (tiny_run / "metrics.jsonl").read_bytes() == before


def test_what_is_not_finite_stops_and_is_named(tiny_run, tmp_path, call_main):
    workdir = tmp_path / "run"
    options = [*TINY_CONFIG, "--config.manager.learning_rate=nan", f"--workdir={workdir}"]
    before("manager", tiny_run, workdir)
    (workdir / "config.json").unlink()
    done = call_main(main, *options)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("main: manager step ")
    assert "not finite" in last
    assert "config.manager.learning_rate" in last
    assert all(row["phase"] != "manager" or np.isfinite(row["loss"]) for row in rows_of(workdir))


def assert_one_line(done, says):
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("main: ")
    assert says in line
    assert not (REPO / "runs" / "x").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--workdir is missing"),
        (["--workdr=runs/x"], "did you mean --workdir?"),
        (["--workdir=runs/x", "--config.manager.learning_rat=1"], "'manager.learning_rate'?"),
        (["--workdir=runs/x", "--config=configs/sib_grp.py"], "configs/sib_grpo.py?"),
        (["--workdir=runs/x", "--config=configs/sib_grpo.py:smok"], "smoke"),
        (["--workdir=runs/x", "--config.job=wrld"], "it must be one of world, text"),
        (["--workdir=runs/x", "runs/y"], "unexpected argument"),
        (["--workdir=runs/x", "--topology=v5p:8x8x4"], "add --compile_only"),
        (["--workdir=runs/x", "--profile_steps=7:3"], "--profile_steps is '7:3'; it must be FIRST"),
        (["--workdir=runs/x", "--config.sib.credit=sate"], "config.sib.credit is 'sate'"),
    ],
)
def test_a_mistake_is_one_line(options, says):
    assert_one_line(run_module("mmmem_jax.main", *options), says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--compile_only", "--topology=v5q:8x8"], "unknown topology 'v5q:8x8'; some that are"),
        (["--compile_only", "--config.mesh.group=99"], "asks for 1 x 99 x 1 devices"),
        (["--workdir=runs/x", "--config=configs/timed_text.py"], "config.data_dir is empty"),
    ],
)
def test_a_mistake_of_a_job_is_one_line(call_main, options, says):
    assert_one_line(call_main(main, *options), says)


def test_a_config_is_planned_without_a_workdir():
    config = ["--config=configs/egolife.py:smoke", "--config.manager.num_rows=8"]
    done = run_module("mmmem_jax.main", *config, "--config.sib.inner_epochs=1", "--compile_only")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 of 1 cpu: mesh data 1 x group 1 x model 1\n")
    assert ": fits\n" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_if_it_fits(monkeypatch, fits, code):
    for name, value in (("CONFIG", sib_grpo.get_config("smoke")), ("COMPILE_ONLY", True)):
        monkeypatch.setattr(main, name, types.SimpleNamespace(value=value))
    for name in ("WORKDIR", "TOPOLOGY", "COMPILATION_CACHE"):
        monkeypatch.setattr(main, name, types.SimpleNamespace(value=None))
    monkeypatch.setattr(main.flags, "log_plainly", lambda: None)
    monkeypatch.setattr(plan, "report", lambda plan_fn, config, topology: fits)
    assert main.main([]) == code


@pytest.mark.parametrize(
    ("asked", "told", "found"),
    [("mine", None, "mine"), ("mine", "jax", "mine"), (None, "jax", "jax"), (None, None, "xla")],
)
def test_what_is_compiled_is_kept_where_it_was_asked_to(monkeypatch, tmp_path, asked, told, found):
    monkeypatch.setenv("MMMEM_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", told and str(tmp_path / told))
        main.set_compilation_cache(asked and str(tmp_path / asked))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / found)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_help_explains_itself():
    done = run_module("mmmem_jax.main", "--help")
    assert done.returncode == 0
    for word in ("--workdir", "--config", "sib_grpo.py:smoke", "resumes", "--compile_only"):
        assert word in done.stdout
