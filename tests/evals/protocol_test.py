"""Tests of mmmem_jax/evals/protocol.py: policies on the same footing, also with nothing to do."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import sib_grpo
from mmmem_jax.data.encoded import QUESTION_FIELDS, EncodedStream
from mmmem_jax.evals import protocol
from mmmem_jax.policies import rules
from mmmem_jax.train import world_job

CONFIG = sib_grpo.get_config("smoke")
MEMORY = dataclasses.replace(
    world_job.memory_config(CONFIG), sensory_slots=4, episodic_slots=4, schema_slots=4
)
MODELS = world_job.make_models(CONFIG)
CHUNK_FIELDS = set(EncodedStream._fields) - set(QUESTION_FIELDS)


def make_streams(num_chunks: int, num_streams: int = 3):
    made = world_job.make_streams(CONFIG, "test", num_streams, num_chunks=num_chunks)
    return world_job.encode_streams(MODELS.eye, made, CONFIG.dim)


@pytest.fixture(scope="module")
def streams():
    return make_streams(64)


def evaluate(policy, streams, **kwargs):
    options = {"retrieval": world_job.retrieval_config(CONFIG), "batch_size": 3} | kwargs
    return protocol.evaluate(policy, MODELS.reader, streams, **options)


def policies(num_chunks: int):
    learned = protocol.learned_policy(MODELS.manager, MEMORY)
    fixed = rules.fixed_rules(
        max(num_chunks, 1), 4, similarity=0.5, surprise_change=0.6, half_life=86_400.0
    )
    return [learned, *(protocol.rule_policy(rule, MEMORY) for rule in fixed)]


def test_every_policy_keeps_the_budget_and_answers_all(streams):
    for policy in policies(64):
        records = evaluate(policy, streams)
        assert records.slots.max() <= 4
        assert np.all(records.tokens <= records.source_tokens)
        assert np.all(records.tokens <= records.tokens_all_levels)
        for log_probs in (records.log_probs, records.top_down_log_probs, records.flat_log_probs):
            np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1.0, rtol=1e-5)
        entry = protocol.summarise(policy.name, records, streams)
        assert entry["name"] == policy.name
        assert 0.0 <= entry["ece"] <= 1.0
        assert sum(row["n"] for row in entry["by_family"]) == streams.question_valid.sum()
        assert sum(entry["stop_levels"].values()) == pytest.approx(1.0)
        json.dumps(entry, allow_nan=False)


def test_unlimited_keeps_everything(streams):
    records = evaluate(protocol.unlimited_policy(MEMORY, 64), streams)
    np.testing.assert_array_equal(records.slots, 64)
    np.testing.assert_array_equal(records.tokens, records.source_tokens)


def test_the_batch_changes_nothing(streams):
    policy = protocol.learned_policy(MODELS.manager, MEMORY)  # draws nothing
    whole, pieces = (evaluate(policy, streams, batch_size=n) for n in (3, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, pieces)


@pytest.mark.parametrize("num_chunks", [0, 1])
def test_streams_with_next_to_nothing_in_them(num_chunks):
    streams = make_streams(1)
    chunks = {f: getattr(streams, f)[:, :num_chunks] for f in CHUNK_FIELDS}
    streams = streams._replace(**chunks)
    for policy in policies(num_chunks)[:3]:
        records = evaluate(policy, streams)
        assert np.all(np.isfinite(records.log_probs))
        assert records.slots.max(initial=0) <= num_chunks
        json.dumps(protocol.summarise(policy.name, records, streams), allow_nan=False)


def test_without_questions_there_is_no_accuracy(streams):
    silent = streams._replace(question_valid=np.zeros_like(streams.question_valid))
    policy = policies(64)[0]
    entry = protocol.summarise("learned", evaluate(policy, silent), silent)
    assert entry["accuracy"] is entry["se"] is entry["accuracy_top_down"] is entry["ece"] is None
    json.dumps(entry, allow_nan=False)


def test_errors_are_clustered_by_stream():
    valid = np.ones((4, 10), bool)
    right = np.zeros((4, 10), bool)
    right[:2] = True  # all or nothing a stream: 4 independent observations, not 40
    score = protocol.accuracy_and_error(right, valid)
    assert score["accuracy"] == 0.5
    assert score["se"] == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)
    mixed = np.tile(np.arange(10) % 2 == 0, (4, 1))
    assert protocol.accuracy_and_error(mixed, valid)["se"] == pytest.approx(0.0)
    assert protocol.accuracy_and_error(right, ~valid) == {"accuracy": None, "se": None, "n": 0}


def test_padding_questions_do_not_count(streams):
    right = np.random.default_rng(0).random(streams.answer.shape) < 0.5
    valid = streams.question_valid.copy()
    valid[:, ::2] = False
    score = protocol.accuracy_and_error(right, valid)
    assert score["accuracy"] == pytest.approx(right[valid].mean())
    assert score["n"] == valid.sum()


def test_rules_take_the_constants_that_score_best():
    def score(rule):
        wanted = {"similarity_merge": 0.7, "surprise": 0.3, "forgetting_curve": 0.7}
        half_life = float(rule.params["half_life"]) if rule.name == "forgetting_curve" else 0.0
        return -abs(float(rule.params["threshold"]) - wanted[rule.name]) - half_life / 1e9

    assert protocol.tune_rules(score) == {
        "similarity": 0.7, "surprise_change": 0.3, "half_life": min(protocol.HALF_LIVES),
    }  # fmt: skip


def test_evidence_age_counts_from_its_newest_chunk(streams):
    age = protocol.evidence_age(streams)
    has = streams.question_valid & (streams.evidence.max(-1) >= 0)
    assert np.all(age[has] >= 0)
    assert np.all(np.isnan(age[streams.evidence.max(-1) < 0]))
    assert age[has].max() <= streams.span.max() / 86_400
