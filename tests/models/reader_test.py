"""The reader: what must not change its answer, and that it can learn one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmmem_jax import memory
from mmmem_jax.memory import MemoryConfig
from mmmem_jax.models import reader as reader_lib
from mmmem_jax.models.reader import Reader
from mmmem_jax.retrieval import evidence as ev
from mmmem_jax.testing import toys

CONFIG = MemoryConfig(
    sensory_slots=4, episodic_slots=5, schema_slots=6, num_prototypes=2, num_relations=2, dim=8
)
LEVELS = ("sensory", "episodic", "schema")
NUM_SLOTS = 4 + 5 + 6
QUERY, OPTIONS = toys.random_questions(0, 3, 4, 8)


def option_log_probs(reader, state, query, options):
    """log q(y | m) of every option from the whole memory, [Q, O]."""
    asked = reader.ask(query, options)
    return jax.nn.log_softmax(reader.answer(reader_lib.project(state), asked))


@pytest.fixture(scope="module")
def model():
    """A reader far from its start: every parameter moved, so that everything is used."""
    graphdef, params = nnx.split(Reader(8, hidden=16, rngs=nnx.Rngs(0)))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, moved))


@pytest.fixture(scope="module")
def answer(model):
    """Option logits from a memory, a question, and an evidence mask or None."""

    @jax.jit
    def run(state, query, options, evidence=None):
        return model.answer(reader_lib.project(state), model.ask(query, options), evidence)

    return run


@pytest.fixture(scope="module")
def state():
    """A memory of which every third slot is empty."""
    state = toys.random_memory(0, CONFIG, num_chunks=48)
    for name in LEVELS:
        level = getattr(state, name)
        keep = jnp.arange(len(level.valid)) % 3 > 0
        state = state.replace(**{name: level.replace(valid=level.valid & keep)})
    return state


def rows_of(level):
    """Names of the per-slot arrays of a level."""
    size = len(level.valid)
    fields = [f.name for f in dataclasses.fields(level)]
    return [n for n in fields if np.ndim(getattr(level, n)) and len(getattr(level, n)) == size]


def with_rows(state, name, change):
    """The state with every per-slot array x of a level replaced by change(x, valid)."""
    level = getattr(state, name)
    changed = {n: change(getattr(level, n), level.valid) for n in rows_of(level)}
    return state.replace(**{name: level.replace(**changed)})


def test_the_options_are_told_apart(answer, state):
    logits = answer(state, QUERY, OPTIONS)
    assert logits.shape == (3, 4)
    assert np.all(np.ptp(logits, axis=1) > 1e-2)
    assert np.all(np.abs(logits - answer(memory.init(CONFIG), QUERY, OPTIONS)).max(1) > 1e-3)


@pytest.mark.parametrize("level", LEVELS)
def test_slots_have_no_order(answer, state, level):
    order = np.random.default_rng(0).permutation(len(getattr(state, level).valid))
    shuffled = with_rows(state, level, lambda x, valid: x[order])
    assert not np.array_equal(getattr(shuffled, level).valid, getattr(state, level).valid)
    np.testing.assert_allclose(
        answer(shuffled, QUERY, OPTIONS), answer(state, QUERY, OPTIONS), atol=1e-4
    )


@pytest.mark.parametrize("level", LEVELS)
def test_empty_slots_may_hold_anything(answer, state, level):
    def spoil(x, valid):
        if x.dtype != jnp.float32:
            return x
        return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, 50.0)

    spoiled = with_rows(state, level, spoil)
    np.testing.assert_allclose(
        answer(spoiled, QUERY, OPTIONS), answer(state, QUERY, OPTIONS), atol=1e-4
    )


def test_options_have_no_order(answer, state):
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(
        answer(state, QUERY, OPTIONS[:, order]), answer(state, QUERY, OPTIONS)[:, order], atol=1e-4
    )


def test_questions_do_not_see_each_other(answer, state):
    together = answer(state, QUERY, OPTIONS)
    for q in range(3):
        alone = answer(state, QUERY[q : q + 1], OPTIONS[q : q + 1])
        np.testing.assert_allclose(alone[0], together[q], atol=1e-4)


def test_evidence_is_the_rest_removed(answer, state):
    rng = np.random.default_rng(0)
    mask = rng.random((3, NUM_SLOTS)) < 0.5
    found = answer(state, QUERY, OPTIONS, jnp.asarray(mask))
    for q in range(3):
        cut, start = state, 0
        for name in LEVELS:
            level = getattr(state, name)
            here = mask[q, start : start + len(level.valid)]
            cut = cut.replace(**{name: level.replace(valid=level.valid & here)})
            start += len(level.valid)
        np.testing.assert_allclose(found[q], answer(cut, QUERY, OPTIONS)[q], atol=1e-4)


def test_all_slots_as_evidence_are_no_evidence_given(answer, state):
    everything = jnp.ones((3, NUM_SLOTS), bool)
    np.testing.assert_allclose(
        answer(state, QUERY, OPTIONS, everything), answer(state, QUERY, OPTIONS), atol=1e-5
    )
    assert np.array_equal(reader_lib.project(state).valid, ev.slot_valid(state))


@pytest.mark.parametrize("changes", [{"schema_slots": 0}, {"num_prototypes": 1}])
def test_other_memories(model, changes):
    config = dataclasses.replace(CONFIG, num_relations=0, **changes)
    run = jax.jit(lambda s: option_log_probs(model, s, QUERY, OPTIONS))
    for state in (memory.init(config), toys.random_memory(0, config)):
        log_probs = run(state)
        np.testing.assert_allclose(np.exp(log_probs).sum(1), 1, atol=1e-5)


def test_time_of_day_comes_round():
    span = jnp.array([[6 * 3600.0, 6 * 3600.0], [30 * 3600.0, 30 * 3600.0]])
    features = reader_lib.slot_features(span, jnp.ones(2), jnp.asarray(90_000.0))
    np.testing.assert_allclose(features[0, 3:5], features[1, 3:5], atol=1e-3)
    np.testing.assert_allclose(features[0, 3:5], [1, 0], atol=1e-3)
    assert features[0, 1] > features[1, 1] == 0  # the second is still to come: of no age


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def holding(text) -> memory.MemoryState:
    """A memory of five episodes with the given texts [5, 8]."""
    state = memory.init(CONFIG)
    stream = state.episodic.replace(text=text, valid=jnp.ones(5, bool))
    return state.replace(clock=jnp.asarray(60.0), episodic=stream)


def recall_batch(key, size=32):
    """Memories in which one episode tells the question with its right option."""
    k1, k2, k3, k4 = jax.random.split(key, 4)
    query, options = jax.random.normal(k1, (size, 8)), jax.random.normal(k2, (size, 4, 8))
    right = jax.random.randint(k3, (size,), 0, 4)
    told = query + jnp.take_along_axis(options, right[:, None, None], axis=1)[:, 0]
    text = jax.random.normal(k4, (size, 5, 8)).at[:, 2].set(told)
    return jax.vmap(holding)(unit(text)), unit(query), unit(options), right


def test_learns_which_option_the_memory_holds():
    graphdef, params = nnx.split(Reader(8, hidden=16, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(1e-2)

    def loss_fn(params, key):
        model = nnx.merge(graphdef, params)
        state, query, options, right = recall_batch(key)

        def one(state, query, options):
            return option_log_probs(model, state, query[None], options[None])[0]

        log_probs = jax.vmap(one)(state, query, options)
        accuracy = jnp.mean(jnp.argmax(log_probs, -1) == right)
        return -jnp.mean(jnp.take_along_axis(log_probs, right[:, None], 1)), accuracy

    @jax.jit
    def train(params):
        def body(carry, key):
            params, opt_state = carry
            (_, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, key)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), accuracy

        keys = jax.random.split(jax.random.key(0), 200)
        return jax.lax.scan(body, (params, optimizer.init(params)), keys)[1]

    accuracy = train(params)
    assert accuracy[-20:].mean() > 0.85
