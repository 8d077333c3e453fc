"""Resized pictures against torch's antialiased filter for uint8, which torchvision resizes by."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax.models.qwen3_vl.resizing import resize

torch = pytest.importorskip("torch", reason="needs mmmem_jax[parity]")

from tests.models.qwen3_vl import reference  # noqa: E402

pytestmark = pytest.mark.parity

edge = st.integers(3, 700)  # torch fails where one is 1 or 2


@settings(max_examples=200, deadline=None)
@given(before=st.tuples(edge, edge), after=st.tuples(edge, edge), seed=st.integers(0, 9))
def test_equal_to_the_last_bit(before, after, seed):
    rng = np.random.default_rng(seed)
    # Noise, and black and white, which rings the most.
    values = rng.integers(0, 256, (*before, 3)) if seed % 2 else rng.choice([0, 255], (*before, 3))
    image = values.astype(np.uint8)
    theirs = reference.resize(torch.from_numpy(image).permute(2, 0, 1), after)
    np.testing.assert_array_equal(resize(image, *after), theirs.permute(1, 2, 0).numpy())
