"""Padded lengths, from both sides."""

import pytest

from mmmem_jax.models.qwen3_vl.buckets import bucket_length, largest_bucket


@pytest.mark.parametrize("length", range(0, 200))
def test_the_next_length_and_the_last_that_fits(length):
    assert bucket_length(length) >= length
    assert largest_bucket(length) <= max(length, 0)
    assert bucket_length(largest_bucket(length)) <= max(length, 16)
    assert largest_bucket(bucket_length(length)) == bucket_length(length)


def test_no_room_is_none():
    assert [largest_bucket(room) for room in (-5, 0, 15, 16, 23, 24)] == [0, 0, 0, 16, 16, 24]
