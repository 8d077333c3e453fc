"""Tests of mmmem_jax/train/reader_phase.py: what the reader learns from, and its calibration."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmmem_jax.data.encoded import QuestionBatch
from mmmem_jax.memory.types import MemoryConfig
from mmmem_jax.models.reader import Reader, project
from mmmem_jax.retrieval.top_down import RetrievalConfig, best_slots, search
from mmmem_jax.testing import toys
from mmmem_jax.train import reader_phase

CONFIG = MemoryConfig(sensory_slots=4, episodic_slots=4, schema_slots=4, dim=8)


@pytest.fixture(scope="module")
def items():
    streams = [toys.random_items(seed, 12) for seed in range(8)]
    return jax.tree.map(lambda *x: jnp.stack(x), *streams)


def test_full_memories_hold_every_chunk(items):
    states = jax.jit(reader_phase.full_memories, static_argnums=1)(items, CONFIG)
    np.testing.assert_array_equal(states.episodic.valid.sum(-1), 12)
    np.testing.assert_array_equal(states.episodic.tokens.sum(-1), items.tokens.sum(-1))
    np.testing.assert_array_equal(jnp.sort(states.sensory.trace_id), items.trace_id)


def test_unlimited_memory_never_has_fewer_slots():
    for num_chunks in (1, 12, 200):
        config = reader_phase.unlimited_config(CONFIG, num_chunks)
        assert config.episodic_slots == config.sensory_slots == num_chunks
        assert config.schema_slots >= CONFIG.schema_slots
        assert dataclasses.replace(
            config, sensory_slots=4, episodic_slots=4, schema_slots=4
        ) == CONFIG  # fmt: skip


def test_varied_memories_vary(items):
    make = jax.jit(reader_phase.varied_memories, static_argnums=2)
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), items)
    states = make(jax.random.key(0), same, CONFIG)
    assert np.all(states.episodic.valid.sum(-1) <= 4)
    assert len({row.tobytes() for row in np.asarray(states.episodic.source)}) > 4
    again, other = (make(jax.random.key(seed), same, CONFIG) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, states, again)
    assert np.any(states.episodic.source != other.episodic.source)


def test_calibration_error_of_known_confidence():
    log_probs = np.log(np.tile([0.7, 0.1, 0.1, 0.1], (10, 1)))
    for hits, error in ((7, 0.0), (10, 0.3), (0, 0.7)):
        right = np.arange(10) < hits
        found = reader_phase.expected_calibration_error(log_probs, right)
        assert found == pytest.approx(error, abs=1e-6)
    assert reader_phase.expected_calibration_error(np.zeros((0, 4)), np.zeros(0, bool)) == 0.0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found(temperature):
    logits = 2.0 * jax.random.normal(jax.random.key(0), (4000, 4))
    answer = jax.random.categorical(jax.random.key(1), logits)
    found = jax.jit(reader_phase.fit_temperature)(logits * temperature, answer)
    assert float(jnp.exp(found)) == pytest.approx(temperature, rel=0.1)


def test_without_answers_the_temperature_stays():
    assert reader_phase.fit_temperature(jnp.zeros((0, 4)), jnp.zeros(0, jnp.int32)) == 0.0


def test_a_question_reads_the_search_to_its_depth_or_the_best_slots():
    state = toys.random_memory(0, CONFIG)
    query, options = toys.random_questions(0, 3, 4, 8)
    questions = QuestionBatch(query, options, *[jnp.zeros(3, jnp.int32)] * 3, jnp.ones(3, bool))
    model, retrieval = Reader(8, rngs=nnx.Rngs(0)), RetrievalConfig()
    depth, flat = jnp.array([0, 3, 3]), jnp.array([0, 0, 5])
    answer = jax.jit(lambda *asked: reader_phase._answer(model, *asked, retrieval))
    found = answer(state, questions, depth, flat)

    searched = search(state, query, options, retrieval)[0] <= depth[:, None]
    best = best_slots(state, query, options, 5)
    assert np.any(best[2] != searched[2])
    evidence = jnp.where(flat[:, None] > 0, best, searched)
    whole = jax.jit(
        lambda state, seen: model.answer(project(state), model.ask(query, options), seen)
    )
    wanted = whole(state, evidence)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
