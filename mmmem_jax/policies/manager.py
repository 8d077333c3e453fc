"""The learned manager: a two-layer network over the chunk and a few readings of the memory."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mmmem_jax.memory import episodic, schema, slots
from mmmem_jax.memory.types import ADD_NEW, DISCARD, NUM_ACTIONS, Item, ManagerOutput, MemoryState
from mmmem_jax.policies.sampling import sample_action

NUM_ITEM_SCALARS = 4  # of `item_features`, after the two embeddings
NUM_CONTEXT = 10
SCHEMA_CONTEXT = (7, 8)  # those of `context_features` that the schema gives


def item_features(item: Item) -> Float[Array, "... 2D+4"]:
    """What the manager sees of a chunk: seen, told, whether each is there, change, length."""
    there = jnp.stack(
        [
            jnp.any(item.visual != 0, -1),
            jnp.any(item.text != 0, -1),
            item.change,
            item.tokens / 8.0,
        ],
        axis=-1,
    )
    return jnp.concatenate([item.visual, item.text, there], axis=-1)


def context_features(state: MemoryState, item: Item) -> Float[Array, "10"]:
    """What the manager reads of the memory: e*, novelty, fill, and what the schema knows."""
    stream, graph = state.episodic, state.schema
    near = jnp.where(stream.valid, episodic.similarity(stream, item), -1.0)
    latest = jnp.maximum(stream.latest, 0)
    has_latest = stream.latest >= 0
    age = jnp.maximum(item.span[0] - stream.span[latest, 1], 0.0)
    known = jnp.asarray(0.0)
    told_before = jnp.asarray(0.0)
    if state.config.schema_slots and item.mention.shape[0]:
        same = jnp.where(graph.valid, schema.similarity(graph, item.mention[0]), -1.0)
        entity = slots.argmax(same)
        known = same[entity]
        told_before = slots.cosine(graph.gloss[entity][None], item.text)[0]
    full = jnp.all(stream.valid)
    weakest = jnp.min(jnp.where(stream.valid, stream.strength, jnp.inf))
    return jnp.stack(
        [
            near[latest] * has_latest,
            near.max(),
            jnp.log1p(age / 3600.0) / 4.0,
            jnp.log1p(stream.count[latest] * has_latest) / 4.0,
            jnp.mean(stream.valid.astype(jnp.float32)),
            full.astype(jnp.float32),
            jnp.where(full, jnp.tanh(weakest / 4.0), -1.0),
            known,
            told_before,
            has_latest.astype(jnp.float32),
        ]
    )


class Manager(nnx.Module):
    """pi_theta(action | chunk, memory)."""

    def __init__(self, dim: int, hidden: int = 64, *, rngs: nnx.Rngs):
        self.item = nnx.Linear(2 * dim + NUM_ITEM_SCALARS, hidden, rngs=rngs)
        self.context = nnx.Linear(NUM_CONTEXT, hidden, use_bias=False, rngs=rngs)
        self.mid = nnx.Linear(hidden, hidden, rngs=rngs)
        # A zero last layer starts from the uniform policy, so pi_ref favours no action.
        self.out = nnx.Linear(hidden, NUM_ACTIONS, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(
        self, item: Float[Array, "... I"], context: Float[Array, "... C"]
    ) -> Float[Array, "... 3"]:
        """Action logits from `item_features` and `context_features`; the two broadcast."""
        x = jax.nn.gelu(self.item(item) + self.context(context))
        return self.out(jax.nn.gelu(self.mid(x)))


def logits_fn(graphdef, params, item, context) -> Float[Array, "... 3"]:
    """Action logits of the manager `nnx.merge(graphdef, params)`."""
    return nnx.merge(graphdef, params)(item, context)


def decide(
    graphdef, params, noise, state: MemoryState, item: Item, *, temperature: float = 1.0
) -> ManagerOutput:
    """Samples an action, or takes the likeliest one at temperature 0.

    The margin log pi(ADD_NEW) - log pi(DISCARD) is the item's strength: when slots run out, what
    the manager was least sure to keep goes first.
    """
    context = context_features(state, item)
    logits = logits_fn(graphdef, params, item_features(item), context)
    log_probs = jax.nn.log_softmax(logits)
    if temperature:
        log_probs = jax.nn.log_softmax(logits / temperature)
        action = sample_action(log_probs, noise[0])
    else:
        action = jnp.argmax(logits)
    return ManagerOutput(
        logits=logits,
        action=action.astype(jnp.int32),
        log_prob=log_probs[action],
        strength=logits[ADD_NEW] - logits[DISCARD],
        context=context,
    )


def make_decide_fn(graphdef, *, temperature: float = 1.0):
    """`decide` with the network bound: decide_fn(params, noise, state, item)."""
    return functools.partial(decide, graphdef, temperature=temperature)
