"""The supervised warm start: what the teacher writes, and that a model learns to write it."""

import functools

import jax
import numpy as np
import pytest

from mmmem_jax.memory import traces
from mmmem_jax.memory.types import ADD_NEW, DISCARD, MERGE
from mmmem_jax.sib.token_update import make_optimizer
from mmmem_jax.train import sft
from mmmem_jax.train.state import init_state
from tests.sib.token_toys import WORDING, B, L, T, make_batch, make_setup

EMPTY, END = traces.init(T, 2 * L), WORDING.stop_ids[0]


def caption_of(batch, b, t):
    return list(batch.caption[b, t][batch.caption_valid[b, t]])


@pytest.mark.parametrize("size", [1, 8])
def test_a_teacher_writes_captions_and_merges_what_the_node_holds(size):
    decider, *_ = make_setup(size)
    batch = make_batch()
    action = np.array([[ADD_NEW, MERGE, DISCARD, ADD_NEW]] * B)
    found = jax.device_get(sft.follow(decider, batch, action, EMPTY))
    assert found.ids.shape == (B, 1, T, size)
    np.testing.assert_array_equal(found.ids[:, 0, :, 0], np.array(WORDING.action_ids)[action])
    both = caption_of(batch, 0, 0) + caption_of(batch, 0, 1)
    memory = jax.tree.map(lambda x: x[0, 0], found.traces)
    for slot, text in ((0, both), (1, caption_of(batch, 0, 3))):
        assert list(memory.ids[slot][memory.valid[slot]]) == text[: size - 2] if size > 1 else text
    assert int(memory.count) == 2
    if size > 1:
        written = [list(found.ids[0, 0, t][found.valid[0, 0, t]]) for t in range(T)]
        first = caption_of(batch, 0, 0)
        assert written[0] == [WORDING.action_ids[ADD_NEW], *first, END]
        assert written[1] == [WORDING.action_ids[MERGE], *both[: size - 2], END]
        assert written[2] == [WORDING.action_ids[DISCARD], END]
    assert not found.valid[1, 0, -1].any()  # padding


def test_a_model_learns_to_decide_as_the_teacher():
    decider, adapter, base = make_setup()
    optimizer = make_optimizer(1e-2)
    update = jax.jit(sft.make_update(decider, EMPTY, optimizer, clips_at_once=2))
    state, batch, losses = init_state(adapter, optimizer, jax.random.key(0)), make_batch(), []
    for _ in range(12):
        state, metrics = update(state, batch, base)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 0.5
    assert losses[-1] < 0.3 * losses[0]
    assert functools.reduce(lambda a, b: a and np.isfinite(b), metrics.values(), True)
