"""What every backbone hands to the builder of a memory."""

from typing import Any, NamedTuple

from mmmem_jax.memory.types import Item
from mmmem_jax.perception.decode import Frame

# What one entity may have to do with another; the memory keeps the number.
RELATIONS = (
    "seen with", "holds", "uses", "wears", "talks to", "looks at", "goes to", "is in",
)  # fmt: skip


class Work(NamedTuple):
    """What a model read and looked at, and what that would have been without reuse."""

    tokens: int = 0  # read by the language model, those that it wrote included
    frames: int = 0  # encoded by the vision tower
    tokens_anew: int = 0  # had each prompt been read from its start
    frames_anew: int = 0  # had each prompt's frames been encoded for it


class Percept(NamedTuple):
    """What was perceived of one clip; `item` has NumPy leaves and no leading axis."""

    index: int
    span: tuple[float, float]  # s
    caption: str
    subtitles: str
    labels: tuple[tuple[str, float], ...]  # entities named, with their probabilities
    key_frames: tuple[Frame, ...]
    item: Item
    failed: tuple[str, ...] = ()  # what could not be found out, such as "extraction"
    seen: Any = None  # what the backbone's own policy reads besides
    work: Work = Work()


def total(*works: Work) -> Work:
    """The sum of all."""
    return Work(*map(sum, zip(Work(), *works, strict=True)))
