"""Pictures made larger or smaller, to the bit as the public processors make them.

Source: the antialiased bicubic filter of torch.nn.functional.interpolate for uint8, which the
processors of the published folders resize by. Pillow's differs only in that its weights are of 22
bits, not 15, which changes about one value of a hundred by one or two of 255.
"""

from functools import lru_cache

import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8
from scipy.sparse import csr_array

_A = -0.5  # of Keys' cubic convolution (1981)
_REACH = 2  # pixels of the coarser grid that it sees to each side
_WEIGHT_BITS = 15


def resize(
    image: UInt8[np.ndarray, "H W 3"], height: int, width: int
) -> UInt8[np.ndarray, "h w 3"]:
    """Resizes along rows and then along columns, rounding to whole colours after each."""
    rows = _filtered(rearrange(image, "h w c -> w (h c)"), width)
    rows = rearrange(rows, "w (h c) -> h (w c)", h=len(image))
    return rearrange(_filtered(rows, height), "h (w c) -> h w c", w=width)


def _filtered(lines: UInt8[np.ndarray, "S N"], size: int) -> UInt8[np.ndarray, "s N"]:
    """Resizes along the first axis."""
    if len(lines) == size:
        return lines
    weights, bits = _integer_weights(len(lines), size)
    sums = weights @ lines.astype(np.int32)  # at most 2 * 255 * 2**22
    return np.clip((sums + (1 << bits - 1)) >> bits, 0, 255).astype(np.uint8)


@lru_cache(maxsize=64)  # the frames of a video share theirs
def _integer_weights(before: int, after: int) -> tuple[csr_array, int]:
    """The weights of `before` pixels in each of `after`, times 2**bits and rounded, and bits.

    bits is the largest for which every weight keeps within _WEIGHT_BITS, at most 22.
    """
    rows, columns, weights = _weights(before, after)
    bits = 0
    while bits < 22 and int(0.5 + weights.max() * 2 ** (bits + 1)) < 2**_WEIGHT_BITS:
        bits += 1
    scaled = weights * 2**bits
    whole = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32)  # halves away from 0
    return csr_array((whole, (rows, columns)), shape=(after, before)), bits


def _weights(before: int, after: int) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, "N"]]:
    """Where a pixel `row` of the result sees a pixel `column`, and by what weight, as float64."""
    scale = before / after
    coarse = max(scale, 1.0)
    reach = _REACH * coarse
    rows, columns, weights = [], [], []
    for row in range(after):
        centre = scale * (row + 0.5)
        first = max(int(centre - reach + 0.5), 0)
        seen = np.arange(first, min(int(centre + reach + 0.5), before))
        weight = _cubic((seen - centre + 0.5) * (1 / coarse))
        rows.append(np.full(len(seen), row))
        columns.append(seen)
        weights.append(weight / weight.sum())
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(weights)


def _cubic(x: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Keys' kernel: 1 at 0, and 0 at other whole numbers."""
    x = np.abs(x)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
