"""Entropy-driven retrieval: what becomes evidence when, and where the search stops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax import memory
from mmmem_jax.memory import MemoryConfig
from mmmem_jax.retrieval import evidence as ev
from mmmem_jax.retrieval import top_down as top_down_lib
from mmmem_jax.retrieval.top_down import (
    RetrievalConfig,
    confidence_to_gamma,
    entropy,
    flat,
    search,
    top_down,
)
from mmmem_jax.testing import toys

MEMORY = MemoryConfig(
    sensory_slots=6, episodic_slots=8, schema_slots=7, num_prototypes=2, num_relations=2, dim=8
)
TINY = dataclasses.replace(MEMORY, sensory_slots=1, episodic_slots=1, schema_slots=1)
N = 6 + 8 + 7
SENSORY, EPISODIC, SCHEMA = slice(0, 6), slice(6, 14), slice(14, N)
NUM_QUESTIONS, NUM_OPTIONS = 5, 4
CONFIG = RetrievalConfig(rounds=(1, 3, 3), patience=2)
STEPS = 7
QUESTIONS = toys.random_questions(0, NUM_QUESTIONS, NUM_OPTIONS, 8)


def table_answer(table):
    """An answer_fn whose entropy at step s follows from the table, by the slots read so far."""

    def answer_fn(mask):
        step = jnp.clip(mask.sum(-1) - 1, 0, table.shape[0] - 1)
        return table[step]

    return answer_fn


def vote(mask):
    """Logits that grow with the slots read: slot i votes for option i mod NUM_OPTIONS."""
    votes = jax.nn.one_hot(jnp.arange(N) % NUM_OPTIONS, NUM_OPTIONS)
    return 0.3 * mask.astype(jnp.float32) @ votes


@jax.jit
def run(state, query, options):
    return top_down(state, query, options, answer_fn=vote, config=CONFIG)


jit_search = jax.jit(search, static_argnames="config")


@pytest.fixture(scope="module")
def state():
    return toys.random_memory(0, MEMORY, num_chunks=48)


@pytest.fixture(scope="module")
def sparse():
    """A memory whose invalid slots would win, were they read: junk, then NaN."""
    state = toys.random_memory(1, MEMORY, num_chunks=48)
    keep = [jnp.arange(n) % 2 == 0 for n in (6, 8, 7)]
    levels = {}
    for name, mask in zip(("sensory", "episodic", "schema"), keep, strict=True):
        level = getattr(state, name)
        levels[name] = level.replace(valid=level.valid & mask)
    return state.replace(**levels)


def spoil(state, value):
    """The state with every float of an invalid slot set to `value`."""

    def level(x):
        def leaf(a):
            rows = jnp.ndim(a) and a.shape[0] == x.valid.shape[0] and a.dtype == jnp.float32
            if not rows:
                return a
            return jnp.where(x.valid.reshape(-1, *[1] * (a.ndim - 1)), a, value)

        return jax.tree.map(leaf, x)

    return state.replace(
        sensory=level(state.sensory), episodic=level(state.episodic), schema=level(state.schema)
    )


class TestGamma:
    @pytest.mark.parametrize(("options", "nats"), [(4, 0.720), (5, 0.778)])
    def test_four_in_five(self, options, nats):
        assert confidence_to_gamma(0.8, options) == pytest.approx(nats, abs=1e-3)

    @pytest.mark.parametrize("options", [2, 4, 7])
    @pytest.mark.parametrize("confidence", [0.5, 0.8, 0.99, 1.0])
    def test_is_the_entropy_of_that_confidence(self, confidence, options):
        rest = (1 - confidence) / (options - 1)
        p = np.array([confidence] + [rest] * (options - 1))
        expected = -np.sum(p[p > 0] * np.log(p[p > 0]))
        assert confidence_to_gamma(confidence, options) == pytest.approx(expected)

    @pytest.mark.parametrize("options", range(2, 12))
    def test_of_a_guess_is_the_most_there_is_and_falls(self, options):
        gamma = [confidence_to_gamma(c, options) for c in np.linspace(1 / options, 1, 50)]
        assert gamma[0] == pytest.approx(np.log(options))
        assert np.all(np.diff(gamma) < 0)

    @pytest.mark.parametrize(
        ("confidence", "options"), [(0.0, 4), (1.1, 4), (0.8, 1), (0.24, 4), (0.4, 2)]
    )
    def test_nonsense_is_refused(self, confidence, options):
        with pytest.raises(ValueError, match=f"2 or more.*: {options}, {confidence}"):
            confidence_to_gamma(confidence, options)

    def test_entropy_of_impossible_options_is_finite(self):
        log_p = jnp.log(jnp.array([0.5, 0.5, 0.0]))
        assert float(entropy(log_p)) == pytest.approx(np.log(2))


class TestConfig:
    @pytest.mark.parametrize(
        "change", [{"confidence": 0.0}, {"confidence": 2.0}, {"top_k": (5, 0, 1)},
                   {"rounds": (0, 0, 0)}, {"rounds": (1, -1, 1)}],
    )  # fmt: skip
    def test_nonsense_is_refused(self, change):
        with pytest.raises(ValueError, match="RetrievalConfig"):
            RetrievalConfig(**change)

    def test_levels_are_read_top_down(self):
        assert CONFIG.step_levels == (ev.SCHEMA, *[ev.EPISODIC] * 3, *[ev.SENSORY] * 3)
        assert RetrievalConfig().top_k == (5, 2, 1)


class TestSearch:
    @pytest.mark.parametrize("which", ["state", "sparse"])
    def test_each_step_adds_the_next_best_of_its_level(self, request, which):
        state = request.getfixturevalue(which)
        entered, _ = map(np.asarray, jit_search(state, *QUESTIONS, config=CONFIG))
        valid = np.asarray(ev.slot_valid(state))
        assert np.all(entered[:, ~valid] == STEPS)
        steps = {"schema": [0], "episodic": [1, 2, 3], "sensory": [4, 5, 6]}
        top_k = dict(zip(steps, CONFIG.top_k, strict=True))
        for name, where in zip(steps, (SCHEMA, EPISODIC, SENSORY), strict=True):
            assert set(np.unique(entered[:, where])) <= {*steps[name], STEPS}
            left = int(valid[where].sum())
            for step in steps[name]:
                added = (entered[:, where] == step).sum(1)
                assert np.all(added == min(left, top_k[name]))
                left -= min(left, top_k[name])

    def test_better_slots_come_first(self, state):
        entered, _ = jit_search(state, *QUESTIONS, config=CONFIG)
        scores = np.asarray(ev.slot_similarity(state, *QUESTIONS))
        for q in range(NUM_QUESTIONS):
            here = np.asarray(entered[q, SCHEMA]) == 0
            found, left = scores[q, SCHEMA][here], scores[q, SCHEMA][~here]
            assert found.min() >= left.max()

    def test_grounded_episodes_are_lifted(self):
        """Of two equal episodes, the one an entity read is grounded in comes first."""
        state = toys.random_memory(2, MEMORY)
        query, options = QUESTIONS[0][:1], QUESTIONS[1][:1]
        stream = state.episodic
        alike = jnp.broadcast_to(stream.text[:1], stream.text.shape)
        stream = stream.replace(text=alike, prototypes=jnp.zeros_like(stream.prototypes))
        grounding = jnp.zeros((7, 8), bool).at[:, 5].set(True)
        state = state.replace(episodic=stream, schema=state.schema.replace(grounding=grounding))
        entered, _ = jit_search(state, query, options, config=CONFIG)
        first = np.flatnonzero(np.asarray(entered[0, EPISODIC]) == 1)
        assert first.tolist() == [0, 5]

    def test_retrieval_entropy_is_over_slots(self, state, sparse):
        _, found = jit_search(state, *QUESTIONS, config=CONFIG)
        valid = [state.schema.valid.sum(), state.episodic.valid.sum(), state.sensory.valid.sum()]
        assert np.all((found > 0) & (found <= np.log(np.asarray(valid)) + 1e-6))
        scores = np.asarray(ev.slot_similarity(state, *QUESTIONS))[:, SCHEMA]
        p = np.exp(scores / CONFIG.temperature)
        p = (
            np.where(state.schema.valid, p, 0)
            / np.sum(np.where(state.schema.valid, p, 0), 1)[:, None]
        )
        expected = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), 1)
        np.testing.assert_allclose(found[:, 0], expected, atol=1e-4)

    @pytest.mark.parametrize("config", [MEMORY, TINY])
    def test_an_empty_memory_offers_nothing(self, config):
        entered, found = jit_search(memory.init(config), *QUESTIONS, config=CONFIG)
        assert np.all(entered == STEPS)
        assert not np.any(found)

    def test_a_slot_is_read_at_its_own_level_where_more_may_be_read_than_there_is(self):
        state = toys.random_memory(0, TINY)
        entered, _ = jit_search(state, *QUESTIONS, config=CONFIG)
        assert np.array_equal(entered, [[4, 1, 0]] * NUM_QUESTIONS)  # sensory, episodic, schema

    def test_without_a_schema_the_episodes_come_first(self):
        config = dataclasses.replace(MEMORY, schema_slots=0, num_relations=0)
        state = toys.random_memory(0, config)
        entered, found = jit_search(state, *QUESTIONS, config=CONFIG)
        assert entered.shape == (NUM_QUESTIONS, 14)
        assert np.all(entered >= 1)
        assert np.all(np.isfinite(found))


class TestStop:
    """Slots are read 5, 7, 9, 11 (schema, three rounds of episodes), then one sensory item each."""

    READ = (5, 7, 9, 11, 12, 13, 14)

    def stop(self, state, probabilities, **changes):
        """The stop when the right option has the given probability at each step."""
        table = np.full((N, NUM_OPTIONS), np.log(0.25), np.float32)
        for slots, p in zip(self.READ, probabilities, strict=True):
            table[slots - 1] = np.log([p] + [(1 - p) / 3] * 3)
        config = dataclasses.replace(CONFIG, **changes)
        answer_fn = table_answer(jnp.asarray(table))
        search_fn = jax.jit(lambda s: top_down(s, *QUESTIONS, answer_fn=answer_fn, config=config))
        return search_fn(state)

    @pytest.mark.parametrize(
        ("probabilities", "step", "level"),
        [
            ([0.81, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3], 0, ev.SCHEMA),  # sure at once
            ([0.30, 0.4, 0.85, 0.3, 0.3, 0.3, 0.9], 2, ev.EPISODIC),  # the first sure step counts
            ([0.30, 0.4, 0.50, 0.6, 0.65, 0.7, 0.75], 6, ev.SENSORY),  # never sure: the last
            ([0.30, 0.4, 0.50, 0.6, 0.7, 0.79, 0.9], 6, ev.SENSORY),
            ([0.30, 0.3, 0.30, 0.9, 0.9, 0.9, 0.9], 2, ev.EPISODIC),  # stalled twice
            ([0.30, 0.3, 0.60, 0.6, 0.7, 0.7, 0.7], 6, ev.SENSORY),  # a gain starts the count anew
            ([0.50, 0.4, 0.30, 0.9, 0.9, 0.9, 0.9], 2, ev.EPISODIC),  # rising entropy is no gain
        ],
    )
    def test_where_it_must(self, state, probabilities, step, level):
        out = self.stop(state, probabilities)
        assert out.stop_step.tolist() == [step] * NUM_QUESTIONS
        assert out.stop_level.tolist() == [level] * NUM_QUESTIONS
        np.testing.assert_allclose(np.exp(out.log_probs[:, 0]), probabilities[step], atol=1e-5)
        p = np.array(probabilities)
        expected = -(p * np.log(p) + (1 - p) * np.log((1 - p) / 3))
        np.testing.assert_allclose(
            out.answer_entropy, np.tile(expected, (NUM_QUESTIONS, 1)), atol=1e-5
        )

    def test_confidence_moves_it(self, state):
        probabilities = [0.3, 0.5, 0.7, 0.81, 0.9, 0.96, 0.99]
        for confidence, step in ((0.45, 1), (0.6, 2), (0.8, 3), (0.95, 5)):
            assert self.stop(state, probabilities, confidence=confidence).stop_step[0] == step

    @pytest.mark.parametrize(("patience", "step"), [(1, 1), (2, 2), (4, 4), (9, 6)])
    def test_patience_moves_it(self, state, patience, step):
        assert self.stop(state, [0.3] * 7, patience=patience).stop_step[0] == step

    @pytest.mark.parametrize(("epsilon", "step"), [(0.01, 6), (0.3, 2)])
    def test_epsilon_moves_it(self, state, epsilon, step):
        probabilities = [0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7]
        assert self.stop(state, probabilities, epsilon=epsilon).stop_step[0] == step


class TestTopDown:
    def test_evidence_only_grows(self, state):
        masks = []

        def watch(mask):
            jax.debug.callback(lambda m: masks.append(np.asarray(m)), mask, ordered=True)
            return vote(mask)

        jax.jit(lambda s: top_down(s, *QUESTIONS, answer_fn=watch, config=CONFIG))(state)
        jax.effects_barrier()
        masks = np.stack(masks)
        assert masks.shape == (STEPS, NUM_QUESTIONS, N)
        assert np.all(masks[1:] >= masks[:-1])
        assert masks.sum(-1).tolist() == [[n] * NUM_QUESTIONS for n in TestStop.READ]
        level = np.asarray(ev.slot_levels(state))
        for step, mask in enumerate(masks):
            assert np.all(level[np.flatnonzero(mask.any(0))] <= CONFIG.step_levels[step])

    def test_tokens_read_are_those_of_the_evidence_at_the_stop(self, state):
        out = run(state, *QUESTIONS)
        cost = np.asarray(ev.slot_tokens(state, CONFIG.visual_tokens))
        read = np.asarray(out.entered) <= np.asarray(out.stop_step)[:, None]
        assert np.array_equal(out.tokens_read, (read * cost).sum(1))
        assert np.all(out.tokens_read > 0)

    def test_the_answer_is_that_of_the_evidence_at_the_stop(self, state):
        out = run(state, *QUESTIONS)
        mask = np.asarray(out.entered) <= np.asarray(out.stop_step)[:, None]
        np.testing.assert_allclose(
            out.log_probs, jax.nn.log_softmax(vote(jnp.asarray(mask))), atol=1e-6
        )
        np.testing.assert_allclose(np.exp(out.log_probs).sum(1), 1, atol=1e-6)

    @pytest.mark.parametrize("value", [1e6, np.nan])
    def test_invalid_slots_do_not_leak(self, sparse, value):
        clean, spoiled = run(sparse, *QUESTIONS), run(spoil(sparse, value), *QUESTIONS)
        for x, y in zip(jax.tree.leaves(clean), jax.tree.leaves(spoiled), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)
        for state in (sparse, spoil(sparse, value)):
            _, mask, tokens = jit_flat(state, *QUESTIONS)
            assert not np.any(mask & ~ev.slot_valid(state))
            assert np.all(tokens >= 0)

    def test_an_empty_memory_is_no_answer(self):
        out = run(memory.init(MEMORY), *QUESTIONS)
        np.testing.assert_allclose(out.log_probs, -np.log(NUM_OPTIONS), atol=1e-6)
        assert not np.any(out.tokens_read)
        last = len(CONFIG.step_levels) - 1  # a step that finds nothing to read is no stall
        assert out.stop_step.tolist() == [last] * NUM_QUESTIONS

    def test_steps_that_read_nothing_do_not_stall(self):
        entropy = jnp.full((1, 7), 0.9).at[0, 6].set(0.1)
        nothing_between = jnp.array([[0, 6, 7, 7]])  # slots enter at the first and the last step
        stop = top_down_lib._stop_step(entropy, nothing_between, 0.3, CONFIG)
        assert stop.tolist() == [6]

    def test_batched_equals_a_loop(self, state, sparse):
        states = jax.tree.map(lambda *x: jnp.stack(x), state, sparse)
        query, options = (jnp.stack([x, x[::-1]]) for x in QUESTIONS)
        batched = jax.jit(jax.vmap(run))(states, query, options)
        for b, one in enumerate((state, sparse)):
            alone = run(one, query[b], options[b])
            for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(batched), strict=True):
                np.testing.assert_allclose(x, y[b], atol=1e-5)

    def test_no_questions(self, state):
        none = (jnp.zeros((0, 8)), jnp.zeros((0, NUM_OPTIONS, 8)))
        out = jax.jit(
            lambda s: top_down(
                s, *none, answer_fn=lambda m: jnp.zeros((0, NUM_OPTIONS)), config=CONFIG
            )
        )(state)
        assert out.log_probs.shape == (0, NUM_OPTIONS)


@jax.jit
def jit_flat(state, query, options):
    return flat(state, query, options, answer_fn=vote, config=CONFIG)


class TestFlat:
    def test_reads_the_best_slots_of_all_levels(self, state):
        log_probs, mask, tokens = jit_flat(state, *QUESTIONS)
        budget = 5 * 1 + 2 * 3 + 1 * 3
        scores = np.asarray(ev.slot_similarity(state, *QUESTIONS))
        assert np.all(mask.sum(1) == budget)
        for q in range(NUM_QUESTIONS):
            assert scores[q][mask[q]].min() >= scores[q][~mask[q]].max()
        cost = np.asarray(ev.slot_tokens(state, CONFIG.visual_tokens))
        assert np.array_equal(tokens, (mask * cost).sum(1))
        np.testing.assert_allclose(log_probs, jax.nn.log_softmax(vote(mask)), atol=1e-6)

    def test_an_empty_memory_offers_nothing(self):
        logits = jnp.zeros((NUM_QUESTIONS, NUM_OPTIONS))
        _, mask, tokens = flat(
            memory.init(TINY), *QUESTIONS, answer_fn=lambda m: logits, config=CONFIG
        )
        assert not np.any(mask)
        assert not np.any(tokens)

    def test_top_down_never_reads_more_slots(self, state, sparse):
        for memory_state in (state, sparse):
            entered, _ = jit_search(memory_state, *QUESTIONS, config=CONFIG)
            _, mask, _ = jit_flat(memory_state, *QUESTIONS)
            assert np.all((entered < STEPS).sum(1) <= 14)
            assert np.all(mask.sum(1) <= 14)
            assert np.all(mask.sum(1) >= (entered < STEPS).sum(1))
