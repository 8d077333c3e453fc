"""Tests of mmmem_jax/models/qwen3_vl/vision.py."""

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax.models.qwen3_vl.generate import encode_visual
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL
from mmmem_jax.models.qwen3_vl.vision import grid_positions, patch_bucket, visual_inputs
from mmmem_jax.testing.qwen3_vl import TINY, random_params

VISION = TINY.vision
UNIT = VISION.merge_unit


@pytest.fixture(scope="module")
def encode():
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Qwen3VL(TINY, rngs=nnx.Rngs(0))))
    params = random_params(TINY, 0)
    return lambda inputs: jax.device_get(encode_visual(graphdef, params, inputs))


def pixels(t, h, w, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(t * h * w, VISION.patch_dim)).astype(np.float32), (t, h, w)


def rows_of(tokens, frame, count, num_frames):
    size = tokens.embeddings.shape[0] // num_frames
    span = slice(frame * size, frame * size + count)
    return tokens.embeddings[span], tokens.deepstack[:, span]


sizes = st.integers(1, 12).map(lambda n: 2 * n)


@given(sizes, sizes)
@settings(max_examples=30, deadline=None)
def test_positions_interpolate_the_learned_grid(height, width):
    index, weight, rotary = grid_positions(height, width, VISION)
    side = round(VISION.num_position_embeddings**0.5)
    assert index.min() >= 0
    assert index.max() < side**2
    assert np.allclose(weight.sum(1), 1.0)
    assert weight.min() >= 0
    # The interpolated row and column are linear in those of the patch, edge to edge.
    row = (index // side * weight).sum(1)
    column = (index % side * weight).sum(1)
    assert np.allclose(row, rotary[:, 0] * (side - 1) / max(height - 1, 1), atol=1e-4)
    assert np.allclose(column, rotary[:, 1] * (side - 1) / max(width - 1, 1), atol=1e-4)


def test_merged_patches_are_neighbours():
    rotary = grid_positions(4, 6, VISION)[2]
    assert rotary[:UNIT].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert rotary[UNIT : 2 * UNIT].tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert len(np.unique(rotary, axis=0)) == 24


@given(st.integers(1, 40_000))
@settings(max_examples=50, deadline=None)
def test_few_buckets_each_of_whole_tokens(longest):
    size = patch_bucket(longest, VISION)
    assert longest <= size <= max(longest * 1.5 + UNIT, 16 * UNIT)
    assert size % UNIT == 0


def test_padding_and_the_other_frames_do_not_change_a_frame(encode):
    small, large = pixels(1, 2, 4), pixels(2, 8, 10, seed=1)
    alone = encode(visual_inputs([small], VISION))
    beside = encode(visual_inputs([large, small], VISION, num_frames=4))
    for a, b in zip(rows_of(alone, 0, 2, 1), rows_of(beside, 2, 2, 4), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_frames_of_a_video_do_not_see_each_other(encode):
    values, (t, h, w) = pixels(2, 4, 4)
    both = encode(visual_inputs([(values, (t, h, w))], VISION))
    second = encode(visual_inputs([(values[h * w :], (1, h, w))], VISION))
    found, wanted = rows_of(both, 1, 4, 2), rows_of(second, 0, 4, 1)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_where_a_patch_lies_matters(encode):
    values, grid = pixels(1, 4, 4)
    there = encode(visual_inputs([(values, grid)], VISION)).embeddings[:4]
    shuffled = values.reshape(4, 4, -1)[::-1].reshape(values.shape)
    moved = encode(visual_inputs([(shuffled, grid)], VISION)).embeddings[:4]
    assert np.abs(there - moved[::-1]).max() > 1e-2
