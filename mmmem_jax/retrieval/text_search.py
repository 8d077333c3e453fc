"""Searching a memory of timed text: the nodes nearest a question, and the option they speak for.

The memory keeps ids; the embeddings of its rows stay on the host. A node is the token-weighted mean
of the rows whose text it holds, and counts as evidence only if half of its tokens or more come from
the evidence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmmem_jax.memory import slots
from mmmem_jax.memory.types import MemoryState


class Kept(NamedTuple):
    """The rows a memory holds, sorted by node."""

    row: np.ndarray  # [R] int, row of the stream
    node: np.ndarray  # [R] int, id of the node that holds it


def node_cosines(
    state: MemoryState, query: Float[Array, "Q D"], *, visuals: bool = False
) -> Float[Array, "Q N"]:
    """Cosine of each question with each node's text, or with its nearest view where that is more.

    With `visuals`, views share the space of text, and what fits best counts.
    """
    stream = state.episodic
    norm = jnp.linalg.norm(stream.text, axis=-1, keepdims=True)
    cosine = query @ (stream.text / jnp.maximum(norm, 1e-6)).T
    if visuals:
        views = jnp.einsum("qd,nkd->qkn", query, slots.unit(stream.prototypes))
        cosine = jnp.maximum(cosine, views.max(1))
    return cosine


def evidence_mass(
    state: MemoryState,
    query: Float[Array, "Q D"],
    evidence: Int[Array, "Q S"],
    temperature: float | Array,
    *,
    visuals: bool = False,
) -> Float[Array, "Q"]:
    """Probability that retrieval by softmax(cosine / temperature) lands on the evidence.

    A node gives the share of the rows from its first to its last that are evidence. An empty memory
    gives 0. `evidence` holds rows, -1 is padding. `visuals`: see `node_cosines`.
    """
    stream = state.episodic
    cosine = node_cosines(state, query, visuals=visuals)
    first, last = stream.source[:, 0], stream.source[:, 1]
    found = evidence[..., None]
    inside = (found >= jnp.maximum(first, 0)) & (found <= last)  # [Q, S, N]
    share = inside.sum(1) / (last - first + 1)
    log_p = jax.nn.log_softmax(jnp.where(stream.valid, cosine / temperature, -1e9))
    return jnp.sum(jnp.where(stream.valid, jnp.exp(log_p) * share, 0.0), axis=-1)


def kept_rows(node_of_row: np.ndarray, node_id: np.ndarray, valid: np.ndarray) -> Kept:
    """What a memory holds, from the node each row went into, [t], -1 for none, and its slots."""
    live = node_id[valid]
    alive = np.zeros(max(live.max(initial=-1), node_of_row.max(initial=-1)) + 2, bool)
    alive[live] = True  # the last entry, where -1 points, stays False
    row = np.flatnonzero(alive[node_of_row])
    order = np.argsort(node_of_row[row], kind="stable")
    return Kept(row[order], node_of_row[row][order])


def node_scores(
    kept: Kept, texts: np.ndarray, tokens: np.ndarray, embedding: np.ndarray
) -> np.ndarray:
    """Cosines of n texts with the kept nodes, float [n, nodes].

    Args:
      kept: what the memory holds.
      texts: float [n, E], unit embeddings.
      tokens: int [T], tokens of every row.
      embedding: float [T, E], unit embeddings of every row.
    """
    first, rows = _first_rows(kept), embedding[kept.row]
    if len(first) == len(rows):  # one row a node
        return texts @ rows.T
    weight = tokens[kept.row].astype(np.float32)
    nodes = np.add.reduceat(weight[:, None] * rows, first, axis=0)
    nodes /= np.maximum(np.linalg.norm(nodes, axis=-1, keepdims=True), 1e-6)
    return texts @ nodes.T


def node_hits(kept: Kept, tokens: np.ndarray, is_evidence: np.ndarray) -> np.ndarray:
    """Which kept nodes hold evidence: half of their tokens or more from rows [T] that are."""
    first = _first_rows(kept)
    weight = tokens[kept.row]
    if not len(first):
        return np.zeros(0, bool)
    from_evidence = np.add.reduceat(weight * is_evidence[kept.row], first)
    return 2 * from_evidence >= np.add.reduceat(weight, first)


def recall_at(scores: np.ndarray, hits: np.ndarray, k: int) -> bool:
    """Whether one of the k highest-scoring nodes [n] is a hit."""
    k = min(k, len(scores))
    return bool(k) and bool(hits[np.argpartition(-scores, k - 1)[:k]].any())


def choose_option(scores: np.ndarray) -> int | None:
    """The option whose best node scores highest, from [O, n]; None of an empty memory."""
    return int(scores.max(1).argmax()) if scores.shape[1] else None


def _first_rows(kept: Kept) -> np.ndarray:
    """Where each node's rows begin in `kept`."""
    return np.flatnonzero(np.r_[True, kept.node[1:] != kept.node[:-1]][: len(kept.node)])
