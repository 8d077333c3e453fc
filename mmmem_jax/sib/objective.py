"""Estimates of the two bounds of the Semantic Information Bottleneck (eq. 5 to 9), in nats."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def relevance_bound(
    log_prob_answer: Float[Array, "..."], entropy: Float[Array, "..."] | float, weight
) -> Array:
    """Lower bound of I(M; Y): H(Y) + E log q(y | m).

    Args:
      log_prob_answer: log q(y | m).
      entropy: H(Y) in nats, of the same shape or one that broadcasts to it.
      weight: 1 for questions that count.
    """
    return jnp.sum((entropy + log_prob_answer) * weight) / jnp.maximum(jnp.sum(weight), 1)


class Draws(NamedTuple):
    """Memories drawn from a policy."""

    log_ratio: jax.Array  # [...] log pi / p_ref of the trace that made each memory
    tokens: jax.Array  # [...] |m|


def log_partition(policy: Draws, ref: Draws, lam: float) -> tuple[Array, Array]:
    """log Z of r(m) = p_ref(m) exp(-lambda |m|) / Z (eq. 9), and how far to trust it.

    Memories of pi and of p_ref are weighted together by the balance heuristic (Veach and Guibas
    1995): where lambda is large, Z comes from short memories, which p_ref alone hardly draws.

    Args:
      policy: memories drawn from pi.
      ref: memories drawn from p_ref.
      lam: rate in nats a token.

    Returns:
      log Z, whose estimate is low on average (Jensen) the more, the fewer memories count; and the
      share of memories that count, (sum w)^2 / (N sum w^2).
    """
    log_ratio, tokens = (
        jnp.concatenate([a.ravel(), b.ravel()]) for a, b in zip(policy, ref, strict=True)
    )
    n, share = tokens.size, policy.tokens.size / tokens.size
    mixture = jnp.logaddexp(jnp.log(share) + log_ratio, jnp.log1p(-share))
    weight = -lam * tokens - mixture
    total = jax.nn.logsumexp(weight)
    counts = jnp.exp(2 * total - jax.nn.logsumexp(2 * weight)) / n
    return total - jnp.log(n), counts


def rate_bound(policy: Draws, log_z: Float[Array, ""], lam: float) -> Float[Array, ""]:
    """Upper bound of KL(pi || prior) of action traces: E[log pi / p_ref + lambda |m|] + log Z.

    This is eq. 7 over traces: it bounds what the decisions tell, not I(X; M), for the text that a
    memory holds may tell more. `log_ratio` sums over the decisions of a trace, so the rate is per
    stream. Either prior may be the tighter.

    With lam = 0 and log_z = 0 the prior is p_ref. As long as p_ref does not look at the stream (an
    untrained manager does not), this bounds I(X; trace), and nothing in it is estimated.

    The prior of eq. 9 knows how long chunks are: it bounds what traces tell beyond that. Its log Z
    is estimated low on average, so the bound may be too small; it is no bound where one memory
    decides (N times the share that `log_partition` gives is about 1).
    """
    return jnp.mean(policy.log_ratio + lam * policy.tokens) + log_z
