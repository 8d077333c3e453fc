"""Tests of mmmem_jax/train/metrics.py: what a run writes, and what a resumed one takes back."""

import json
import logging
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mmmem_jax.errors import UserError
from mmmem_jax.train import metrics


def write(workdir, phase: str, first_step: int, steps) -> None:
    writer = metrics.MetricsWriter(workdir, phase, first_step)
    for step in steps:
        writer.write(step, {"loss": step / 2})
    writer.close()


def test_rows_come_back(tmp_path):
    write(tmp_path, "eye", 0, [1, 2])
    write(tmp_path, "reader", 0, [1])
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["phase"], r["step"], r["loss"]) for r in rows] == [
        ("eye", 1, 0.5), ("eye", 2, 1.0), ("reader", 1, 0.5),
    ]  # fmt: skip


def tensorboard_shows(folder) -> list[int]:
    """Steps of one phase as TensorBoard reads its files: a session start hides what it redoes."""
    steps = []
    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # a TFRecord: length, its checksum, the event, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                steps = [step for step in steps if step < event.step]
            steps += [event.step] if event.summary.value else []
    return steps


def test_tensorboard_hides_the_points_past_the_checkpoint(tmp_path):
    write(tmp_path, "reader", 0, [1, 2])
    write(tmp_path, "eye", 0, [1, 2, 3])
    write(tmp_path, "eye", 2, [3, 4])
    write(tmp_path, "eye", 0, [1])
    assert tensorboard_shows(tmp_path / "tensorboard" / "reader") == [1, 2]
    assert tensorboard_shows(tmp_path / "tensorboard" / "eye") == [1]


def test_resuming_drops_the_rows_past_the_checkpoint(tmp_path):
    write(tmp_path, "eye", 0, [1, 2])
    write(tmp_path, "reader", 0, [1, 2, 3])
    write(tmp_path, "reader", 2, [3, 4])
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["phase"], r["step"]) for r in rows] == [
        ("eye", 1), ("eye", 2), ("reader", 1), ("reader", 2), ("reader", 3), ("reader", 4),
    ]  # fmt: skip


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"phase": "eye", "step": 1}) + '\n{"phase": "ey')
    assert [r["step"] for r in metrics.read_metrics(path)] == [1]
    write(tmp_path, "eye", 1, [2])
    assert [r["step"] for r in metrics.read_metrics(path)] == [1, 2]
    assert metrics.read_metrics(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("saved", "says"), [(40, "step 40 is saved"), (None, "no step is saved")])
def test_what_is_not_finite_is_named(bad, saved, says):
    with pytest.raises(UserError) as error:
        metrics.check_finite("manager", 42, {"loss": 1.0, "grad_norm": bad}, saved)
    message = str(error.value)
    assert "manager step 42: grad_norm not finite" in message
    assert says in message
    assert "loss" not in message
    metrics.check_finite("manager", 42, {"loss": 1.0}, saved)
    with pytest.raises(UserError, match=r": a, b, c and 2 more not finite"):
        metrics.check_finite("manager", 42, dict.fromkeys("abcde", bad), saved)


def test_a_log_gets_plain_lines(monkeypatch, caplog):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    progress = metrics.Progress("reader", 10, 4)
    with caplog.at_level(logging.INFO, "mmmem_jax"):
        progress.advance()
        progress.report(5, {"loss": 0.25})
    progress.close()
    assert caplog.messages[0].startswith("reader 5/10 loss=0.25 (")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = metrics.Progress("reader", 10, 4)
    for step in range(5, 11):
        progress.advance()
        progress.report(step, {"loss": 0.25})
    progress.close()
    shown = capsys.readouterr().err
    assert "10/10" in shown
    assert "loss=0.25" in shown
