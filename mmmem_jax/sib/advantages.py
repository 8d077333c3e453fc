"""Group-relative advantages of credit units (eq. 11)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

STDS = ("group", "batch", "off")
_TINY = 1e-6  # of rewards in [-1, 1]; a share of larger ones


class Advantages(NamedTuple):
    """Advantage and weight of every unit; units of zero-variance groups weigh nothing."""

    value: jax.Array  # [B, G, U]
    weight: jax.Array  # [B, 1, U]
    zero_share: jax.Array  # [] share of groups without variance


def returns_to_go(rewards: Float[Array, "B G U"], discount: float) -> Float[Array, "B G U"]:
    """R_u = r_u + discount R_{u+1}."""

    def body(later, reward):
        total = reward + discount * later
        return total, total

    _, out = jax.lax.scan(
        body, jnp.zeros(rewards.shape[:2]), jnp.moveaxis(rewards, 2, 0), reverse=True
    )
    return jnp.moveaxis(out, 0, 2)


def advantages(
    rewards: Float[Array, "B G U"], *, credit: str, discount: float, std: str
) -> Advantages:
    """Centres rewards over the group at the same unit.

    Args:
      rewards: eq. 10 per unit.
      credit: 'step' takes discounted rewards-to-go first; 'state' and 'trajectory' compare a
        unit's own reward.
      discount: per unit, for 'step'.
      std: 'group' divides by the group's standard deviation (GRPO), 'batch' by that of the whole
        batch, 'off' only centres (Dr. GRPO, arXiv 2503.20783).

    Raises:
      ValueError: if `std` is unknown.
    """
    if std not in STDS:
        raise ValueError(f"std must be one of {', '.join(STDS)}, got {std!r}")
    gain = returns_to_go(rewards, discount) if credit == "step" else rewards
    centred = gain - gain.mean(1, keepdims=True)
    spread = jnp.sqrt(jnp.mean(centred**2, axis=1, keepdims=True))
    # float32 gives equal rewards of size 100 a spread of 1e-5.
    size = jnp.maximum(jnp.abs(gain).max(1, keepdims=True), 1.0)
    weight = (spread > _TINY * size).astype(jnp.float32)
    if std == "group":
        centred = centred / jnp.maximum(spread, _TINY)
    elif std == "batch":
        centred = centred / jnp.maximum(jnp.sqrt(jnp.mean(centred**2)), _TINY)
    return Advantages(centred * weight, weight, 1.0 - weight.mean())
