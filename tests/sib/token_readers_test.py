"""Readers of a memory of text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmmem_jax.data import token_streams, worlds
from mmmem_jax.data.token_streams import QUESTION_FIELDS, TokenStream
from mmmem_jax.memory import traces as memory
from mmmem_jax.memory.types import ADD_NEW, DISCARD
from mmmem_jax.models.qwen3_vl.images import PixelConfig
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL, Tokens
from mmmem_jax.sib.token_readers import make_likelihood_reader, overlap_reader
from mmmem_jax.testing.qwen3_vl import TINY, random_params, toy_tokenizer

update = jax.jit(memory.update)
O = 4  # noqa: E741, as in jaxtyping's shapes


def padded(rows, width: int):
    """Ids and validity of rows of ids, -1 where a slot is not valid."""
    ids = np.array([list(row) + [-1] * (width - len(row)) for row in rows], np.int32)
    return np.maximum(ids, 0), ids >= 0


def traces_of(nodes, *, num_nodes: int = 3, max_tokens: int = 6, before: int = 0):
    """A memory [1, 1, ...] that holds these nodes, after `before` others that have gone."""
    made = memory.init(num_nodes, max_tokens)
    for node in [[99]] * before + nodes:
        ids, valid = padded([node], max_tokens)
        made = update(made, ADD_NEW, ids[0], valid[0])
    return jax.tree.map(lambda x: np.asarray(x)[None, None], made)


def asking(subjects=((),), options=(((),) * O,), questions=((),), width: int = 6) -> TokenStream:
    """A stream [1, ...] of questions alone."""
    q = max(len(subjects), len(questions))
    question, question_valid = padded(questions, width)
    subject, subject_valid = padded(subjects, width)
    option, option_valid = padded([o for row in options for o in row], width)
    return TokenStream(
        **dict.fromkeys(("caption", "caption_valid", "patches", "valid", "teacher")),
        question=question[None],
        question_valid=question_valid[None],
        subject=subject[None],
        subject_valid=subject_valid[None],
        option=option.reshape(1, -1, O, width),
        option_valid=option_valid.reshape(1, -1, O, width),
        answer=np.zeros((1, q), np.int32),
        asked=np.ones((1, q), bool),
    )


class TestOverlap:
    """Tokens: 1 2 is a word, and 3 another; options are 10 to 13 and, of two words, 20 21."""

    read = staticmethod(jax.jit(overlap_reader))
    OPTIONS = ((10,), (11,), (12,), (13,))

    def answer(self, nodes, subject, options=OPTIONS, **kwargs):
        """Probabilities of the options, and the likeliest."""
        log_probs = self.read(traces_of(nodes, **kwargs), asking([subject], [options]))
        assert log_probs.shape == (1, 1, 1, O)
        probs = np.exp(log_probs[0, 0, 0])
        np.testing.assert_allclose(probs.sum(), 1, atol=1e-5)
        return probs

    @pytest.mark.parametrize(
        ("nodes", "subject"),
        [
            ([], [3]),
            ([[3, 5]], [3]),  # no option
            ([[10, 5]], [3]),  # no subject
            ([[10, 5]], []),  # nothing is asked about
            ([[3], [10]], [3]),  # not in one node
            ([[1, 5, 2, 10]], [1, 2]),  # tokens of a word that do not follow each other
            ([[2, 1, 10]], [1, 2]),
            ([[1], [2, 10]], [1, 2]),  # a word does not go on in the next node
            ([[3, 10], [7], [7], [7]], [3]),  # gone
        ],
    )
    def test_no_match_is_uniform(self, nodes, subject):
        np.testing.assert_allclose(self.answer(nodes, subject), 0.25, atol=1e-6)

    @pytest.mark.parametrize(
        ("nodes", "subject", "best"),
        [
            ([[3, 11]], [3], 1),
            ([[5, 12, 1, 2]], [1, 2], 2),
            ([[5, 1, 1, 2, 12]], [1, 2], 2),
            ([[3, 11], [3, 13]], [3], 3),  # the newest decides
            ([[3, 13], [3, 11]], [3], 1),
            ([[3, 13, 11]], [3], 1),  # within a node, too
            ([[3, 1, 2, 10], [3, 11]], [3, -1, 1, 2], 0),  # more of the subject counts more
            ([[7], [3, 11], [3, 13], [3, 12]], [3], 2),  # slots go round
            ([[7], [7], [3, 11], [7], [3, 13]], [3], 3),
        ],
    )
    def test_the_best_and_newest_match_decides(self, nodes, subject, best):
        probs = self.answer(nodes, subject)
        assert np.argmax(probs) == best
        assert probs[best] > 0.9

    def test_more_words_of_an_option_count_more(self):
        options = ((20, -1, 21), (20, -1, 22), (23,), (24,))
        probs = self.answer([[3, 21, 5, 20]], [3], options)
        assert np.argsort(-probs)[:2].tolist() == [0, 1]

    def test_padding_changes_nothing(self):
        nodes, subject = [[3, 11], [3, 13]], [3, -1, 1, 2]
        narrow = self.answer(nodes, subject)
        stream = asking([subject], [self.OPTIONS], width=9)
        wide = self.read(traces_of(nodes, num_nodes=5, max_tokens=8), stream)
        np.testing.assert_allclose(np.exp(wide[0, 0, 0]), narrow, atol=1e-6)


@pytest.fixture(scope="module")
def world():
    config = worlds.WorldConfig(num_chunks=128, questions_per_family=2, facts=32)
    lives = [worlds.make_stream(3, i, config) for i in range(6)]
    streams = token_streams.from_worlds(lives, toy_tokenizer(), PixelConfig(1, 1))
    return streams, np.stack([stream.relevant for stream, _ in lives])


class TestReward:
    """Captions of clips that matter answer the world's questions; others do not."""

    def probability(self, streams: TokenStream, kept) -> list[float]:
        """Mean q(y | m) of G memories of the captions kept, bool [G, S, T]."""

        def remember(keep, ids, valid):
            def step(traces, x):
                return memory.update(traces, *x), None

            start = memory.init(64, streams.caption.shape[-1])
            return jax.lax.scan(step, start, (jnp.where(keep, ADD_NEW, DISCARD), ids, valid))[0]

        over_group = jax.vmap(remember, in_axes=(0, None, None))
        held = jax.vmap(over_group)(np.moveaxis(kept, 0, 1), streams.caption, streams.caption_valid)
        log_probs = np.asarray(jax.jit(overlap_reader)(held, streams))  # [S, G, Q, O]
        answer = np.broadcast_to(streams.answer[:, None, :, None], (*log_probs.shape[:-1], 1))
        probs = np.exp(np.take_along_axis(log_probs, answer, -1)[..., 0])
        return [probs[:, g][streams.asked].mean() for g in range(len(kept))]

    def test_what_matters_is_worth_keeping(self, world):
        streams, relevant = world
        rng = np.random.default_rng(0)
        random = rng.permuted(relevant, axis=1)
        all_of_it, facts, nothing, others = self.probability(
            streams, np.stack([np.ones_like(relevant), relevant, relevant & False, random])
        )
        assert facts > 0.6
        assert nothing == pytest.approx(0.25, abs=1e-5)
        assert others < facts - 0.2
        assert all_of_it < facts - 0.1  # 64 nodes hold half of the stream


