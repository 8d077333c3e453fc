"""Perceived streams, and the order in which the loader serves them."""

import numpy as np
import pytest

from mmmem_jax.data import encoded
from mmmem_jax.data.encoded import QUESTION_FIELDS, EncodedStream

NUM_STREAMS, T, M, D = 7, 3, 6, 4


def stream(index: int, num_valid: int) -> EncodedStream:
    """A stream whose arrays all carry its index; question i has answer i."""
    return EncodedStream(
        visual=np.full((T, D), index, np.float16),
        coarse=np.full((T, D), index, np.float16),
        text=np.full((T, D), index, np.float16),
        span=np.full((T, 2), index, np.float32),
        tokens=np.full(T, index, np.int32),
        mention=np.zeros((T, 2, D), np.float16),
        mention_valid=np.ones((T, 2), bool),
        change=np.zeros(T, np.float32),
        relation=np.full(T, -1, np.int32),
        valid=np.ones(T, bool),
        relevant=np.ones(T, bool),
        query=np.full((M, D), index, np.float16),
        options=np.full((M, 4, D), index, np.float16),
        answer=np.arange(M, dtype=np.int32),
        family=np.arange(M, dtype=np.int32),
        evidence=np.arange(M * 2, dtype=np.int32).reshape(M, 2),
        query_time=np.arange(M, dtype=np.float32),
        question_valid=np.arange(M) < num_valid,
    )


@pytest.fixture(scope="module")
def streams():
    return encoded.stack([stream(i, num_valid=3) for i in range(NUM_STREAMS)])


def take(loader, count):
    return [next(loader) for _ in range(count)]


def loader(streams, seed=0, batch_size=3, questions=4):
    return encoded.make_loader(
        streams, seed=seed, batch_size=batch_size, questions_per_stream=questions
    )


def same(a, b) -> bool:
    return all(
        np.array_equal(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True)
    )


class TestLoader:
    def test_order_and_draws_follow_from_the_seed(self, streams):
        first = take(loader(streams), 6)
        assert same(first, take(loader(streams), 6))
        assert not same(first, take(loader(streams, seed=1), 6))

    def test_every_stream_comes_once_before_any_comes_again(self, streams):
        batches = take(loader(streams, batch_size=1), 3 * NUM_STREAMS)
        order = [int(b.tokens[0, 0]) for b in batches]
        epochs = np.reshape(order, (3, NUM_STREAMS))
        assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(NUM_STREAMS), (3, 1)))
        assert not np.array_equal(epochs[0], epochs[1])

    @pytest.mark.parametrize("served", [0, 5])
    def test_resumes_anywhere(self, streams, served):
        original = loader(streams)
        take(original, served)
        state = original.get_state()
        rest = take(original, 4)
        other = loader(streams)
        take(other, 2)
        other.set_state(state)
        assert same(take(other, 4), rest)

    def test_questions_stay_with_their_stream(self, streams):
        for batch in take(loader(streams), 5):
            index = batch.tokens[:, 0]
            assert np.array_equal(batch.query[:, 0, 0], index)
            assert np.array_equal(batch.options[:, 0, 0, 0], index)
            assert np.array_equal(batch.answer, batch.family)
            assert np.array_equal(batch.answer * 2, batch.evidence[..., 0])
            assert np.array_equal(batch.answer < 3, batch.question_valid)

    def test_valid_questions_come_first(self, streams):
        for batch in take(loader(streams), 5):
            assert batch.question_valid.tolist() == [[True, True, True, False]] * 3
            assert np.array_equal(np.sort(batch.answer[:, :3]), [[0, 1, 2]] * 3)

    def test_each_visit_draws_other_questions(self, streams):
        streams = streams._replace(question_valid=np.ones((NUM_STREAMS, M), bool))
        batches = take(loader(streams, batch_size=1, questions=2), 8 * NUM_STREAMS)
        draws = {tuple(b.answer[0]) for b in batches if b.tokens[0, 0] == 2}
        assert len(draws) > 3

    def test_a_batch_may_hold_more_than_all_streams(self, streams):
        (batch,) = take(loader(streams, batch_size=9), 1)
        assert batch.tokens.shape == (9, T)

    def test_streams_without_valid_questions(self):
        streams = encoded.stack([stream(i, num_valid=0) for i in range(2)])
        (batch,) = take(loader(streams, batch_size=2), 1)
        assert batch.answer.shape == (2, 4)
        assert not np.any(batch.question_valid)

    def test_streams_without_questions(self):
        empty = {name: getattr(stream(0, 0), name)[:0] for name in QUESTION_FIELDS}
        streams = encoded.stack([stream(i, 0)._replace(**empty) for i in range(2)])
        (batch,) = take(loader(streams, batch_size=2), 1)
        assert batch.options.shape == (2, 0, 4, D)


class TestDevice:
    def test_items_are_numbered_and_float32(self, streams):
        items = encoded.to_items(streams)
        assert items.visual.dtype == items.mention.dtype == np.float32
        assert items.trace_id.tolist() == [[0, 1, 2]] * NUM_STREAMS
        assert items.tokens.dtype == items.relation.dtype == np.int32
        assert items.valid.dtype == bool
        one = encoded.to_items(stream(5, 3))
        assert np.array_equal(one.text, items.text[5])

    def test_questions_keep_their_shapes(self, streams):
        questions = encoded.to_questions(streams)
        assert questions.query.shape == (NUM_STREAMS, M, D)
        assert questions.options.shape == (NUM_STREAMS, M, 4, D)
        assert questions.query.dtype == np.float32
        assert np.array_equal(questions.valid, streams.question_valid)
