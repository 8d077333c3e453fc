"""Tests of the benchmark scripts: each ends with one JSON line that has the promised keys."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import common, egolife, frontier, learning, length, retrieval, throughput
from mmmem_jax import provenance
from mmmem_jax.evals import protocol, world_eval
from mmmem_jax.evals.protocol import Records
from mmmem_jax.policies import rules
from mmmem_jax.train import checkpoints, world_job
from tests.conftest import REPO

KEYS = {
    "throughput": {"jax", "torch", "ratio"},
    "length": {"lengths", "learned", "best_rule", "state_bytes", "ms_per_chunk"},
    "retrieval": {
        "top_down", "flat", "token_ratio", "gist_stops_at_schema", "seen_once_reaches_sensory",
        "se", "control", "flat_same_tokens",
    },
    "learning": {
        "learned", "best_rule", "best_rule_name", "unlimited", "trajectory_credit", "gap_closed",
        "se", "ece",
    },
    "egolife": {
        "recall_learned", "recall_best_rule", "best_rule_name", "recall_unlimited", "n", "se",
        "acc_learned", "acc_best_rule", "acc_unlimited", "official_recall_learned",
    },
    "frontier": {"points", "num_steps"},
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


@pytest.fixture
def argv(monkeypatch):
    """Sets the arguments of a script that runs in this process."""
    monkeypatch.setattr(common.flags, "log_plainly", lambda: None)
    return lambda *options: monkeypatch.setattr("sys.argv", ["script.py", *options])


def test_the_frontier_has_the_keys_of_every_point(argv, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # two streams do not split over eight
    monkeypatch.setattr(frontier, "BETA1", (2e-4,))
    argv(f"--workdir={shutil.copytree(tiny_run, tmp_path / 'run')}")
    frontier.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result.keys() >= KEYS["frontier"] | ALWAYS
    (point,) = result["points"]
    assert point.keys() >= {"beta1", "tokens", "accuracy", "se", *frontier.BOUNDS}


class TestMistakes:
    @pytest.mark.parametrize(
        ("module", "options", "message"),
        [
            (learning, ["--seeds=a"], "'a' is no list of different seeds such as 0,1,2"),
            (learning, ["--seeds=1,1"], "'1,1' is no list of different seeds such as 0,1,2"),
            (learning, ["--seeds="], "'' is no list of different seeds such as 0,1,2"),
            (learning, ["--credits=stp"], "'stp' is no list of some of trajectory, state, step"),
            (frontier, [], "the following arguments are required: --workdir"),
        ],
    )
    def test_arguments(self, argv, capsys, module, options, message):
        argv(*options)
        with pytest.raises(SystemExit, match="2"):
            module.main()
        assert capsys.readouterr().err.endswith(f"{message}\n")

    def test_a_frontier_of_no_run(self, argv, tmp_path):
        argv(f"--workdir={tmp_path}")
        with pytest.raises(SystemExit, match=r"^frontier: \S+ has no config.json; run mmmem_jax"):
            frontier.main()

    def test_a_full_frontier_of_a_toy(self, argv, tiny_run):
        argv(f"--workdir={tiny_run}", "--full")
        with pytest.raises(SystemExit, match="^frontier: --full is of the default config, but "):
            frontier.main()

    def test_learning_in_a_folder_of_other_runs(self, tmp_path):
        (tmp_path / "seed0/step").mkdir(parents=True)
        (tmp_path / "seed0/step/config.json").write_text('{"job": "other"}')
        command = [sys.executable, "benchmarks/learning.py", f"--workdir={tmp_path}"]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
        assert done.returncode
        assert done.stderr.startswith("learning: ")
        assert done.stderr.count("\n") == 1
        assert "belongs to another config" in done.stderr


def entry(accuracy: float, se: float = 0.0, ece: float = 0.0) -> dict:
    return {"accuracy": accuracy, "se": se, "ece": ece}


class TestLearning:
    def test_means_and_errors_of_known_seeds(self):
        seeds = [
            {
                "learned": entry(0.7, 0.03, 0.02), "uniform": entry(0.5, 0.03),
                "kmeans": entry(0.3, 0.03), "unlimited": entry(0.8, 0.04),
                "trajectory_credit": entry(0.6, 0.05), "num_questions": 10,
            },
            {
                "learned": entry(0.9, 0.03, 0.04), "uniform": entry(0.5, 0.03),
                "kmeans": entry(0.5, 0.03), "unlimited": entry(1.0, 0.04),
                "trajectory_credit": entry(0.6, 0.05), "num_questions": 20,
            },
        ]  # fmt: skip
        found = learning.combine(seeds)
        assert found.keys() >= KEYS["learning"]
        assert found["learned"] == pytest.approx(0.8)
        assert (found["best_rule"], found["best_rule_name"]) == (0.5, "uniform")
        assert found["unlimited"] == pytest.approx(0.9)
        assert found["trajectory_credit"] == pytest.approx(0.6)
        assert found["gap_closed"] == pytest.approx((0.8 - 0.5) / (0.9 - 0.5))
        assert found["ece"]["learned"] == pytest.approx(0.03)
        assert found["num_questions"] == [10, 20]
        # Two seeds at 0.7 and 0.9 differ by more than their questions explain, equal ones by less.
        assert found["se"]["learned"] == pytest.approx((0.02 / 2) ** 0.5)
        assert found["se"]["best_rule"] == pytest.approx(0.03 / 2**0.5)
        assert learning.combine(seeds[:1])["se"]["learned"] == pytest.approx(0.03)

    @pytest.fixture
    def kept(self, tmp_path, monkeypatch):
        """Where seed 0 keeps what was measured, while nothing can be trained."""

        def train(*_):
            raise InterruptedError("trains")

        monkeypatch.setattr(learning, "train", train)
        path = tmp_path / "seed0/measured_trajectory.json"
        path.parent.mkdir()
        return path

    def test_goes_on_from_what_it_kept(self, kept):
        config = checkpoints.plain(learning.make_config(0, "step", full=True).to_dict())
        old = {"config": config, "versions": provenance.versions(), "found": {"learned": entry(1)}}
        kept.write_text(json.dumps(old))
        root = kept.parent.parent
        assert learning.measure(root, 0, ["trajectory"], full=True) == old["found"]
        old["versions"]["jax"] = "0.1"
        kept.write_text(json.dumps(old))
        with pytest.raises(InterruptedError, match="trains"):
            learning.measure(root, 0, ["trajectory"], full=True)

    def test_a_toy_is_no_full_result(self, kept):
        toy = checkpoints.plain(learning.make_config(0, "step", full=False).to_dict())
        found = {"learned": entry(1)}
        for old in (
            {"config": toy, "versions": provenance.versions(), "found": found},
            found,  # as earlier versions kept it
        ):
            kept.write_text(json.dumps(old))
            with pytest.raises(InterruptedError, match="trains"):
                learning.measure(kept.parent.parent, 0, ["trajectory"], full=True)

    def test_measures_a_run(self, tiny_run, tmp_path, monkeypatch):
        def make_config(seed, credit, full):
            config = ConfigDict(common.checkpoints.read_config(tiny_run))
            config.sib.credit = credit
            return config

        def rule_policies(run, workdir):  # all ten take a minute to compile
            return [protocol.rule_policy(rules.keep_recent(), world_job.memory_config(run.config))]

        monkeypatch.setattr(learning, "make_config", make_config)
        monkeypatch.setattr(world_eval, "rule_policies", rule_policies)
        shutil.copytree(tiny_run, tmp_path / "seed0/step")
        found = learning.measure(tmp_path, 0, ["trajectory"], full=False)
        assert found.keys() >= {"learned", "keep_recent", "unlimited", "trajectory_credit"}
        assert learning.combine([found]).keys() >= KEYS["learning"]
        assert learning.measure(tmp_path, 0, ["trajectory"], full=False) == found


def test_the_headline_of_known_entries():
    def made(name, recall, accuracy, official):
        return {
            "name": name, "recall": recall, "recall_se": 0.03, "n": 7, "accuracy": accuracy,
            "official_recall": official, "official_recall_se": 0.04, "official_n": 5,
            "official_accuracy": 1 - accuracy,
        }  # fmt: skip

    found = egolife.headline(
        [
            made("learned", 0.5, 0.6, 0.1),
            made("recent", 0.2, 0.4, 0.3),  # the best of the official ones, and least accurate
            made("idf", 0.4, 0.5, 0.2),
            made("unlimited", 0.9, 0.8, 0.7),
        ]
    )
    assert found.keys() >= KEYS["egolife"]
    expected = {
        "recall_learned": 0.5, "recall_best_rule": 0.4, "recall_unlimited": 0.9,
        "best_rule_name": "idf", "n": 7,
        "acc_learned": 0.6, "acc_best_rule": 0.5, "acc_unlimited": 0.8,
        "official_recall_learned": 0.1, "official_recall_best_rule": 0.3,
        "official_best_rule_name": "recent", "official_n": 5, "official_acc_best_rule": 0.6,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert found["se"]["gap"] == pytest.approx((2 * 0.03**2) ** 0.5)
    assert found["official_se"]["gap"] == pytest.approx((2 * 0.04**2) ** 0.5)


def test_throughput_tells_how_it_was_scheduled(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    for name in ("SCHED_OTHER", "SCHED_FIFO"):
        policy = getattr(os, name) | os.SCHED_RESET_ON_FORK
        monkeypatch.setattr(os, "sched_getscheduler", lambda pid, policy=policy: policy)
        assert throughput.scheduling() == {"scheduler": name, "load": 1.5}


def test_throughput_compares_the_same_decisions():
    if importlib.util.find_spec("torch") is None:
        command = [sys.executable, "benchmarks/throughput.py"]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600)
        assert done.returncode
        assert "pip install 'mmmem_jax[benchmark]'" in done.stderr.splitlines()[-1]
        return
    result = run_script("throughput")
    assert result.keys() >= KEYS["throughput"] | ALWAYS | {"scheduler", "load"}
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
