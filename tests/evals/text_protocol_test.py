"""The text protocol: causality, budgets, what counts, on a made-up life."""

import functools
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from mmmem_jax.data import text_streams
from mmmem_jax.data.text_streams import Asked
from mmmem_jax.evals import text_eval, text_policies, text_protocol
from mmmem_jax.evals.protocol import Policy
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


def on_day(text, number: int, query_time=None, evidence=()):
    """The text `number` days later, its labelled question asked at and about absolute times (s)."""
    stream, later = text.stream, 86_400.0 * number

    def moved(question):
        windows = tuple((start + later, end + later) for start, end in question.evidence)
        return replace(question, query_time=question.query_time + later, evidence=windows)

    made = stream.made._replace(questions=tuple(map(moved, stream.made.questions)))
    asked = tuple(
        replace(question, query_time=query_time, evidence=evidence)
        for question in stream.labelled.questions
    )
    labelled = stream.labelled._replace(questions=asked)
    return text._replace(
        stream=stream._replace(span=stream.span + later, made=made, labelled=labelled)
    )


@pytest.mark.parametrize(
    ("evidence", "alone", "with_the_days_before"),
    [
        ((500.0, 530.0), False, True),  # of the first day
        ((86_900.0, 86_930.0), False, True),
        ((173_300.0, 173_330.0), True, True),  # of the own day
        ((174_000.0, 174_030.0), False, False),  # of the own day, after the question
    ],
)
def test_labelled_questions_also_search_the_days_before(
    config, texts, evidence, alone, with_the_days_before
):
    days = [on_day(text, number, 173_800.0, (evidence,)) for number, text in enumerate(texts)]
    run = functools.partial(
        text_protocol.run_policy, text_policies.unlimited(config), splits=("test",), top_k=10_000
    )
    assert run(days)["test"].labelled.hit.tolist() == [with_the_days_before]
    assert run(days[2:])["test"].labelled.hit.tolist() == [alone]
    whole = run(days)["test"]
    assert whole.labelled.has_evidence.tolist() == [with_the_days_before]
    assert whole.made.hit.all()  # made questions rest on their own day
    assert whole.made.has_evidence.all()
    assert whole.tokens == texts[2].stream.tokens.sum()


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


BEST = 0.4


def memory_of(value, config, read):
    """A maker that keeps everything under the value BEST, else nothing; notes what it reads."""
    rule = rules.unlimited() if value == BEST else rules.random_actions([1e-30, 1e-30, 1.0])

    def make(text):
        read.append(text.stream)
        size = text_job.memory_config(config, len(text.items.valid), None)
        return Policy("fake", rule.decide_fn, rule.params, size)

    return make


def without_questions(text):
    return text._replace(stream=text.stream._replace(made=Asked((), text.stream.made.query, ())))


def test_tuning_takes_the_best_value_and_reads_the_last_training_stream_alone(config, texts):
    grid, read = (0.1, 0.2, BEST, 0.8), []
    one, two = (on_day(texts[0], number) for number in range(2))
    silent = without_questions(on_day(texts[0], 2))

    def tuned(texts):
        read.clear()
        return text_policies.tune(texts, lambda v: memory_of(v, config, read), grid, top_k=10_000)

    assert tuned([one, two, *texts[1:]]) == BEST
    assert len(read) == len(grid)
    assert all(stream.span is two.stream.span for stream in read)
    assert tuned([one, two, silent, *texts[1:]]) == BEST
    assert all(stream.span is two.stream.span for stream in read)
    assert tuned([silent, *texts[1:]]) == grid[0]
    assert not read


def test_what_cannot_be_tuned_is_said_once(config, texts, caplog):
    def run_all(texts):
        next(text_eval.run_all(config, texts, [], splits=(), shares=()), None)

    run_all(texts)
    assert not caplog.records
    run_all([without_questions(texts[0]), *texts[1:]])
    (record,) = caplog.records
    assert record.getMessage().startswith("no training stream has a question with evidence")


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
