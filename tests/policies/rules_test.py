"""Every fixed rule behind the learned manager's signature, on the same budget."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax import memory
from mmmem_jax.memory import ADD_NEW, DISCARD, MERGE, MemoryConfig, pyramid
from mmmem_jax.policies import rules
from mmmem_jax.testing import toys

T, SLOTS, B = 24, 4, 3
CONFIG = MemoryConfig(
    sensory_slots=3, episodic_slots=SLOTS, schema_slots=0, num_relations=0, num_prototypes=1, dim=8
)
NOISE = jnp.array([0.5, 0.5])
RULES = {
    rule.name: rule
    for rule in [
        *rules.fixed_rules(T, SLOTS, similarity=0.3, surprise_change=1.0, half_life=10.0),
        rules.random_actions([0.5, 0.3, 0.2]),
        rules.unlimited(),
    ]
}


@jax.jit
def run_together(params, keys, init, items):
    """All rules over all streams in one program: params [R, ...], keys [B], items [B, T]."""
    over_time = functools.partial(memory.scan, decide_fn=rules.decide)
    over_streams = jax.vmap(over_time, in_axes=(None, 0, None, 0))
    return jax.vmap(over_streams, in_axes=(0, None, None, None))(params, keys, init, items)


def run_all(config):
    """{name: (state, output)} of all rules; those of one configuration run together."""
    found, keys = {}, jax.random.split(jax.random.key(0), B)
    for changes in ({}, {"merge_target": "nearest"}):
        group = [rule for rule in RULES.values() if rule.changes == changes]
        params = jax.tree.map(lambda *x: jnp.stack(x), *(rule.params for rule in group))
        init = memory.init(group[0].configure(config))
        out = jax.tree.map(np.asarray, run_together(params, keys, init, batch()))
        for i, rule in enumerate(group):
            found[rule.name] = jax.tree.map(lambda x, i=i: x[i], out)
    assert set(found) == set(RULES)
    return found


def run(rule, items, config=CONFIG, seed=0):
    """One rule over streams [B, T]."""
    keys = jax.random.split(jax.random.key(seed), len(items.valid))
    params = jax.tree.map(lambda x: x[None], rule.params)
    out = run_together(params, keys, memory.init(rule.configure(config)), items)
    return jax.tree.map(lambda x: np.asarray(x[0]), out)


def batch(**fields):
    items = [toys.random_items(seed, T) for seed in range(B)]
    return jax.tree.map(lambda *x: jnp.stack(x), *items).replace(**fields)


@pytest.fixture(scope="module")
def results():
    return run_all(CONFIG)


@pytest.fixture(scope="module")
def budget_results():
    return run_all(dataclasses.replace(CONFIG, token_budget=9))


def kept(state, b=0):
    """First chunk of every episode held, in order."""
    stream = state.episodic
    return sorted(stream.source[b, stream.valid[b], 0].tolist())


@pytest.mark.parametrize("name", RULES)
class TestEveryRule:
    def test_decides_in_a_batched_scan(self, results, name):
        state, output = results[name]
        assert output.action.shape == (B, T)
        assert output.action.dtype == np.int32
        assert set(np.unique(output.action)) <= {ADD_NEW, MERGE, DISCARD}
        assert output.logits.shape == (B, T, 3)
        assert output.context.shape == (B, T, 0)
        assert np.all(np.isfinite(state.episodic.strength))

    def test_holds_the_capacity(self, results, name):
        state, output = results[name]
        assert state.episodic.valid.shape == (B, SLOTS)
        least = 0 if name == "random" else 1  # it may discard the first chunk
        assert np.all((least <= output.slots) & (output.slots <= SLOTS))
        assert output.slots[:, -1].max() > 1 or name == "surprise"

    def test_changes_no_capacity(self, results, name):
        changed = RULES[name].configure(CONFIG)
        for field in ("sensory_slots", "episodic_slots", "schema_slots", "token_budget"):
            assert getattr(changed, field) == getattr(CONFIG, field)

    def test_holds_a_token_budget(self, budget_results, name):
        _, output = budget_results[name]
        assert np.all(output.tokens <= 9)
        assert np.any(output.tokens > 0)


def test_the_rules_of_the_paper_are_there():
    names = {r.name for r in rules.fixed_rules(8, 2, similarity=1, surprise_change=1, half_life=1)}
    assert names == {
        "keep_recent", "uniform", "uniform_merge", "reservoir", "similarity_merge", "surprise",
        "kmeans", "forgetting_curve",
    }  # fmt: skip


def test_keep_recent_keeps_the_last(results):
    for b in range(B):
        assert kept(results["keep_recent"][0], b) == list(range(T - SLOTS, T))


def test_unlimited_keeps_all():
    config = dataclasses.replace(CONFIG, episodic_slots=T, sensory_slots=T)
    state, _ = run(rules.unlimited(), batch(), config)
    assert kept(state) == list(range(T))
    assert np.array_equal(state.episodic.tokens.sum(1), batch().tokens.sum(1))


def test_uniform_keeps_evenly_spaced_chunks(results):
    assert kept(results["uniform"][0]) == [0, 6, 12, 18]


@pytest.mark.parametrize(("chunks", "slots"), [(24, 4), (24, 5), (24, 24), (7, 3), (3, 4)])
def test_uniform_keeps_as_many_as_fit(chunks, slots):
    params = rules.uniform(chunks, slots).params
    state = memory.init(CONFIG)
    item = jax.tree.map(lambda x: x[0], toys.random_items(0, 1))

    def action(t):
        return rules.decide(params, NOISE, state.replace(num_items=t), item).action

    times = np.flatnonzero(np.asarray(jax.vmap(action)(jnp.arange(chunks))) == ADD_NEW)
    assert len(times) == min(chunks, slots)
    assert times[0] == 0
    assert set(np.diff(times)) <= {chunks // slots, -(-chunks // slots)}


def test_uniform_merge_covers_the_stream_in_equal_parts(results):
    stream = results["uniform_merge"][0].episodic
    assert np.all(stream.count == T // SLOTS)
    assert kept(results["uniform_merge"][0]) == [0, 6, 12, 18]
    order = np.argsort(stream.source[0, :, 0])
    assert stream.source[0, order, 1].tolist() == [5, 11, 17, 23]


def test_reservoir_draws_anew_for_every_stream(results):
    state, _ = results["reservoir"]
    assert kept(state, 0) != kept(state, 1)
    other, _ = run(RULES["reservoir"], batch(), seed=9)
    assert kept(state, 0) != kept(other, 0)


def test_similarity_merge_cuts_where_the_stream_changes():
    views = jnp.repeat(jnp.eye(8)[:4], T // 4, axis=0)  # four scenes
    items = batch(text=jnp.stack([views] * B), coarse=jnp.zeros((B, T, 8)))
    state, output = run(rules.similarity_merge(0.9), items)
    assert kept(state) == [0, 6, 12, 18]
    assert (output.action == ADD_NEW).sum(1).tolist() == [4] * B


def test_surprise_cuts_at_boundaries_and_keeps_the_most_surprising():
    change = np.full(T, 0.1, np.float32)
    change[[0, 3, 7, 11, 15, 19]] = [1.0, 0.6, 0.9, 0.7, 0.8, 0.65]
    items = batch(change=jnp.tile(change, (B, 1)))
    state, output = run(rules.surprise(0.5), items)
    assert np.flatnonzero(output.action[0] == ADD_NEW).tolist() == [0, 3, 7, 11, 15, 19]
    assert kept(state) == [0, 7, 11, 15]


def test_kmeans_fills_the_slots_then_joins_the_nearest(results):
    assert results["kmeans"][1].action[0].tolist() == [ADD_NEW] * SLOTS + [MERGE] * (T - SLOTS)
    views = jnp.tile(jnp.eye(8)[:4], (T // 4, 1))
    items = batch(text=jnp.stack([views] * B), coarse=jnp.zeros((B, T, 8)))
    items = items.replace(tokens=jnp.ones((B, T), jnp.int32))
    state, _ = run(rules.kmeans(), items)
    np.testing.assert_allclose(state.episodic.text[0], np.eye(8)[:4], atol=1e-6)
    assert state.episodic.count[0].tolist() == [T // 4] * 4


def test_forgetting_curve_weighs_salience_against_age():
    # Salience 16 times that of the next chunk lasts four half-lives.
    rule = rules.forgetting_curve(half_life=10.0, threshold=2.0)
    item = jax.tree.map(lambda x: x[0], toys.random_items(0, 1))
    state = memory.init(CONFIG)

    def strength(change, end):
        span = jnp.array([end - 1.0, end])
        return float(
            rules.decide(rule.params, NOISE, state, item.replace(change=change, span=span)).strength
        )

    strong = strength(jnp.asarray(1.59), 10.0)
    assert strong > strength(jnp.asarray(0.09), 49.0)
    assert strong < strength(jnp.asarray(0.09), 51.0)


def test_an_unknown_constant_is_refused():
    with pytest.raises(ValueError, match=r"no constant \['treshold'\]"):
        rules._rule("surprise", treshold=1.0)


def test_random_actions_follow_their_probabilities():
    params, state = rules.random_actions([0.6, 0.4, 0.0]).params, memory.init(CONFIG)
    item = jax.tree.map(lambda x: x[0], toys.random_items(0, 1))
    noise = pyramid.draw_noise(jax.random.key(0), jnp.arange(2000))
    decisions = jax.vmap(lambda x: rules.decide(params, x, state, item))(noise)
    share = np.bincount(decisions.action, minlength=3) / 2000
    np.testing.assert_allclose(share, [0.6, 0.4, 0.0], atol=0.04)
    assert abs(np.corrcoef(decisions.action, decisions.strength)[0, 1]) < 0.08
