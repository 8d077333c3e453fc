"""Tests of the bank of many memories over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mmmem_jax import memory
from mmmem_jax.errors import UserError
from mmmem_jax.memory import MemoryConfig
from mmmem_jax.retrieval import bank
from mmmem_jax.retrieval import evidence as ev
from mmmem_jax.testing import toys

MEMORY = MemoryConfig(sensory_slots=6, episodic_slots=8, schema_slots=7, dim=8, num_relations=4)
OTHER = MemoryConfig(sensory_slots=9, episodic_slots=5, schema_slots=3, dim=8, num_relations=2)


def mesh_of(*shape):
    names = ("data", "group", "model")[: len(shape)]
    devices = jax.devices()[: np.prod(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


@pytest.fixture(scope="module")
def states():
    """Full, empty, and of other capacities."""
    full = toys.random_memory(0, MEMORY, num_chunks=30)
    other = toys.random_memory(2, OTHER, num_chunks=30)
    return [full, memory.init(MEMORY), other]


@jax.jit
def cosines(state, query):
    """Of each slot's best vector [Q, N]; -inf if invalid, 0 if it holds none."""
    cosine = ev.slot_similarity(state, query, jnp.zeros((len(query), 1, query.shape[1])))
    return jnp.where(ev.slot_valid(state), cosine, -jnp.inf)


@pytest.fixture(scope="module")
def query():
    return np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def alone(states, query):
    """What one device finds."""
    return bank.retrieve(bank.put(states, mesh_of(1)), query, temperature=0.3, top_k=12)


@pytest.mark.parametrize("shape", [(8,), (2, 2, 2)])
def test_every_mesh_finds_what_one_device_finds(states, query, alone, shape):
    spread = bank.put(states, mesh_of(*shape))
    assert {len(x.data) for x in spread.keys.addressable_shards} == {bank.ROWS}
    found = bank.retrieve(spread, query, temperature=0.3, top_k=12)
    np.testing.assert_array_equal(found.origin, alone.origin)
    for got, wanted in zip(found[:3], alone[:3], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_best_key_is_that_of_the_best_slot(states, query, alone):
    of_each = [np.asarray(cosines(state, query)) for state in states]
    best = np.argmax([c.max(1) for c in of_each], axis=0)
    for row, video in enumerate(best):
        np.testing.assert_array_equal(alone.origin[row, 0], (video, of_each[video][row].argmax()))
        top = 0.3 * alone.top_values[row, 0]
        np.testing.assert_allclose(top, of_each[video][row].max(), rtol=1e-5)


def test_all_keys_are_found_once_and_their_softmax_adds_up(states, query):
    spread = bank.put(states, mesh_of(4))
    number = int(spread.mask.sum())
    found = bank.retrieve(spread, query, temperature=0.3, top_k=number + 2)
    assert (found.origin[:, number:] == -1).all()
    videos, slots = np.moveaxis(found.origin[:, :number], -1, 0)
    for i, state in enumerate(states):
        nearest = cosines(state, np.concatenate([query[:1], -query[:1]])).max(0)
        held = np.flatnonzero(nearest > 0)  # 0: an empty slot's
        for row in range(len(query)):
            np.testing.assert_array_equal(np.unique(slots[row][videos[row] == i]), held)
    log_p = np.asarray(found.top_values)[:, :number] - np.asarray(found.log_z)[:, None]
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.entropy, -(np.exp(log_p) * log_p).sum(1), rtol=1e-5)


def test_memories_that_cannot_share_a_bank_are_named(states):
    with pytest.raises(UserError, match=r"sizes \[8, 12\]"):
        bank.put([*states, memory.init(MemoryConfig(dim=12))], mesh_of(1))
    with pytest.raises(UserError, match="no memory"):
        bank.put([], mesh_of(1))
