"""Searching kept rows: against plain loops over nodes."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax import memory
from mmmem_jax.memory import ADD_NEW, MERGE, Item, MemoryConfig
from mmmem_jax.retrieval import text_search
from mmmem_jax.retrieval.text_search import Kept

RNG = np.random.default_rng(0)


def unit(*shape):
    x = RNG.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_kept_rows_are_those_of_live_nodes_sorted_by_node():
    node_of_row = np.array([0, 1, 0, -1, 2, 1])
    kept = text_search.kept_rows(
        node_of_row, node_id=np.array([1, 7, 0]), valid=np.array([True, False, True])
    )
    np.testing.assert_array_equal(kept.row, [0, 2, 1, 5])
    np.testing.assert_array_equal(kept.node, [0, 0, 1, 1])


@pytest.mark.parametrize("rows", [0, 4])
def test_an_empty_memory_holds_no_row(rows):
    kept = text_search.kept_rows(np.arange(rows), np.full(3, -1), np.zeros(3, bool))
    assert kept.row.size == kept.node.size == 0
    scores = text_search.node_scores(kept, unit(2, 5), np.ones(rows), unit(rows, 5))
    hits = text_search.node_hits(kept, np.ones(rows, int), np.ones(rows, bool))
    assert scores.shape == (2, 0)
    assert not text_search.recall_at(scores[0], hits, 5)
    assert text_search.choose_option(scores) is None


@pytest.mark.parametrize("node", [[3, 5, 9, 11], [3, 3, 5, 5], [2, 2, 2, 2], [1, 4, 4, 6]])
def test_a_node_scores_as_the_weighted_mean_of_its_rows(node):
    embedding, text, tokens = unit(6, 8), unit(3, 8), np.array([3, 1, 4, 1, 5, 9])
    kept = Kept(np.array([0, 2, 3, 5]), np.array(node))
    scores = text_search.node_scores(kept, text, tokens, embedding)
    for column, n in enumerate(sorted(set(node))):
        rows = kept.row[kept.node == n]
        mean = (tokens[rows, None] * embedding[rows]).sum(0)
        expected = text @ (mean / np.linalg.norm(mean))
        np.testing.assert_allclose(scores[:, column], expected, atol=1e-6)


def test_a_node_is_a_hit_only_if_half_its_tokens_are_evidence():
    kept = Kept(np.arange(5), np.array([0, 0, 1, 1, 2]))
    tokens = np.array([3, 5, 4, 4, 2])
    is_evidence = np.array([True, False, True, False, False])
    hits = text_search.node_hits(kept, tokens, is_evidence)
    np.testing.assert_array_equal(hits, [False, True, False])


def test_recall_looks_at_the_k_best_nodes_only():
    scores, hits = np.array([0.1, 0.9, 0.5, 0.3]), np.array([True, False, False, False])
    assert [text_search.recall_at(scores, hits, k) for k in (1, 3, 4, 9)] == [
        False,
        False,
        True,
        True,
    ]


def test_the_option_with_the_best_single_node_is_chosen():
    assert text_search.choose_option(np.array([[0.2, 0.3], [0.9, 0.0], [0.5, 0.5]])) == 1


def stream_memory(actions, text):
    config = MemoryConfig(
        sensory_slots=1, episodic_slots=4, schema_slots=0, num_prototypes=1, dim=text.shape[1]
    )
    state = memory.init(config)
    zeros = jnp.zeros(text.shape[1])
    for t, (action, row) in enumerate(zip(actions, text, strict=True)):
        item = Item(
            visual=zeros, coarse=zeros, text=jnp.asarray(row), span=jnp.array([t, t + 1.0]),
            tokens=jnp.int32(4), mention=jnp.zeros((0, text.shape[1])),
            mention_valid=jnp.zeros(0, bool), change=jnp.float32(1), relation=jnp.int32(-1),
            trace_id=jnp.int32(t), valid=jnp.asarray(True),
        )  # fmt: skip
        state = memory.step(state, item, jnp.int32(action))
    return state


def test_evidence_mass_is_the_softmax_over_nodes_weighted_by_their_evidence():
    text = unit(4, 8)
    state = stream_memory([ADD_NEW, ADD_NEW, MERGE, ADD_NEW], text)
    evidence = jnp.array([[0, -1], [2, -1], [1, 2], [-1, -1]])
    query = jnp.asarray(unit(4, 8))
    mass = text_search.evidence_mass(state, query, evidence, 0.1)
    nodes = np.stack([text[0], (text[1] + text[2]) / 2, text[3]])
    nodes /= np.linalg.norm(nodes, axis=-1, keepdims=True)
    p = np.exp(np.asarray(query) @ nodes.T / 0.1)
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(mass, [p[0, 0], p[1, 1] / 2, p[2, 1], 0.0], rtol=2e-4, atol=1e-6)


def test_an_empty_memory_gives_no_evidence_mass():
    state = stream_memory([], unit(0, 8))
    mass = text_search.evidence_mass(state, jnp.asarray(unit(2, 8)), jnp.array([[0], [-1]]), 0.1)
    np.testing.assert_array_equal(mass, 0.0)
