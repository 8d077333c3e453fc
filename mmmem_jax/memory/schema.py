"""Symbolic Schema (L3): entities, glosses, relations and grounding edges (eq. 4).

An item costs one similarity against the N3 entities per mention: nothing is embedded again.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmmem_jax.memory import slots
from mmmem_jax.memory.types import Item, MemoryConfig, SymbolicSchema


def init(config: MemoryConfig) -> SymbolicSchema:
    """An empty schema of `config.schema_slots` entities (0 switches the level off)."""
    n, d, r = config.schema_slots, config.dim, config.num_relations
    return SymbolicSchema(
        embedding=jnp.zeros((n, d)),
        norm=jnp.zeros(n),
        told=jnp.zeros((n, 2, d)),
        mentions=jnp.zeros(n, jnp.int32),
        span=jnp.zeros((n, 2)),
        tokens=jnp.zeros(n, jnp.int32),
        grounding=jnp.zeros((n, config.episodic_slots), bool),
        strength=jnp.zeros(n),
        valid=jnp.zeros(n, bool),
        relations=jnp.full((r, 3), -1, jnp.int32),
        relation_time=jnp.zeros(r),
        relation_valid=jnp.zeros(r, bool),
    )


ENTITY_FIELDS = (
    "embedding", "norm", "told", "mentions", "span", "tokens", "grounding", "strength", "valid",
)  # fmt: skip


def unground(
    schema: SymbolicSchema, replaced: Int[Array, ""], dropped: Bool[Array, "N2"] | None
) -> SymbolicSchema:
    """Removes the grounding edges to the episode in slot `replaced` (-1: none) and to `dropped`."""
    column = jnp.where(replaced >= 0, replaced, schema.grounding.shape[1])
    grounding = schema.grounding.at[:, column].set(False, mode="drop")
    if dropped is not None:
        grounding = grounding & ~dropped
    return schema.replace(grounding=grounding)


def similarity(schema: SymbolicSchema, mention: Float[Array, "D"]) -> Float[Array, "N3"]:
    """Cosine of each entity's embedding with a mention's."""
    return slots.cosine(schema.embedding, mention, schema.norm)


def _insert_mention(schema, item, mention, episode, strength, enabled, config):
    """Merges one mention into its entity, or opens one.

    Returns the schema, the slot that took the mention and the slot that it opened, -1 for none.
    """
    near = jnp.where(schema.valid, similarity(schema, mention), -jnp.inf)
    nearest = slots.argmax(near)
    known = near[nearest] >= config.entity_similarity
    free = slots.weakest(schema.strength, schema.span[:, 1], schema.valid)
    stays = known | ~schema.valid[free] | (strength >= schema.strength[free])
    enabled = enabled & stays
    slot = jnp.where(known, nearest, free).astype(jnp.int32)

    old = {name: getattr(schema, name)[slot] for name in ENTITY_FIELDS}
    count = jnp.where(known, old["mentions"] + 1, 1)
    told = jnp.any(item.text != 0)
    text = jnp.where(told, item.text, item.coarse)

    def blend(name, value, rate):
        return jnp.where(known, old[name] + rate * (value - old[name]), value)

    embedding = blend("embedding", mention, 1.0 / count)
    row = {
        "embedding": embedding,
        "norm": jnp.linalg.norm(embedding),
        "told": blend("told", text, jnp.stack([config.gloss_rate, 1.0 / count])[:, None]),
        "mentions": count,
        "span": jnp.stack([jnp.where(known, old["span"][0], item.span[0]), item.span[1]]),
        "tokens": jnp.where(known, jnp.maximum(old["tokens"], item.tokens), item.tokens),
        "grounding": (old["grounding"] & known) | episode,
        "strength": jnp.where(known, jnp.maximum(old["strength"], strength), strength),
        "valid": jnp.asarray(True),
    }
    table = {name: getattr(schema, name) for name in ENTITY_FIELDS}
    schema = schema.replace(**slots.write(table, slot, row, enabled))
    return schema, jnp.where(enabled, slot, -1), jnp.where(enabled & ~known, slot, -1)


def _unrelate(schema, opened):
    """Removes the edges of the entities that were in the slots `opened` [E] before."""
    ends = schema.relations[:, ::2]
    gone = (ends[..., None] == opened).any((1, 2))
    return schema.replace(relation_valid=schema.relation_valid & ~gone)


def _insert_relation(schema, subject, relation, target, time, enabled):
    """Adds or refreshes the edge subject -relation-> target; the longest unseen one goes first."""
    edge = jnp.stack([subject, relation, target]).astype(jnp.int32)
    same = schema.relation_valid & jnp.all(schema.relations == edge, axis=-1)
    seen = jnp.where(schema.relation_valid, schema.relation_time, -1.0)  # unused rows go first
    index = slots.argmin(jnp.where(same, -jnp.inf, seen))
    enabled = enabled & (subject >= 0) & (target >= 0) & (subject != target) & (relation >= 0)
    table = (schema.relations, schema.relation_time, schema.relation_valid)
    relations, relation_time, relation_valid = slots.write(
        table, index, (edge, time, jnp.asarray(True)), enabled
    )
    return schema.replace(
        relations=relations, relation_time=relation_time, relation_valid=relation_valid
    )


def update(
    schema: SymbolicSchema,
    item: Item,
    episode: Int[Array, ""],
    strength: Float[Array, ""],
    config: MemoryConfig,
) -> SymbolicSchema:
    """Takes the mentions of an item kept in episodic slot `episode` (-1: not kept)."""
    kept = episode >= 0
    episode_edge = slots.only(episode, kept, config.episodic_slots)
    entities, opened = [], []
    for mention, valid in zip(item.mention, item.mention_valid, strict=True):
        schema, slot, fresh = _insert_mention(
            schema, item, mention, episode_edge, strength, kept & valid, config
        )
        entities.append(slot)
        opened.append(fresh)
    if entities and config.num_relations:
        schema = _unrelate(schema, jnp.stack(opened))
    if len(entities) >= 2 and config.num_relations:
        schema = _insert_relation(
            schema, entities[0], item.relation, entities[1], item.span[1], kept
        )
    return schema
