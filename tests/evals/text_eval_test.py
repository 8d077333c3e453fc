"""The evaluation of a text run: a small folder and one checkpoint, from following to the report."""

import contextlib
import io
import json
import types

import jax
import numpy as np
import pytest

from mmmem_jax import eval_main
from mmmem_jax.data.timed_text import Question
from mmmem_jax.evals import (
    follow,
    text_eval,
    text_example,
    text_policies,
    text_questions,
    text_report,
)
from mmmem_jax.evals.text_protocol import Records
from mmmem_jax.sib import update as sib
from mmmem_jax.train import checkpoints, text_job
from mmmem_jax.train.world_job import manager_optimizer
from tests.train.text_job_test import small_config

SHARE = "0.0625"


def coarsely(patch):
    """One constant each, so that tuning takes no time."""
    for grid in ("HALF_LIVES", "SIMILARITIES", "CHANGES"):
        patch.setattr(text_policies, grid, (0.5,))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Workdir, run and results of an untrained manager, as if it were the end of training."""
    with pytest.MonkeyPatch.context() as patch:
        coarsely(patch)
        config = small_config(tmp_path_factory.mktemp("text"))
        workdir = tmp_path_factory.mktemp("workdir")
        step = config.manager.num_steps
        checkpoints.claim_workdir(workdir, config.to_dict())
        model = text_job.make_manager(config)
        start = sib.init_state(model, manager_optimizer(config), jax.random.key(0))
        with checkpoints.open_checkpoints(workdir / "checkpoints/manager") as folder:
            checkpoints.save(folder, step, start, {"position": 0}, config.to_dict())
        eval_main.FLAGS(["eval_main", "--follow"])
        with contextlib.redirect_stdout(io.StringIO()) as said:
            eval_main.evaluate_text(workdir)
        eval_main.FLAGS.unparse_flags()
    results = json.loads((workdir / "eval/results.json").read_text())
    return types.SimpleNamespace(
        workdir=workdir, run=text_eval.load_run(workdir), results=results, said=said.getvalue()
    )


def test_every_policy_is_compared_and_shown(evaluated):
    table = evaluated.results["table"]
    assert list(table) == list(evaluated.run.config.eval.splits)
    *shown, last = evaluated.said.splitlines()
    assert len(shown) == len(table) * 15
    assert last == f"report: {evaluated.workdir / 'eval/report.html'}"
    for by_share in table.values():
        entries = by_share[SHARE]
        names = [entry["name"] for entry in entries]
        assert names[0] == "learned"
        assert names[-2:] == ["oracle_askable", "unlimited"]
        assert len(names) == len(set(names)) == 13
        assert entries[-1]["official_n"] == 1
        assert entries[0]["seeds"] == [entries[0]["recall"]]
        best = text_eval.best_rule(entries, "recall")
        assert best["name"] in names[1:-2]
        assert all(e["recall"] <= best["recall"] for e in entries[1:-2])
        for entry in entries:
            assert 0.0 <= entry["recall"] <= 1.0
            assert any(line.startswith(entry["name"]) for line in shown)


def test_seeds_are_averaged_and_the_rest_is_as_with_one(evaluated, monkeypatch):
    coarsely(monkeypatch)
    config, texts = evaluated.run
    models = [text_job.make_manager(config)] * 2
    found = text_eval.compare(config, texts, models, splits=("test",), shares=(0.0625,))
    before = evaluated.results["table"]["test"][SHARE]
    for ours, one in zip(found["test"][SHARE], before, strict=True):
        types = [{key: row[key] for key in ("type", "n", "recall", "recall_se")}
                 for row in one["by_type"]]  # fmt: skip
        assert ours == {key: one[key] for key in ours} | {"by_type": types} | (
            {"seeds": 2 * one["seeds"]} if "seeds" in one else {}
        )


def test_recall_by_type_is_the_mean_over_seeds():
    questions = [Question("q", "v", "?", ("a", "b"), 0, 1.0, (), kind) for kind in ("who", "when")]
    asked = text_questions.Asking(questions, [], np.array([0.5, 0.5]))
    both = np.ones(2, bool)
    seeds = [Records(np.array(hit), both, both, both, both, np.zeros(2, int))
             for hit in ([True, False], [True, True])]  # fmt: skip
    when, who = text_questions.recall_by_type(asked, seeds)
    assert (when["type"], when["n"], when["recall"]) == ("when", 1, 0.5)
    assert (who["type"], who["n"], who["recall"]) == ("who", 1, 1.0)


def test_the_budget_is_said_as_a_share_of_what_was_seen(evaluated):
    for by_share in evaluated.results["table"].values():
        *limited, unlimited = by_share[SHARE]
        assert len({entry["share_of_seen"] for entry in limited}) == 1
        assert float(SHARE) < limited[0]["share_of_seen"] < 1.0
        assert unlimited["share_of_seen"] == 1.0


def test_groups_add_up_to_the_whole(evaluated):
    for by_share in evaluated.results["table"].values():
        for entry in by_share[SHARE]:
            for groups in (entry["by_type"], entry["by_age"]):
                assert sum(row["n"] for row in groups) == entry["n"]
                found = sum(row["n"] * (row["recall"] or 0.0) for row in groups)
                assert found == pytest.approx(entry["n"] * entry["recall"])


def test_every_question_has_a_row_of_three_policies(evaluated):
    lines = (evaluated.workdir / "eval/questions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 3 * evaluated.results["num_questions"]
    for split, by_share in evaluated.results["table"].items():
        entries = {entry["name"]: entry for entry in by_share[SHARE]}
        best = text_eval.best_rule(by_share[SHARE], "recall")["name"]
        here = [row for row in rows if row["split"] == split]
        assert {(r["policy"], r["share"]) for r in here} == {
            ("learned", 0.0625), (best, 0.0625), ("unlimited", 1.0)
        }  # fmt: skip
        for name in ("learned", best, "unlimited"):
            for asked, prefix in (("made", ""), ("labelled", "official_")):
                mine = [r for r in here if (r["policy"], r["asked"]) == (name, asked)]
                hits = [r["hit"] for r in mine if r["hit"] is not None]
                assert np.mean(hits) == pytest.approx(entries[name][f"{prefix}recall"])
                assert len({r["qid"] for r in mine}) == len(mine)
                for r in mine:
                    assert not r["hit"] or r["held"]
                    assert r["right"] == (r["chosen"] == r["answer"])


def test_following_wrote_the_curve(evaluated):
    (row,) = follow.read_curve(evaluated.workdir)
    split = evaluated.run.config.eval.splits[0]
    learned = evaluated.results["table"][split][SHARE][0]
    assert row["step"] == evaluated.results["step"]
    assert row["split"] == split
    for key in ("recall", "accuracy", "tokens", "slots"):
        assert row[key] == learned[key]


def test_the_example_holds_what_was_retrieved(evaluated):
    example = evaluated.results["example"]
    assert [p["name"] for p in example["policies"]][0] == "learned"
    assert example["evidence"]
    entries = evaluated.results["table"][example["split"]][example["share"]]
    for policy in example["policies"]:
        assert len(policy["nodes"]) <= evaluated.run.config.eval.top_k
        scores = [node["score"] for node in policy["nodes"]]
        assert scores == sorted(scores, reverse=True)
        assert policy["num_rows"] < policy["num_past"]
        for node in policy["nodes"]:
            assert all(row["t1"] <= example["query_time"] for row in node["rows"])
            assert node["hit"] <= any(row["evidence"] for row in node["rows"])
    if entries[0]["recall"]:
        assert any(node["hit"] for node in example["policies"][0]["nodes"])


def test_the_files_are_those_of_a_world_run(evaluated):
    folder = evaluated.workdir / "eval"
    names = {"curve.jsonl", "questions.jsonl", "report.html", "results.json", "summary.png"}
    assert {path.name for path in folder.iterdir()} == names
    saved = json.loads((folder / "results.json").read_text())
    metrics = follow.read_curve(evaluated.workdir)
    assert (folder / "report.html").read_text() == text_report.render(saved, metrics)


def test_the_example_is_one_that_only_the_first_policy_finds():
    ours, theirs = np.array([False, True, True]), np.array([True, True, False])
    assert text_example.choose([ours, theirs]) == 2
    assert text_example.choose([ours, ours]) == 1
    assert text_example.choose([ours]) == 1
    assert text_example.choose([ours & False, theirs]) == 0


@pytest.mark.parametrize(
    ("query_time", "evidence", "hours"),
    [
        (7200.0, ((0.0, 3600.0),), 1.0),
        (7200.0, ((0.0, 0.0), (3000.0, 3600.0), (7000.0, 9000.0)), 1.0),
        (None, ((0.0, 3600.0),), 2.0),
        (10.0, ((5.0, 20.0),), np.nan),
        (10.0, (), np.nan),
    ],
)
def test_age_is_that_of_the_newest_evidence_of_the_past(query_time, evidence, hours):
    question = Question("q", "v", "?", ("a", "b"), 0, query_time, evidence, "who")
    stream = types.SimpleNamespace(span=np.array([[0.0, 1.0], [1.0, 10_800.0]]))
    np.testing.assert_equal(text_questions.evidence_age(question, stream), hours)


def test_no_question_gives_no_group():
    none = text_questions.Asking([], [], np.zeros(0))
    groups = text_questions.groups(none, Records(*[np.zeros(0, bool)] * 6))
    assert groups["by_type"] == []
    assert [row["n"] for row in groups["by_age"]] == [0] * text_questions.NUM_AGES
