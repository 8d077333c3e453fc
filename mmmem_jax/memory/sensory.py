"""Sensory Buffer (L1): verbatim items, eq. 1."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmmem_jax.memory import slots
from mmmem_jax.memory.types import Item, MemoryConfig, SensoryBuffer


def init(config: MemoryConfig) -> SensoryBuffer:
    """An empty buffer of `config.sensory_slots` slots."""
    n, d = config.sensory_slots, config.dim
    return SensoryBuffer(
        visual=jnp.zeros((n, d)),
        text=jnp.zeros((n, d)),
        span=jnp.zeros((n, 2)),
        tokens=jnp.zeros(n, jnp.int32),
        trace_id=jnp.full(n, -1, jnp.int32),
        node_id=jnp.full(n, -1, jnp.int32),
        strength=jnp.zeros(n),
        valid=jnp.zeros(n, bool),
    )


def write(
    buffer: SensoryBuffer,
    item: Item,
    node_id: Int[Array, ""],
    strength: Float[Array, ""],
    enabled: Bool[Array, ""],
) -> SensoryBuffer:
    """Keeps `item` verbatim; in a full buffer the weakest of the slots and the item goes."""
    index = slots.weakest(buffer.strength, buffer.span[:, 0], buffer.valid)
    stays = ~buffer.valid[index] | (strength >= buffer.strength[index])
    row = SensoryBuffer(
        visual=item.visual,
        text=item.text,
        span=item.span,
        tokens=item.tokens,
        trace_id=item.trace_id,
        node_id=node_id,
        strength=strength,
        valid=True,
    )
    return slots.write(buffer, index, row, enabled & stays)
