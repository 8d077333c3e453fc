"""The episodic memory as text: each node holds the tokens of its trace, and no embeddings.

A manager that is a language model reads and writes this memory (eq. 2); the action sequence with
the texts it wrote determines it (appendix A.3). Nodes go round: node number i lies in slot i mod N,
so where a memory is full its oldest node gives way to a new one.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from mmmem_jax.memory.types import ADD_NEW, DISCARD, MERGE

MERGES = ("append", "rewrite")


@struct.dataclass
class Traces:
    """N nodes of at most L tokens; those of a node come first in its slot, without gaps."""

    ids: jax.Array  # [N, L] int32
    valid: jax.Array  # [N, L] bool
    count: jax.Array  # [] int32, nodes opened so far, also those that have gone
    latest: jax.Array  # [] int32, slot of the newest node, -1 if there is none
    dropped: jax.Array  # [] int32, tokens written that did not fit in their node


def init(num_nodes: int, max_tokens: int) -> Traces:
    """An empty memory of `num_nodes` nodes with `max_tokens` tokens each.

    Raises:
      ValueError: if either is less than 1.
    """
    if min(num_nodes, max_tokens) < 1:
        raise ValueError(f"a memory of {num_nodes} nodes of {max_tokens} tokens holds nothing")
    return Traces(
        ids=jnp.zeros((num_nodes, max_tokens), jnp.int32),
        valid=jnp.zeros((num_nodes, max_tokens), bool),
        count=jnp.zeros((), jnp.int32),
        latest=jnp.full((), -1, jnp.int32),
        dropped=jnp.zeros((), jnp.int32),
    )


def update(
    traces: Traces,
    action: Int[Array, ""],
    text_ids: Int[Array, "T"],
    text_valid: Bool[Array, "T"],
    *,
    merge: str = "append",
) -> Traces:
    """The memory after one decision; a pure function for one memory, to `vmap` and `scan`.

    Args:
      traces: the memory before.
      action: ADD_NEW opens a node with the text, MERGE writes to the latest (and opens one if there
        is none), DISCARD changes nothing; it is also what to give for a clip that is padding.
      text_ids: int32, the text.
      text_valid: which of its tokens count.
      merge: 'append': MERGE adds the text to what the node holds; 'rewrite': the text takes its
        place.

    Raises:
      ValueError: if `merge` is unknown.
    """
    if merge not in MERGES:
        raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
    num_nodes, max_tokens = traces.ids.shape
    opens = (action == ADD_NEW) | ((action == MERGE) & (traces.latest < 0))
    slot = jnp.where(opens, traces.count % num_nodes, traces.latest)
    written = jnp.arange(num_nodes) == jnp.where(action == DISCARD, -1, slot)
    kept = traces.valid[slot] & ~opens & (merge == "append")
    text = text_valid & (action != DISCARD)
    place = jnp.where(text, kept.sum() + jnp.cumsum(text) - 1, max_tokens)
    ids = traces.ids[slot].at[place].set(text_ids, mode="drop")
    valid = kept.at[place].set(True, mode="drop")
    return Traces(
        ids=jnp.where(written[:, None], jnp.where(valid, ids, 0), traces.ids),
        valid=jnp.where(written[:, None], valid, traces.valid),
        count=traces.count + opens,
        latest=slot,
        dropped=traces.dropped + jnp.sum(text & (place >= max_tokens), dtype=jnp.int32),
    )


def numbers(traces: Traces) -> Int[Array, "... N"]:
    """When the node in each slot was opened, 0 for the first, -1 where there is none; int32."""
    num_nodes = traces.ids.shape[-2]
    newest = traces.count[..., None] - 1
    return jnp.maximum(newest - (newest - jnp.arange(num_nodes)) % num_nodes, -1)


def length(traces: Traces) -> Int[Array, "..."]:
    """Tokens held, Length(m) of eq. 10; int32, any leading axes."""
    return traces.valid.sum((-2, -1), dtype=jnp.int32)
