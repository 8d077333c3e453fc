"""The memory as text, against a list of nodes in plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax.memory import traces as memory
from mmmem_jax.memory.types import ADD_NEW, DISCARD, MERGE

N, L, C, T = 3, 5, 7, 12  # slots, tokens of a node, tokens of a text, decisions


class Plain:
    """What the memory should do, with lists."""

    def __init__(self, merge: str):
        self.merge, self.nodes, self.count, self.dropped = merge, [], 0, 0

    def update(self, action: int, text: list[int]):
        if action == DISCARD:
            return
        if action == ADD_NEW or not self.nodes:
            self.nodes = [*self.nodes, []][-N:]  # the oldest goes
            self.count += 1
        elif self.merge == "rewrite":
            self.nodes[-1] = []
        whole = self.nodes[-1] + text
        self.nodes[-1] = whole[:L]
        self.dropped += len(whole) - len(self.nodes[-1])


def nodes_of(traces: memory.Traces) -> list[list[int]]:
    """The texts of the nodes, oldest first."""
    numbers = np.asarray(memory.numbers(traces))
    order = [slot for slot in np.argsort(numbers) if numbers[slot] >= 0]
    return [np.asarray(traces.ids[s])[np.asarray(traces.valid[s])].tolist() for s in order]


@functools.partial(jax.jit, static_argnames="merge")
def run(actions, ids, valid, merge):
    """The memory after each decision, [T, ...]."""

    def step(traces, x):
        traces = memory.update(traces, *x, merge=merge)
        return traces, traces

    return jax.lax.scan(step, memory.init(N, L), (actions, ids, valid))[1]


def decisions(seed: int):
    """Random actions and texts; what is not valid lies anywhere."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(3, size=T).astype(np.int32)
    ids = rng.integers(1, 100, size=(T, C)).astype(np.int32)
    return actions, ids, rng.random((T, C)) < rng.choice([0.2, 0.5, 1.0])


@pytest.mark.parametrize("merge", memory.MERGES)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_is_the_list_of_nodes(merge, seed):
    actions, ids, valid = decisions(seed)
    after, plain = jax.device_get(run(actions, ids, valid, merge)), Plain(merge)
    for t in range(T):
        now = jax.tree.map(lambda x, t=t: x[t], after)
        plain.update(actions[t], ids[t][valid[t]].tolist())
        assert nodes_of(now) == plain.nodes
        assert (now.count, now.dropped) == (plain.count, plain.dropped)
        assert now.latest == (plain.count - 1) % N if plain.count else now.latest == -1
        assert memory.length(now) == sum(map(len, plain.nodes))
        assert np.all(now.valid[:, 1:] <= now.valid[:, :-1])  # texts have no gaps
        assert not now.ids[~now.valid].any()


def test_the_oldest_node_goes_when_full():
    actions = np.full(T, ADD_NEW, np.int32)
    ids = np.arange(1, T + 1, dtype=np.int32)[:, None].repeat(C, 1)
    after = run(actions, ids, np.arange(C) < np.ones((T, 1)), "append")
    last = jax.tree.map(lambda x: x[-1], after)
    assert nodes_of(last) == [[T - 2], [T - 1], [T]]
    assert memory.numbers(last).tolist() == [9, 10, 11]
    assert memory.numbers(jax.tree.map(lambda x: x[3], after)).tolist() == [3, 1, 2]
    assert memory.numbers(memory.init(N, L)).tolist() == [-1, -1, -1]


def test_merging_counts_what_does_not_fit():
    actions = np.array([MERGE, MERGE, DISCARD] + [DISCARD] * (T - 3), np.int32)
    ids = np.arange(1, T * C + 1, dtype=np.int32).reshape(T, C)
    valid = np.arange(C) < np.full((T, 1), 3)
    appended, rewritten = (
        jax.tree.map(lambda x: x[-1], run(actions, ids, valid, merge)) for merge in memory.MERGES
    )
    assert nodes_of(appended) == [[1, 2, 3, 8, 9]]
    assert nodes_of(rewritten) == [[8, 9, 10]]
    assert (int(appended.dropped), int(rewritten.dropped)) == (1, 0)


def test_a_batch_is_its_rows():
    rows = [decisions(seed) for seed in range(4)]
    batch = jax.tree.map(lambda *x: np.stack(x), *rows)
    together = jax.vmap(functools.partial(run, merge="append"))(*batch)
    for i, row in enumerate(rows):
        alone = run(*row, merge="append")
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), together, alone)
    assert memory.length(together).shape == (4, T)
    assert memory.numbers(together).shape == (4, T, N)
    assert memory.numbers(together).dtype == memory.length(together).dtype == jnp.int32


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="append, rewrite, got 'replace'"):
        memory.update(
            memory.init(N, L), MERGE, jnp.zeros(C, int), jnp.zeros(C, bool), merge="replace"
        )
    with pytest.raises(ValueError, match="0 nodes of 5 tokens"):
        memory.init(0, L)
