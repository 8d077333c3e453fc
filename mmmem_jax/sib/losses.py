"""The clipped surrogate of SIB-GRPO (eq. 11), unreduced: a sum and its denominator."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

RATIOS = ("sequence", "length_normalised")


def unit_log_ratio(
    log_prob: Float[Array, "B G T"],
    old_log_prob: Float[Array, "B G T"],
    valid: Bool[Array, "B 1 T"],
    num_units: int,
    ratio: str,
) -> Float[Array, "B G U"]:
    """log of pi_theta(m | s) / pi_old(m | s) over the decisions of each unit.

    'sequence' is the ratio of eq. 11; 'length_normalised' its geometric mean per decision
    (GSPO, arXiv 2507.18071).
    """
    if ratio not in RATIOS:
        raise ValueError(f"ratio must be one of {', '.join(RATIOS)}, got {ratio!r}")
    b, g, _ = log_prob.shape
    log_ratio = jnp.where(valid, log_prob - old_log_prob, 0.0).reshape(b, g, num_units, -1).sum(-1)
    if ratio == "length_normalised":
        count = valid.reshape(b, 1, num_units, -1).sum(-1)
        log_ratio = log_ratio / jnp.maximum(count, 1)
    return log_ratio


def sib_grpo_loss(
    log_prob: Float[Array, "B G T"],
    old_log_prob: Float[Array, "B G T"],
    advantage: Float[Array, "B G U"],
    weight: Float[Array, "B 1 U"],
    valid: Bool[Array, "B 1 T"],
    *,
    ratio: str = "sequence",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, jax.Array]]:
    """-sum min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), its denominator, metrics.

    `clip_high > clip_low` is clip-higher (DAPO, arXiv 2503.14476). The loss holds no KL term: the
    log-ratio to the reference is part of the reward (eq. 10). Divide the sum by the denominator.
    """
    num_units = advantage.shape[-1]
    rho = jnp.exp(unit_log_ratio(log_prob, old_log_prob, valid, num_units, ratio))
    clipped = jnp.clip(rho, 1.0 - clip_low, 1.0 + clip_high)
    gain = jnp.minimum(rho * advantage, clipped * advantage)
    denominator = jnp.maximum((weight * jnp.ones_like(rho)).sum(), 1.0)
    log_ratio = jnp.where(valid, log_prob - old_log_prob, 0.0)
    count = jnp.maximum((valid * jnp.ones_like(log_ratio)).sum(), 1.0)
    metrics = {
        "ratio_min": rho.min(),
        "ratio_max": rho.max(),
        "clip_low_share": jnp.mean((rho < 1.0 - clip_low) & (advantage < 0)),
        "clip_high_share": jnp.mean((rho > 1.0 + clip_high) & (advantage > 0)),
        "kl_old_k1": -log_ratio.sum() / count,
        "kl_old_k3": jnp.where(valid, jnp.expm1(log_ratio) - log_ratio, 0.0).sum() / count,
    }
    return -jnp.sum(gain * weight), denominator, metrics


def reference_divergence(
    log_prob: Float[Array, "B G T"],
    ref_log_prob: Float[Array, "B G T"],
    valid: Bool[Array, "B 1 T"],
) -> dict[str, jax.Array]:
    """Two estimates of KL(pi_theta || pi_ref), nats a valid decision: k1 and k3 of its samples."""
    to_ref = jnp.where(valid, ref_log_prob - log_prob, 0.0)
    count = jnp.maximum((valid & jnp.ones_like(to_ref, bool)).sum(), 1)
    return {
        "kl_ref_k1": -to_ref.sum() / count,
        "kl_ref_k3": jnp.where(valid, jnp.expm1(to_ref) - to_ref, 0.0).sum() / count,
    }


def policy_entropy(logits: Float[Array, "B G T 3"], valid: Bool[Array, "B 1 T"]):
    """Mean entropy of the action distribution over valid decisions, nats."""
    log_probs = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    total = jnp.where(valid, entropy, 0.0).sum()
    return total / jnp.maximum((valid * jnp.ones_like(entropy)).sum(), 1.0)
