"""Resized pictures: what must hold, beside Pillow, and by numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmmem_jax.models.qwen3_vl.resizing import resize

edge = st.integers(1, 60)


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@settings(max_examples=50, deadline=None)
@given(before=st.tuples(edge, edge), after=st.tuples(edge, edge))
def test_a_plain_colour_survives(before, after):
    plain = np.full((*before, 3), (10, 200, 255), np.uint8)
    np.testing.assert_array_equal(resize(plain, *after), np.broadcast_to(plain[0, 0], (*after, 3)))


@settings(max_examples=50, deadline=None)
@given(size=st.tuples(edge, edge), after=st.tuples(edge, edge))
def test_mirrored_and_turned(size, after):
    """A mirror image resizes to the mirror image; a fitting edge is not touched."""
    image = noise(*size)
    np.testing.assert_array_equal(resize(image[:, ::-1], *after), resize(image, *after)[:, ::-1])
    np.testing.assert_array_equal(resize(image[::-1], *after), resize(image, *after)[::-1])
    np.testing.assert_array_equal(resize(image, *size), image)


@pytest.mark.parametrize("size", [(40, 50), (300, 200), (97, 131), (480, 640), (20, 30)])
@pytest.mark.parametrize("after", [(64, 96), (192, 288), (32, 32)])
def test_close_to_pillow(size, after):
    """Its weights have 22 bits. It is given one edge at a time, as it would choose the order."""
    picture = Image.fromarray(noise(*size))
    rows = picture.resize((after[1], picture.height), Image.Resampling.BICUBIC)
    theirs = np.asarray(rows.resize(after[::-1], Image.Resampling.BICUBIC))
    gap = np.abs(resize(noise(*size), *after).astype(int) - theirs)
    assert gap.max() <= 2
    assert (gap > 0).mean() < 0.01


def test_golden():
    ramp = np.arange(0, 240, 30, dtype=np.uint8)[None, :, None].repeat(3, 2)
    assert resize(ramp, 1, 4)[0, :, 0].tolist() == [16, 74, 136, 194]
    step = np.array([0, 0, 255, 255], np.uint8)[None, :, None].repeat(3, 2)
    assert resize(step, 1, 8)[0, :, 0].tolist() == [0, 0, 0, 52, 203, 255, 255, 255]
