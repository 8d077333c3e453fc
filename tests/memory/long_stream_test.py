"""A million chunks in the memory of a few."""

import jax
import jax.numpy as jnp
import numpy as np

from mmmem_jax import memory
from mmmem_jax.memory import ADD_NEW, MERGE, Item, ManagerOutput, MemoryConfig

CONFIG = MemoryConfig(
    sensory_slots=4, episodic_slots=4, schema_slots=4, num_prototypes=1, num_relations=4, dim=8
)
SEGMENT, NUM_SEGMENTS = 20_000, 50


def chunk(t) -> Item:
    """Chunk t of an endless stream, made where it is read."""
    x = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (3, 8))
    start = t.astype(jnp.float32) * 10.0
    return Item(
        visual=x[0], coarse=x[0], text=x[1], mention=x[2:], mention_valid=x[2:, 0] > 0,
        span=jnp.stack([start, start + 10.0]), tokens=t % 7, change=jnp.abs(x[0, 0]),
        relation=t % 3 - 1, trace_id=t, valid=jnp.asarray(True),
    )  # fmt: skip


def by_change(params, key, state, item):
    """Opens an episode where the stream changes much."""
    action = jnp.where(item.change > 1.0, ADD_NEW, MERGE)
    return ManagerOutput(jnp.zeros(3), action, jnp.zeros(()), item.change, jnp.zeros(0))


def test_a_million_chunks_in_constant_memory():
    @jax.jit
    def segment(key, state, first):
        items = jax.vmap(chunk)(first + jnp.arange(SEGMENT))
        return memory.scan(None, key, state, items, decide_fn=by_change)[0]

    state = memory.init(CONFIG)
    layout = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for i in range(NUM_SEGMENTS):
        state = segment(jax.random.key(0), state, jnp.asarray(i * SEGMENT))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == layout
    assert segment._cache_size() == 1
    total = SEGMENT * NUM_SEGMENTS
    assert int(state.num_items) == total == 1_000_000
    assert float(state.clock) == 10.0 * total
    assert sum(x.nbytes for x in jax.tree.leaves(state)) < 4_096
    stream = state.episodic
    assert np.all(stream.valid)
    assert np.all((0 <= stream.span[:, 0]) & (stream.span[:, 0] < stream.span[:, 1]))
    assert np.all(stream.span[:, 1] <= state.clock)
    assert np.all((0 <= stream.source) & (stream.source < total))
    for x in jax.tree.leaves(state):
        assert np.all(np.isfinite(x))
