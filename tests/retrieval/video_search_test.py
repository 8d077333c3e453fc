"""Tests of the search for options and for moments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax import memory
from mmmem_jax.memory import MemoryConfig
from mmmem_jax.memory.types import LEVELS
from mmmem_jax.retrieval import evidence as ev
from mmmem_jax.retrieval import top_down
from mmmem_jax.retrieval import video_search as vs
from mmmem_jax.retrieval.joined import join
from mmmem_jax.retrieval.top_down import RetrievalConfig
from mmmem_jax.testing import toys

D = 8
MEMORY = MemoryConfig(sensory_slots=16, episodic_slots=8, schema_slots=8, num_relations=4, dim=D)
ALL = dataclasses.replace(vs.RETRIEVAL, confidence=1.0, patience=99)
# Every direction and its opposite: mean 0, deviation 1 / sqrt(D) for every question.
BACKGROUND = jnp.concatenate([jnp.eye(D), -jnp.eye(D)])
# With this a score is 4 times the cosine.
WIDTH = D**0.5 / 4
PLAIN = vs.Calibration(text=(0.0, WIDTH), visual=(0.0, WIDTH), entity=(0.0, WIDTH))
QUESTIONS = toys.random_questions(7, 12, 4, dim=D)
STEPS = len(vs.RETRIEVAL.step_levels)
N1, N2 = MEMORY.sensory_slots, MEMORY.episodic_slots


def scores(state, wanted, calibration=PLAIN):
    return vs.slot_scores(state, wanted, BACKGROUND, calibration)


def moments(state, question, config=vs.RETRIEVAL, calibration=PLAIN):
    return vs.search_moments(state, question, BACKGROUND, calibration=calibration, config=config)


@pytest.fixture(scope="module")
def state():
    return toys.random_memory(0, MEMORY, num_chunks=24)


@pytest.fixture(scope="module")
def orphaned(state):
    """Verbatim items whose episodes are gone."""
    valid = state.episodic.valid & (jnp.arange(N2) % 3 == 0)
    return state.replace(episodic=state.episodic.replace(valid=valid))


def moment_of(state, item: int) -> int:
    """The slot of the moment that a verbatim item belongs to."""
    held = np.asarray(ev.links(state)[1])[:, item]
    return N1 + int(held.argmax()) if held.any() else item


class TestScores:
    def test_kinds_are_counted_in_their_own_deviations(self, state):
        wanted = QUESTIONS[1][0]
        plain = scores(state, wanted)
        kinds = dict.fromkeys(("text", "visual", "entity"), (0.4 * WIDTH, WIDTH))
        valid = ev.slot_valid(state)
        found = scores(state, wanted, dataclasses.replace(PLAIN, **kinds))
        expected = jnp.where(plain == vs.LOWEST, vs.LOWEST, plain - 0.4)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.all(found[:, ~valid] == vs.LOWEST)

    def test_a_question_near_to_everything_gains_nothing_by_it(self, state):
        """What a question shares with all of the background and the memory counts for nothing."""
        common = jnp.zeros(D + 1).at[D].set(1.0)

        def widened(x, by):  # one more direction, in which all lie `by` far
            return jnp.concatenate([x, jnp.full((*x.shape[:-1], 1), by)], -1)

        s, e, g, found = state.sensory, state.episodic, state.schema, []
        for by in (0.0, 2.0):
            level = s.replace(visual=jnp.zeros((N1, D + 1)), text=widened(s.text, 1.0))
            pads = state.replace(
                sensory=level,
                episodic=e.replace(
                    text=widened(e.text, 1.0), prototypes=widened(e.prototypes, 1.0)
                ),
                schema=g.replace(embedding=widened(g.embedding, 1.0), told=widened(g.told, 1.0)),
            )
            wanted = widened(QUESTIONS[0][:2], 0.0) + by * common
            background = widened(BACKGROUND, 1.0)
            found.append(vs.slot_scores(pads, wanted, background, PLAIN)[:, :N1])
        told = np.asarray(s.valid) & (np.linalg.norm(s.text, axis=1) > 0.99)
        assert told.any()
        np.testing.assert_allclose(found[0][:, told], found[1][:, told], atol=1e-4)

    def test_equal_kinds_rank_as_plain_similarity_does(self, state):
        cosine = ev.slot_similarity(state, jnp.zeros((12, D)), QUESTIONS[1])
        found = jax.vmap(lambda w: scores(state, w).max(0))(QUESTIONS[1])
        valid = np.asarray(ev.slot_valid(state))
        # What holds nothing of a kind has cosine 0 there, and counts only if all else is negative.
        np.testing.assert_allclose(
            np.maximum(found[:, valid], 0) * 0.25, np.maximum(cosine[:, valid], 0), atol=1e-5
        )

    def test_what_is_silent_and_blind_is_never_found(self, state):
        blind = state.replace(sensory=jax.tree.map(jnp.zeros_like, state.sensory).replace(
            valid=state.sensory.valid, node_id=state.sensory.node_id))  # fmt: skip
        assert np.all(scores(blind, QUESTIONS[1][0])[:, :N1] == vs.LOWEST)


class TestGammas:
    @pytest.mark.parametrize("confidence", [0.3, 0.8, 1.0])
    def test_by_number_of_candidates(self, confidence):
        table = vs.gammas(confidence, 8)
        assert table[:2].tolist() == [0.0, 0.0]
        for n in range(2, 9):
            expected = top_down.confidence_to_gamma(max(confidence, 1 / n), n)
            assert table[n] == pytest.approx(expected)


class TestMoments:
    @pytest.mark.parametrize("which", ["state", "orphaned"])
    @pytest.mark.parametrize("q", range(6))
    def test_a_moment_that_was_kept_verbatim_is_found(self, request, which, q):
        """Asked with its own text or picture, a clip's moment is the best one."""
        state = request.getfixturevalue(which)
        valid = np.flatnonzero(np.asarray(state.sensory.valid) & np.any(state.sensory.text != 0, 1))
        item = int(valid[q % len(valid)])
        asked = state.sensory.text[item]
        sure = dataclasses.replace(PLAIN, lift=0.0)
        found = moments(state, asked, config=ALL, calibration=sure)
        assert found.item_read[0]
        best = int(found.best_items[0])
        cosine = float(state.sensory.text[best] @ asked)
        np.testing.assert_allclose(found.moment_scores[0], 4.0, atol=1e-3)
        assert best == item or cosine == pytest.approx(1.0, abs=1e-3)
        assert int(found.moments[0]) == moment_of(state, best)

    def test_scores_are_those_of_the_evidence_read(self, state):
        """Against the definition, moment by moment."""
        entered_links, holds = map(np.asarray, ev.links(state))
        for q in QUESTIONS[0]:
            found = jax.device_get(moments(state, q))
            read = found.output.entered[0] <= found.output.stop_step[0]
            expected = []
            for e in np.flatnonzero(state.episodic.valid):
                lifts = [PLAIN.lift * found.scores[N1 + N2 + u] for u in range(8)
                         if entered_links[u, e] and read[N1 + N2 + u]]  # fmt: skip
                lift = max([0.0, *lifts])
                shown = [found.scores[N1 + e]] if read[N1 + e] else []
                shown += [found.scores[i] for i in range(N1) if holds[e, i] and read[i]]
                shown = [x for x in shown if x > vs.LOWEST]
                if shown or lift > 0:
                    expected.append(lift + max(shown, default=0.0))
            expected += [
                found.scores[i]
                for i in range(N1)
                if read[i] and not holds[:, i].any() and found.scores[i] > vs.LOWEST
            ]
            expected = sorted(expected, reverse=True)[: len(found.moments)]
            got = found.moment_scores[found.moments >= 0]
            np.testing.assert_allclose(got, expected, atol=1e-4)

    def test_the_gate_is_that_of_the_confidence(self, state):
        sure = [dataclasses.replace(vs.RETRIEVAL, confidence=c, patience=99) for c in (0.4, 0.7, 1)]
        for q in QUESTIONS[0]:
            found = [jax.device_get(moments(state, q, config=c)) for c in sure]
            stops = [int(x.output.stop_step[0]) for x in found]
            assert stops == sorted(stops)
            for x, stop in zip(found, stops, strict=True):
                entropies = x.output.answer_entropy[0]
                assert np.all(entropies[:stop] > x.gamma)
                assert stop == STEPS - 1 or entropies[stop] <= x.gamma
            np.testing.assert_allclose(
                [x.output.answer_entropy for x in found[1:]],
                [found[0].output.answer_entropy] * 2, atol=1e-6,
            )  # fmt: skip

    @pytest.mark.parametrize("which", ["state", "orphaned"])
    @pytest.mark.parametrize("level", ["episodic", "sensory"])
    def test_changing_what_is_not_read_changes_no_entropy_before_it_is_read(
        self, request, which, level
    ):
        """Eq. 12: H_s is of the evidence read until then."""
        there = request.getfixturevalue(which)
        table = getattr(there, level)
        other = toys.random_memory(1, MEMORY, num_chunks=24)
        names = ("text", "visual" if level == "sensory" else "prototypes")
        changed = {name: getattr(getattr(other, level), name) for name in names}
        elsewhere = there.replace(**{level: table.replace(**changed)})
        first = vs.RETRIEVAL.step_levels.index(LEVELS.index(level))
        later = []
        for q in QUESTIONS[0]:
            found = [moments(s, q, config=ALL).output.answer_entropy[0] for s in (there, elsewhere)]
            np.testing.assert_allclose(found[1][:first], found[0][:first], atol=1e-5)
            later.append(np.abs(found[1][first:] - found[0][first:]).max())
        assert max(later) > 0.01  # it does count once it is read

    def test_probabilities_sum_to_one_and_entropies_are_bounded(self, state, orphaned):
        for memory_state in (state, orphaned):
            for q in QUESTIONS[0]:
                out = moments(memory_state, q).output
                assert float(jnp.exp(out.log_probs).sum()) == pytest.approx(1, abs=1e-5)
                most = np.log(out.log_probs.shape[1]) + 1e-5
                assert np.all((out.answer_entropy >= 0) & (out.answer_entropy <= most))

    @pytest.mark.parametrize("entities", [True, False])
    def test_the_only_moment_is_read_and_told(self, state, entities):
        one = state.episodic.replace(valid=state.episodic.valid & (jnp.arange(N2) == 0))
        gone = state.sensory.replace(valid=jnp.zeros(N1, bool))
        graph = state.schema.replace(valid=state.schema.valid & entities)
        alone = state.replace(episodic=one, sensory=gone, schema=graph)
        for q in QUESTIONS[0]:
            found = moments(alone, q)
            assert float(found.gamma) == -1
            assert np.all(np.asarray(found.output.answer_entropy) == 0)
            assert found.moments.tolist() == [N1] + [-1] * 7
            assert found.output.entered[0, N1] <= found.output.stop_step[0]

    def test_an_empty_memory_has_none(self):
        found = moments(memory.init(MEMORY), QUESTIONS[0][0])
        assert np.all(found.moments == -1)
        assert np.all(found.best_items == -1)
        assert not np.any(found.item_read)
        assert float(found.scores.max()) == vs.LOWEST
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))

    def test_padding_changes_nothing(self, state):
        for q in QUESTIONS[0][:4]:
            alone = jax.device_get(moments(state, q))
            joined = join([state], least=32)
            padded = jax.device_get(moments(joined.state, q))
            np.testing.assert_allclose(padded.moment_scores, alone.moment_scores, atol=1e-5)
            np.testing.assert_allclose(
                padded.output.answer_entropy, alone.output.answer_entropy, atol=1e-5
            )
            origin = joined.origin[padded.moments[padded.moments >= 0]][:, 1]
            there = alone.moments[alone.moments >= 0]
            assert np.array_equal(origin, np.where(there >= N1, there - N1, there))


