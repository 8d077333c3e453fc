"""Rules for text: what they keep of a stream whose features are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax import memory
from mmmem_jax.data.text_streams import (
    FEATURE_CENTRE,
    FEATURE_SCALE,
    FEATURES,
    IDF_SUM,
    SPOKEN,
)
from mmmem_jax.memory import Item, MemoryConfig
from mmmem_jax.policies import text_rules

NUM_ROWS, SLOTS, DIM = 40, 8, 16
RNG = np.random.default_rng(0)
IDF = RNG.permutation(NUM_ROWS).astype(np.float32)
TOLD = np.arange(NUM_ROWS) % 3 == 0


def items() -> Item:
    visual = np.zeros((NUM_ROWS, DIM), np.float32)
    visual[:, IDF_SUM], visual[:, SPOKEN] = IDF, TOLD
    features = slice(0, len(FEATURES))
    visual[:, features] = (visual[:, features] - FEATURE_CENTRE) / FEATURE_SCALE
    time = jnp.arange(NUM_ROWS, dtype=jnp.float32)
    return Item(
        visual=jnp.asarray(visual),
        coarse=jnp.zeros((NUM_ROWS, DIM)),
        text=jnp.asarray(RNG.normal(size=(NUM_ROWS, DIM)), jnp.float32),
        span=jnp.stack([time, time + 1.0], -1),
        tokens=jnp.full(NUM_ROWS, 4, jnp.int32),
        mention=jnp.zeros((NUM_ROWS, 0, DIM)),
        mention_valid=jnp.zeros((NUM_ROWS, 0), bool),
        change=jnp.ones(NUM_ROWS),
        relation=jnp.full(NUM_ROWS, -1, jnp.int32),
        trace_id=jnp.arange(NUM_ROWS, dtype=jnp.int32),
        valid=jnp.ones(NUM_ROWS, bool),
    )


def kept(params, decide_fn=text_rules.decide) -> set[int]:
    config = MemoryConfig(
        sensory_slots=1, episodic_slots=SLOTS, schema_slots=0, num_prototypes=1, dim=DIM
    )
    state, _ = memory.scan(
        params, jax.random.key(0), memory.init(config), items(), decide_fn=decide_fn
    )
    stream = state.episodic
    return set(np.asarray(stream.source[:, 0])[np.asarray(stream.valid)].tolist())


def best(score, of=range(NUM_ROWS)) -> set[int]:
    return set(sorted(of, key=lambda row: -score[row])[:SLOTS])


def test_features_are_where_the_rules_read_them():
    assert FEATURES[IDF_SUM] == "idf_sum"
    assert FEATURES[SPOKEN] == "spoken"


def test_highest_idf_keeps_the_rows_of_highest_idf():
    assert kept(text_rules.highest_idf()[1]) == best(IDF)


@pytest.mark.parametrize("half_life", [2.0, 20.0, 1e9])
def test_idf_fades_by_half_in_a_half_life(half_life):
    _, params = text_rules.idf_forgetting(half_life)
    retention = (IDF + 1e-2) * 2.0 ** ((np.arange(NUM_ROWS) - NUM_ROWS) / half_life)
    assert kept(params) == best(retention)


def test_transcripts_only_keeps_the_newest_of_what_was_said():
    said = np.flatnonzero(TOLD)
    assert kept(text_rules.transcripts_only()[1]) == set(said[-SLOTS:].tolist())


def test_the_oracle_keeps_what_it_is_told_to():
    strengths = RNG.random(NUM_ROWS)
    assert kept(jnp.asarray(strengths), text_rules.decide_oracle) == best(strengths)


def test_names_tell_the_rules_apart():
    made = [text_rules.highest_idf(), text_rules.idf_forgetting(1.0), text_rules.transcripts_only()]
    assert [name for name, _ in made] == ["highest_idf", "idf_forgetting", "transcripts_only"]
