"""Episodic Stream (L2): nodes opened, extended or left alone by the manager (eq. 2, 3)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from mmmem_jax.memory import slots
from mmmem_jax.memory.types import ADD_NEW, MERGE, EpisodicStream, Item, MemoryConfig


@struct.dataclass
class EpisodicUpdate:
    """What an update did."""

    slot: Int[Array, ""]  # slot that took the item, -1 if none did
    node_id: Int[Array, ""]
    tokens_added: Int[Array, ""]
    replaced: Int[Array, ""]  # slot that holds another node than before, -1 if none does
    dropped: Bool[Array, "N2"] | None = None  # slots emptied to fit the budget, if there is one


def init(config: MemoryConfig) -> EpisodicStream:
    """An empty stream of `config.episodic_slots` nodes."""
    n, k, d = config.episodic_slots, config.num_prototypes, config.dim
    return EpisodicStream(
        prototypes=jnp.zeros((n, k, d)),
        prototype_count=jnp.zeros((n, k), jnp.int32),
        text=jnp.zeros((n, d)),
        key=jnp.zeros((n, 2 * d)),
        span=jnp.zeros((n, 2)),
        count=jnp.zeros(n, jnp.int32),
        tokens=jnp.zeros(n, jnp.int32),
        source_tokens=jnp.zeros(n, jnp.int32),
        source=jnp.full((n, 2), -1, jnp.int32),
        node_id=jnp.full(n, -1, jnp.int32),
        strength=jnp.zeros(n),
        valid=jnp.zeros(n, bool),
        latest=jnp.asarray(-1, jnp.int32),
        next_id=jnp.asarray(0, jnp.int32),
    )


def rows(stream: EpisodicStream) -> dict[str, Array]:
    """The per-slot arrays by name (everything but `latest` and `next_id`)."""
    names = [f.name for f in dataclasses.fields(stream) if f.name not in ("latest", "next_id")]
    return {name: getattr(stream, name) for name in names}


def _merge_prototypes(prototypes, count, visual, threshold):
    """One step of sequential K-means: join the nearest centre, or open an unused one if far."""
    seen = jnp.any(visual != 0)
    similarity = jnp.where(count > 0, slots.cosine(prototypes, visual), -jnp.inf)
    nearest, unused = slots.argmax(similarity), slots.argmin(count)
    far = (similarity[nearest] < threshold) & (count[unused] == 0)
    k = jnp.where(far, unused, nearest)
    new_count = count[k] + 1
    centre = prototypes[k] + (visual - prototypes[k]) / new_count
    return (
        prototypes.at[k].set(jnp.where(seen, centre, prototypes[k])),
        count.at[k].set(jnp.where(seen, new_count, count[k])),
    )


def _key(text, visual):
    """What similarity reads of a node or an item: text and visual side by side, unit lengths."""
    return jnp.concatenate([slots.unit(text), slots.unit(visual)], axis=-1)


def _node_from_item(item: Item, strength, next_id, num_prototypes: int):
    """Rows of a node that holds one item."""
    dim = item.coarse.shape[-1]
    seen = jnp.any(item.coarse != 0)
    return {
        "prototypes": jnp.zeros((num_prototypes, dim)).at[0].set(item.coarse),
        "prototype_count": jnp.zeros(num_prototypes, jnp.int32).at[0].set(seen),
        "text": item.text,
        "key": _key(item.text, item.coarse),
        "span": item.span,
        "count": jnp.asarray(1, jnp.int32),
        "tokens": item.tokens,
        "source_tokens": item.tokens,
        "source": jnp.stack([item.trace_id, item.trace_id]),
        "node_id": next_id,
        "strength": strength,
        "valid": jnp.asarray(True),
    }


def _node_with_item(node, item: Item, strength, config: MemoryConfig):
    """Rows of `node` after it took `item` in (A.3: a fixed rule of the action)."""
    prototypes, prototype_count = _merge_prototypes(
        node["prototypes"], node["prototype_count"], item.coarse, config.prototype_similarity
    )
    read = node["source_tokens"] + item.tokens
    weight = item.tokens / jnp.maximum(read, 1)
    text = node["text"] + weight * (item.text - node["text"])
    return {
        "prototypes": prototypes,
        "prototype_count": prototype_count,
        "text": text,
        "key": _key(text, prototype_count @ prototypes),
        "span": jnp.stack(
            [
                jnp.minimum(node["span"][0], item.span[0]),
                jnp.maximum(node["span"][1], item.span[1]),
            ]
        ),
        "count": node["count"] + 1,
        "tokens": node["tokens"] + merged_tokens(item, config),
        "source_tokens": read,
        "source": jnp.stack([node["source"][0], item.trace_id]),
        "node_id": node["node_id"],
        "strength": jnp.maximum(node["strength"], strength),
        "valid": node["valid"],
    }


def merged_tokens(item: Item, config: MemoryConfig) -> Int[Array, ""]:
    """Tokens a node gains by MERGE: the kept share of the item's, rounded up."""
    return jnp.ceil(config.merge_keep * item.tokens).astype(jnp.int32)


