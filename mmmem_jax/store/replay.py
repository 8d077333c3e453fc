"""The memory after recorded clips: A.3 makes it a pure function of items, actions, strengths."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmmem_jax import memory
from mmmem_jax.memory import ADD_NEW, MERGE, Item, MemoryState

BATCH = 64  # clips handed to the device at once; a shorter rest is padded, the padding not run


def _step(state: MemoryState, item: Item, action, strength, node_id) -> MemoryState:
    """One recorded step.

    `node_id` is that of the episode the item went into, -1 where it is not known yet. It changes
    nothing where all clips are there. Where the clips of an evicted episode were pruned, it keeps
    ids as recorded, and what was merged into an episode that is gone opens it again.
    """
    stream = state.episodic
    absent = (node_id >= 0) & ~jnp.any(stream.valid & (stream.node_id == node_id))
    next_id = jnp.where(absent, jnp.maximum(node_id, stream.next_id), stream.next_id)
    action = jnp.where(absent & (action == MERGE), ADD_NEW, action)
    state = state.replace(episodic=stream.replace(next_id=next_id))
    return memory.step(state, item, action, strength)


@jax.jit
def _run(state, items, actions, strengths, node_ids, count) -> MemoryState:
    """`count` steps; live and from disk run this one program, so that their bits are the same."""

    def body(i, state):
        rows = jax.tree.map(lambda x: x[i], (items, actions, strengths, node_ids))
        return _step(state, *rows)

    return jax.lax.fori_loop(0, count, body, state)


def _padded(values: Sequence, size: int) -> np.ndarray:
    """Arrays of one shape stacked, zeros to `size`."""
    found = np.stack(values)
    out = np.zeros((size, *found.shape[1:]), found.dtype)
    out[: len(found)] = found
    return out


def _with_mentions(item: Item, size: int) -> Item:
    """`item` with room for `size` mentions."""
    missing = size - len(item.mention_valid)
    return item.replace(
        mention=np.pad(item.mention, ((0, missing), (0, 0))),
        mention_valid=np.pad(item.mention_valid, (0, missing)),
    )


def replay(state: MemoryState, steps: Sequence[tuple[Item, int, float, int]]) -> MemoryState:
    """The memory after `steps` of (item, action, strength, node_id), items in NumPy."""
    mentions = max((len(item.mention_valid) for item, *_ in steps), default=0)
    for start in range(0, len(steps), BATCH):
        batch = steps[start : start + BATCH]
        items, actions, strengths, node_ids = zip(*batch, strict=True)
        items = [_with_mentions(item, mentions) for item in items]
        state = _run(
            state,
            jax.tree.map(lambda *x: _padded(x, BATCH), *items),
            _padded(np.asarray(actions, np.int32), BATCH),
            _padded(np.asarray(strengths, np.float32), BATCH),
            _padded(np.asarray(node_ids, np.int32), BATCH),
            np.int32(len(batch)),
        )
    return state


def advance(state: MemoryState, item: Item, action: int, strength: float) -> MemoryState:
    """The memory after one more clip: `memory.step` by the program that replays the disk.

    Args:
      state: the memory before.
      item: what `store.rounded` gave, in NumPy.
      action: ADD_NEW, MERGE or DISCARD.
      strength: float32, rank for eviction.
    """
    return replay(state, [(item, int(action), float(strength), -1)])


def node_of(state: MemoryState, trace_id: int) -> int:
    """Id of the episode that the newest clip, `trace_id`, went into; -1 if it was not kept."""
    stream = state.episodic
    slots = np.flatnonzero(np.asarray(stream.valid) & (np.asarray(stream.source)[:, 1] == trace_id))
    return int(np.asarray(stream.node_id)[slots[0]]) if len(slots) else -1
