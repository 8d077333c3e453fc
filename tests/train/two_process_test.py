"""Two real processes on this machine are one run: killed, stopped, resumed, and equal to one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from mmmem_jax.train import checkpoints, preemption
from mmmem_jax.train.metrics import read_metrics
from tests.conftest import REPO, TINY, TINY_CONFIG
from tests.main_test import before, final_state, rows_of

SECONDS = 240  # until a test gives up


class Pair:
    """Two processes of `python -m mmmem_jax.main`, one run."""

    def __init__(self, workdir: Path):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.logs = [workdir.parent / f"log{i}" for i in range(2)]
        command = [sys.executable, "-m", "mmmem_jax.main", *TINY_CONFIG, "--config.mesh.data=2"]
        command += [f"--workdir={workdir}", f"--coordinator=localhost:{port}", "--num_processes=2"]
        environ = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles faster
        self.processes = []
        for i, log in enumerate(self.logs):
            with log.open("w") as file:
                process = subprocess.Popen(
                    [*command, f"--process_id={i}"],
                    cwd=REPO,
                    env=environ,
                    stdout=file,
                    stderr=file,
                )
            self.processes.append(process)

    def wait(self) -> list[int]:
        """The exit codes."""
        return [process.wait(SECONDS) for process in self.processes]

    def said(self) -> str:
        """What both have printed."""
        return "\n".join(log.read_text() for log in self.logs)


@contextlib.contextmanager
def pair(workdir: Path) -> Iterator[Pair]:
    """Starts two processes that end with the context at the latest."""
    started = Pair(workdir)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.wait()


@pytest.fixture
def workdir(tiny_run, tmp_path):
    """A run of two devices that one process has brought to where the manager starts."""
    folder = tmp_path / "run"
    before("manager", tiny_run, folder)
    config = json.loads((folder / "config.json").read_text())
    config["mesh"]["data"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def last_step(workdir: Path) -> int:
    """The last step that the manager has logged."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return max((row["step"] for row in rows if row["phase"] == "manager"), default=0)


def wait_for_step(run: Pair, workdir: Path, step: int) -> None:
    """Returns when the manager has logged `step`."""
    deadline = time.monotonic() + SECONDS
    while last_step(workdir) < step:
        assert time.monotonic() < deadline, run.said()
        assert all(process.poll() is None for process in run.processes), run.said()
        time.sleep(0.02)


def test_killed_stopped_and_resumed_is_the_run_of_one(tiny_run, workdir):
    manager = workdir / "checkpoints" / "manager"
    with pair(workdir) as run:  # the second is killed: the first ends, and says why
        wait_for_step(run, workdir, 3)
        killed = time.monotonic()
        run.processes[1].kill()
        assert run.wait()[0] not in (0, -signal.SIGKILL)
        assert time.monotonic() - killed < 60
        last = run.logs[0].read_text().strip().splitlines()[-1]
        assert last.startswith("main: process 0 of 2 ends, as another process of the run was lost")
    killed_at = last_step(workdir)
    assert killed_at < TINY["manager.num_steps"]

    with pair(workdir) as run:  # one is told to stop: both save the same step
        wait_for_step(run, workdir, killed_at + 1)
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.wait() == [0, 0], run.said()
    mark = json.loads((workdir / preemption.MARKER).read_text())
    assert mark == {"phase": "manager", "step": checkpoints.steps(manager)[-1]}
    assert killed_at < mark["step"] < TINY["manager.num_steps"]

    with pair(workdir) as run:
        assert run.wait() == [0, 0], run.said()
        assert "main: " not in run.said()
    assert not (workdir / preemption.MARKER).exists()

    one, two = final_state(tiny_run), final_state(workdir)
    assert one[0][1:] == two[0][1:]  # position in the data, and step
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one, two)
    for x, y in zip(rows_of(tiny_run), rows_of(workdir), strict=True):
        assert x == pytest.approx(y, abs=1e-4)
