"""Pictures as patches for Qwen3-VL's vision tower.

Sources: Qwen2-VL (arXiv 2409.12191), whose resizing and patch order Qwen3-VL keeps, and the
preprocessor_config.json of the published folders.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8

from mmmem_jax.errors import UserError
from mmmem_jax.models.json_object import read_object
from mmmem_jax.models.qwen3_vl.resizing import resize

IMAGE_FILE = "preprocessor_config.json"
_JOINT_FILE = "processor_config.json"
_MAX_ASPECT = 200


@dataclass(frozen=True)
class PixelConfig:
    """How pictures become patches."""

    min_pixels: int  # of a resized picture, or of all frames of a resized video together
    max_pixels: int
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of a channel from 0 to 1
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def factor(self) -> int:
        """Pixels along an edge of a merged token."""
        return self.patch_size * self.merge_size


class Pixels(NamedTuple):
    """A picture or a video as patches."""

    # [t*h*w, C*Tp*p*p] float32; the patches of one token (merge x merge) are neighbours
    patches: Float[np.ndarray, "P D"]
    grid: tuple[int, int, int]  # patches in time, height and width: t, h, w


class Visual(NamedTuple):
    """A picture or a video, and what a prompt says about it."""

    pixels: Pixels
    times: tuple[float, ...] = ()  # seconds of each of a video's t; empty for a picture


def read_image_config(folder: str | Path) -> PixelConfig:
    """Reads how a model folder wants pictures; see read_processor.

    Raises:
      UserError: if it is missing, no JSON, incomplete, or asks for another preprocessing.
    """
    return pixel_config(*read_processor(folder, "image_processor", IMAGE_FILE))


def read_processor(folder: str | Path, section: str, file: str) -> tuple[dict[str, Any], Path]:
    """The fields of a processor of a model folder, and the path they stand in.

    The published folders have a file for each; since its version 5 transformers saves sections of
    processor_config.json, which come first here as there.

    Raises:
      UserError: if neither is there, or what is there is no JSON object.
    """
    joint = Path(folder) / _JOINT_FILE
    found = read_object(joint).get(section) if joint.is_file() else None
    if found is None:
        return read_object(Path(folder) / file), Path(folder) / file
    if not isinstance(found, dict):
        raise UserError(f"{joint} has {section} {found!r}; it must be an object")
    return found, joint


def pixel_config(found: dict[str, Any], path: Path) -> PixelConfig:
    """Checks the fields that pictures and videos share; `path` is named in errors.

    Raises:
      UserError: if a field is missing or asks for another preprocessing.
    """
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not found.get(step, True):
            raise UserError(f"{path} has {step} false; only true is read")
    try:
        config = PixelConfig(
            min_pixels=int(found["size"]["shortest_edge"]),
            max_pixels=int(found["size"]["longest_edge"]),
            patch_size=int(found["patch_size"]),
            temporal_patch_size=int(found["temporal_patch_size"]),
            merge_size=int(found["merge_size"]),
            mean=tuple(found["image_mean"]),
            std=tuple(found["image_std"]),
        )
    except KeyError as error:
        raise UserError(f"{path} has no {error}; fetch it again") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has a field of another type ({error}); fetch it again") from error
    if not 0 < config.min_pixels <= config.max_pixels:
        raise UserError(f"{path} has a size without 0 < shortest_edge <= longest_edge")
    return config


def image_visual(image: UInt8[np.ndarray, "H W 3"], config: PixelConfig) -> Visual:
    """Turns one picture into patches.

    A picture fills a whole temporal patch: it is repeated temporal_patch_size times.

    Args:
      image: uint8 [H, W, 3], red, green, blue.
      config: sizes and pixel budget.

    Returns:
      Patches of a grid (1, h, w).

    Raises:
      UserError: if the picture has no pixels, another type, or sides of too unlike lengths.
    """
    check_pictures(image[None], "a picture")
    height, width = smart_resize(*image.shape[:2], config)
    return Visual(frame_pixels(resize(image, height, width)[None], config))


def check_pictures(frames: np.ndarray, what: str) -> None:
    """Raises UserError unless `frames` is uint8 [T, H, W, 3] with pixels in it."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise UserError(
            f"{what} is {frames.dtype} {list(frames.shape[1:])}; give uint8 [height, width, 3] RGB"
        )
    if not frames.shape[1] or not frames.shape[2]:
        raise UserError(f"{what} is {frames.shape[2]}x{frames.shape[1]} pixels; give one with some")