def similarity(stream: EpisodicStream, item: Item) -> Float[Array, "N2"]:
    """Mean of the cosines of text and of visual prototypes with the item's, in [-1, 1]."""
    told, seen = jnp.any(item.text != 0), jnp.any(item.coarse != 0)
    total = stream.key @ _key(item.text, item.coarse)
    return total / jnp.maximum(told.astype(jnp.float32) + seen, 1.0)


def _merge_target(stream: EpisodicStream, item: Item, config: MemoryConfig) -> Int[Array, ""]:
    """Slot that MERGE extends, -1 if there is none."""
    if config.merge_target == "latest":
        return stream.latest
    near = jnp.where(stream.valid, similarity(stream, item), -jnp.inf)
    return jnp.where(jnp.any(stream.valid), slots.argmax(near), -1).astype(jnp.int32)


def update(
    stream: EpisodicStream,
    item: Item,
    action: Int[Array, ""],
    strength: Float[Array, ""],
    config: MemoryConfig,
) -> tuple[EpisodicStream, EpisodicUpdate]:
    """Applies the manager's action (eq. 2): psi(m, e*) in {ADD_NEW, MERGE, DISCARD}.

    MERGE without a target, or past `max_node_tokens` or the whole budget, opens a node. In a full
    stream the weakest of the nodes and the new one goes (ties: the oldest), so an item weaker than
    all is not kept; nor is one that is larger than the budget.
    """
    table = rows(stream)
    target = _merge_target(stream, item, config)
    full_node = jnp.asarray(False)
    limits = [x for x in (config.max_node_tokens, config.token_budget) if x is not None]
    if limits:
        full_node = stream.tokens[target] + merged_tokens(item, config) > min(limits)
    merges = item.valid & (action == MERGE) & (target >= 0) & ~full_node
    opens = item.valid & ((action == ADD_NEW) | ((action == MERGE) & ~merges))

    free = slots.weakest(stream.strength, stream.span[:, 0], stream.valid)
    stays = ~stream.valid[free] | (strength >= stream.strength[free])
    opens = opens & stays
    if config.token_budget is not None:  # else it would push out all others, then itself
        opens = opens & (item.tokens <= config.token_budget)
    slot = jnp.where(merges, target, free)
    enabled = merges | opens

    current = {name: x[slot] for name, x in table.items()}
    opened = _node_from_item(item, strength, stream.next_id, config.num_prototypes)
    merged = _node_with_item(current, item, strength, config)
    new = {name: jnp.where(merges, merged[name], opened[name]) for name in table}
    table = slots.write(table, slot, new, enabled)

    taken = jnp.where(merges, merged_tokens(item, config), item.tokens)
    result = EpisodicUpdate(
        slot=jnp.where(enabled, slot, -1).astype(jnp.int32),
        node_id=jnp.where(enabled, new["node_id"], -1),
        tokens_added=jnp.where(enabled, taken, 0).astype(jnp.int32),
        replaced=jnp.where(opens, slot, -1),
    )
    latest = jnp.where(opens, slot, stream.latest).astype(jnp.int32)
    stream = stream.replace(
        **table, latest=latest, next_id=stream.next_id + opens.astype(jnp.int32)
    )
    if config.token_budget is None:
        return stream, result
    return _enforce_budget(stream, result, config.token_budget)


def _enforce_budget(stream: EpisodicStream, result: EpisodicUpdate, budget: int):
    """Empties the weakest nodes (ties: the oldest) until the text held fits `budget` tokens."""
    order = stream.span[:, 0]

    def over(valid):
        return jnp.sum(jnp.where(valid, stream.tokens, 0)) > budget

    def drop_weakest(valid):
        strength = jnp.where(valid, stream.strength, jnp.inf)
        oldest_weakest = jnp.where(strength == strength.min(), order, jnp.inf)
        return valid.at[jnp.argmin(oldest_weakest)].set(False)

    valid = jax.lax.while_loop(over, drop_weakest, stream.valid)
    latest_gone = (stream.latest >= 0) & ~valid[stream.latest]
    own_gone = (result.slot >= 0) & ~valid[result.slot]
    stream = stream.replace(
        valid=valid,
        tokens=jnp.where(valid, stream.tokens, 0),
        latest=jnp.where(latest_gone, -1, stream.latest),
    )
    return stream, result.replace(
        slot=jnp.where(own_gone, -1, result.slot),
        node_id=jnp.where(own_gone, -1, result.node_id),
        tokens_added=jnp.where(own_gone, 0, result.tokens_added),
        dropped=~valid,
    )