class TestOptions:
    IS_OPTION = jnp.ones(4, bool)

    def ask(self, state, wanted, is_option=IS_OPTION, config=vs.RETRIEVAL):
        return jax.device_get(
            vs.search_options(
                state, wanted, is_option, BACKGROUND, calibration=PLAIN, config=config
            )
        )

    def test_order_permutes_the_probabilities_and_nothing_else(self, state):
        for wanted in QUESTIONS[1]:
            there = self.ask(state, wanted)
            order = np.array([2, 0, 3, 1])
            back = self.ask(state, wanted[order])
            np.testing.assert_allclose(
                back.output.log_probs[0], there.output.log_probs[0][order], atol=1e-5
            )
            assert back.output.stop_step == there.output.stop_step
            assert np.array_equal(back.output.entered, there.output.entered)
            np.testing.assert_allclose(back.moment_scores, there.moment_scores, atol=1e-5)

    def test_padding_has_no_say(self, state):
        for wanted in QUESTIONS[1]:
            three = self.ask(state, wanted[:3], jnp.ones(3, bool))
            for padding in (0.0, 5.0):
                padded = wanted.at[3].set(padding)
                found = self.ask(state, padded, jnp.arange(4) < 3)
                np.testing.assert_allclose(
                    found.output.log_probs[0, :3], three.output.log_probs[0], atol=1e-5
                )
                assert np.exp(found.output.log_probs[0, 3]) == 0
                assert found.gamma == three.gamma
                assert found.output.stop_step == three.output.stop_step

    def test_what_was_told_is_chosen(self, state):
        """An option that says what a clip said beats those that no clip said."""
        told = np.flatnonzero(np.any(state.sensory.text != 0, 1) & np.asarray(state.sensory.valid))
        for item, wanted in zip(told, QUESTIONS[1], strict=False):
            found = self.ask(state, wanted.at[1].set(state.sensory.text[item]), config=ALL)
            others = scores(state, wanted)[jnp.array([0, 2, 3])]
            if float(others.max()) < 3.9:
                assert found.output.log_probs[0].argmax() == 1
                assert found.scores.max() == pytest.approx(4.0, abs=1e-3)

    def test_probabilities_are_of_the_best_score_read(self, state):
        for wanted in QUESTIONS[1]:
            found = self.ask(state, wanted)
            read = found.output.entered[0] <= found.output.stop_step[0]
            best = np.asarray(scores(state, wanted))[:, read].max(1)
            expected = np.exp(best / PLAIN.temperature)
            np.testing.assert_allclose(
                np.exp(found.output.log_probs[0]), expected / expected.sum(), atol=1e-5
            )

    def test_nothing_remembered_makes_all_alike(self):
        found = self.ask(memory.init(MEMORY), QUESTIONS[1][0])
        np.testing.assert_allclose(np.exp(found.output.log_probs[0]), 0.25, atol=1e-6)


def test_is_deterministic(state):
    first, second = (jax.device_get(moments(state, QUESTIONS[0][0])) for _ in range(2))
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


def test_retrieval_reads_as_in_the_paper():
    assert vs.RETRIEVAL.top_k == RetrievalConfig().top_k == (5, 2, 1)
