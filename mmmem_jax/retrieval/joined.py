"""Several memories searched as one: their valid slots side by side, padded to a few sizes."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from mmmem_jax import memory
from mmmem_jax.errors import UserError
from mmmem_jax.memory import MemoryConfig, MemoryState
from mmmem_jax.memory.types import LEVELS

LEAST_SLOTS = 512  # memories up to the capacity of one video share one compiled program


class Joined(NamedTuple):
    """A memory of several, and for each of its slots the (memory, slot) it came from, -1 if none.

    `state` holds NumPy arrays. Its node ids are those of the memories, each shifted past the ids
    of the memories before it; trace ids stay as they were, so they need `sensory` or `episodic`.
    """

    state: MemoryState
    sensory: Int[np.ndarray, "N1 2"]
    episodic: Int[np.ndarray, "N2 2"]
    schema: Int[np.ndarray, "N3 2"]

    @property
    def origin(self) -> Int[np.ndarray, "N 2"]:
        """(memory, slot) of all slots in the order of `retrieval.evidence`."""
        return np.concatenate([self.sensory, self.episodic, self.schema])


def join(states: Sequence[MemoryState], *, least: int = LEAST_SLOTS) -> Joined:
    """Puts the valid slots of one or more memories into one, on the host.

    Each level is padded to the next power of two, `least` or more, so that a search compiles once
    for whatever number and age of memories. Grounding stays within each memory (block-diagonal).
    Relations are left out: no retrieval reads them.

    Raises:
      UserError: no memory is given, or they differ in embedding size or number of prototypes.
    """
    states = jax.device_get(list(states))
    shapes = sorted({(s.config.dim, s.config.num_prototypes) for s in states})
    if len(shapes) != 1:
        raise UserError(
            f"memories of (embedding size, prototypes) {shapes} cannot be searched together; "
            "build all of them with the same settings"
            if shapes
            else "there is no memory to search; build one first"
        )
    origin = {name: _origin([getattr(s, name).valid for s in states]) for name in LEVELS}
    sizes = {f"{name}_slots": _padded(len(origin[name]), least) for name in LEVELS}
    dim, prototypes = shapes[0]
    config = MemoryConfig(**sizes, dim=dim, num_prototypes=prototypes, num_relations=0)
    empty = jax.device_get(memory.init(config))
    levels = {n: _fill(getattr(empty, n), [getattr(s, n) for s in states]) for n in LEVELS}
    shift = np.cumsum([0, *(int(s.episodic.next_id) for s in states)])
    for name in ("sensory", "episodic"):
        node_id = levels[name].node_id
        node_id[: len(origin[name])] += shift[origin[name][:, 0]]
    levels["episodic"] = levels["episodic"].replace(next_id=np.int32(shift[-1]))
    grounding = _grounding(
        origin["schema"], origin["episodic"], states, empty.schema.grounding.shape
    )
    levels["schema"] = levels["schema"].replace(grounding=grounding)
    state = empty.replace(
        **levels,
        clock=np.float32(max(s.clock for s in states)),
        num_items=np.int32(sum(s.num_items for s in states)),
        tokens=np.int32(sum(s.tokens for s in states)),
    )
    padded = {n: _rows(np.full((sizes[f"{n}_slots"], 2), -1), origin[n]) for n in LEVELS}
    return Joined(state, **padded)


def _origin(valid: Sequence[np.ndarray]) -> np.ndarray:
    """(memory, slot) [n, 2] of every valid slot."""
    parts = [np.stack([np.full(v.sum(), i), np.flatnonzero(v)], 1) for i, v in enumerate(valid)]
    return np.concatenate(parts).astype(np.int32)


def _padded(count: int, least: int) -> int:
    return max(least, 1 << max(count - 1, 0).bit_length())


def _fill(empty, levels: Sequence):
    """The empty level with the valid rows of the levels in its first slots, but for grounding."""
    filled = {}
    for field in dataclasses.fields(empty):
        value = getattr(empty, field.name)
        if value.shape[:1] == empty.valid.shape and field.name != "grounding":
            rows = np.concatenate([getattr(x, field.name)[x.valid] for x in levels])
            filled[field.name] = _rows(value, rows)
    return empty.replace(**filled)


def _rows(empty: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`rows`, and then what `empty` has there."""
    return np.concatenate([rows.astype(empty.dtype), empty[len(rows) :]])


def _grounding(entities, episodes, states, shape) -> np.ndarray:
    """Each memory's grounding edges in its block."""
    grounding = np.zeros(shape, bool)
    for i, state in enumerate(states):
        rows, columns = (np.flatnonzero(o[:, 0] == i) for o in (entities, episodes))
        edges = state.schema.grounding[np.ix_(entities[rows, 1], episodes[columns, 1])]
        grounding[np.ix_(rows, columns)] = edges
    return grounding
