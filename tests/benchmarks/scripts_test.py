"""Tests of the benchmark scripts: each ends with one JSON line that has the promised keys."""

import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import length, retrieval
from mmmem_jax.evals import protocol, world_eval
from mmmem_jax.evals.protocol import Records
from tests.conftest import REPO

KEYS = {
    "throughput": {"jax", "torch", "ratio"},
    "length": {"lengths", "learned", "best_rule", "state_bytes", "ms_per_chunk"},
    "retrieval": {
        "top_down", "flat", "token_ratio", "gist_stops_at_schema", "seen_once_reaches_sensory",
        "se",
    },
}  # fmt: skip
ALWAYS = {"date", "device", "versions", "seeds", "command"}


def run_script(name: str, *options: str) -> dict:
    command = [sys.executable, f"benchmarks/{name}.py", *options]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["length", "retrieval"])
def test_the_last_line_has_the_keys(tiny_run, name):
    result = run_script(name, f"--workdir={tiny_run}")
    assert result.keys() >= KEYS[name] | ALWAYS
    if name == "length":
        columns = [v for k, v in result.items() if isinstance(v, list) and k != "seeds"]
        assert {len(column) for column in columns} == {len(result["lengths"])}
        assert len(set(result["state_bytes"])) == 1


def test_throughput_compares_the_same_decisions():
    if importlib.util.find_spec("torch") is None:
        command = [sys.executable, "benchmarks/throughput.py"]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600)
        assert done.returncode
        assert "pip install 'mmmem_jax[benchmark]'" in done.stderr.splitlines()[-1]
        return
    result = run_script("throughput")
    assert result.keys() >= KEYS["throughput"] | ALWAYS
    assert result["same_actions"] == 1.0
    assert result["ratio"] == pytest.approx(result["jax"] / result["torch"])


def test_cutting_a_stream_changes_nothing(tiny_run, monkeypatch):
    run = world_eval.load_run(tiny_run)
    learned, _ = world_eval.load_learned(run, tiny_run, None)
    num_chunks = run.streams.valid.shape[1]
    whole, cut = [], []
    for size, states in ((num_chunks, whole), (num_chunks // 4, cut)):
        monkeypatch.setattr(length, "SEGMENT", size)
        states.append(length.pass_streams(learned, run.streams, num_chunks)[1])
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


def test_shares_and_scores_of_known_records(tiny_run):
    streams = world_eval.load_run(tiny_run).streams
    shape = (*streams.answer.shape, 4)
    right = np.log(np.full(shape, 0.1))
    np.put_along_axis(right, streams.answer[..., None], np.log(0.7), -1)
    wrong = np.roll(right, 1, axis=-1)
    zeros, ones = np.zeros(shape[:2], int), np.ones(shape[:2], int)
    records = Records(
        log_probs=right, top_down_log_probs=right, flat_log_probs=wrong,
        answer_entropy=np.zeros(shape), stop_step=zeros,
        stop_level=np.where(streams.family == 1, 2, 0), tokens_read=ones,
        flat_tokens_read=4 * ones, slots=zeros[:, 0], tokens=zeros[:, 0],
        tokens_all_levels=zeros[:, 0], source_tokens=ones[:, 0],
    )  # fmt: skip
    found = retrieval.compare(records, streams)
    assert (found["top_down"], found["flat"], found["difference"]) == (1.0, 0.0, 1.0)
    assert found["token_ratio"] == 0.25
    assert found["gist_stops_at_schema"] in (1.0, None)  # None: so short a life has no gist
    assert found["seen_once_reaches_sensory"] in (1.0, None)
    assert found["num_questions"] == streams.question_valid.sum()
    assert (
        protocol.accuracy_and_error(right.argmax(-1) == streams.answer, streams.question_valid)[
            "accuracy"
        ]
        == found["whole"]
    )
