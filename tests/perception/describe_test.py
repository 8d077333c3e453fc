"""Captions say what is known, as surely as it is known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmmem_jax.perception import describe

STEADY = {"motion": 5.0, "brightness": 120.0}
labels = st.lists(
    st.tuples(st.sampled_from(["tabby cat", "apple", "oboe", "bus"]), st.floats(0, 1)), max_size=6
)


@pytest.mark.parametrize(
    ("found", "scene", "caption"),
    [
        ([("tabby cat", 0.7), ("sofa", 0.2)], STEADY,
         "A tabby cat and perhaps a sofa, moving slowly."),
        ([("apple", 0.9)], {"motion": 0.0, "brightness": 120.0}, "An apple, not moving."),
        ([("bus", 0.9)], STEADY | {"colours": "mostly red"}, "A bus, mostly red, moving slowly."),
        ([], {"motion": 30.0, "brightness": 3.0}, "A scene, in the dark, moving fast."),
        ([("bus", 0.2), ("cab", 0.3), ("car", 0.4)], STEADY,
         "Perhaps a car, perhaps a cab and perhaps a bus, moving slowly."),
    ],
)  # fmt: skip
def test_examples(found, scene, caption):
    assert describe.caption(found, **scene) == caption


def test_subtitles_are_quoted_as_they_are():
    assert describe.caption([], **STEADY, subtitles="Come here.").endswith('Subtitle: "Come here."')


@given(labels, st.floats(0, 255), st.floats(0, 255))
def test_nothing_is_said_that_was_not_seen(found, motion, brightness):
    caption = describe.caption(found, motion=motion, brightness=brightness)
    for name in ("tabby cat", "apple", "oboe", "bus"):
        said = name in caption.lower()
        assert not said or any(n == name and p >= describe.GUESSED for n, p in found)
    sure = {n for n, p in describe.named(found) if p >= describe.SURE}
    assert caption.lower().count("perhaps") == len(describe.named(found)) - sum(
        p >= describe.SURE for _, p in describe.named(found)
    )
    assert len(sure) <= len(describe.named(found)) <= describe.MAX_LABELS


@given(labels)
def test_the_order_of_labels_does_not_matter_but_for_ties(found):
    distinct = list({p: (n, p) for n, p in found}.values())
    assert describe.named(distinct) == describe.named(distinct[::-1])
