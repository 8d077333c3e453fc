"""The reward of eq. 10: r(s, m) = R_vqa(s, m) - beta1 Length(m) - beta2 log(pi_old / pi_ref)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

TASKS = ("accuracy", "probability", "log_prob", "log_gain")


class RewardTerms(NamedTuple):
    """The three terms of eq. 10 per credit unit, [B, G, U], before weighting."""

    task: jax.Array
    length: jax.Array
    log_ratio: jax.Array


def task_reward(
    log_probs: Float[Array, "... Q O"],
    answer: Int[Array, "... Q"],
    valid: Bool[Array, "... Q"],
    kind: str,
    log_probs_without: Float[Array, "... Q O"] | None = None,
) -> Float[Array, "..."]:
    """R_vqa, the mean over a stream's valid questions (0 if it has none).

    Args:
      log_probs: log q(y | m) of every option.
      answer: index of the right option.
      valid: which questions count.
      kind: 'accuracy' is 1 where the likeliest option is right; 'probability' is q(y | m);
        'log_prob' is log q(y | m);
        'log_gain' is log q(y | m) - log q(y | no memory).
      log_probs_without: log q(y | no memory), for 'log_gain'.

    Raises:
      ValueError: if `kind` is unknown, or 'log_gain' lacks `log_probs_without`.
    """

    def of_answer(x):
        index = jnp.broadcast_to(answer, x.shape[:-1])[..., None]
        return jnp.take_along_axis(x, index, axis=-1)[..., 0]

    if kind == "accuracy":
        score = (jnp.argmax(log_probs, -1) == answer).astype(jnp.float32)
    elif kind == "probability":
        score = jnp.exp(of_answer(log_probs))
    elif kind == "log_prob":
        score = of_answer(log_probs)
    elif kind == "log_gain" and log_probs_without is not None:
        score = of_answer(log_probs) - of_answer(log_probs_without)
    else:
        raise ValueError(f"task reward must be one of {', '.join(TASKS)}, got {kind!r}")
    return jnp.sum(jnp.where(valid, score, 0.0), -1) / jnp.maximum(valid.sum(-1), 1)


def terms(
    task: Float[Array, "B G U"],
    length: Float[Array, "B G U"],
    log_prob: Float[Array, "B G T"],
    ref_log_prob: Float[Array, "B G T"],
    valid: Bool[Array, "B 1 T"],
) -> RewardTerms:
    """The terms of eq. 10 per unit; the KL log-ratio is that of the sampled actions."""
    ratio = jnp.where(valid, log_prob - ref_log_prob, 0.0)
    return RewardTerms(task, length, ratio.reshape(*task.shape, -1).sum(-1))


def weigh(reward: RewardTerms, beta1: float, beta2: float) -> Float[Array, "B G U"]:
    """Eq. 10 summed up."""
    return reward.task - beta1 * reward.length - beta2 * reward.log_ratio
