"""Fixed rules: memory mechanisms from the literature as policies over the same three actions.

Each rule is a decide_fn and the changes it needs to the memory's configuration. A rule decides by
its actions and by the strength it gives an item, which ranks items for eviction.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmmem_jax.memory import episodic
from mmmem_jax.memory.types import ADD_NEW, DISCARD, MERGE, ManagerOutput, MemoryConfig


@dataclasses.dataclass(frozen=True)
class Rule:
    """A named policy without parameters; `changes` are applied to the shared MemoryConfig."""

    name: str
    decide_fn: Callable[..., ManagerOutput]
    changes: dict = dataclasses.field(default_factory=dict)

    def configure(self, config: MemoryConfig) -> MemoryConfig:
        """The shared configuration with the rule's changes; capacities never change."""
        return dataclasses.replace(config, **self.changes)


def _decision(action, strength) -> ManagerOutput:
    action = jnp.asarray(action, jnp.int32)
    return ManagerOutput(
        logits=jnp.zeros(3),
        action=action,
        log_prob=jnp.asarray(0.0),
        strength=jnp.asarray(strength, jnp.float32),
        context=jnp.zeros(0),
    )


def keep_recent() -> Rule:
    """Keeps the newest chunks."""
    return Rule("keep_recent", lambda p, key, state, item: _decision(ADD_NEW, item.span[1]))


def uniform(num_chunks: int, num_slots: int) -> Rule:
    """Keeps one chunk in every num_chunks / num_slots."""

    def decide_fn(params, key, state, item):
        t = state.num_items
        first = (t * num_slots) // num_chunks != ((t - 1) * num_slots) // num_chunks
        return _decision(jnp.where(first | (t == 0), ADD_NEW, DISCARD), item.span[1])

    return Rule("uniform", decide_fn)


def uniform_merge(num_chunks: int, num_slots: int) -> Rule:
    """Cuts the stream into num_slots equal episodes, each merging all its chunks."""

    def decide_fn(params, key, state, item):
        t = state.num_items
        first = (t * num_slots) // num_chunks != ((t - 1) * num_slots) // num_chunks
        return _decision(jnp.where(first | (t == 0), ADD_NEW, MERGE), item.span[1])

    return Rule("uniform_merge", decide_fn)


def reservoir() -> Rule:
    """A uniform sample of the past: the slots hold the chunks with the largest random keys.

    Vitter, "Random sampling with a reservoir" (1985), in its random-key form.
    """
    return Rule(
        "reservoir", lambda p, key, state, item: _decision(ADD_NEW, jax.random.uniform(key))
    )


def similarity_merge(threshold: float) -> Rule:
    """Merges a chunk at least `threshold` similar to e*, else opens a node; the oldest goes."""

    def decide_fn(params, key, state, item):
        near = episodic.similarity(state.episodic, item)[jnp.maximum(state.episodic.latest, 0)]
        return _decision(jnp.where(near >= threshold, MERGE, ADD_NEW), item.span[1])

    return Rule("similarity_merge", decide_fn)


def surprise(threshold: float) -> Rule:
    """Opens an episode where the stream changes by more than `threshold`; keeps surprising ones.

    Boundaries as in event segmentation by surprise (EM-LLM, arXiv 2407.09450), with the change of
    the embedding in place of token surprise.
    """

    def decide_fn(params, key, state, item):
        boundary = item.change > threshold
        return _decision(jnp.where(boundary, ADD_NEW, MERGE), item.change)

    return Rule("surprise", decide_fn)


def kmeans() -> Rule:
    """Online K-means over chunks: fill the slots, then merge each chunk into the nearest node."""

    def decide_fn(params, key, state, item):
        full = jnp.all(state.episodic.valid)
        return _decision(jnp.where(full, MERGE, ADD_NEW), item.span[1])

    return Rule("kmeans", decide_fn, {"merge_target": "nearest"})


def forgetting_curve(half_life: float, threshold: float) -> Rule:
    """Retention decays with age and is renewed by repetition.

    Ebbinghaus' curve as in MemoryBank (arXiv 2305.10250): retention = salience * 2^(-age / half
    life). Its logarithm plus now / half_life does not change with time, so it serves as strength.
    A chunk `threshold` similar to e* merges, which renews the node.
    """

    def decide_fn(params, key, state, item):
        near = episodic.similarity(state.episodic, item)[jnp.maximum(state.episodic.latest, 0)]
        strength = jnp.log2(item.change + 1e-2) + item.span[1] / half_life
        return _decision(jnp.where(near >= threshold, MERGE, ADD_NEW), strength)

    return Rule("forgetting_curve", decide_fn)


def unlimited() -> Rule:
    """Keeps every chunk; needs a configuration with a slot for each."""
    return Rule("unlimited", lambda p, key, state, item: _decision(ADD_NEW, item.span[1]))


def random_actions(probabilities) -> Rule:
    """Actions drawn independently with the given probabilities [3], and random strengths."""
    log_probabilities = jnp.log(jnp.asarray(probabilities))

    def decide_fn(params, key, state, item):
        action = jax.random.categorical(key, log_probabilities)
        return _decision(action, jax.random.uniform(jax.random.fold_in(key, 1)))

    return Rule("random", decide_fn)


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
