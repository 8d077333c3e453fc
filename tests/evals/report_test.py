"""Tests of the HTML report, on made-up results."""

import base64
import copy
import html
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import image

from mmmem_jax.evals import charts, report, timeline

SECTIONS = "results learning frontier families ages stops stream provenance".split()
FAMILIES = {"state": "schema", "seen_once": "sensory", "when": "episodic", "gist": "schema"}
RULES = ("keep_recent", "uniform", "reservoir", "similarity_merge", "surprise", "kmeans")
DAY, CHUNKS = 86_400, 256
VOID = {"meta", "img", "br"}


def _png():
    file = io.BytesIO()
    pixels = np.random.default_rng(0).random((16, 16, 3))
    image.imsave(file, pixels, format="png")
    return base64.b64encode(file.getvalue()).decode()


def _policy(name, accuracy):
    stops = {"schema": 0.5, "episodic": 0.3, "sensory": 0.2}
    return {
        "name": name,
        "accuracy": accuracy,
        "se": 0.0093,
        "probability": accuracy - 0.0417,
        "slots": 256 if name == "unlimited" else 32,
        "tokens": 9876.0 if name == "unlimited" else 412.6,
        "compression": 1.0 if name == "unlimited" else 0.0418,
        "tokens_read": 51.25,
        "accuracy_top_down": accuracy - 0.0123,
        "accuracy_flat": accuracy - 0.0234,
        "flat_tokens_read": 131.0,
        "by_family": [
            {"family": f, "level": level, "accuracy": accuracy - 0.05 * i, "se": 0.021, "n": 250}
            for i, (f, level) in enumerate(FAMILIES.items())
        ],
        "by_age": [
            {"lo": lo, "hi": lo + 1, "accuracy": accuracy - 0.03 * lo, "se": 0.02, "n": 321}
            for lo in range(4)
        ],
        "stop_levels": stops,
        "stops_by_family": dict.fromkeys(FAMILIES, stops),
    }


def _example():
    rng = np.random.default_rng(1)
    kinds = rng.choice(["state", "routine", "loud", "idle", "talk", "glitch"], CHUNKS)
    actions = rng.choice(["ADD_NEW", "MERGE", "DISCARD"], CHUNKS, p=[0.15, 0.25, 0.6])
    seconds = 4 * DAY / CHUNKS

    def span(first, count=1):
        return {"t0": float(first * seconds), "t1": float((first + count) * seconds)}

    chunks = [
        span(i)
        | {"text": f"made-up narration {i}", "kind": str(kinds[i]), "action": str(actions[i])}
        | {"relevant": bool(kinds[i] == "state")}
        for i in range(CHUNKS)
    ]
    schema = [
        span(first, rng.integers(20, 100)) | {"label": f"entity {i}", "mentions": i + 1}
        for i, first in enumerate(rng.integers(0, 150, 12))
    ]
    episodic = [
        span(first, 8) | {"text": f"episode {i}", "count": 8}
        for i, first in enumerate(range(0, 240, 14))
    ]
    sensory = [
        span(first) | {"text": f"item {i}", "image": _png()}
        for i, first in enumerate(rng.integers(0, CHUNKS, 32))
    ]
    for slots, steps in ((schema, [0] * 5), (episodic, [1, 1, 2, 2]), (sensory, [3, 4])):
        for i, slot in enumerate(slots):
            slot["step"] = steps[i] if i < len(steps) else None
    entropy = ("schema", 1.31), ("episodic", 1.22), ("episodic", 0.97), ("sensory", 0.9)
    steps = [{"level": lv, "answer_entropy": h, "stopped": False} for lv, h in entropy]
    steps += [{"level": "sensory", "answer_entropy": 0.4567, "stopped": True}]
    return {
        "question": "Which pattern did the made-up mug have?",
        "options": ["striped", "dotted", "checked", "plain"],
        "answer": 1,
        "predicted": 1,
        "probabilities": [0.0611, 0.8432, 0.0512, 0.0445],
        "family": "seen_once",
        "evidence_spans": [[100 * seconds, 102 * seconds], [40 * seconds, 41 * seconds]],
        "duration": 4 * DAY,
        "chunks": chunks,
        "levels": {"schema": schema, "episodic": episodic, "sensory": sensory},
        "steps": steps,
    }


def _full_results():
    rules = [_policy(name, 0.30 + 0.04 * i) for i, name in enumerate(RULES)]
    policies = [_policy("unlimited", 0.8125), *rules, _policy("learned", 0.7341)]
    return {
        "title": "Synthetic results of a test",
        "date": "2026-11-20T12:00:00+00:00",
        "command": "python -m mmmem_jax.eval_main --workdir=runs/made-up",
        "device": "a made-up device",
        "versions": {"jax": "0.10.2", "flax": "0.12.8"},
        "seed": 17,
        "step": 1234,
        "num_streams": 96,
        "num_questions": 4321,
        "reader_ece": 0.0271,
        "policies": policies,
        "frontier": [
            {
                "policy": p["name"],
                "slots": slots,
                "tokens": 9876.0 if p["name"] == "unlimited" else 13.0 * slots,
                "accuracy": p["accuracy"] - 1 / slots * (p["name"] != "unlimited"),
                "se": 0.0111,
            }
            for p in policies
            for slots in (8, 16, 32, 64)
        ],
        "example": _example(),
    }


