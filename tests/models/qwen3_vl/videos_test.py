"""Sampling, sizes, times and refusals of videos."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl.images import PixelConfig
from mmmem_jax.models.qwen3_vl.videos import (
    VideoConfig,
    patch_times,
    read_video_config,
    sample_frames,
    sampled_video_visual,
    smart_resize_video,
    video_visual,
)
from mmmem_jax.testing.qwen3_vl import write_tokenizer

PIXELS = PixelConfig(min_pixels=4 * 32 * 32, max_pixels=64 * 32 * 32)
CONFIG = VideoConfig(PIXELS, max_frames=16)


def video(frames, height, width):
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


class TestSampleFrames:
    @settings(max_examples=100, deadline=None)
    @given(num_frames=st.integers(1, 500), fps=st.floats(0.5, 60))
    def test_rise_from_first_to_last(self, num_frames, fps):
        rows = sample_frames(num_frames, fps, CONFIG)
        assert min(num_frames, 4) <= len(rows) <= 16
        assert (np.diff(rows) > 0).all()
        assert rows[0] == 0
        assert rows[-1] == num_frames - 1 or len(rows) == 1

    def test_golden(self):
        assert sample_frames(20, 5.0, CONFIG).tolist() == [0, 3, 5, 8, 11, 14, 16, 19]
        assert sample_frames(3, 30.0, CONFIG).tolist() == [0, 1, 2]  # fewer than min_frames
        assert len(sample_frames(3000, 30.0, CONFIG)) == 16

    @pytest.mark.parametrize(
        ("num_frames", "fps", "message"),
        [(0, 5.0, "no frames"), (5, 0.0, "0.0 frames a second"), (5, float("nan"), "nan frames")],
    )
    def test_nothing_to_sample(self, num_frames, fps, message):
        with pytest.raises(UserError, match=message):
            sample_frames(num_frames, fps, CONFIG)


class TestSmartResizeVideo:
    @settings(max_examples=200, deadline=None)
    @given(num_frames=st.integers(2, 16), height=st.integers(16, 2000), width=st.integers(16, 2000))
    def test_whole_tokens_within_the_budget(self, num_frames, height, width):
        sizes = smart_resize_video(num_frames, height, width, CONFIG)
        assert all(size % 32 == 0 and size > 0 for size in sizes)
        # An odd number of frames counts as it is or rounded to even, so one frame may be over.
        total = (num_frames - num_frames % 2) * sizes[0] * sizes[1]
        assert total <= PIXELS.max_pixels or min(sizes) == 32

    def test_golden(self):
        assert smart_resize_video(8, 480, 640, CONFIG) == (64, 96)
        assert smart_resize_video(2, 20, 30, CONFIG) == (32, 64)
        assert smart_resize_video(5, 64, 64, CONFIG) == (64, 64)

    def test_cap_of_a_frame(self):
        capped = replace(CONFIG, max_frame_tokens=6)
        assert smart_resize_video(2, 480, 640, CONFIG) == (128, 192)
        assert smart_resize_video(2, 480, 640, capped) == (64, 64)

    def test_single_frame(self):
        with pytest.raises(UserError, match="1 frames and needs 2; give one frame as a picture"):
            smart_resize_video(1, 64, 64, CONFIG)


class TestVideoVisual:
    def test_odd_frame_is_repeated(self):
        frames = video(5, 64, 64)
        odd = video_visual(frames, [0.0, 0.5, 1.0, 1.5, 2.0], CONFIG)
        assert odd.pixels.grid == (3, 4, 4)
        assert odd.times == (0.25, 1.25, 2.0)
        even = video_visual(np.concatenate([frames, frames[-1:]]), [0.0] * 6, CONFIG)
        np.testing.assert_array_equal(odd.pixels.patches, even.pixels.patches)

    def test_sampled(self):
        frames = video(20, 64, 64)
        rows = [0, 3, 5, 8, 11, 14, 16, 19]
        sampled = sampled_video_visual(frames, 5.0, CONFIG)
        expected = video_visual(frames[rows], np.array(rows) / 5, CONFIG)
        np.testing.assert_array_equal(sampled.pixels.patches, expected.pixels.patches)
        assert sampled.times == pytest.approx((0.3, 1.3, 2.5, 3.5))

    @settings(max_examples=50, deadline=None)
    @given(seconds=st.lists(st.floats(0, 100), min_size=1, max_size=9), span=st.integers(1, 4))
    def test_times_lie_within_their_patch(self, seconds, span):
        seconds = sorted(seconds)
        times = patch_times(seconds, span)
        assert len(times) == -(-len(seconds) // span)
        for number, time in enumerate(times):
            part = seconds[number * span : (number + 1) * span]
            assert part[0] <= time <= part[-1]

    @pytest.mark.parametrize(
        ("frames", "seconds", "message"),
        [
            (np.zeros((0, 5, 5, 3), np.uint8), [], "no frames"),
            (np.zeros((2, 5, 5, 3), np.uint8), [0.0], "2 frames and 1 times"),
            (np.zeros((2, 5, 0, 3), np.uint8), [0.0, 1.0], "0x5 pixels"),
            (np.zeros((2, 5, 5, 3)), [0.0, 1.0], "float64"),
            (np.zeros((2, 1, 999, 3), np.uint8), [0.0, 1.0], "over 200 times"),
        ],
    )
    def test_bad_videos(self, frames, seconds, message):
        with pytest.raises(UserError, match=message):
            video_visual(frames, seconds, CONFIG)


class TestReadVideoConfig:
    @pytest.fixture
    def change(self, tmp_path):
        write_tokenizer(tmp_path)
        path = tmp_path / "video_preprocessor_config.json"

        def change(**fields):
            found = json.loads(path.read_text()) | fields
            found = {name: value for name, value in found.items() if value is not ...}
            path.write_text(json.dumps(found))
            return tmp_path

        return change

    def test_toy_folder(self, change):
        assert read_video_config(change()) == CONFIG

    def test_published_files_leave_out_sampling(self, change):
        config = read_video_config(change(fps=..., min_frames=..., max_frames=...))
        assert (config.fps, config.min_frames, config.max_frames) == (2, 4, 768)

    def test_cap(self, change):
        assert read_video_config(change(cap_pixels_per_frame=True)).max_frame_tokens == 768
        config = read_video_config(change(cap_pixels_per_frame=True, max_video_tokens=9))
        assert config.max_frame_tokens == 9

    def test_one_file_for_all(self, change):
        folder = change()
        fields = json.loads((folder / "video_preprocessor_config.json").read_text())
        joint = json.dumps({"image_processor": {}, "video_processor": fields | {"fps": 3}})
        (folder / "processor_config.json").write_text(joint)
        assert read_video_config(folder) == replace(CONFIG, fps=3)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [({"fps": 0}, "has fps 0"), ({"max_frames": "9"}, "has max_frames '9'")],
    )
    def test_bad_files(self, change, fields, message):
        with pytest.raises(UserError, match=message):
            read_video_config(change(**fields))
