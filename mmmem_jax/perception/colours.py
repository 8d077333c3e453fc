"""Names of the colours that fill pictures."""

import numpy as np
from jaxtyping import UInt8

# Up to which hue, in degrees, a colour is called so.
_HUES = (
    (15, "red"), (40, "orange"), (70, "yellow"), (165, "green"), (255, "blue"), (290, "purple"),
    (345, "pink"), (360, "red"),
)  # fmt: skip
_GREYS = ("black", "grey", "white")
_BLACK, _WHITE = 0.15, 0.8  # value under and over which it is no grey
_PALE = 0.2  # saturation under which there is no hue to see, as where the channels differ by
_FAINT = 0.08  # less than so much of the range
_BROWN = 0.65  # value under which orange is brown
_LEAST, _MOST = 0.2, 2  # share of the pixels from which a colour is named, and how many are
_COLOURLESS = 0.02  # share of the pixels up to which hues do not count
_PLAIN = 0.8  # share of black or white alone from which it is called that


def shares(pixels: UInt8[np.ndarray, "... 3"]) -> dict[str, float]:
    """Which share of RGB pixels has each colour, of eleven with plain names; most first."""
    red, green, blue = pixels.reshape(-1, 3).astype(np.float32).T / 255
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    width = np.maximum(chroma, 1e-6)
    hue = 60 * np.select(
        [value == red, value == green],
        [(green - blue) / width % 6, (blue - red) / width + 2],
        (red - green) / width + 4,
    )
    pale = (chroma < _PALE * value) | (chroma < _FAINT)
    names = np.select(
        [value < _BLACK, pale & (value > _WHITE), pale, (value < _BROWN) & (abs(hue - 28) < 17)]
        + [hue <= end for end, _ in _HUES],
        ["black", "white", "grey", "brown", *(name for _, name in _HUES)],
        "red",
    )
    found, counts = np.unique(names, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {str(found[i]): float(counts[i]) / len(names) for i in order}


def described(share: dict[str, float]) -> str:
    """Such as "mostly green and blue", "in black and white", or nothing if no colour leads."""
    hued = 1.0 - sum(share.get(name, 0.0) for name in _GREYS)
    if hued < _COLOURLESS and max(share.get(name, 0.0) for name in ("black", "white")) < _PLAIN:
        return "in black and white"
    named = [name for name, part in share.items() if part >= _LEAST][:_MOST]
    return f"mostly {' and '.join(named)}" if named else ""
