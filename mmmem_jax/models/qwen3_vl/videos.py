"""Videos as patches for Qwen3-VL's vision tower: frames sampled by time, a budget for all of them.

Sources: Qwen3-VL (arXiv 2511.21631), video_preprocessor_config.json of the published folders.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl.images import (
    PixelConfig,
    Visual,
    check_aspect,
    check_pictures,
    fit_budget,
    frame_pixels,
    pixel_config,
    read_processor,
)
from mmmem_jax.models.qwen3_vl.resizing import resize

VIDEO_FILE = "video_preprocessor_config.json"


@dataclass(frozen=True)
class VideoConfig:
    """How videos become patches; the pixel budget is that of all frames together."""

    pixels: PixelConfig
    fps: float = 2.0  # frames sampled a second
    min_frames: int = 4
    max_frames: int = 768
    max_frame_tokens: int | None = None  # cap on one frame's share; None: none


def read_video_config(folder: str | Path) -> VideoConfig:
    """Reads how a model folder wants videos; see images.read_processor.

    The published files leave out fps, min_frames and max_frames where they are VideoConfig's.

    Raises:
      UserError: if it is missing, no JSON, incomplete, or asks for another preprocessing.
    """
    found, path = read_processor(folder, "video_processor", VIDEO_FILE)
    own = {name: found[name] for name in ("fps", "min_frames", "max_frames") if name in found}
    if found.get("cap_pixels_per_frame"):
        own["max_frame_tokens"] = found.get("max_video_tokens", 768)
    for name, value in own.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{path} has {name} {value!r}; it must be a number over 0")
    return VideoConfig(pixel_config(found, path), **own)


def sample_frames(num_frames: int, fps: float, config: VideoConfig) -> Int[np.ndarray, "T"]:
    """Picks frames evenly over a whole video, about config.fps a second.

    Args:
      num_frames: frames the video has.
      fps: frames it shows a second.
      config: the rate to sample at, and the fewest and most frames to take.

    Returns:
      [T] rising indices, the first and last frame among them where T is at least 2.

    Raises:
      UserError: if there are no frames or no rate.
    """
    if num_frames < 1:
        raise UserError("the video has no frames; give at least 2")
    if not fps > 0:
        raise UserError(f"the video has {fps} frames a second; give its rate")
    wanted = int(num_frames / fps * config.fps)
    wanted = min(max(wanted, config.min_frames), config.max_frames, num_frames)
    return np.linspace(0, num_frames - 1, wanted).round().astype(np.int64)


def smart_resize_video(
    num_frames: int, height: int, width: int, config: VideoConfig
) -> tuple[int, int]:
    """The size of every frame, in whole tokens, so that all together keep the pixel budget.

    Raises:
      UserError: if there are fewer frames than make a temporal patch, or one edge is over 200
        times the other.
    """
    pixels = config.pixels
    span, factor = pixels.temporal_patch_size, pixels.factor
    if num_frames < span:
        raise UserError(
            f"the video has {num_frames} frames and needs {span}; give one frame as a picture"
        )
    if config.max_frame_tokens is not None:
        share = min(config.max_frame_tokens * factor**2, pixels.max_pixels // num_frames)
        share = max(share, int(pixels.min_pixels * 1.05))
        pixels = replace(pixels, max_pixels=share * num_frames)
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_aspect(height, width)
    rounded = (round(height / factor) * factor, round(width / factor) * factor)
    total = round(num_frames / span) * span * rounded[0] * rounded[1]
    return fit_budget(height, width, rounded, total, num_frames, pixels)


def patch_times(seconds: Sequence[float], span: int) -> tuple[float, ...]:
    """The time of each temporal patch: the middle between its first and its last frame.

    Args:
      seconds: of every frame; the last is repeated to whole patches, as the frame is.
      span: frames in a patch.
    """
    seconds = [*seconds, *[seconds[-1]] * (-len(seconds) % span)]
    return tuple(
        float(first + last) / 2
        for first, last in zip(seconds[::span], seconds[span - 1 :: span], strict=True)
    )


def video_visual(
    frames: UInt8[np.ndarray, "T H W 3"], seconds: Sequence[float], config: VideoConfig
) -> Visual:
    """Turns sampled frames into patches.

    Args:
      frames: uint8 [T, H, W, 3] RGB; see sample_frames.
      seconds: [T] when each is shown.
      config: sizes and pixel budget.

    Returns:
      Patches of a grid (ceil(T / temporal_patch_size), h, w), with their times.

    Raises:
      UserError: if there are no frames, frames without pixels, of another type or of too long a
        shape, or if their times are not as many.
    """
    if not len(frames):
        raise UserError("the video has no frames; give at least 2")
    if len(seconds) != len(frames):
        raise UserError(
            f"the video has {len(frames)} frames and {len(seconds)} times; give equally"
        )
    check_pictures(frames, "a frame")
    height, width = smart_resize_video(*frames.shape[:3], config)
    resized = np.stack([resize(frame, height, width) for frame in frames])
    times = patch_times(seconds, config.pixels.temporal_patch_size)
    return Visual(frame_pixels(resized, config.pixels), times)


def sampled_video_visual(
    frames: UInt8[np.ndarray, "T H W 3"], fps: float, config: VideoConfig
) -> Visual:
    """Samples a whole video shown at `fps` frames a second and turns it into patches.

    Raises:
      UserError: as sample_frames and video_visual do.
    """
    rows = sample_frames(len(frames), fps, config)
    return video_visual(frames[rows], rows / fps, config)
