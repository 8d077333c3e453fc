"""Pictures against the public processor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax.models.qwen3_vl.images import (
    frame_pixels,
    image_visual,
    read_image_config,
    resize,
    smart_resize,
)
from mmmem_jax.testing.qwen3_vl import write_tokenizer

for module in ("torch", "transformers"):
    pytest.importorskip(module, reason="needs mmmem_jax[parity]")

import torch  # noqa: E402
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as public  # noqa: E402

from tests.models.qwen3_vl import reference  # noqa: E402

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


@pytest.mark.parametrize("size", [(64, 96), (32, 32), (128, 64), (97, 131), (480, 640), (20, 30)])
def test_pictures_are_equal(processor, config, size):
    """To those of the public processor that resizes by Pillow, to the last bit of a colour."""
    theirs = processor([picture(*size)])
    ours = image_visual(picture(*size), config).pixels
    assert [list(ours.grid)] == np.asarray(theirs["image_grid_thw"]).tolist()
    np.testing.assert_allclose(ours.patches, theirs["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 50), (300, 200), (97, 131), (480, 640), (20, 30), (70, 64)])
def test_resized_pictures_are_close_to_those_of_torchvision(config, size):
    """On noise, the hardest there is: what is smooth differs less."""
    image = picture(*size)
    target = smart_resize(*size, config)
    theirs = reference.resize(torch.from_numpy(image).permute(2, 0, 1), target)
    theirs = theirs.permute(1, 2, 0).numpy()
    ours = resize(image, *target)
    gap = np.abs(ours.astype(int) - theirs)
    assert gap.max() <= 2
    assert (gap > 0).mean() < 0.01
    expected = frame_pixels(theirs[None], config)
    found = image_visual(image, config).pixels
    assert found.grid == expected.grid
    np.testing.assert_allclose(found.patches, expected.patches, rtol=0, atol=2 / 127.5 + 1e-6)


def test_resized_pictures_by_torchvision(folder, config):
    """The published folders name this processor; `reference.resize` is what it resizes by."""
    pytest.importorskip("torchvision", reason="needs torchvision, for wheels of its own torch")
    from transformers import Qwen2VLImageProcessor

    theirs = Qwen2VLImageProcessor.from_pretrained(folder)([picture(97, 131)])
    ours = image_visual(picture(97, 131), config).pixels
    assert [list(ours.grid)] == np.asarray(theirs["image_grid_thw"]).tolist()
    gap = np.abs(ours.patches - np.asarray(theirs["pixel_values"]))
    assert gap.max() <= 2 / 127.5 + 1e-6
    assert (gap > 1e-6).mean() < 0.01
