"""The world's eye: shapes, what a low resolution can tell, the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmmem_jax.models.frame_encoder import FrameEncoder, frame_loss

V = 5


@pytest.fixture(scope="module")
def encoder():
    return FrameEncoder(V, hidden=16, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_frames(encoder, count):
    fine, coarse = encoder(jnp.zeros((count, 16, 16, 3), jnp.uint8))
    assert fine.shape == coarse.shape == (count, V)


def test_pixels_that_cancel_in_two_by_two_show_at_full_resolution_only(encoder):
    row = np.arange(16)[:, None, None] % 2
    grey = np.full((16, 16, 3), 120)
    frames = np.stack([grey, grey + np.where(row == 0, 30, -30)]).astype(np.uint8)
    fine, coarse = encoder(jnp.asarray(frames))
    np.testing.assert_allclose(coarse[0], coarse[1], atol=1e-6)
    assert np.abs(fine[0] - fine[1]).max() > 1e-2


def test_loss_of_knowing_nothing_and_recall_of_the_words_shown(encoder):
    graphdef, params = nnx.split(encoder)
    blind = nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, params))
    blind.fine_out.bias[...] = jnp.array([1.0, -1.0, -1.0, -1.0, -1.0])
    shown = jnp.array([[1.0, 1.0, 0.0, 0.0, 0.0]])
    loss, metrics = frame_loss(blind, jnp.zeros((1, 16, 16, 3), jnp.uint8), shown)
    right, wrong = np.log1p(np.exp(-1.0)), np.log1p(np.exp(1.0))
    assert float(loss) == pytest.approx(((4 * right + wrong) / 5 + np.log(2)) / 2, rel=1e-5)
    assert float(metrics["recall_fine"]) == 0.5
    assert float(metrics["recall_coarse"]) == 0.0
