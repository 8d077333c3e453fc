"""The pyramid: one pure update per chunk, scanned over the stream."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmmem_jax.memory import episodic, schema, sensory
from mmmem_jax.memory.types import (
    NUM_NOISE,
    Item,
    ManagerOutput,
    MemoryConfig,
    MemoryState,
    StepOutput,
)


def init(config: MemoryConfig) -> MemoryState:
    """An empty memory of fixed capacity."""
    return MemoryState(
        sensory=sensory.init(config),
        episodic=episodic.init(config),
        schema=schema.init(config),
        clock=jnp.zeros(()),
        num_items=jnp.asarray(0, jnp.int32),
        tokens=jnp.asarray(0, jnp.int32),
        config=config,
    )


def tokens_held(state: MemoryState) -> Int[Array, ""]:
    """Text tokens over all valid slots of the three levels, counted anew."""
    levels = (state.sensory, state.episodic, state.schema)
    return sum(jnp.sum(jnp.where(x.valid, x.tokens, 0)) for x in levels)


def _update(state: MemoryState, item: Item, action, strength):
    config = state.config
    stream, done = episodic.update(state.episodic, item, action, strength, config)
    buffer = sensory.write(state.sensory, item, done.node_id, strength, done.slot >= 0)
    graph = state.schema
    if config.schema_slots:
        graph = schema.unground(graph, done.replaced, done.dropped)
        graph = schema.update(graph, item, done.slot, strength, config)
    state = state.replace(
        sensory=buffer,
        episodic=stream,
        schema=graph,
        clock=jnp.where(item.valid, jnp.maximum(state.clock, item.span[1]), state.clock),
        num_items=state.num_items + item.valid.astype(jnp.int32),
    )
    return state.replace(tokens=tokens_held(state).astype(jnp.int32)), done


def step(
    state: MemoryState,
    item: Item,
    action: Int[Array, ""],
    strength: Float[Array, ""] | None = None,
) -> MemoryState:
    """The memory after one chunk (A.3: a deterministic function of state, item and action).

    Args:
      state: the memory, any leading batch axes removed (use `jax.vmap`).
      item: the chunk; `valid=False` leaves everything as it is.
      action: int32 [], ADD_NEW=0, MERGE=1 or DISCARD=2.
      strength: float32 [], rank for eviction; None ranks by time, so the oldest slot goes first.
    """
    strength = item.span[1] if strength is None else strength
    return _update(state, item, action, strength)[0]


def draw_noise(rng_key: jax.Array, index: Int[Array, "T"]) -> Float[Array, "T 2"]:
    """The noise of the decisions on items number `index` of a stream, uniform in (0, 1]."""

    def draw(i):
        return 1.0 - jax.random.uniform(jax.random.fold_in(rng_key, i), (NUM_NOISE,))

    return jax.vmap(draw)(index)


DecideFn = Callable[..., ManagerOutput]


def scan(
    params,
    rng_key: jax.Array,
    state: MemoryState,
    items: Item,
    *,
    decide_fn: DecideFn,
) -> tuple[MemoryState, StepOutput]:
    """Passes a stream through the memory in one `jax.lax.scan`.

    Args:
      params: the manager's parameters, handed to `decide_fn`.
      rng_key: the noise of a decision depends on `fold_in(rng_key, state.num_items)` alone, so a
        stream cut into segments that hand the state on draws what the whole stream draws.
      state: memory to start from.
      items: chunks with a leading axis T.
      decide_fn: (params, noise, state, item) -> ManagerOutput; learned or fixed rule. `noise`:
        float32 [2], uniform in (0, 1].

    Returns:
      The memory after T chunks, and StepOutput with a leading axis T.
    """

    def body(state, chunk):
        noise, item = chunk
        decision = decide_fn(params, noise, state, item)
        state, done = _update(state, item, decision.action, decision.strength)
        output = StepOutput(
            logits=decision.logits,
            action=decision.action,
            log_prob=decision.log_prob,
            strength=decision.strength,
            context=decision.context,
            node_id=done.node_id,
            tokens_added=done.tokens_added,
            tokens=jnp.sum(jnp.where(state.episodic.valid, state.episodic.tokens, 0)),
            slots=jnp.sum(state.episodic.valid),
        )
        return state, output

    index = state.num_items + jnp.cumsum(items.valid) - items.valid
    return jax.lax.scan(body, state, (draw_noise(rng_key, index), items))
