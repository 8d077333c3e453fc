"""Sizes, patch order and refusals of pictures."""

import json
from dataclasses import replace

import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl.images import (
    PixelConfig,
    image_visual,
    normalise,
    patchify,
    read_image_config,
    smart_resize,
)
from mmmem_jax.testing.qwen3_vl import write_tokenizer

CONFIG = PixelConfig(min_pixels=4 * 32 * 32, max_pixels=64 * 32 * 32)
TINY = PixelConfig(min_pixels=1, max_pixels=64, patch_size=2)  # tokens of 4 x 4 pixels


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class TestSmartResize:
    @settings(max_examples=200, deadline=None)
    @given(height=st.integers(1, 3000), width=st.integers(1, 3000))
    def test_whole_tokens_within_the_budget(self, height, width):
        if max(height, width) > 200 * min(height, width):
            return
        sizes = smart_resize(height, width, CONFIG)
        assert all(size % CONFIG.factor == 0 and size > 0 for size in sizes)
        assert sizes[0] * sizes[1] >= CONFIG.min_pixels
        # A picture much longer than wide keeps one token across, whatever that costs.
        assert sizes[0] * sizes[1] <= CONFIG.max_pixels or min(sizes) == CONFIG.factor

    @settings(max_examples=50, deadline=None)
    @given(rows=st.integers(2, 8), columns=st.integers(2, 8))
    def test_fitting_size_stays(self, rows, columns):
        assert smart_resize(32 * rows, 32 * columns, CONFIG) == (32 * rows, 32 * columns)

    @pytest.mark.parametrize(
        ("size", "resized"),
        [
            ((48, 80), (64, 64)),  # halves round to even
            ((100, 100), (96, 96)),
            ((480, 640), (192, 288)),  # over budget: rounded down
            ((10, 12), (64, 96)),  # under budget: rounded up
            ((1, 200), (32, 928)),
        ],
    )
    def test_golden(self, size, resized):
        assert smart_resize(*size, CONFIG) == resized

    def test_the_published_budget(self):
        published = PixelConfig(min_pixels=65536, max_pixels=16777216)
        assert smart_resize(1080, 1920, published) == (1088, 1920)
        assert smart_resize(100, 100, published) == (256, 256)

    def test_too_long(self):
        with pytest.raises(UserError, match=r"2010x10 pixels is over 200 times"):
            smart_resize(10, 2010, CONFIG)


class TestPatchify:
    @settings(max_examples=30, deadline=None)
    @given(frames=st.integers(1, 5), rows=st.integers(1, 3), columns=st.integers(1, 3))
    def test_can_be_undone(self, frames, rows, columns):
        values = np.random.default_rng(0).integers(
            0, 256, (frames, 4 * rows, 4 * columns, 3), np.uint8
        )
        patches, (t, h, w) = patchify(values, TINY)
        assert (t, h, w) == ((frames + 1) // 2, 2 * rows, 2 * columns)
        whole = rearrange(
            patches,
            "(t h w mh mw) (c s p q) -> (t s) (h mh p) (w mw q) c",
            **{"t": t, "h": rows, "w": columns, "mh": 2, "mw": 2, "c": 3, "s": 2, "p": 2, "q": 2},
        )
        np.testing.assert_array_equal(whole[:frames], values)
        np.testing.assert_array_equal(whole[frames:], values[-1:].repeat(frames % 2, axis=0))

    def test_order(self):
        rows, columns = np.mgrid[:4, :8]
        values = np.stack([10 * rows + columns, 100 + 10 * rows + columns, 0 * rows], -1)
        patches, grid = patchify(values[None].astype(np.uint8), TINY)
        assert grid == (1, 2, 4)
        # Top left pixels: the four patches of the left token, then those of the right one.
        assert patches[:, 0].tolist() == [0, 2, 20, 22, 4, 6, 24, 26]
        assert patches[1].reshape(3, 2, 4)[:2].tolist() == [
            [[2, 3, 12, 13]] * 2,  # red, twice in time
            [[102, 103, 112, 113]] * 2,
        ]


class TestImageVisual:
    def test_fitting_picture_is_only_scaled(self):
        image = picture(64, 96)
        visual = image_visual(image, CONFIG)
        assert visual.times == ()
        assert visual.pixels.grid == (1, 4, 6)
        expected, _ = patchify(image[None] / 127.5 - 1, CONFIG)
        np.testing.assert_allclose(visual.pixels.patches, expected, rtol=0, atol=1e-6)
        assert visual.pixels.patches.dtype == np.float32

    def test_mean_and_deviation_of_each_channel(self):
        config = PixelConfig(1, 2, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
        values = normalise(np.array([[255, 255, 255], [0, 0, 0]], np.uint8).repeat(2, 1), config)
        expected = np.array([[1, 1, 0], [0, -1, -4]]).repeat(2, 1)
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)
        assert values.dtype == np.float32

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (np.zeros((0, 5, 3), np.uint8), "5x0 pixels"),
            (np.zeros((5, 5, 3), np.float32), r"float32 \[5, 5, 3\]"),
            (np.zeros((5, 5, 4), np.uint8), r"uint8 \[5, 5, 4\]"),
            (np.zeros((5, 5), np.uint8), r"uint8 \[5, 5\]"),
            (np.zeros((1, 500, 3), np.uint8), "500x1 pixels is over 200 times"),
        ],
    )
    def test_bad_pictures(self, image, message):
        with pytest.raises(UserError, match=message):
            image_visual(image, CONFIG)


class TestReadImageConfig:
    def test_toy_folder(self, tmp_path):
        write_tokenizer(tmp_path)
        assert read_image_config(tmp_path) == PixelConfig(min_pixels=1024, max_pixels=65536)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"patch_size": None}, "another type"),
            ({"size": {"shortest_edge": 5}}, "no 'longest_edge'"),
            ({"size": {"shortest_edge": 5, "longest_edge": 4}}, "shortest_edge <= longest_edge"),
            ({"do_normalize": False}, "do_normalize false"),
        ],
    )
    def test_bad_files(self, tmp_path, change, message):
        write_tokenizer(tmp_path)
        path = tmp_path / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(UserError, match=message):
            read_image_config(tmp_path)

    def test_one_file_for_all(self, tmp_path):
        """It comes first, as in transformers; the older kind says nothing of pictures."""
        write_tokenizer(tmp_path)
        joint = tmp_path / "processor_config.json"
        joint.write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
        older = read_image_config(tmp_path)
        fields = json.loads((tmp_path / "preprocessor_config.json").read_text())
        fields["size"]["longest_edge"] = 4096
        joint.write_text(json.dumps({"image_processor": fields}))
        assert read_image_config(tmp_path) == replace(older, max_pixels=4096)
        joint.write_text(json.dumps({"image_processor": 3}))
        with pytest.raises(UserError, match="has image_processor 3"):
            read_image_config(tmp_path)

    def test_no_file(self, tmp_path):
        with pytest.raises(UserError, match=r"has no preprocessor_config\.json"):
            read_image_config(tmp_path)

    @pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "not a JSON object")])
    def test_no_object(self, tmp_path, text, message):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_image_config(tmp_path)
