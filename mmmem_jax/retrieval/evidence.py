"""Which slots of a memory bear on a question: similarity per level, and what a slot costs to read.

Slots of the three levels are numbered together as in the reader: sensory, episodic, schema.
A question is its text plus its options; a slot counts by the option it fits best.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmmem_jax.memory import slots
from mmmem_jax.memory.types import MemoryState

SCHEMA, EPISODIC, SENSORY = 0, 1, 2  # reading order, top down


def slot_levels(state: MemoryState) -> Int[Array, "N"]:
    """Level of each slot, SCHEMA / EPISODIC / SENSORY."""
    counts = [x.valid.shape[0] for x in (state.sensory, state.episodic, state.schema)]
    return jnp.repeat(
        jnp.array([SENSORY, EPISODIC, SCHEMA]), jnp.array(counts), total_repeat_length=sum(counts)
    )


def slot_valid(state: MemoryState):
    """Validity of each slot, bool [N]."""
    return jnp.concatenate([state.sensory.valid, state.episodic.valid, state.schema.valid])


def slot_similarity(
    state: MemoryState, query: Float[Array, "Q D"], options: Float[Array, "Q O D"]
) -> Float[Array, "Q N"]:
    """Best cosine over options and over the vectors a slot holds (text, visuals, gloss)."""
    wanted = slots.unit(query[:, None] + options)  # [Q, O, D]

    def best(*banks):  # each [n, D]
        scores = [jnp.einsum("qod,nd->qon", wanted, slots.unit(b)).max(1) for b in banks]
        return jnp.stack(scores).max(0)

    s, e, g = state.sensory, state.episodic, state.schema
    prototypes = [e.prototypes[:, k] for k in range(e.prototypes.shape[1])]
    return jnp.concatenate(
        [best(s.visual, s.text), best(e.text, *prototypes), best(g.embedding, g.gloss)], axis=1
    )


def slot_tokens(state: MemoryState, visual_tokens: tuple[int, int]) -> Int[Array, "N"]:
    """Tokens to read each slot: its text, plus visual tokens of (a coarse view, a full view).

    An entity is read as two texts, gloss and profile; never told, they are two coarse views.
    """
    coarse, full = visual_tokens
    s, e, g = state.sensory, state.episodic, state.schema
    seen = jnp.any(s.visual != 0, -1)
    views = jnp.sum(e.prototype_count > 0, -1)
    entity = 2 * jnp.where(g.valid & (g.tokens == 0), coarse, g.tokens)
    return jnp.concatenate([s.tokens + full * seen, e.tokens + coarse * views, entity])


def links(state: MemoryState) -> tuple[jax.Array, jax.Array]:
    """Edges that lead down: schema to episode bool [N3, N2], episode to sensory bool [N2, N1]."""
    s, e, g = state.sensory, state.episodic, state.schema
    grounding = g.grounding & g.valid[:, None] & e.valid[None]
    holds = (e.node_id[:, None] == s.node_id[None]) & e.valid[:, None] & s.valid[None]
    return grounding, holds
