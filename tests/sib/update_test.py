"""A whole update on a toy task: keep the chunks that carry a mark."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmmem_jax.data import encoded
from mmmem_jax.data.encoded import EncodedStream
from mmmem_jax.memory import MemoryConfig
from mmmem_jax.memory.types import LEVELS
from mmmem_jax.models.reader import Reader
from mmmem_jax.policies.manager import Manager
from mmmem_jax.retrieval.top_down import RetrievalConfig
from mmmem_jax.sib.update import SibConfig, TaskFns, init_state, make_update, reader_task
from mmmem_jax.testing import toys
from mmmem_jax.train import plan
from mmmem_jax.train.sharding import keep_placed, make_mesh, make_shard, place, put_batch

SLOTS, D, T, B = 4, 8, 16, 4
CONFIG = MemoryConfig(
    sensory_slots=1, episodic_slots=SLOTS, schema_slots=0, num_relations=0, num_prototypes=1, dim=D
)
SIB = SibConfig(num_generations=8, block_size=2, beta1=0.0)


def make_batch(seed, num_streams=B, num_chunks=T, marks=SLOTS) -> EncodedStream:
    """Streams in which `marks` chunks have a text that starts with 1; two questions each."""
    rng = np.random.default_rng(seed)

    def stream():
        text = rng.normal(size=(num_chunks, D)) * 0.3
        text[:, 0] = 0
        text[rng.permutation(num_chunks)[:marks], 0] = 1
        start = np.arange(num_chunks, dtype=np.float32)
        query, options = toys.random_questions(int(rng.integers(99)), 2, 4, D)
        half = np.float16
        return EncodedStream(
            visual=(rng.normal(size=(num_chunks, D)) * 0.3).astype(half),
            coarse=np.zeros((num_chunks, D), half),
            text=text.astype(half),
            span=np.stack([start, start + 1], 1),
            tokens=rng.integers(1, 9, num_chunks).astype(np.int32),
            mention=np.zeros((num_chunks, 0, D), half),
            mention_valid=np.zeros((num_chunks, 0), bool),
            change=rng.random(num_chunks).astype(np.float32),
            relation=np.full(num_chunks, -1, np.int32),
            valid=np.ones(num_chunks, bool),
            relevant=text[:, 0] > 0,
            query=np.asarray(query, half),
            options=np.asarray(options, half),
            answer=rng.integers(4, size=2).astype(np.int32),
            family=np.zeros(2, np.int32),
            evidence=np.full((2, 1), -1, np.int32),
            query_time=np.full(2, num_chunks, np.float32),
            question_valid=np.ones(2, bool),
        )

    return encoded.stack([stream() for _ in range(num_streams)])


def marks_kept(batch) -> TaskFns:
    """Share of the slots that hold a mark."""

    def reward(states):
        held = states.episodic.valid & (states.episodic.text[..., 0] > 0.75)
        return held.mean(-1)

    def final(states):
        return {"log_prob": jnp.log(0.25 + 0.5 * reward(states))}

    return TaskFns(reward, final, np.log(4))


def start(config=SIB, make_task=marks_kept, rate=0.01, mesh=None):
    """An untrained manager and the compiled update, on a mesh if there is one."""
    model, optimizer = Manager(D, hidden=16, rngs=nnx.Rngs(0)), optax.adam(rate)
    make = functools.partial(make_update, nnx.graphdef(model), make_task, optimizer, CONFIG, config)
    state = init_state(model, optimizer, jax.random.key(0))
    if mesh is None:
        return state, jax.jit(make())
    return place(mesh, state), jax.jit(keep_placed(mesh, make(shard=make_shard(mesh))))


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.fixture(scope="module")
def two_updates():
    """States and metrics of two updates from an untrained manager."""
    state, update = start()
    first, metrics = update(state, make_batch(0))
    second, metrics2 = update(first, make_batch(1))
    return (state, first, second), (metrics, metrics2), update


class TestUpdate:
    def test_ratios_start_at_one_and_move(self, two_updates):
        for metrics in two_updates[1]:
            assert float(metrics["ratio_first"]) == pytest.approx(1, abs=1e-5)
            assert metrics["ratio_max"] > 1.0001
            assert metrics["ratio_min"] < 0.9999

    def test_counts_and_leaves_the_reference_alone(self, two_updates):
        (state, first, second), _, _ = two_updates
        assert [int(s.step) for s in (state, first, second)] == [0, 1, 2]
        assert same(state.ref_params, second.ref_params)
        assert same(state.rng, second.rng)
        assert not same(state.params, first.params)
        assert not same(first.params, second.params)

    def test_again_is_the_same_to_the_bit(self, two_updates):
        (state, first, _), (metrics, _), update = two_updates
        again, metrics_again = update(state, make_batch(0))
        assert same(again, first)
        assert same(metrics_again, metrics)

    def test_each_step_draws_anew(self, two_updates):
        (state, first, _), _, update = two_updates
        later = state.replace(step=jnp.asarray(5, jnp.int32))
        other, _ = update(later, make_batch(0))
        assert not same(other.params, first.params)

    def test_metrics_are_finite_and_add_up(self, two_updates):
        for metrics in two_updates[1]:
            assert all(np.all(np.isfinite(x)) for x in metrics.values())
            m = {k: float(v) for k, v in metrics.items()}
            assert m["share_add"] + m["share_merge"] + m["share_discard"] == pytest.approx(1)
            parts = m["reward_task"] + m["reward_length_weighted"] + m["reward_log_ratio_weighted"]
            assert m["reward"] == pytest.approx(parts, abs=1e-6)
            assert m["reward_task"] == pytest.approx(m["task_reward"], abs=1e-6)
            assert m["reward_length"] == pytest.approx(m["tokens_held"], rel=1e-5)
            assert m["reward_log_ratio_weighted"] == pytest.approx(
                -SIB.beta2 * m["reward_log_ratio"], rel=1e-4, abs=1e-9
            )
            assert 0 < m["slots_held"] <= SLOTS
            assert 0 < m["compression"] < 1
            assert 0 <= m["zero_std_share"] < 1
            assert not m["collapse_add"]

    def test_an_untrained_manager_is_its_reference(self, two_updates):
        first, second = two_updates[1]
        assert float(first["reward_log_ratio"]) == pytest.approx(0, abs=1e-4)
        assert abs(float(second["reward_log_ratio"])) > 1e-3
        # The rate of the reference is that of its prior: log Z + lambda |m| >= 0 by Jensen.
        assert float(first["bound_rate"]) >= -1e-4

    def test_relevance_bound_is_a_mean(self, two_updates):
        for metrics in two_updates[1]:
            assert np.log(4) + np.log(0.25) <= float(metrics["bound_relevance"]) < np.log(4)

    @pytest.mark.parametrize(("name", "kind"), [("add", 0), ("merge", 1), ("discard", 2)])
    def test_collapse_is_alarmed(self, two_updates, name, kind):
        (state, *_), _, update = two_updates
        params = jax.tree.map(jnp.copy, state.params)
        params["out"]["bias"][...] = 20.0 * jax.nn.one_hot(kind, 3)
        _, metrics = update(state.replace(params=params), make_batch(0))
        alarms = {k: int(v) for k, v in metrics.items() if k.startswith("collapse")}
        assert alarms == {f"collapse_{k}": int(k == name) for k in ("add", "merge", "discard")}


def test_padding_is_never_learned_from(two_updates):
    """Streams that end early: what the padding holds changes nothing."""
    (state, *_), _, update = two_updates
    batch = make_batch(0)
    valid = np.arange(T) < 12
    batch = batch._replace(valid=np.tile(valid, (B, 1)))
    junk = batch._replace(text=np.where(valid[None, :, None], batch.text, np.float16(7)))
    for x, y in zip(
        *(jax.tree.leaves(update(state, b)[0].params) for b in (batch, junk)), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_with_state_credit_the_rate_is_that_of_the_memory_made(two_updates):
    """All go on from generation 0, whose trace and memory no other generation changes."""
    (_, _, moved), *_ = two_updates

    def bounds(num_generations):
        config = SibConfig(
            credit="state", block_size=2, num_generations=num_generations, beta1=1e-3
        )
        _, metrics = start(config)[1](moved, make_batch(2))
        return {k: float(v) for k, v in metrics.items() if k.startswith("bound_rate")}

    few, many = bounds(2), bounds(8)
    assert few["bound_rate_ref"] != 0
    assert few == pytest.approx(many, rel=1e-4)


def learn(config, num_updates):
    """Task reward and tokens held, at the first update and over the last ten."""
    state, update = start(config, rate=0.02)
    reward, tokens = [], []
    for seed in range(num_updates):
        state, metrics = update(state, make_batch(seed, num_streams=8))
        assert float(metrics["ratio_first"]) == pytest.approx(1, abs=2e-5)
        reward.append(float(metrics["task_reward"]))
        tokens.append(float(metrics["tokens_held"]))
    return (reward[0], np.mean(reward[-10:])), (tokens[0], np.mean(tokens[-10:]))


@pytest.mark.parametrize(
    ("credit", "ratio", "bar"),
    [
        ("step", "length_normalised", 0.85),
        ("state", "length_normalised", 0.7),
        ("trajectory", "sequence", 0.75),
    ],
)
def test_learns_what_to_keep(credit, ratio, bar):
    config = SibConfig(
        credit=credit, ratio=ratio, std="group", block_size=2, num_generations=16, beta1=0.0
    )
    # Every update meets streams it has not seen.
    (first, last), _ = learn(config, 40)
    assert first < 0.25  # as much as the newest chunks hold, of which a quarter is marked
    assert last > bar


def test_a_price_on_tokens_shortens_memories():
    # A node costs about 0.9 and gains at most 0.25.
    config = SibConfig(beta1=0.2, std="group", block_size=2, num_generations=16)
    _, (first, last) = learn(config, 20)
    assert last < 0.4 * first


def test_with_the_reader_as_judge():
    kind = "log_gain"
    graphdef, params = nnx.split(Reader(D, hidden=8, rngs=nnx.Rngs(1)))
    retrieval = RetrievalConfig(rounds=(1, 1, 1))
    state, update = start(
        SibConfig(num_generations=4, block_size=8, task=kind),
        make_task=reader_task(graphdef, params, kind, CONFIG, retrieval),
    )
    batch = make_batch(0)
    batch = batch._replace(question_valid=np.arange(B)[:, None] > [0, 0])  # one has no question
    state, metrics = update(state, batch)
    assert all(np.all(np.isfinite(x)) for x in metrics.values())
    assert float(metrics["ratio_first"]) == pytest.approx(1, abs=1e-5)
    stops = [metrics[f"stop_{level}"] for level in LEVELS]
    assert float(sum(stops)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("confidence", "stops"),
    [(0.25, [1, 0, 0]), (1.0, [0, 0, 1])],  # a guess will do; never sure
)
def test_stops_are_shares_of_the_streams_asked(confidence, stops):
    graphdef, params = nnx.split(Reader(D, hidden=8, rngs=nnx.Rngs(1)))
    retrieval = RetrievalConfig(rounds=(1, 1, 1), confidence=confidence)
    batch = make_batch(0)._replace(question_valid=np.arange(B)[:, None] > [0, 1])
    task = reader_task(graphdef, params, "log_prob", CONFIG, retrieval)(batch)
    held = toys.random_memory(0, CONFIG, num_chunks=8)
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, 1, *x.shape)), held)
    final = jax.jit(task.final)(states)  # op by op, each would be compiled by itself
    found = [float(final[f"stop_{level}"]) for level in LEVELS]
    assert found == pytest.approx(stops)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task must be one of accuracy, .* got 'bleu'"):
        reader_task(None, None, "bleu", CONFIG, RetrievalConfig())


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2)])
def test_any_mesh_makes_the_same_update(two_updates, shape):
    """Groups over 2 and 4 devices, the manager over 2: means, spreads and gradients are as on 1."""
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    (_, _, whole), (_, metrics), _ = two_updates
    mesh = make_mesh(*shape)
    split, update = start(mesh=mesh)
    update = update.lower(split, put_batch(mesh, make_batch(0))).compile()
    for seed in range(2):  # the second takes the state from where the first has left it
        split, split_metrics = update(split, put_batch(mesh, make_batch(seed)))
    moment = split.opt_state[0].mu["mid"]["kernel"][...]
    assert {x.data.shape for x in moment.addressable_shards} == {(16 // shape[2], 16)}
    for x, y in zip(*map(jax.tree.leaves, (whole, split)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], split_metrics[name], atol=1e-4, err_msg=name)
    gathered = [c for c in plan.collectives_of(update.as_text()) if c.kind == "all-gather"]
    of_a_device = B * SIB.num_generations * T // (shape[0] * shape[1])
    assert max(size for c in gathered for size in c.sizes) < 2 * of_a_device  # no trajectories
