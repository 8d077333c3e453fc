"""Videos against the public processor."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax.models.qwen3_vl.videos import (
    read_video_config,
    sample_frames,
    sampled_video_visual,
    smart_resize_video,
)
from mmmem_jax.testing.qwen3_vl import write_tokenizer

for module in ("torch", "transformers"):
    pytest.importorskip(module, reason="needs mmmem_jax[parity]")

from transformers.models.qwen3_vl import video_processing_qwen3_vl as public  # noqa: E402
from transformers.video_utils import VideoMetadata  # noqa: E402

from tests.models.qwen3_vl import reference  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_vl")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return reference.load_processor(folder).video_processor


@pytest.fixture(scope="module")
def config(folder):
    return read_video_config(folder)


@settings(max_examples=200, deadline=None)
@given(num_frames=st.integers(1, 2000), fps=st.floats(0.5, 60))
def test_sampled_frames(processor, config, num_frames, fps):
    theirs = processor.sample_frames(VideoMetadata(total_num_frames=num_frames, fps=fps))
    np.testing.assert_array_equal(sample_frames(num_frames, fps, config), theirs)


@settings(max_examples=300, deadline=None)
@given(num_frames=st.integers(2, 40), height=st.integers(1, 2000), width=st.integers(1, 2000))
def test_sizes(config, num_frames, height, width):
    pixels = config.pixels
    try:
        theirs = public.smart_resize(
            num_frames, height, width, 2, pixels.factor, pixels.min_pixels, pixels.max_pixels
        )
    except ValueError:  # too long
        return
    assert smart_resize_video(num_frames, height, width, config) == theirs


@settings(max_examples=100, deadline=None)
@given(num_frames=st.integers(2, 40), height=st.integers(32, 999), width=st.integers(32, 999))
def test_numbers_of_patches_under_a_cap(folder, config, num_frames, height, width):
    processor = public.Qwen3VLVideoProcessor.from_pretrained(
        folder, cap_pixels_per_frame=True, max_video_tokens=6
    )
    capped = replace(config, max_frame_tokens=6)
    ours = np.prod(smart_resize_video(num_frames, height, width, capped)) // 16**2
    theirs = processor.get_num_of_video_patches(num_frames, height, width)
    assert -(-num_frames // 2) * ours == theirs


@pytest.mark.parametrize(
    ("frames", "fps", "size"),
    [
        (20, 5.0, (64, 64)),  # fits: not resized
        (5, 2.0, (64, 64)),  # an odd frame
        (3, 24.0, (64, 96)),  # fewer than min_frames
        (12, 4.0, (70, 64)),
        (40, 4.0, (97, 131)),
        (9, 2.0, (360, 640)),
    ],
)
def test_patches(processor, config, frames, fps, size):
    video = np.random.default_rng(0).integers(0, 256, (frames, *size, 3), np.uint8)
    theirs = processor([video], video_metadata=[VideoMetadata(total_num_frames=frames, fps=fps)])
    ours = sampled_video_visual(video, fps, config).pixels
    assert [list(ours.grid)] == np.asarray(theirs["video_grid_thw"]).tolist()
    np.testing.assert_allclose(ours.patches, theirs["pixel_values_videos"], rtol=0, atol=1e-6)
