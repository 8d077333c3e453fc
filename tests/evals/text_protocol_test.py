"""The text protocol: causality, budgets, what counts, on a made-up life."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from mmmem_jax.data import text_streams
from mmmem_jax.evals import text_policies, text_protocol
from mmmem_jax.evals.text_policies import Setting
from mmmem_jax.policies import rules, text_rules
from mmmem_jax.retrieval.text_search import Kept
from mmmem_jax.train import text_job

REPO = Path(__file__).resolve().parents[2]


def _module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


made_up = _module(REPO / "tests/data/text_streams_test.py")


@pytest.fixture(scope="module")
def config() -> ConfigDict:
    config = _module(REPO / "configs/egolife.py").get_config("smoke")
    config.dim = made_up.DIM
    return config


@pytest.fixture(scope="module")
def texts():
    parts = [
        (f"v {split}", "v", split, made_up.life("v", 0))
        for split in ("train", "validation", "test")
    ]
    streams = text_streams.make_streams(
        parts, made_up.embed, wearer=None, num_questions=30, rng_seed=0
    )
    space = text_streams.fit_space(streams[0].embedding, made_up.DIM)
    return text_protocol.prepare(space, streams)


def policies(config, share):
    setting = Setting(config, share)
    return {
        "keep_recent": text_policies.rule(setting, lambda _: rules.keep_recent()),
        "similarity_merge": text_policies.rule(setting, lambda _: rules.similarity_merge(0.0)),
        "highest_idf": text_policies.text_rule(setting, text_rules.highest_idf()),
        "learned": text_policies.learned(setting, text_job.make_manager(config), 1.0, 100.0),
    }


@pytest.mark.parametrize("name", ["keep_recent", "similarity_merge", "highest_idf", "learned"])
def test_memories_hold_the_past_within_the_budget(config, texts, name):
    text = texts[2]
    make = policies(config, 1 / 8)[name]
    times = [-1.0, 0.0, 204.0, 204.5, 1000.0, np.inf]
    budget = int(text.stream.tokens.sum()) // 8
    for time, kept in zip(times, text_protocol.replay(make(text), text, times), strict=True):
        assert (text.stream.span[kept.row, 1] <= time).all()
        assert text.stream.tokens[kept.row].sum() <= budget
        assert (np.diff(kept.node) >= 0).all()
        assert len(set(kept.row)) == len(kept.row)


def test_a_replay_with_stops_is_the_replay_without(config, texts):
    make = policies(config, 1 / 8)["similarity_merge"]
    stops = text_protocol.replay(make(texts[2]), texts[2], [3.0, 500.0, 777.0, np.inf])
    whole = text_protocol.replay(make(texts[2]), texts[2], [np.inf])
    for ours, theirs in zip(stops[-1], whole[-1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_keep_recent_holds_the_newest_rows(config, texts):
    make = policies(config, 1 / 8)["keep_recent"]
    kept = text_protocol.replay(make(texts[2]), texts[2], [np.inf])[0]
    np.testing.assert_array_equal(np.sort(kept.row), np.arange(400 - len(kept.row), 400))


def test_unlimited_holds_all_that_ended(config, texts):
    make = text_policies.unlimited(config)
    for time, kept in zip(
        (204.0, np.inf),
        text_protocol.replay(make(texts[2]), texts[2], (204.0, np.inf)),
        strict=True,
    ):
        np.testing.assert_array_equal(
            np.sort(kept.row), np.flatnonzero(texts[2].stream.span[:, 1] <= time)
        )


def test_labelled_questions_also_search_the_days_before(config, texts):
    found = text_protocol.run_policy(
        text_policies.unlimited(config), texts, ("validation", "test"), top_k=10_000
    )
    assert found["test"].labelled.hit.tolist() == [True]
    assert found["test"].made.hit.all()
    assert found["test"].made.has_evidence.all()
    assert found["test"].tokens == texts[2].stream.tokens.sum()


def test_a_budget_is_a_larger_share_of_what_was_seen(texts):
    stream = texts[2].stream
    total = int(stream.tokens.sum())
    expected = []
    for question in stream.made.questions:
        seen = stream.tokens[stream.span[:, 1] <= question.query_time].sum()
        expected.append(min(1.0, (total // 4) / seen))
    found = text_protocol.share_of_seen(stream, total // 4)
    np.testing.assert_allclose(found, expected)
    assert 0.25 < found.mean() < 1.0
    np.testing.assert_array_equal(text_protocol.share_of_seen(stream, total), 1.0)
    np.testing.assert_array_equal(text_protocol.share_of_seen(stream, None), 1.0)


def test_nothing_kept_finds_nothing(config, texts):
    empty = Kept(np.zeros(0, int), np.zeros(0, int))
    stream = texts[2].stream
    asked = stream.made
    records = text_protocol.score(asked, [empty] * len(asked.questions), [stream], top_k=5)
    assert not records.hit.any()
    assert not records.held.any()
    assert not records.right.any()
    assert (records.chosen == -1).all()
    assert records.has_answer.all()


def test_joined_memories_number_rows_and_nodes_through(texts):
    a, b = Kept(np.array([2, 5]), np.array([0, 3])), Kept(np.array([1]), np.array([0]))
    joined = text_protocol._join([a, b], [texts[0].stream, texts[1].stream])
    np.testing.assert_array_equal(joined.row, [2, 5, 401])
    np.testing.assert_array_equal(joined.node, [0, 3, 4])


def test_no_question_gives_no_rate():
    empty = np.zeros(0, bool)
    assert text_protocol.rate(empty, empty) == {"mean": None, "se": None, "n": 0}
    half = np.array([True, False, True, False])
    assert text_protocol.rate(half, np.ones(4, bool)) == {"mean": 0.5, "se": 0.25, "n": 4}
