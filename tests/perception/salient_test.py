"""Salient frames: equations 32-34 against a plain reading of them, and what any clip gets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmmem_jax.perception.salient import key_subclips, salient_frames


def as_written(levels, min_gap):
    """Eq. 32-34 and the suppression, in words, of clips of uniform grey images."""
    levels = [float(level) for level in levels]
    d = {i: abs(levels[i] - levels[i - 1]) for i in range(1, len(levels))}
    if not d:
        return [0]
    mean = sum(d.values()) / len(d)
    std = (sum((v - mean) ** 2 for v in d.values()) / len(d)) ** 0.5
    kept = []
    for i in sorted((i for i in d if d[i] > mean + std), key=lambda i: -d[i]):
        if all(abs(i - j) >= min_gap for j in kept):
            kept.append(i)
    distinct = []
    for i in kept:
        if all(abs(levels[i] - levels[j]) >= 4 for j in distinct):
            distinct.append(i)
    return sorted(distinct) or [len(levels) // 2]


def grey(levels):
    return np.broadcast_to(
        np.array(levels, np.uint8)[:, None, None, None], (len(levels), 8, 6, 3)
    ).copy()


# Frames that stay alike but for a few jumps: uniform levels never stand out.
levels = st.lists(st.one_of(st.integers(100, 102), st.integers(0, 255)), min_size=1, max_size=40)


@settings(deadline=None)
@given(levels, st.integers(1, 8))
def test_is_what_the_equations_say(levels, min_gap):
    change = np.abs(np.diff(np.array(levels, float)))
    if len(change) and np.any(np.abs(change - change.mean() - change.std()) < 1e-9):
        return  # on the threshold, where rounding decides
    assert salient_frames(grey(levels), min_gap).tolist() == as_written(levels, min_gap)


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.uint8, st.tuples(*[st.integers(1, 9)] * 3, st.just(3))), st.integers(1, 4))
def test_gives_frames_of_the_clip_in_order_with_the_gap(images, min_gap):
    found = salient_frames(images, min_gap)
    assert len(found) >= 1
    assert 0 <= found.min()
    assert found.max() < len(images)
    assert np.all(np.diff(found) >= min_gap)


def test_takes_jumps_and_not_what_looks_the_same():
    levels = [10] * 8 + [200] * 8 + [12] * 8 + [201] * 8
    # Jumps at 8, 16 and 24 by 190, 188 and 189; what 24 shows, 8 has shown.
    assert salient_frames(grey(levels), 2).tolist() == [8, 16]


def test_a_still_clip_gives_its_middle():
    assert salient_frames(grey([7] * 9), 3).tolist() == [4]
    assert salient_frames(grey([7]), 3).tolist() == [0]
    with pytest.raises(ValueError, match="without images"):
        salient_frames(grey([7])[:0], 3)


@given(st.data(), st.integers(1, 30), st.integers(0, 5))
def test_subclips_hold_their_frame_and_stay_within(data, num_frames, half_width):
    index = data.draw(st.integers(0, num_frames - 1))
    (subclip,) = key_subclips([index], num_frames, half_width)
    assert list(subclip) == [i for i in range(num_frames) if abs(i - index) <= half_width]
