"""One chunk of one stream at a time in eager PyTorch: the way the released code runs its manager.

The same network and the same memory as `mmmem_jax.memory.scan` with `mmmem_jax.policies.manager`,
written as one would in PyTorch: embeddings in preallocated tensors, everything scalar in Python,
and only the branch that the action takes. `benchmarks/throughput.py` checks that both decide alike.
"""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import gelu, linear

from mmmem_jax.memory.types import ADD_NEW, MERGE, Item, MemoryConfig


class Chunk(NamedTuple):
    """A chunk as perception hands it over: tensors and plain numbers."""

    visual: torch.Tensor
    coarse: torch.Tensor
    text: torch.Tensor
    mention: torch.Tensor
    mention_valid: list[bool]
    span: list[float]
    tokens: int
    change: float
    relation: int


def make_chunks(items: Item) -> list[Chunk]:
    """The chunks of a stream, leading axis T."""
    vectors = [torch.tensor(x) for x in (items.visual, items.coarse, items.text, items.mention)]
    scalars = (items.mention_valid, items.span, items.tokens, items.change, items.relation)
    return [Chunk(*row) for row in zip(*vectors, *(x.tolist() for x in scalars), strict=True)]


def _cosine(a: torch.Tensor, b: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return (a @ b) / (norm * torch.linalg.vector_norm(b)).clamp(min=1e-6)


def _key(text: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    pair = torch.stack([text, visual])
    return (pair / torch.linalg.vector_norm(pair, dim=-1, keepdim=True).clamp(min=1e-6)).flatten()


class Table:
    """The scalars of a level's slots; the weakest slot goes first, ties to the smallest age."""

    def __init__(self, size: int):
        self.strength = [-math.inf] * size  # of an empty slot
        self.span = [(0.0, 0.0)] * size
        self.tokens = [0] * size
        self.valid = torch.zeros(size, dtype=torch.bool)

    def room_for(self, strength: float, end: int = 0) -> int:
        """Slot that an item of this strength may take, -1 if all are stronger."""
        slots = range(len(self.strength))
        slot = min(slots, key=lambda i: (self.strength[i], self.span[i][end]))
        return slot if strength >= self.strength[slot] else -1

    def put(self, slot: int, strength: float, span, tokens: int) -> None:
        """Writes the scalars of a slot."""
        self.strength[slot], self.span[slot], self.tokens[slot] = strength, span, tokens
        self.valid[slot] = True


class TorchMemory:
    """The pyramid and its manager for one stream; `weights` are those of the Flax manager."""

    def __init__(self, weights: dict[str, torch.Tensor], config: MemoryConfig):
        self.weights, self.config = weights, config
        n1, n2, n3, d = (
            config.sensory_slots, config.episodic_slots, config.schema_slots, config.dim,
        )  # fmt: skip
        self.sensory, self.seen, self.told = Table(n1), torch.zeros(n1, d), torch.zeros(n1, d)
        self.item_node = [-1] * n1
        self.episodes = Table(n2)
        self.prototypes = torch.zeros(n2, config.num_prototypes, d)
        self.prototype_count = torch.zeros(n2, config.num_prototypes)
        self.text, self.key = torch.zeros(n2, d), torch.zeros(n2, 2 * d)
        self.count, self.source_tokens, self.node_id = [0] * n2, [0] * n2, [-1] * n2
        self.latest, self.next_id = -1, 0
        self.entities = Table(n3)
        self.embedding, self.norm = torch.zeros(n3, d), torch.zeros(n3)
        self.gloss, self.profile = torch.zeros(n3, d), torch.zeros(n3, d)
        self.mentions = [0] * n3
        self.grounding = torch.zeros(n3, n2, dtype=torch.bool)
        self.relations: dict[tuple[int, int, int], float] = {}

    def step(self, chunk: Chunk, noise: float) -> tuple[int, torch.Tensor]:
        """Decides on a chunk by `noise` in (0, 1] and updates; the action and the logits [3]."""
        logits = self._logits(chunk)
        add, merge, _ = torch.softmax(logits, -1).tolist()
        action = (noise > add) + (noise > add + merge)
        add, _, discard = logits.tolist()
        self._update(chunk, action, add - discard)
        return action, logits

    def _logits(self, chunk: Chunk) -> torch.Tensor:
        w, context = self.weights, self._context(chunk)
        told, seen = chunk.text.any().item(), chunk.visual.any().item()
        there = torch.tensor([float(seen), float(told), chunk.change, chunk.tokens / 8.0])
        item = torch.cat([chunk.visual, chunk.text, there])
        x = linear(item, w["item.kernel"], w["item.bias"]) + linear(context, w["context.kernel"])
        x = gelu(linear(gelu(x, approximate="tanh"), w["mid.kernel"], w["mid.bias"]),
                 approximate="tanh")  # fmt: skip
        return linear(x, w["out.kernel"], w["out.bias"])

    def _similarity(self, chunk: Chunk) -> torch.Tensor:
        channels = float(chunk.text.any()) + float(chunk.coarse.any())
        return self.key @ _key(chunk.text, chunk.coarse) / max(channels, 1.0)

    def _context(self, chunk: Chunk) -> torch.Tensor:
        near = torch.where(self.episodes.valid, self._similarity(chunk), -1.0).tolist()
        has_latest, latest = self.latest >= 0, max(self.latest, 0)
        age = max(chunk.span[0] - self.episodes.span[latest][1], 0.0)
        held = sum(x > -math.inf for x in self.episodes.strength)
        full = held == len(near)
        same = torch.where(self.entities.valid, self._alike(chunk.mention[0]), -1.0)
        known, entity = torch.max(same, 0)
        gloss = self.gloss[entity]
        return torch.tensor(
            [
                near[latest] * has_latest,
                max(near),
                math.log1p(age / 3600.0) / 4.0,
                math.log1p(self.count[latest] * has_latest) / 4.0,
                held / len(near),
                float(full),
                math.tanh(min(self.episodes.strength) / 4.0) if full else -1.0,
                known.item(),
                _cosine(gloss, chunk.text, torch.linalg.vector_norm(gloss)).item(),
                float(has_latest),
            ]
        )

    def _alike(self, mention: torch.Tensor) -> torch.Tensor:
        return _cosine(self.embedding, mention, self.norm)

    def _update(self, chunk: Chunk, action: int, strength: float) -> None:
        if action == MERGE and self.latest >= 0:
            slot = self.latest
            self._merge(slot, chunk, strength)
        elif action in (ADD_NEW, MERGE):
            slot = self.episodes.room_for(strength)
            if slot < 0:
                return
            self._open(slot, chunk, strength)
        else:
            return
        row = self.sensory.room_for(strength)
        if row >= 0:
            self.sensory.put(row, strength, chunk.span, chunk.tokens)
            self.seen[row], self.told[row] = chunk.visual, chunk.text
            self.item_node[row] = self.node_id[slot]
        found = [
            self._mention(chunk, mention, slot, strength) if valid else -1
            for mention, valid in zip(chunk.mention, chunk.mention_valid, strict=True)
        ]
        self._relate(found[0], chunk.relation, found[1], chunk.span[1])

    def _open(self, slot: int, chunk: Chunk, strength: float) -> None:
        self.episodes.put(slot, strength, chunk.span, chunk.tokens)
        self.prototypes[slot] = 0.0
        self.prototypes[slot, 0] = chunk.coarse
        self.prototype_count[slot] = 0.0
        self.prototype_count[slot, 0] = float(chunk.coarse.any())
        self.text[slot], self.key[slot] = chunk.text, _key(chunk.text, chunk.coarse)
        self.count[slot], self.source_tokens[slot] = 1, chunk.tokens
        self.node_id[slot] = self.next_id
        self.grounding[:, slot] = False
        self.latest, self.next_id = slot, self.next_id + 1

    def _merge(self, slot: int, chunk: Chunk, strength: float) -> None:
        if chunk.coarse.any():
            count, centres = self.prototype_count[slot], self.prototypes[slot]
            norm = torch.linalg.vector_norm(centres, dim=-1)
            near = torch.where(count > 0, _cosine(centres, chunk.coarse, norm), -torch.inf)
            k, unused = int(torch.argmax(near)), int(torch.argmin(count))
            if near[k] < self.config.prototype_similarity and count[unused] == 0:
                k = unused
            count[k] += 1
            centres[k] += (chunk.coarse - centres[k]) / count[k]
        table, (start, end) = self.episodes, self.episodes.span[slot]
        self.source_tokens[slot] += chunk.tokens
        weight = chunk.tokens / max(self.source_tokens[slot], 1)
        self.text[slot] += weight * (chunk.text - self.text[slot])
        visual = self.prototype_count[slot] @ self.prototypes[slot]
        self.key[slot] = _key(self.text[slot], visual)
        self.count[slot] += 1
        table.put(
            slot,
            max(table.strength[slot], strength),
            (min(start, chunk.span[0]), max(end, chunk.span[1])),
            table.tokens[slot] + math.ceil(self.config.merge_keep * chunk.tokens),
        )

    def _mention(self, chunk: Chunk, mention: torch.Tensor, episode: int, strength: float) -> int:
        """Merges one mention into its entity, or opens one; the slot, -1 if it is not kept."""
        table = self.entities
        near = torch.where(table.valid, self._alike(mention), -torch.inf)
        score, slot = torch.max(near, 0)
        slot, text = int(slot), chunk.text if chunk.text.any() else chunk.coarse
        if score >= self.config.entity_similarity:
            self.mentions[slot] += 1
            rate = 1.0 / self.mentions[slot]
            self.embedding[slot] += rate * (mention - self.embedding[slot])
            self.norm[slot] = torch.linalg.vector_norm(self.embedding[slot])
            self.gloss[slot] += self.config.gloss_rate * (text - self.gloss[slot])
            self.profile[slot] += rate * (text - self.profile[slot])
            strength = max(table.strength[slot], strength)
            tokens = max(table.tokens[slot], chunk.tokens)
            table.put(slot, strength, (table.span[slot][0], chunk.span[1]), tokens)
            self.grounding[slot, episode] = True
            return slot
        slot = table.room_for(strength, end=1)
        if slot < 0:
            return slot
        self.relations = {e: t for e, t in self.relations.items() if slot not in (e[0], e[2])}
        table.put(slot, strength, chunk.span, chunk.tokens)
        self.embedding[slot], self.gloss[slot], self.profile[slot] = mention, text, text
        self.mentions[slot], self.norm[slot] = 1, torch.linalg.vector_norm(mention)
        self.grounding[slot] = False
        self.grounding[slot, episode] = True
        return slot

    def _relate(self, subject: int, relation: int, target: int, time: float) -> None:
        if min(subject, relation, target) < 0 or subject == target:
            return
        edge = (subject, relation, target)
        if edge not in self.relations and len(self.relations) == self.config.num_relations:
            del self.relations[min(self.relations, key=self.relations.get)]
        self.relations[edge] = time
