"""One bank of what many videos' memories hold, its rows spread over a mesh and searched in place.

    bank = put(states, mesh)  # on one device, or a pod
    found = retrieve(bank, query, temperature=0.1, top_k=32)
    videos, slots = np.moveaxis(found.origin, -1, 0)

Where `joined.join` makes one memory of a few, to be searched top down, this is for more keys than
one device has memory for: exact, each key read once, and only summaries travel between devices.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mmmem_jax.errors import UserError
from mmmem_jax.kernels.retrieval_entropy import sharded
from mmmem_jax.memory import MemoryState

ROWS = 512  # each device's rows are a multiple: whole tiles, and few shapes to compile


class Bank(NamedTuple):
    """Unit vectors, rows over all axes of the mesh, and on the host where each comes from."""

    keys: Float[Array, "R D"]
    mask: jax.Array  # bool [R], False for padding
    origin: Int[np.ndarray, "R 2"]  # (video, slot), slots as in `retrieval.evidence`; -1: padding


class Found(NamedTuple):
    """Of each query, over all keys: see `kernels.retrieval_entropy`."""

    log_z: Float[Array, "B"]
    entropy: Float[Array, "B"]  # retrieval entropy over the keys, nats
    top_values: Float[Array, "B K"]  # cosine over temperature, falling
    origin: Int[np.ndarray, "B K 2"]  # (video, slot); -1 where there are fewer than K keys


def put(states: Sequence[MemoryState], mesh: Mesh, *, dtype=jnp.float32) -> Bank:
    """The bank of one or more memories, each valid slot with every vector that it holds.

    A slot that holds a text and a view has two keys. Every process gives the same memories.

    Args:
      states: memories of one embedding size, without batch axes.
      mesh: whose devices share the rows.
      dtype: float32 or bfloat16, of the keys.

    Raises:
      UserError: no memory is given, or they differ in embedding size.
    """
    states = jax.device_get(list(states))
    dims = sorted({s.config.dim for s in states})
    if len(dims) != 1:
        raise UserError(
            f"memories of embedding sizes {dims} cannot share a bank"
            if dims
            else "there is no memory to search; build one first"
        )
    vectors, slots = zip(*map(_vectors, states), strict=True)
    origin = np.concatenate([np.stack([np.full_like(s, i), s], 1) for i, s in enumerate(slots)])
    padded = -(-max(len(origin), 1) // (ROWS * mesh.size)) * ROWS * mesh.size
    pad = ((0, padded - len(origin)), (0, 0))
    origin = np.pad(origin, pad, constant_values=-1)
    keys = np.pad(np.concatenate(vectors), pad).astype(dtype)
    over_mesh = NamedSharding(mesh, P(mesh.axis_names))

    def spread(x):
        return jax.make_array_from_callback(x.shape, over_mesh, x.__getitem__)

    return Bank(spread(keys), spread(origin[:, 0] >= 0), origin)


def retrieve(
    bank: Bank, query: Float[Array, "B D"], *, temperature: float | Array, top_k: int
) -> Found:
    """Searches all keys for B queries: cosines over the temperature, their softmax and the best.

    The same whatever the mesh, but for float rounding.

    Args:
      bank: made by `put`.
      query: float [B, D], of any length but 0.
      temperature: positive; of float32 precision.
      top_k: K, at least 1; counts keys, of which a slot may have several.
    """
    mesh = bank.keys.sharding.mesh
    *found, rows = _search(query, bank.keys, bank.mask, temperature, mesh=mesh, top_k=top_k)
    rows = np.asarray(rows)
    return Found(*found, np.where(rows[..., None] < 0, -1, bank.origin[rows]))


@partial(jax.jit, static_argnames=("mesh", "top_k"))
def _search(query, keys, mask, temperature, *, mesh: Mesh, top_k: int):
    query = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
    return sharded.retrieval_entropy(
        query, keys, mask, mesh=mesh, axis=mesh.axis_names, temperature=temperature, top_k=top_k
    )


def _vectors(state: MemoryState) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [r, D] that the valid slots hold, and the slot of each [r]."""
    s, e, g = state.sensory, state.episodic, state.schema
    levels = [
        (s.valid, s.text[:, None], s.visual[:, None]),
        (e.valid, e.text[:, None], e.prototypes),
        (g.valid, g.embedding[:, None], g.gloss[:, None]),
    ]
    vectors, slots, first = [], [], 0
    for valid, *held in levels:
        held = np.concatenate(held, axis=1)  # [n, vectors of a slot, D]
        slot, which = np.nonzero(valid[:, None] & np.any(held != 0, axis=-1))
        vectors.append(held[slot, which])
        slots.append(first + slot)
        first += len(valid)
    vectors = np.concatenate(vectors)
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / norm, np.concatenate(slots).astype(np.int32)
