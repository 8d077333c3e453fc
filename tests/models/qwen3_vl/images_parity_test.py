"""Pictures against the public processor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax.models.qwen3_vl.images import (
    image_visual,
    read_image_config,
    smart_resize,
)
from mmmem_jax.testing.qwen3_vl import write_tokenizer

for module in ("torch", "transformers"):
    pytest.importorskip(module, reason="needs mmmem_jax[parity]")

from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as public  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_vl")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return public.Qwen2VLImageProcessorPil.from_pretrained(folder)


@pytest.fixture(scope="module")
def config(folder):
    return read_image_config(folder)


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@settings(max_examples=300, deadline=None)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_sizes(config, height, width):
    if max(height, width) > 200 * min(height, width):
        return
    assert smart_resize(height, width, config) == public.smart_resize(
        height, width, config.factor, config.min_pixels, config.max_pixels
    )


@pytest.mark.parametrize("size", [(64, 96), (32, 32), (128, 64)])
def test_fitting_pictures(processor, config, size):
    theirs = processor([picture(*size)])
    ours = image_visual(picture(*size), config).pixels
    assert [list(ours.grid)] == np.asarray(theirs["image_grid_thw"]).tolist()
    np.testing.assert_allclose(ours.patches, theirs["pixel_values"], rtol=0, atol=1e-6)


SIZES = [(97, 131), (480, 640), (20, 30), (300, 200), (70, 64)]  # Pillow, too, begins with rows


@pytest.mark.parametrize("size", SIZES)
def test_resized_pictures_are_close_to_those_of_pillow(processor, config, size):
    """On noise, the hardest there is: what is smooth differs less."""
    theirs = processor([picture(*size)])
    ours = image_visual(picture(*size), config).pixels
    assert [list(ours.grid)] == np.asarray(theirs["image_grid_thw"]).tolist()
    gap = np.abs(ours.patches - np.asarray(theirs["pixel_values"]))
    assert gap.max() <= 2 / 127.5 + 1e-6
    assert (gap > 1e-6).mean() < 0.01


@pytest.mark.parametrize("size", SIZES)
def test_resized_pictures(folder, config, size):
    """The published folders name this processor; resizing_parity_test has what it resizes by."""
    pytest.importorskip("torchvision", reason="needs torchvision, for wheels of its own torch")
    from transformers import Qwen2VLImageProcessor

    theirs = Qwen2VLImageProcessor.from_pretrained(folder)([picture(*size)])
    ours = image_visual(picture(*size), config).pixels
    assert [list(ours.grid)] == np.asarray(theirs["image_grid_thw"]).tolist()
    np.testing.assert_allclose(ours.patches, theirs["pixel_values"], rtol=0, atol=1e-6)
