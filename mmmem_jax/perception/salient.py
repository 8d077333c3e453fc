"""Salient key frames of a clip (eq. 32-34), and the key sub-clips around them.

Source: MM-Mem, arXiv 2603.01455, section 3.1 and appendix.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

# Every fourth row stands for the image: a quarter of the bytes, and rows are read whole.
_ROW_STEP = 4
# Mean difference, in grey levels of 255, under which two key frames look the same.
_SAME = 4.0


def salient_frames(images: UInt8[np.ndarray, "T H W 3"], min_gap: int) -> Int[np.ndarray, "K"]:
    """Indices of a clip's key frames in the order of time, at least one.

    Frame i changes by d_i, the mean of |f_i - f_{i-1}|_1 over pixels (eq. 32); those with d_i over
    mean(d) + std(d) (eq. 33, 34) are taken by falling d, each if it is at least `min_gap` frames
    from all taken. Of two that look the same (mean difference under 4 of 255 levels) the one of
    smaller d goes. A clip in which no frame stands out gives its middle frame.

    Differences are measured on every fourth row of the images.

    Raises:
      ValueError: there are no images.
    """
    if not len(images):
        raise ValueError("a clip without images has no salient frame")
    rows = images[:, ::_ROW_STEP]
    change = np.array([_difference(a, b) for a, b in zip(rows[1:], rows[:-1], strict=True)])
    kept: list[int] = []
    if len(change):
        over = np.flatnonzero(change > change.mean() + change.std())
        for i in over[np.argsort(-change[over], kind="stable")] + 1:
            if all(abs(i - j) >= min_gap for j in kept):
                kept.append(int(i))
    distinct: list[int] = []
    for i in kept:
        if all(_difference(rows[i], rows[j]) >= _SAME for j in distinct):
            distinct.append(i)
    return np.array(sorted(distinct) or [len(images) // 2])


def key_subclips(indices: Sequence[int], num_frames: int, half_width: int) -> list[range]:
    """The frames within `half_width` of each index, cut at the ends of a clip of `num_frames`."""
    return [range(max(0, i - half_width), min(num_frames, i + half_width + 1)) for i in indices]


def _difference(a: UInt8[np.ndarray, "H W 3"], b: UInt8[np.ndarray, "H W 3"]) -> Float:
    """Mean absolute difference, in levels; the larger less the smaller stays within uint8."""
    return (np.maximum(a, b) - np.minimum(a, b)).mean()
