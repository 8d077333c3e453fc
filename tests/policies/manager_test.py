"""The learned manager: where it starts, how it samples, what it reads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmmem_jax import memory
from mmmem_jax.memory import ADD_NEW, DISCARD, MemoryConfig, pyramid
from mmmem_jax.policies import manager
from mmmem_jax.testing import toys

CONFIG = MemoryConfig(
    sensory_slots=3, episodic_slots=4, schema_slots=5, num_prototypes=2, num_relations=2, dim=8
)
ITEMS = toys.random_items(0, 40)


# The same function for the same arguments, so that it is compiled once.
make_decide_fn = functools.cache(
    lambda graphdef, temperature: manager.make_decide_fn(graphdef, temperature=temperature)
)
scan = jax.jit(memory.scan, static_argnames="decide_fn")


@pytest.fixture(scope="module")
def networks():
    """Network definition, fresh parameters, and parameters that prefer some actions."""
    graphdef, fresh = nnx.split(manager.Manager(8, hidden=16, rngs=nnx.Rngs(0)))
    leaves, treedef = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return graphdef, fresh, jax.tree.unflatten(treedef, moved)


def run(networks, params, temperature=1.0, config=CONFIG, items=ITEMS, key=0):
    decide_fn = make_decide_fn(networks[0], temperature)
    return scan(params, jax.random.key(key), memory.init(config), items, decide_fn=decide_fn)


@pytest.fixture(scope="module")
def fresh_run(networks):
    return run(networks, networks[1])


@pytest.fixture(scope="module")
def moved_run(networks):
    return run(networks, networks[2])


def test_an_untrained_manager_has_no_preference(fresh_run):
    output = fresh_run[1]
    assert not np.any(output.logits)
    np.testing.assert_allclose(output.log_prob, -np.log(3), atol=1e-6)
    assert len(np.unique(output.action)) == 3


def test_log_prob_is_that_of_the_action_taken(moved_run):
    output = moved_run[1]
    log_probs = jax.nn.log_softmax(output.logits)
    taken = np.take_along_axis(np.asarray(log_probs), np.asarray(output.action)[:, None], 1)[:, 0]
    assert np.ptp(taken) > 0.5
    np.testing.assert_allclose(output.log_prob, taken, atol=1e-6)


def test_temperature_zero_takes_the_likeliest(networks):
    _, output = run(networks, networks[2], temperature=0.0)
    assert np.array_equal(output.action, np.argmax(output.logits, -1))
    _, again = run(networks, networks[2], temperature=0.0, key=5)
    assert np.array_equal(output.action, again.action)


def test_samples_follow_the_tempered_policy(networks):
    item = jax.tree.map(lambda x: x[0], ITEMS)
    state = memory.init(CONFIG)
    for temperature in (1.0, 0.5):
        decide_fn = manager.make_decide_fn(networks[0], temperature=temperature)
        noise = pyramid.draw_noise(jax.random.key(2), jnp.arange(2000))
        out = jax.jit(jax.vmap(lambda x, d=decide_fn: d(networks[2], x, state, item)))(noise)
        probs = jax.nn.softmax(out.logits[0] / temperature)
        np.testing.assert_allclose(np.bincount(out.action, minlength=3) / 2000, probs, atol=0.04)
        np.testing.assert_allclose(out.log_prob, jnp.log(probs)[out.action], atol=1e-5)


def test_strength_is_the_margin_of_keeping_over_discarding(networks):
    state = memory.init(CONFIG)
    item = jax.tree.map(lambda x: x[3], ITEMS)
    out = manager.decide(networks[0], networks[2], jnp.array([0.5, 0.5]), state, item)
    assert float(out.strength) == float(out.logits[ADD_NEW] - out.logits[DISCARD]) != 0


def test_logits_follow_from_the_recorded_context(networks, moved_run):
    # The update reads the context of the rollout instead of the memory.
    output = moved_run[1]
    assert output.context.shape == (40, manager.NUM_CONTEXT)
    again = manager.logits_fn(
        networks[0], networks[2], manager.item_features(ITEMS), output.context
    )
    np.testing.assert_allclose(again, output.logits, atol=1e-5)


def test_context_is_finite_and_tells_an_empty_memory_from_a_full_one(networks):
    item = jax.tree.map(lambda x: x[0], ITEMS)
    empty = manager.context_features(memory.init(CONFIG), item)
    full = manager.context_features(toys.random_memory(0, CONFIG), item)
    assert np.all(np.isfinite(empty))
    assert np.all(np.isfinite(full))
    assert [float(x[4]) for x in (empty, full)] == [0.0, 1.0]  # share of slots filled
    assert [float(x[9]) for x in (empty, full)] == [0.0, 1.0]  # whether there is an e*


def test_without_a_schema(networks):
    config = dataclasses.replace(CONFIG, schema_slots=0, num_relations=0)
    state, output = run(networks, networks[2], config=config)
    assert np.all(np.isfinite(output.logits))
    assert int(state.num_items) == 40


def test_without_mentions(networks):
    items = toys.random_items(0, 8, num_mentions=0)
    _, output = run(networks, networks[2], items=items)
    assert np.all(np.isfinite(output.logits))
