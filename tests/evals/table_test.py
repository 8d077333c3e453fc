"""Tests of the results table and picture, on made-up results."""

import math

import numpy as np
import pytest
from matplotlib import image

from mmmem_jax.evals import table

RESULTS = {
    "policies": [
        {"name": "unlimited", "accuracy": 0.8125, "se": 0.0071, "slots": 256, "tokens": 9876.0},
        {"name": "uniform", "accuracy": 0.4312, "se": 0.0111, "slots": 32},
        {
            "name": "learned",
            "accuracy": 0.7341,
            "se": 0.0093,
            "slots": 32,
            "tokens": 412.6,
            "tokens_all_levels": 901.2,
            "compression": 0.0418,
            "accuracy_top_down": 0.7218,
            "tokens_read": 51.25,
            "by_family": [{"family": "when", "accuracy": 0.5, "se": 0.02, "n": 100}],
        },
        {"name": "reservoir", "accuracy": 0.5523, "se": 0.0112, "slots": 32},
        {"name": "no_score"},
    ]
}


def test_rows_are_in_order_aligned_and_hold_the_numbers():
    lines = table.format_table(RESULTS).splitlines()
    names = [line.split()[0] for line in lines[2:]]
    assert names == ["learned", "reservoir", "uniform", "no_score", "unlimited"]
    assert lines[2].split() == (
        ["learned", "0.734", "+-", "0.009", "32", "413", "901", "0.0418", "0.722", "51.2"]
    )
    assert lines[-1].split() == ["unlimited", "0.812", "+-", "0.007", "256", "9,876", *"----"]
    assert {len(line) for line in lines} == {len(lines[0])}


def test_the_table_is_ascii():
    assert table.format_table({"policies": [{"name": "gelernt-ü", "accuracy": math.nan}]}).isascii()


@pytest.mark.parametrize("results", [{}, {"policies": []}, {"policies": None}])
def test_no_policy_is_said(results):
    assert table.best_rule(results) is None
    assert table.format_table(results).endswith("(no policy was evaluated)")


def test_best_rule_is_neither_learned_nor_unlimited_nor_without_score():
    assert table.best_rule(RESULTS)["name"] == "reservoir"
    others = [p for p in RESULTS["policies"] if p["name"] not in ("reservoir", "uniform")]
    assert table.best_rule({"policies": others}) is None


def test_compared_are_those_there_are():
    assert [role for role, _ in table.compared(RESULTS)] == ["learned", "rule", "unlimited"]
    assert table.compared({"policies": RESULTS["policies"][:1]}) == [
        ("unlimited", RESULTS["policies"][0])
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (math.nan, "-"), (True, "-"), ("1", "-"), (0, "0"), (12345, "12,345")]
    + [(3.14159, "3.14"), (123.4, "123"), (0.001234, "0.00123")],
)
def test_number(value, shown):
    assert table.number(value) == shown


@pytest.mark.parametrize("results", [RESULTS, {}, {"policies": [{"name": "learned"}]}])
def test_picture_has_its_size_and_is_not_blank(results, tmp_path):
    table.plot_summary(results, tmp_path / "summary.png")
    pixels = image.imread(tmp_path / "summary.png")
    assert pixels.shape[:2] == (500, 1200)
    assert np.ptp(pixels[..., :3]) > 0.5


def test_names_are_drawn_as_they_are(tmp_path):
    policy = {"name": "learned", "accuracy": 0.5}
    policy["by_family"] = [{"family": "a $x_{$ b", "accuracy": 0.5}]
    table.plot_summary({"policies": [policy]}, tmp_path / "summary.png")
    assert (tmp_path / "summary.png").stat().st_size > 1000
