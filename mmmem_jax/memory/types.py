"""The state of the memory. Every array has a fixed capacity; slot i counts only where `valid[i]`.

Legend: N1, N2, N3 slots of the three levels, K prototypes, R relations, E mentions of an item,
D embedding. Times are seconds since the stream began (float32); ids are int32, -1 where absent.
"""

import dataclasses

import jax
from flax import struct

ADD_NEW, MERGE, DISCARD = 0, 1, 2
NUM_ACTIONS = 3
NUM_NOISE = 2  # uniform numbers that a policy gets for each decision
LEVELS = ("schema", "episodic", "sensory")  # in reading order, top down


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Capacities and update constants; static, so changing one compiles a new program."""

    sensory_slots: int = 24
    episodic_slots: int = 24
    schema_slots: int = 24
    num_prototypes: int = 2
    num_relations: int = 24
    dim: int = 64
    token_budget: int | None = None  # most text tokens the episodic stream may hold; None: no limit
    merge_keep: float = 0.25  # share of an item's tokens that its node keeps on MERGE
    prototype_similarity: float = 0.8  # a visual nearer than this joins an existing prototype
    entity_similarity: float = 0.7  # a mention nearer than this is the same entity
    gloss_rate: float = 0.6  # weight of the newest text in an entity's gloss
    max_node_tokens: int | None = None  # a MERGE that would pass it opens a new node instead
    merge_target: str = "latest"  # node that MERGE extends: "latest" (eq. 2) or "nearest"

    def __post_init__(self):
        least = dict.fromkeys(("sensory_slots", "episodic_slots", "num_prototypes", "dim"), 1)
        # 0 switches the schema or its relations off; a budget of 0 is that of a silent stream.
        least |= dict.fromkeys(("schema_slots", "num_relations", "token_budget"), 0)
        value = vars(self) | {"token_budget": self.token_budget or 0}  # None is no limit
        for name, low in least.items():
            if value[name] < low:
                raise ValueError(f"MemoryConfig.{name} must be at least {low}, got {value[name]}")
        if self.merge_target not in ("latest", "nearest"):
            raise ValueError(f"MemoryConfig.merge_target is latest or nearest: {self.merge_target}")


@struct.dataclass
class Item:
    """One chunk of the stream as perception hands it over (eq. 1: visual, text trace, time)."""

    visual: jax.Array  # [D] float32, full-resolution view, zeros where nothing is seen
    coarse: jax.Array  # [D] float32, low-resolution view, what the upper levels keep
    text: jax.Array  # [D] float32, narration, zeros where nothing is told
    span: jax.Array  # [2] float32, seconds
    tokens: jax.Array  # [] int32, tokens of the narration
    mention: jax.Array  # [E, D] float32, embeddings of the entities named or seen
    mention_valid: jax.Array  # [E] bool
    change: jax.Array  # [] float32, distance from the chunk before, 0 (the same) to 2
    relation: jax.Array  # [] int32, id of the relation from mention 0 to mention 1, -1 for none
    trace_id: jax.Array  # [] int32, row of the trace store that holds the text and the pixels
    valid: jax.Array  # [] bool, False for padding: the step leaves the state unchanged


@struct.dataclass
class SensoryBuffer:
    """L1: verbatim items."""

    visual: jax.Array  # [N1, D]
    text: jax.Array  # [N1, D]
    span: jax.Array  # [N1, 2]
    tokens: jax.Array  # [N1]
    trace_id: jax.Array  # [N1]
    node_id: jax.Array  # [N1] episode the item went into
    strength: jax.Array  # [N1]
    valid: jax.Array  # [N1] bool


@struct.dataclass
class EpisodicStream:
    """L2: a chronological stream of events (eq. 3)."""

    prototypes: jax.Array  # [N2, K, D] running K-means centres of the coarse visuals
    prototype_count: jax.Array  # [N2, K] int32
    text: jax.Array  # [N2, D] token-weighted mean of the texts read
    key: jax.Array  # [N2, 2D] text and mean visual, each of unit length or 0: what is compared
    span: jax.Array  # [N2, 2]
    count: jax.Array  # [N2] int32, items read
    tokens: jax.Array  # [N2] int32, tokens held
    source_tokens: jax.Array  # [N2] int32, tokens read
    source: jax.Array  # [N2, 2] int32, first and last trace_id
    node_id: jax.Array  # [N2] int32, unique over the stream
    strength: jax.Array  # [N2]
    valid: jax.Array  # [N2] bool
    latest: jax.Array  # [] int32, slot of e*, -1 if none
    next_id: jax.Array  # [] int32


@struct.dataclass
class SymbolicSchema:
    """L3: entities with glosses, relations among them, grounding edges to episodes (eq. 4).

    Neither retrieval nor the reader reads `relations`; they are kept for who reads the graph.
    """

    embedding: jax.Array  # [N3, D] running mean of the mentions
    norm: jax.Array  # [N3] length of `embedding`, kept so that no step measures it again
    told: jax.Array  # [N3, 2, D] gloss and profile, one row to fetch
    mentions: jax.Array  # [N3] int32
    span: jax.Array  # [N3, 2]
    tokens: jax.Array  # [N3] int32, tokens of the gloss
    grounding: jax.Array  # [N3, N2] bool
    strength: jax.Array  # [N3]
    valid: jax.Array  # [N3] bool
    relations: jax.Array  # [R, 3] int32: subject slot, relation id, object slot
    relation_time: jax.Array  # [R] float32
    relation_valid: jax.Array  # [R] bool

    @property
    def gloss(self) -> jax.Array:
        """[N3, D] recency-weighted text, what is true of u now."""
        return self.told[..., 0, :]

    @property
    def profile(self) -> jax.Array:
        """[N3, D] mean text, what is usual of u."""
        return self.told[..., 1, :]


@struct.dataclass
class MemoryState:
    """The three levels, the clock (end of the last item, s), items read and tokens held."""

    sensory: SensoryBuffer
    episodic: EpisodicStream
    schema: SymbolicSchema
    clock: jax.Array  # [] float32
    num_items: jax.Array  # [] int32
    tokens: jax.Array  # [] int32, text tokens held by the three levels together
    config: MemoryConfig = struct.field(pytree_node=False)


@struct.dataclass
class ManagerOutput:
    """A decision. `strength` ranks the item for eviction: the weakest slot goes first."""

    logits: jax.Array  # [3] float32
    action: jax.Array  # [] int32
    log_prob: jax.Array  # [] float32, log pi(action)
    strength: jax.Array  # [] float32
    context: jax.Array  # [F] float32, what the policy read of the state; F is 0 for fixed rules


@struct.dataclass
class StepOutput:
    """What one step did."""

    logits: jax.Array  # [3]
    action: jax.Array  # [] int32 as decided
    log_prob: jax.Array  # []
    strength: jax.Array  # []
    context: jax.Array  # [F]
    node_id: jax.Array  # [] int32, episode that took the item, -1 if none did
    tokens_added: jax.Array  # [] int32, tokens the episodic stream took
    tokens: jax.Array  # [] int32, episodic tokens held after the step
    slots: jax.Array  # [] int32, episodes held after the step
