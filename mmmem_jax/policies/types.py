"""What a policy says of one clip of a video."""

from typing import NamedTuple

from mmmem_jax.perception.types import Work


class Decision(NamedTuple):
    """What becomes of a clip."""

    action: int
    strength: float  # rank for eviction
    log_prob: float  # of the action, nats, among those that were offered
    trace: str = ""  # what the policy wrote of the episode
    failed: tuple[str, ...] = ()  # what it did not write as it was asked to, such as "trace"
    work: Work = Work()
