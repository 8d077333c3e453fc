"""Tests of mmmem_jax/data/batches.py: the parts of many processes are the batch of one."""

import grain
import numpy as np
import pytest

from mmmem_jax.data.batches import batches

SIZE = 6


def elements() -> grain.MapDataset:
    """Endless pairs (index, a random draw)."""
    dataset = grain.MapDataset.range(5).seed(3).shuffle().repeat()
    return dataset.random_map(lambda i, rng: (i, rng.random(2)))


def take(loader, count: int) -> list:
    return [next(loader) for _ in range(count)]


@pytest.mark.parametrize(
    "parts", [[range(6)], [[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]], [[0, 1, 2], range(6)]]
)
def test_parts_are_those_of_the_whole(parts):
    whole = take(batches(elements(), SIZE), 3)
    for rows in parts:
        for part, batch in zip(take(batches(elements(), SIZE, rows), 3), whole, strict=True):
            for x, y in zip(part, batch, strict=True):
                np.testing.assert_array_equal(x, y[list(rows)])


def test_is_what_grain_makes_of_whole_batches():
    """Runs that were started before rows could be chosen go on."""
    theirs = iter(elements().batch(SIZE, drop_remainder=True).to_iter_dataset())
    ours = batches(elements(), SIZE)
    for x, y in zip(take(ours, 3), take(theirs, 3), strict=True):
        assert [(a.dtype, a.shape) for a in x] == [(a.dtype, a.shape) for a in y]
        for a, b in zip(x, y, strict=True):
            np.testing.assert_array_equal(a, b)
    assert ours.get_state() == theirs.get_state()


def test_the_position_is_that_of_any_part():
    one, other = batches(elements(), SIZE), batches(elements(), SIZE, [4])
    take(one, 2)
    other.set_state(one.get_state())
    np.testing.assert_array_equal(next(other)[1], next(one)[1][[4]])
