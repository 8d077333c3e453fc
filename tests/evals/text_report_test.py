"""Tests of the HTML report of a text run, on made-up results."""

import copy
import html
import re

import numpy as np
import pytest
from matplotlib import image

from mmmem_jax.evals import table, text_report
from tests.evals.report_test import _Page, _plain

SECTIONS = "results learning shares types ages example provenance".split()
SHARES = ("0.0625", "0.25", "0.015625")
RECALL = {"learned": 0.7341, "uniform": 0.31, "highest_idf": 0.5123, "oracle_askable": 0.9}


def _rates(recall):
    return {"recall": recall, "recall_se": 0.011, "n": 321, "accuracy": recall / 2,
            "accuracy_se": 0.012, "accuracy_n": 320}  # fmt: skip


NONE = dict.fromkeys(_rates(1.0))


def _entry(name, recall):
    by_type = [{"type": kind, **_rates(recall - 0.1 * i)} for i, kind in enumerate(("who", "when"))]
    by_age = [{"lo": 0.0, "hi": 1.5, **_rates(recall)}, {"lo": 1.5, "hi": 3.0, **NONE}]
    official = {f"official_{key}": value for key, value in _rates(recall / 3).items()}
    held = {"name": name, "slots": 775.0, "tokens": 8944.3, "share_of_seen": 0.1337}
    by = {"by_type": by_type, "by_age": by_age, "official_by_type": by_type[:1]}
    return held | _rates(recall) | official | by


def _row(text, evidence=False):
    return {"t0": 90_000.0, "t1": 90_002.0, "kind": "caption", "text": text, "evidence": evidence}


@pytest.fixture(scope="module")
def results():
    entries = [_entry(*pair) for pair in (RECALL | {"unlimited": 0.6}).items()]
    nodes = [
        {"score": 0.5, "hit": True, "num_rows": 3, "rows": [_row("Ann left.", True), _row("Hm.")]},
        {"score": 0.4, "hit": False, "num_rows": 1, "rows": [_row("Bob came.")]},
    ]
    policy = {"name": "learned", "chosen": 1, "num_rows": 40, "num_past": 400, "nodes": nodes}
    return {
        "title": "Made-up results", "seed": 17, "step": 300, "num_streams": 2,
        "num_questions": 4321, "top_k": 5, "command": "python -m made.up",
        "table": {split: dict.fromkeys(SHARES, entries) for split in ("validation", "test")},
        "example": {
            "split": "test", "share": "0.0625", "stream": "day 2", "question": "Who left?",
            "type": "who", "query_time": 100_000.0, "options": ["Bob", "Ann"], "answer": 1,
            "evidence": [_row("Ann left.", True)],
            "policies": [policy, policy | {"name": "uniform", "chosen": None, "nodes": []}],
        },
    }  # fmt: skip


METRICS = [{"phase": "manager", "step": s, "reward": s / 9} for s in (1, 2)]


def test_every_section_is_there_and_filled(results):
    page = text_report.render(results, METRICS)
    seen = _Page(page).seen
    assert [a["id"] for tag, a in seen if tag == "section"] == SECTIONS
    assert sum(tag == "polyline" for tag, _ in seen) == 1 + 2 * 4 * 4 + 3
    assert sum(tag == "mark" for tag, _ in seen) == 2  # the evidence, and where it was retrieved
    assert page.count('class="missing"') == 1  # the rule that retrieves nothing
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)


def test_numbers_are_those_of_the_results(results):
    text = _plain(text_report.render(results, METRICS))
    for recall in RECALL.values():
        assert f"{recall:.3f} ± 0.011" in text
        assert f"{recall / 6:.3f} ± 0.012" in text
    assert "highest_idf (best rule)" in text
    assert "oracle_askable (best rule)" not in text
    for shown in ("4,321", "8,944", "Who left?", "day 2, 1:00:00", "and 1 more rows", "0.50"):
        assert shown in text


def test_what_the_numbers_mean_is_said(results):
    text = _plain(text_report.render(results, METRICS))
    assert text.count("the budget is on average 0.134 of the tokens seen until then") == 6
    assert "an order question has four" in text
    assert "and is no upper bound" in text


def test_the_headline_is_of_the_last_split_and_the_first_share(results):
    changed = copy.deepcopy(results)
    changed["table"]["test"]["0.0625"][0]["recall"] = 0.55
    said = text_report.headline(changed)
    assert "finds the evidence of 0.550" in said
    assert "(test split, 0.0625 of the tokens kept, recall@5.)" in said
    assert "closes" in said


def test_rules_are_compared_without_the_oracle(results):
    found = text_report.view(results, "test", "0.0625", "official_accuracy")
    assert table.best_rule(found)["name"] == "highest_idf"
    assert "oracle_askable" not in {row["policy"] for row in found["frontier"]}
    assert found["frontier"][0]["accuracy"] == pytest.approx(RECALL["learned"] / 6)
    assert found["policies"][0]["by_family"][0]["n"] == 320


@pytest.mark.parametrize("table_", [{}, {"test": {}}, None])
def test_without_results_every_section_says_so(table_):
    page = text_report.render({"table": table_, "top_k": 5}, [])
    assert [a["id"] for tag, a in _Page(page).seen if tag == "section"] == SECTIONS
    assert "No policy was evaluated." in page
    assert page.count('class="missing"') >= len(SECTIONS) - 2


def test_questions_of_one_kind_only_still_make_a_page(results):
    changed = copy.deepcopy(results)
    for entry in changed["table"]["test"]["0.0625"]:
        entry |= {f"official_{key}": None for key in NONE} | {"official_by_type": []}
        entry |= NONE | {"by_type": [], "by_age": []}
    _Page(text_report.render(changed, METRICS))


def test_text_is_escaped(results):
    attack = "<script>alert('x')</script>"
    changed = copy.deepcopy(results)
    changed["example"]["question"] = changed["example"]["options"][0] = attack
    changed["example"]["evidence"][0]["text"] = changed["example"]["stream"] = attack
    changed["table"]["test"]["0.0625"][1]["name"] = attack
    page = text_report.render(changed, METRICS)
    assert "script" not in {tag for tag, _ in _Page(page).seen}
    assert page.count(html.escape(attack, quote=False).replace("'", "&#39;")) > 5


def test_picture_has_the_size_of_a_world_runs(results, tmp_path):
    for found in (results, {}):
        text_report.plot_summary(found, tmp_path / "summary.png")
        pixels = image.imread(tmp_path / "summary.png")
        assert pixels.shape[:2] == (500, 1200)
        assert np.ptp(pixels[..., :3]) > 0.5


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "0:00:00"), (3723.9, "1:02:03"), (2 * 86_400 + 60, "day 3, 0:01:00"), (None, "the end")],
)
def test_clock(seconds, shown):
    assert text_report.clock(seconds) == shown
