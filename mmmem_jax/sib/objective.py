"""Estimates of the two bounds of the Semantic Information Bottleneck (eq. 5 to 9), in nats."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def relevance_bound(log_prob_answer: Float[Array, "..."], num_options: int, weight) -> Array:
    """Lower bound of I(M; Y): H(Y) + E log q(y | m).

    Options are shuffled, so H(Y) = log O exactly. `weight` is 1 for questions that count.
    """
    mean = jnp.sum(log_prob_answer * weight) / jnp.maximum(jnp.sum(weight), 1)
    return jnp.log(num_options) + mean


def log_partition(ref_tokens: Float[Array, "..."], lam: float) -> Float[Array, ""]:
    """log Z of r(m) = p_ref(m) exp(-lambda |m|) / Z (eq. 9), from memories drawn from p_ref."""
    x = -lam * ref_tokens.reshape(-1)
    return jax.nn.logsumexp(x) - jnp.log(x.size)


def rate_bound(
    log_ratio: Float[Array, "..."], tokens: Float[Array, "..."], log_z: Float[Array, ""], lam: float
) -> Float[Array, ""]:
    """Upper bound of I(X; M): E[log pi / p_ref + lambda |m|] + log Z (eq. 7 with the prior of 9).

    `log_ratio` sums over the decisions of a trace, so both sides are per stream.
    """
    return jnp.mean(log_ratio + lam * tokens) + log_z
