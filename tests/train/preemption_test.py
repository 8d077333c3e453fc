"""Tests of mmmem_jax/train/preemption.py: asked to stop, a run saves and goes on later."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from mmmem_jax.train import checkpoints, metrics, preemption
from tests.train.trainer_test import fit, rows_of


def stop_at(monkeypatch, step: int) -> None:
    """Has this process sent SIGTERM while `step` is counted."""
    counted = []

    def advance(progress):
        counted.append(progress)
        if len(counted) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(metrics.Progress, "advance", advance)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, final state) of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, fit(workdir, 7, log_every=2)


@pytest.mark.parametrize("step", [3, 4])  # between two reports, and after one
def test_stopped_and_resumed_is_never_stopped(whole, tmp_path, monkeypatch, step):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(SystemExit) as stopped:
            fit(tmp_path, 7, log_every=2)
    assert not stopped.value.code
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoints.steps(tmp_path / "checkpoints" / "phase")[-1] == step
    mark = tmp_path / preemption.MARKER
    assert json.loads(mark.read_text()) == {"phase": "phase", "step": step}
    again = fit(tmp_path, 7, log_every=2)
    jax.tree.map(np.testing.assert_array_equal, whole[1], again)
    assert rows_of(whole[0]) == rows_of(tmp_path)
    assert not mark.exists()


def test_the_last_step_ends_the_phase(tmp_path, monkeypatch):
    stop_at(monkeypatch, 4)
    assert fit(tmp_path, 4).step == 4
    assert not (tmp_path / preemption.MARKER).exists()


def test_nothing_but_the_notice_stops():
    with preemption.notice() as asked_to_stop:
        assert not asked_to_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked_to_stop(2)
        assert asked_to_stop(3)
