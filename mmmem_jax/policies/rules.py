"""Fixed rules: memory mechanisms from the literature as policies over the same three actions.

A rule decides by its actions and by the strength it gives an item, which ranks items for eviction.
All rules share one `decide`, told apart by their parameters, so one compiled program runs them all.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmmem_jax.memory import episodic
from mmmem_jax.memory.types import (
    ADD_NEW,
    DISCARD,
    MERGE,
    Item,
    ManagerOutput,
    MemoryConfig,
    MemoryState,
)
from mmmem_jax.policies.sampling import sample_action


@dataclasses.dataclass(frozen=True)
class Rule:
    """A named fixed policy: `decide_fn(params, noise, state, item)` on a changed MemoryConfig."""

    name: str
    params: dict
    changes: dict = dataclasses.field(default_factory=dict)

    @property
    def decide_fn(self):
        """The decision function that all rules share."""
        return decide

    def configure(self, config: MemoryConfig) -> MemoryConfig:
        """The shared configuration with the rule's changes; capacities never change."""
        return dataclasses.replace(config, **self.changes)


def _near_latest(state: MemoryState, item: Item):
    """Similarity of the item to e*."""
    return episodic.similarity(state.episodic, item)[jnp.maximum(state.episodic.latest, 0)]


def _starts_segment(params, state: MemoryState):
    """Whether the chunk opens one of `num_slots` equal parts of the stream."""
    t, n, size = state.num_items, params["num_slots"], params["num_chunks"]
    return (t == 0) | ((t * n) // size != ((t - 1) * n) // size)


# Each returns (action, strength).


def _keep_recent(params, noise, state, item):
    return ADD_NEW, item.span[1]


def _uniform(params, noise, state, item):
    return jnp.where(_starts_segment(params, state), ADD_NEW, DISCARD), item.span[1]


def _uniform_merge(params, noise, state, item):
    return jnp.where(_starts_segment(params, state), ADD_NEW, MERGE), item.span[1]


def _reservoir(params, noise, state, item):
    return ADD_NEW, noise[1]


def _similarity_merge(params, noise, state, item):
    near = _near_latest(state, item)
    return jnp.where(near >= params["threshold"], MERGE, ADD_NEW), item.span[1]


def _surprise(params, noise, state, item):
    return jnp.where(item.change > params["threshold"], ADD_NEW, MERGE), item.change


def _kmeans(params, noise, state, item):
    return jnp.where(jnp.all(state.episodic.valid), MERGE, ADD_NEW), item.span[1]


def _forgetting_curve(params, noise, state, item):
    near = _near_latest(state, item)
    strength = jnp.log2(item.change + 1e-2) + item.span[1] / params["half_life"]
    return jnp.where(near >= params["threshold"], MERGE, ADD_NEW), strength


def _random(params, noise, state, item):
    return sample_action(params["log_probs"], noise[0]), noise[1]


_DECIDERS = {
    "keep_recent": _keep_recent,
    "uniform": _uniform,
    "uniform_merge": _uniform_merge,
    "reservoir": _reservoir,
    "similarity_merge": _similarity_merge,
    "surprise": _surprise,
    "kmeans": _kmeans,
    "forgetting_curve": _forgetting_curve,
    "random": _random,
}


def decide(params, noise: Float[Array, "2"], state: MemoryState, item: Item) -> ManagerOutput:
    """The decision of the rule that `params` describe."""

    def branch(decider):
        def run(*args):
            action, strength = decider(*args)
            return jnp.asarray(action, jnp.int32), jnp.asarray(strength, jnp.float32)

        return run

    branches = [branch(decider) for decider in _DECIDERS.values()]
    action, strength = jax.lax.switch(params["rule"], branches, params, noise, state, item)
    return ManagerOutput(
        logits=jnp.zeros(3),
        action=action,
        log_prob=jnp.asarray(0.0),
        strength=strength,
        context=jnp.zeros(0),
    )


def _rule(name: str, *, decider: str | None = None, changes: dict | None = None, **constants):
    defaults = {
        "num_chunks": 1,
        "num_slots": 1,
        "threshold": 0.0,
        "half_life": 1.0,
        "log_probs": (0.0, 0.0, 0.0),
    }
    unknown = constants.keys() - defaults.keys()
    if unknown:
        raise ValueError(f"rules have no constant {sorted(unknown)}")
    params = {k: jnp.asarray(v) for k, v in (defaults | constants).items()}
    params["rule"] = jnp.asarray(list(_DECIDERS).index(decider or name), jnp.int32)
    return Rule(name, params, changes or {})


def keep_recent() -> Rule:
    """Keeps the newest chunks."""
    return _rule("keep_recent")


def uniform(num_chunks: int, num_slots: int) -> Rule:
    """Keeps one chunk in every num_chunks / num_slots."""
    return _rule("uniform", num_chunks=num_chunks, num_slots=num_slots)


def uniform_merge(num_chunks: int, num_slots: int) -> Rule:
    """Cuts the stream into num_slots equal episodes, each merging all its chunks."""
    return _rule("uniform_merge", num_chunks=num_chunks, num_slots=num_slots)


def reservoir() -> Rule:
    """A uniform sample of the past: the slots hold the chunks with the largest random keys.

    Vitter, "Random sampling with a reservoir" (1985), in its random-key form.
    """
    return _rule("reservoir")


def similarity_merge(threshold: float) -> Rule:
    """Merges a chunk at least `threshold` similar to e*, else opens a node; the oldest goes."""
    return _rule("similarity_merge", threshold=float(threshold))


def surprise(threshold: float) -> Rule:
    """Opens an episode where the stream changes by more than `threshold`; keeps surprising ones.

    Boundaries as in event segmentation by surprise (EM-LLM, arXiv 2407.09450), with the change of
    the embedding in place of token surprise.
    """
    return _rule("surprise", threshold=float(threshold))


def kmeans() -> Rule:
    """Online K-means over chunks: fill the slots, then merge each chunk into the nearest node."""
    return _rule("kmeans", changes={"merge_target": "nearest"})


def forgetting_curve(half_life: float, threshold: float) -> Rule:
    """Retention decays with age and is renewed by repetition; `half_life` in seconds.

    Ebbinghaus' curve as in MemoryBank (arXiv 2305.10250): retention = salience * 2^(-age / half
    life). Its logarithm plus now / half_life does not change with time, so it serves as strength.
    A chunk `threshold` similar to e* merges, which renews the node.
    """
    return _rule("forgetting_curve", half_life=float(half_life), threshold=float(threshold))


def unlimited() -> Rule:
    """Keeps every chunk; needs a configuration with a slot for each."""
    return _rule("unlimited", decider="keep_recent")


def random_actions(probabilities) -> Rule:
    """Actions drawn independently with the given probabilities [3], and random strengths."""
    return _rule("random", log_probs=jnp.log(jnp.asarray(probabilities, jnp.float32)))


def fixed_rules(
    num_chunks: int, num_slots: int, *, similarity: float, surprise_change: float, half_life: float
) -> list[Rule]:
    """Every rule that holds the budget, with its tuned constants."""
    return [
        keep_recent(),
        uniform(num_chunks, num_slots),
        uniform_merge(num_chunks, num_slots),
        reservoir(),
        similarity_merge(similarity),
        surprise(surprise_change),
        kmeans(),
        forgetting_curve(half_life, similarity),
    ]