def smart_resize(height: int, width: int, config: PixelConfig) -> tuple[int, int]:
    """The nearest size in whole tokens, of about the same shape, within the pixel budget.

    Args:
      height: pixels, as is `width`.
      width: see `height`.
      config: its factor divides both returned edges.

    Returns:
      (height, width) in pixels.

    Raises:
      UserError: if one edge is over 200 times the other.
    """
    check_aspect(height, width)
    factor = config.factor
    rounded = (round(height / factor) * factor, round(width / factor) * factor)
    return fit_budget(height, width, rounded, rounded[0] * rounded[1], 1, config)


def check_aspect(height: float, width: float) -> None:
    """Raises UserError if one edge is over 200 times the other."""
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise UserError(
            f"a picture of {width}x{height} pixels is over {_MAX_ASPECT} times as long as wide;"
            " cut it into pieces"
        )


def fit_budget(
    height: int,
    width: int,
    rounded: tuple[int, int],
    pixels: int,
    num_frames: int,
    config: PixelConfig,
) -> tuple[int, int]:
    """Shrinks or grows (height, width) where `pixels`, those of the rounded size, break the budget.

    Rounds down when shrinking and up when growing; each edge keeps one token at least.
    """
    factor, area = config.factor, num_frames * height * width
    if pixels > config.max_pixels:
        scale = math.sqrt(area / config.max_pixels)
        return (
            max(factor, math.floor(height / scale / factor) * factor),
            max(factor, math.floor(width / scale / factor) * factor),
        )
    if pixels < config.min_pixels:
        scale = math.sqrt(config.min_pixels / area)
        return (
            math.ceil(height * scale / factor) * factor,
            math.ceil(width * scale / factor) * factor,
        )
    return rounded


def normalise(patches: UInt8[np.ndarray, "P D"], config: PixelConfig) -> Float[np.ndarray, "P D"]:
    """Subtracts the mean of each channel and divides by its deviation.

    Args:
      patches: [P, C*Tp*p*p] uint8, of patchify.
      config: mean and std are read.

    Returns:
      float32 of the same shape.
    """
    values = patches.reshape(len(patches), len(config.mean), -1).astype(np.float32)
    values -= np.asarray(config.mean, np.float32)[:, None] * np.float32(255)
    values /= np.asarray(config.std, np.float32)[:, None] * np.float32(255)
    return values.reshape(patches.shape)


def frame_pixels(frames: UInt8[np.ndarray, "T H W 3"], config: PixelConfig) -> Pixels:
    """Cuts resized frames into normalised patches; see patchify."""
    # Cut before they are made float32: a quarter of the bytes to move about.
    patches, grid = patchify(frames, config)
    return Pixels(normalise(patches, config), grid)


def patchify(
    frames: UInt8[np.ndarray, "T H W C"], config: PixelConfig
) -> tuple[UInt8[np.ndarray, "P D"], tuple[int, int, int]]:
    """Cuts frames into patches; the last frame is repeated to whole temporal patches.

    Args:
      frames: [T, H, W, C] uint8, H and W multiples of config.factor.
      config: sizes.

    Returns:
      patches: [t*h*w, C*Tp*p*p]: frame by frame, token by token along rows, within a token again
        along rows; a patch is channel by channel, then time, rows and columns.
      grid: (t, h, w) in patches.
    """
    span, merge, size = config.temporal_patch_size, config.merge_size, config.patch_size
    tail = np.repeat(frames[-1:], -len(frames) % span, axis=0)
    frames = np.concatenate([frames, tail])
    grid = (len(frames) // span, frames.shape[1] // size, frames.shape[2] // size)
    patches = rearrange(
        frames,
        "(t s) (h mh p) (w mw q) c -> (t h w mh mw) (c s p q)",
        s=span,
        mh=merge,
        mw=merge,
        p=size,
        q=size,
    )
    return patches, grid
