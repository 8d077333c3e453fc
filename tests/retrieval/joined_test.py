"""Tests of several memories searched as one."""

import jax
import numpy as np
import pytest

from mmmem_jax import memory
from mmmem_jax.errors import UserError
from mmmem_jax.memory import MemoryConfig
from mmmem_jax.memory.types import LEVELS
from mmmem_jax.retrieval import evidence as ev
from mmmem_jax.retrieval.joined import join
from mmmem_jax.retrieval.top_down import RetrievalConfig, search
from mmmem_jax.testing import toys

MEMORY = MemoryConfig(sensory_slots=6, episodic_slots=8, schema_slots=7, dim=8, num_relations=4)
OTHER = MemoryConfig(sensory_slots=9, episodic_slots=5, schema_slots=3, dim=8, num_relations=2)
QUESTIONS = toys.random_questions(7, 6, 3, dim=8)
UNLINKED = RetrievalConfig(top_k=(3, 2, 1), rounds=(1, 2, 3), link_bonus=0.0)

similarity = jax.jit(ev.slot_similarity)
jit_search = jax.jit(search, static_argnames="config")


@pytest.fixture(scope="module")
def states():
    """Full, half full, empty, and of other capacities."""
    return [
        toys.random_memory(0, MEMORY, num_chunks=48),
        toys.random_memory(1, MEMORY, num_chunks=4),
        memory.init(MEMORY),
        toys.random_memory(2, OTHER, num_chunks=30),
    ]


@pytest.fixture(scope="module")
def joined(states):
    return join(states, least=4)


def slot_of(state, level: int, slot: int) -> int:
    """Number of a level's slot among all slots of a memory."""
    n1, n2 = len(state.sensory.valid), len(state.episodic.valid)
    return slot + {ev.SENSORY: 0, ev.EPISODIC: n1, ev.SCHEMA: n1 + n2}[level]


def of_each(states, joined, values, fill):
    """Values [Q, N_i] of each memory's slots as [Q, N] of the joined slots, `fill` elsewhere."""
    levels = np.asarray(ev.slot_levels(joined.state))
    out = np.full((len(values[0]), len(levels)), fill, values[0].dtype)
    for n, (video, slot) in enumerate(joined.origin):
        if video >= 0:
            out[:, n] = values[video][:, slot_of(states[video], levels[n], slot)]
    return out


class TestJoin:
    def test_holds_every_valid_slot_once(self, states, joined):
        assert np.array_equal(ev.slot_valid(joined.state), joined.origin[:, 0] >= 0)
        for name in LEVELS:
            held = [tuple(x) for x in getattr(joined, name) if x[0] >= 0]
            there = [(i, s) for i, x in enumerate(states)
                     for s in np.flatnonzero(getattr(x, name).valid)]  # fmt: skip
            assert held == there

    def test_scores_are_those_of_each_memory(self, states, joined):
        alone = [np.asarray(similarity(s, *QUESTIONS)) for s in states]
        valid = np.asarray(ev.slot_valid(joined.state))
        found = np.asarray(similarity(joined.state, *QUESTIONS))[:, valid]
        expected = of_each(states, joined, alone, np.float32(0))[:, valid]
        np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_links_are_those_of_each_memory_and_none_between(self, states, joined):
        for which, (upper, lower) in enumerate((("schema", "episodic"), ("episodic", "sensory"))):
            found = np.asarray(ev.links(joined.state)[which])
            expected = np.zeros_like(found)
            alone = [np.asarray(ev.links(s)[which]) for s in states]
            for i, (a, u) in enumerate(getattr(joined, upper)):
                for j, (b, v) in enumerate(getattr(joined, lower)):
                    expected[i, j] = a == b >= 0 and alone[a][u, v]
            assert np.array_equal(found, expected)
            assert found.any()

    def test_search_is_that_of_each_merged(self, states, joined):
        """Where nothing lifts a slot, what each memory would read, merged by score, is read."""
        entered = np.asarray(jit_search(joined.state, *QUESTIONS, config=UNLINKED)[0])
        scores = [np.asarray(similarity(s, *QUESTIONS)) for s in states]
        steps = [np.asarray(jit_search(s, *QUESTIONS, config=UNLINKED)[0]) for s in states]
        num_steps, level = sum(UNLINKED.rounds), np.asarray(ev.slot_levels(joined.state))
        for q in range(len(entered)):
            expected = np.full(entered.shape[1], num_steps)
            first = 0
            for lv, (k, rounds) in enumerate(zip(UNLINKED.top_k, UNLINKED.rounds, strict=True)):
                pool = []
                for n in np.flatnonzero(level == lv):
                    video, slot = joined.origin[n]
                    if video >= 0:
                        there = slot_of(states[video], lv, slot)
                        if steps[video][q, there] < num_steps:
                            pool.append((-scores[video][q, there], n))
                for rank, (_, n) in enumerate(sorted(pool)[: k * rounds]):
                    expected[n] = first + rank // k
                first += rounds
            assert np.array_equal(entered[q], expected)

    def test_one_memory_is_searched_as_it_was(self, states):
        joined = join(states[:1], least=16)
        alone = np.asarray(jit_search(states[0], *QUESTIONS, config=RetrievalConfig())[0])
        found = np.asarray(jit_search(joined.state, *QUESTIONS, config=RetrievalConfig())[0])
        never = sum(RetrievalConfig().rounds)
        assert np.array_equal(found, of_each(states, joined, [alone], never))

    def test_node_ids_are_those_of_one_memory_only(self, joined):
        stream = joined.state.episodic
        ids = stream.node_id[stream.valid]
        assert len(set(ids)) == len(ids)
        assert ids.max() < stream.next_id

    def test_sizes_are_powers_of_two_whatever_is_held(self, states):
        sizes = [len(getattr(join(states, least=4).state, n).valid) for n in LEVELS]
        held = [sum(int(getattr(s, n).valid.sum()) for s in states) for n in LEVELS]
        for size, number in zip(sizes, held, strict=True):
            assert number <= size < 2 * max(number, 4)
            assert size & (size - 1) == 0
        shapes = [jax.tree.map(np.shape, join([s]).state) for s in states]
        assert all(s == shapes[0] for s in shapes)

    def test_bad_input_is_refused(self):
        with pytest.raises(UserError, match="no memory"):
            join([])
        wider = MemoryConfig(dim=16)
        with pytest.raises(UserError, match=r"\(8, 2\), \(16, 2\)"):
            join([memory.init(MEMORY), memory.init(wider)])
