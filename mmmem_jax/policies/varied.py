"""Policies drawn at random, so that a reader sees memories of many kinds before any is learned."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmmem_jax.memory.types import ADD_NEW, DISCARD, MERGE, Item, ManagerOutput, MemoryState
from mmmem_jax.policies.manager import item_features
from mmmem_jax.policies.sampling import sample_action


def draw(rng_key: jax.Array, num_features: int) -> dict[str, jax.Array]:
    """Parameters of one random policy.

    A selective policy ranks chunks by a random direction in `item_features` and adds, merges or
    discards by two thresholds; the others draw actions by chance. Strength follows the ranking,
    time, or chance.
    """
    keys = jax.random.split(rng_key, 6)
    return {
        "direction": jax.random.normal(keys[0], (num_features,)),
        "merge_above": jax.random.normal(keys[1]),
        "add_gap": 0.5 * jnp.abs(jax.random.normal(keys[2])),
        "log_probs": jnp.log(jax.random.dirichlet(keys[3], jnp.ones(3)) + 1e-6),
        "selective": jax.random.bernoulli(keys[4], 0.6),
        "by_time": jax.random.bernoulli(keys[5]),
    }


def decide(params, noise: Float[Array, "2"], state: MemoryState, item: Item) -> ManagerOutput:
    """A decision of the random policy `params`."""
    score = item_features(item) @ params["direction"]
    keeps = score > params["merge_above"]
    adds = score > params["merge_above"] + params["add_gap"]
    chosen = jnp.where(adds, ADD_NEW, jnp.where(keeps, MERGE, DISCARD))
    by_chance = sample_action(params["log_probs"], noise[0])
    action = jnp.where(params["selective"], chosen, by_chance).astype(jnp.int32)
    other = jnp.where(params["by_time"], item.span[1], noise[1])
    return ManagerOutput(
        logits=params["log_probs"],
        action=action,
        log_prob=params["log_probs"][action],
        strength=jnp.where(params["selective"], score, other),
        context=jnp.zeros(0),
    )
