"""Tests of the made memories that questions are timed on."""

import jax
import numpy as np

from benchmarks import ask_latency
from mmmem_jax import store
from mmmem_jax.video import ask

NUM_CLIPS = 40


def test_the_memory_on_disk_is_the_one_that_was_made(tmp_path):
    ask_latency.write_memory(tmp_path, NUM_CLIPS)
    state, actions, _, nodes = ask_latency.remember(NUM_CLIPS)
    with store.open_store(tmp_path, "made") as video:
        loaded = store.load_state(video)
        jax.tree.map(np.testing.assert_array_equal, loaded, state)
        assert store.progress(video).clips == NUM_CLIPS == len(actions)
        replayed = store.state_at(video, NUM_CLIPS * ask_latency.CLIP_SECONDS / 2)
        assert int(replayed.num_items) == NUM_CLIPS // 2
        held = {clip.index for clip in store.read_clips(video)}
    assert held == set(np.flatnonzero(nodes >= 0).tolist())
    rng = np.random.default_rng(0)
    space = ask.Space(
        lambda texts: rng.normal(size=(len(texts), 384)).astype(np.float32),
        ask_latency.things().astype(np.float32),
    )
    with ask.load(tmp_path, space=space) as opened:
        seconds, parts = ask_latency.ask_once(opened, "Where?")
        assert seconds >= sum(parts.values()) > 0
