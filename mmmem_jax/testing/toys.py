"""Random streams, memories and questions: no meaning, but every case the memory has to take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmmem_jax import memory
from mmmem_jax.memory import ADD_NEW, DISCARD, MERGE, Item, ManagerOutput, MemoryConfig, MemoryState


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def random_items(
    seed: int,
    num_chunks: int,
    *,
    dim: int = 8,
    num_mentions: int = 2,
    num_entities: int = 6,
    valid_share: float = 1.0,
) -> Item:
    """A stream of `num_chunks` chunks, leading axis T.

    Some chunks are blind, some silent; mentions are noisy views of a few entities, so that entities
    merge; spans follow each other, 0.5 to 2 s long; padding may lie anywhere.
    """
    rng = np.random.default_rng(seed)

    def vectors(*shape):
        return _unit(rng.normal(size=(*shape, dim)))

    seen, told = rng.random((num_chunks, 1)) < 0.8, rng.random((num_chunks, 1)) < 0.7
    visual = vectors(num_chunks) * seen
    coarse = _unit(visual + 0.3 * vectors(num_chunks)) * seen
    end = np.cumsum(rng.uniform(0.5, 2.0, num_chunks))
    entities = vectors(num_entities)
    named = rng.integers(num_entities, size=(num_chunks, num_mentions))
    mention = entities[named] + 0.3 * rng.normal(size=(num_chunks, num_mentions, dim)) / dim**0.5

    def f32(x):
        return jnp.asarray(x, jnp.float32)

    def i32(x):
        return jnp.asarray(x, jnp.int32)

    return Item(
        visual=f32(visual),
        coarse=f32(coarse),
        text=f32(vectors(num_chunks) * told),
        span=f32(np.stack([np.concatenate([[0.0], end])[:-1], end], axis=1)),
        tokens=i32(rng.integers(1, 9, num_chunks) * told[:, 0]),
        mention=f32(mention),
        mention_valid=jnp.asarray(rng.random((num_chunks, num_mentions)) < 0.7),
        change=f32(rng.uniform(0.0, 2.0, num_chunks)),
        relation=i32(rng.integers(-1, 3, num_chunks)),
        trace_id=i32(np.arange(num_chunks)),
        valid=jnp.asarray(rng.random(num_chunks) < valid_share),
    )


def random_decide(
    params, noise: Float[Array, "2"], state: MemoryState, item: Item
) -> ManagerOutput:
    """A policy of chance alone: ADD_NEW 0.45, MERGE 0.4, DISCARD 0.15, any strength in (0, 1]."""
    draw, strength = noise
    return ManagerOutput(
        logits=jnp.zeros(3),
        action=jnp.where(draw < 0.45, ADD_NEW, jnp.where(draw < 0.85, MERGE, DISCARD)),
        log_prob=jnp.zeros(()),
        strength=strength,
        context=jnp.zeros(0),
    )


_scan = jax.jit(functools.partial(memory.scan, decide_fn=random_decide))


def random_memory(seed: int, config: MemoryConfig, num_chunks: int = 64) -> MemoryState:
    """The memory of a random stream under random actions and strengths."""
    items = random_items(seed, num_chunks, dim=config.dim)
    return _scan(None, jax.random.key(seed), memory.init(config), items)[0]


def random_questions(
    seed: int, num_questions: int, num_options: int, dim: int
) -> tuple[Float[Array, "Q D"], Float[Array, "Q O D"]]:
    """Unit embeddings of questions and of their options."""
    rng = np.random.default_rng(seed)
    query = _unit(rng.normal(size=(num_questions, dim)))
    options = _unit(rng.normal(size=(num_questions, num_options, dim)))
    return jnp.asarray(query, jnp.float32), jnp.asarray(options, jnp.float32)
