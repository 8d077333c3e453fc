"""Drawing an action from its probabilities."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sample_action(log_probs: Float[Array, "3"], noise: Float[Array, ""]) -> Int[Array, ""]:
    """Inverts the distribution function at `noise`, uniform in (0, 1]; needs no normalisation.

    An action of probability 0 is never drawn.
    """
    add, merge, discard = jnp.exp(log_probs - log_probs.max())
    point = noise * (add + merge + discard)
    return (point > add).astype(jnp.int32) + (point > add + merge)
