"""Tests of the script that sets the threshold of `not found in memory`."""

import numpy as np
import pytest

from benchmarks import not_found
from mmmem_jax.video import ask


def space(dim: int = 8) -> ask.Space:
    """A text is the number of its direction."""
    rng = np.random.default_rng(0)
    return ask.Space(
        lambda texts: np.eye(dim, dtype=np.float32)[[int(t) for t in texts]],
        rng.normal(size=(50, dim)).astype(np.float32),
    )


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_gets_more_right(seed):
    rng = np.random.default_rng(seed)
    there, absent = rng.normal(1.0, 1.0, 20), rng.normal(0.0, 1.0, 9)

    def right(t):
        return (there >= t).mean() + (absent < t).mean()

    best = not_found.best_threshold(there, absent)
    assert all(right(best) >= right(t) - 1e-9 for t in np.linspace(-4, 5, 500))


def test_a_gap_is_cut_in_the_middle():
    assert not_found.best_threshold(np.array([3.0, 4.0]), np.array([0.0, 1.0])) == 2.0


def test_scores_are_deviations_over_the_background():
    texts = ["0", "3"]
    found = not_found.standardised(space(), texts, space().background * 7)
    unit = space().background / np.linalg.norm(space().background, axis=1, keepdims=True)
    usual = np.eye(8)[[0, 3]] @ space().background.T
    expected = (np.eye(8)[[0, 3]] @ unit.T - usual.mean(1)[:, None]) / usual.std(1)[:, None]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("span", "expected"), [((0, 1), False), ((1, 2.1), True), ((4, 5), False), ((7, 9), True)]
)
def test_what_a_clip_shows(span, expected):
    assert not_found.overlaps([(2, 4), (8, 8.5)], span) == expected


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_the_likeliest_temperature_is_that_of_the_answers(temperature):
    rng = np.random.default_rng(3)
    asked = []
    for _ in range(3000):
        scores = rng.normal(size=4)
        shares = np.exp(scores / temperature)
        right = rng.choice(4, p=shares / shares.sum())
        asked.append((scores, np.arange(4) == right))
    found = max(not_found.TEMPERATURES, key=lambda t: not_found.log_likelihood(asked, t))
    assert found == temperature


def test_what_never_hits_has_a_floor():
    missed = [(np.array([1.0, 0.0]), np.zeros(2, bool))]
    assert not_found.log_likelihood(missed, 0.5) == pytest.approx(np.log(1e-6))
