"""Captions of clips: plain sentences from labels, colours, motion and subtitles, nothing else.

What the network is unsure of is said to be so; what it does not know is not said.
"""

from collections.abc import Sequence

# Probability from which a label is said plainly, and from which it is said as a guess.
SURE = 0.5
GUESSED = 0.15
MAX_LABELS = 3
# Mean absolute difference of frames 0.2 s apart, in grey levels of 255.
STILL = 1.0
FAST = 12.0
DARK = 24.0  # mean grey level of 255


def caption(
    labels: Sequence[tuple[str, float]],
    *,
    motion: float,
    brightness: float,
    colours: str = "",
    subtitles: str = "",
) -> str:
    """A sentence or two about a clip.

    Args:
      labels: (name, probability), in any order; the surest MAX_LABELS are named.
      motion: mean absolute difference of consecutive frames, 0 to 255.
      brightness: mean grey level, 0 to 255.
      colours: what they are, see colours.described.
      subtitles: what was said or written meanwhile, quoted as it is.

    Returns:
      Such as 'A tabby cat, mostly grey and blue, moving slowly. Subtitle: "Come here."'
    """
    seen = _seen(labels)
    told = [part for part in (seen, colours, _light(brightness), _motion(motion)) if part]
    sentence = ", ".join(told)
    sentence = f"{sentence[:1].upper()}{sentence[1:]}."
    return f'{sentence} Subtitle: "{subtitles}"' if subtitles else sentence


def named(labels: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The labels that a caption names, the surest first."""
    known = sorted((x for x in labels if x[1] >= GUESSED), key=lambda x: -x[1])
    return known[:MAX_LABELS]


def _seen(labels: Sequence[tuple[str, float]]) -> str:
    parts = [
        f"{'' if probability >= SURE else 'perhaps '}{_with_article(name)}"
        for name, probability in named(labels)
    ]
    if not parts:
        return "a scene"
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _light(brightness: float) -> str:
    return "in the dark" if brightness < DARK else ""


def _motion(motion: float) -> str:
    if motion < STILL:
        return "not moving"
    return "moving fast" if motion > FAST else "moving slowly"