PREFIX, SUFFIX, LETTERS, SEPARATOR = (7, 8, 9), (30, 31), (40, 41, 42, 43), (5,)


@pytest.fixture(scope="module")
def model():
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Qwen3VL(TINY, rngs=nnx.Rngs(0))))
    return graphdef, random_params(TINY, 0)


@pytest.fixture(scope="module")
def read(model):
    """(traces, stream, most) -> log-probabilities."""
    graphdef, params = model

    @functools.partial(jax.jit, static_argnames="most")
    def read(traces, stream, most=None):
        reader = make_likelihood_reader(
            graphdef,
            prefix_ids=PREFIX,
            suffix_ids=SUFFIX,
            letter_ids=LETTERS,
            separator_ids=SEPARATOR,
            max_memory_tokens=most,
        )
        return reader(params, traces, stream)

    def of_questions(traces, stream, most=None):
        asked = {name: getattr(stream, name) for name in QUESTION_FIELDS}
        nothing = jnp.zeros(0)
        return read(traces, TokenStream(*[nothing] * 5, **asked), most)

    return of_questions


@pytest.fixture(scope="module")
def in_one_piece(model):
    """(said, question) -> log-probabilities, without cache."""
    graphdef, params = model

    @jax.jit
    def logits(ids):
        model = nnx.merge(graphdef, params)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None, :, None], (*ids.shape, 3))
        text = Tokens(ids, positions, jnp.ones_like(ids, bool), jnp.full_like(ids, -1))
        return model.logits(model(text)[0])[0, :, jnp.array(LETTERS)]

    def read(said, question):
        prompt = [*PREFIX, *said, *question, *SUFFIX]
        ids = jnp.array([prompt + [0] * (32 - len(prompt))])  # what comes after is not looked at
        return jax.nn.log_softmax(logits(ids)[:, len(prompt) - 1])

    return read


class TestLikelihood:
    """Two streams of two generations, of which one holds nothing; the first has lost nodes."""

    SAID = ((99, 5, 50, 51, 52, 5, 60, 61, 5), ())  # 5 parts nodes
    QUESTIONS = ((80, 81, 82, 83), (90, 91))

    def memories(self, **kwargs):
        full = traces_of([[50, 51, 52], [60, 61]], before=3, **kwargs)
        pair = jax.tree.map(
            lambda x, y: np.concatenate([x, y], axis=1), full, traces_of([], **kwargs)
        )
        return jax.tree.map(lambda x: np.concatenate([x, x[:, ::-1]]), pair)

    def stream(self, **kwargs):
        one = asking(((),) * 2, (((),) * O,) * 2, self.QUESTIONS, **kwargs)
        return jax.tree.map(lambda x: np.concatenate([x, x[:, ::-1]]), one)

    def check(self, found, said, in_one_piece):
        assert found.shape == (2, 2, 2, O)
        for g, q in np.ndindex(2, 2):
            expected = in_one_piece(said[g], self.QUESTIONS[q])
            np.testing.assert_allclose(found[0, g, q], expected, atol=1e-4)
            np.testing.assert_allclose(found[1, 1 - g, 1 - q], expected, atol=1e-4)
        assert np.abs(found[0, 0] - found[0, 1]).max() > 0.01  # what is held matters

    def test_is_the_prompt_read_in_one_piece(self, read, in_one_piece):
        self.check(read(self.memories(), self.stream()), self.SAID, in_one_piece)

    def test_padding_changes_nothing(self, read, in_one_piece):
        found = read(self.memories(max_tokens=9), self.stream(width=11))
        self.check(found, self.SAID, in_one_piece)

    def test_reads_the_newest_of_too_much(self, read, in_one_piece):
        newest = (self.SAID[0][-4:], ())
        self.check(read(self.memories(), self.stream(), 4), newest, in_one_piece)

    def test_needs_a_prefix(self, model):
        with pytest.raises(ValueError, match="a prefix of a token"):
            make_likelihood_reader(model[0], prefix_ids=(), suffix_ids=(), letter_ids=LETTERS)