def _metrics():
    rows = []
    for phase, names in (
        ("perception", ["loss", "recall_fine", "recall_coarse"]),
        ("reader", ["loss", "accuracy"]),
        ("manager", sorted({key for phase, _, keys in charts.CURVES[4:-1] for key in keys})),
        ("held-out", ["accuracy", "recall"]),
    ):
        for step in range(0, 1000, 2):
            values = {n: math.exp(-step / 300) * (i + 1) for i, n in enumerate(names)}
            rows.append({"phase": phase, "step": step} | values)
    return rows


@pytest.fixture(scope="module")
def results():
    return _full_results()


@pytest.fixture(scope="module")
def page(results):
    """The page of the full results."""
    return report.render(results, _metrics())


class _Page(HTMLParser):
    """Checks that tags are balanced; collects ids, tags, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.stack, self.seen, self.text = [], [], []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _plain(page):
    return " ".join(" ".join(_Page(page).text).split())


def test_every_section_is_there_and_filled(page):
    assert page.startswith("<!DOCTYPE html>")
    seen = _Page(page).seen
    assert [a["id"] for tag, a in seen if tag == "section"] == SECTIONS
    assert 'class="missing"' not in page
    assert sum(tag == "polyline" for tag, _ in seen) == 8 + 3 + sum(
        len(keys) for _, _, keys in charts.CURVES
    )


@pytest.mark.parametrize("results", [{}, {"policies": [], "example": {}, "frontier": None}])
def test_without_results_every_section_says_so(results):
    page = report.render(results, [])
    assert [a["id"] for tag, a in _Page(page).seen if tag == "section"] == SECTIONS
    assert "No policy was evaluated." in page
    assert page.count('class="missing"') == len(SECTIONS) - 1
    assert page.count("not recorded") == 9


def test_any_key_may_be_missing(results):
    """Every key of every dict, dropped or null, one at a time."""

    def variants(node, path=()):
        if isinstance(node, dict):
            for key, value in node.items():
                yield (*path, key)
                yield from variants(value, (*path, key))
        elif isinstance(node, list) and node:
            yield from variants(node[0], (*path, 0))

    small = copy.deepcopy(results)
    small["policies"] = small["policies"][:1] + small["policies"][-2:]
    small["frontier"] = small["frontier"][:2]
    small["example"]["chunks"] = small["example"]["chunks"][:3]
    small["example"]["levels"] = {k: v[:2] for k, v in small["example"]["levels"].items()}
    for *way, key in variants(small):
        for change in ("drop", "null"):
            changed = copy.deepcopy(small)
            node = changed
            for part in way:
                node = node[part]
            if change == "drop":
                del node[key]
            else:
                node[key] = None
            _Page(report.render(changed, [{"phase": "reader"}, {"loss": math.nan}]))


def test_text_is_escaped(results):
    attack = "<script>alert('x')</script>\"><img src=x onerror=y>"
    changed = copy.deepcopy(results)

    def poison(node):
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            if isinstance(value, dict | list):
                poison(value)
            elif isinstance(value, str) and key not in ("level", "image", "name", "policy"):
                node[key] = attack
        return node

    poison(changed)
    changed["policies"][2]["name"] = attack
    page = report.render(changed, _metrics())
    tags = _Page(page).seen
    assert not {"script", "iframe", "link", "object"} & {tag for tag, _ in tags}
    assert not any("onerror" in attrs for _, attrs in tags)
    assert all(attrs["src"].startswith("data:image/png;") for tag, attrs in tags if tag == "img")
    assert page.count(html.escape("<script>alert", quote=False)) > 10


def test_the_page_needs_nothing_from_outside(page):
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)
    assert "default-src 'none'" in page
    assert len(page) < 3_000_000


def test_numbers_are_those_of_the_results(page, results):
    text = _plain(page)
    for policy in results["policies"]:
        assert f"{policy['accuracy']:.3f} ± {policy['se']:.3f}" in text
        assert f"{policy['probability']:.3f}" in text
        assert f"{policy['accuracy_flat']:.3f}" in text
    for row in results["frontier"]:
        assert f"{row['accuracy']:.3f} ± {row['se']:.3f}" in text
    for family in results["policies"][-1]["by_family"]:
        assert f"{family['accuracy']:.3f} ± 0.021 250" in text
    for shown in ("4,321", "0.0271", "1234", "0.457", "0.843", "9,876", "413", "jax 0.10.2"):
        assert shown in text
    assert results["command"] in text


@pytest.mark.parametrize(
    ("learned", "rule", "unlimited", "says"),
    [
        ((0.7, 0.01), (0.5, 0.01), (0.8, 0.01), "20.0 ± 1.4 points above the best fixed rule"),
        ((0.7, 0.01), (0.5, 0.01), (0.8, 0.01), "closes 67% of the gap"),
        ((0.52, 0.01), (0.5, 0.01), None, "not clearly better than the best fixed rule"),
        (
            (0.4, 0.01),
            (0.5, 0.01),
            None,
            "not better than the best fixed rule: 0.400 ± 0.010, 10.0",
        ),
        ((0.5, 0.01), (0.5, 0.01), None, "not better than the best fixed rule"),
        ((0.7, None), (0.5, 0.01), None, "20.0 points above"),
        ((0.7, 0.01), None, None, "no fixed rule was evaluated"),
        (None, (0.5, 0.01), (0.8, 0.01), "No learned manager was evaluated."),
        ((math.nan, 0.01), (0.5, 0.01), None, "No learned manager was evaluated."),
    ],
)
def test_headline(learned, rule, unlimited, says):
    named = {"learned": learned, "reservoir": rule, "unlimited": unlimited}
    policies = [
        {"name": n, "accuracy": pair[0], "se": pair[1]} for n, pair in named.items() if pair
    ]
    sentence = report.headline({"policies": policies})
    assert says in sentence
    assert ("closes" in sentence) == (None not in (learned, rule, unlimited))


def test_slots_of_steps_after_the_stop_are_not_read(results):
    example = copy.deepcopy(results["example"])
    example["steps"][1]["stopped"] = True
    drawn = timeline.pyramid(example)
    assert [slot["number"] for slot in drawn["read"]] == [1] * 5 + [2] * 2
    assert len(timeline.steps_taken(example)) == 2


def test_what_is_drawn_lies_inside_the_time_line(results):
    drawn = timeline.pyramid(results["example"])
    assert sum(chunk["relevant"] for chunk in drawn["chunks"]) == sum(
        chunk["relevant"] for chunk in results["example"]["chunks"]
    )
    for bar in [bar for row in drawn["rows"] for bar in row["bars"]]:
        assert bar["x"] + bar["width"] > drawn["left"] - 20
        assert bar["x"] < drawn["right"] + 20
        assert 0 <= bar["y"] < drawn["chunks_y"]
    numbers = [bar for row in drawn["rows"] for bar in row["bars"] if bar["slot"]["number"]]
    places = {(bar["x"], bar["y"]) for bar in numbers}
    assert len(places) == len(numbers) == 11


def test_a_long_stream_stays_a_small_page():
    n = 65_536
    text = "a made-up narration of some length " * 20
    chunks = [
        {"t0": 10.0 * i, "t1": 10.0 * i + 10, "text": text, "relevant": i % 50 == 0}
        for i in range(n)
    ]
    slots = [c | {"step": 0 if i == 777 else None} for i, c in enumerate(chunks[:5000])]
    image = "A" * 2_000_000
    levels = {"sensory": [slots[0] | {"step": 0, "image": image}, *slots], "episodic": slots}
    page = report.render({"example": {"chunks": chunks, "levels": levels}}, [])
    assert len(page) < 3_000_000
    assert "600 of 65,536 chunks are drawn" in page
    assert page.count("read at step 1") == 2 + 1  # sensory, episodic
    assert image not in page


def test_curves_keep_their_mean():
    rows = [{"phase": "reader", "step": i, "loss": float(i)} for i in range(3000)]
    (panel,) = charts.curves(rows)
    (line,) = panel["chart"]["lines"]
    assert len(line["dots"]) == charts.MAX_POINTS
    assert panel["series"][0]["last"] == (2999.0, 2999.0)
    ys = [dot["y"] for dot in line["dots"]]
    assert ys == sorted(ys, reverse=True)


@pytest.mark.parametrize("points", [[(5, 0.5)], [(0, 1.0), (1, 1.0)], [(1, 0.0)], [(1, -3.0)]])
def test_flat_and_single_point_curves(points):
    rows = [{"phase": "reader", "step": x, "loss": y} for x, y in points]
    (panel,) = charts.curves(rows)
    for dot in panel["chart"]["lines"][0]["dots"]:
        assert panel["chart"]["left"] <= dot["x"] <= panel["chart"]["right"]
        assert panel["chart"]["top"] <= dot["y"] <= panel["chart"]["bottom"]


def test_write_is_whole_or_not_at_all(results, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    report.write_report(results, _metrics(), path)
    before = path.read_text()
    assert before.rstrip().endswith("</html>")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_report({}, [], path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
