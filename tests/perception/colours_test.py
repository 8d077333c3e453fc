"""Colours are named as they are seen."""

import numpy as np
import pytest

from mmmem_jax.perception import colours


def filled(*colour_and_count):
    return np.concatenate([np.tile(np.uint8(c), (n, 1)) for c, n in colour_and_count])


@pytest.mark.parametrize(
    ("name", "colour"),
    [
        ("red", (200, 30, 30)), ("red", (220, 20, 60)), ("orange", (240, 140, 30)),
        ("yellow", (230, 220, 50)), ("green", (40, 160, 60)), ("blue", (40, 60, 200)),
        ("purple", (120, 40, 190)), ("pink", (240, 90, 190)), ("brown", (120, 80, 45)),
        ("black", (10, 10, 10)), ("black", (30, 5, 5)), ("grey", (128, 130, 126)),
        ("white", (250, 250, 245)),
    ],
)  # fmt: skip
def test_plain_colours_have_their_names(name, colour):
    assert colours.shares(filled((colour, 3))) == {name: 1.0}


def test_shares_add_up_and_fall_whatever_the_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 40, 60, 3), np.uint8)
    share = list(colours.shares(pixels).values())
    assert sum(share) == pytest.approx(1)
    assert share == sorted(share, reverse=True)


def test_order_of_pixels_does_not_matter():
    pixels = np.random.default_rng(1).integers(0, 256, (200, 3), np.uint8)
    shuffled = np.random.default_rng(2).permutation(pixels)
    assert colours.shares(pixels) == colours.shares(shuffled)


GREEN, BLUE, GREY, BLACK = (40, 160, 60), (40, 60, 200), (128, 128, 128), (0, 0, 0)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (filled((GREEN, 6), (BLUE, 3), (GREY, 1)), "mostly green and blue"),
        (filled((GREEN, 9), (BLUE, 1)), "mostly green"),
        (filled((GREY, 99), (GREEN, 1)), "in black and white"),
        (filled((GREY, 9), (GREEN, 1)), "mostly grey"),
        (filled((BLACK, 9), (GREY, 1)), "mostly black"),
    ],
)
def test_what_fills_the_picture_is_said(pixels, words):
    assert colours.described(colours.shares(pixels)) == words


def test_nothing_is_said_where_no_colour_leads():
    assert colours.described(dict.fromkeys("abcdefgh", 1 / 8)) == ""
