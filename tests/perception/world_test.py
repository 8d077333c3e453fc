"""Perception of the procedural world: words and frames in one space."""

import numpy as np
import pytest
from flax import nnx

from mmmem_jax.data import worlds
from mmmem_jax.memory import MemoryConfig
from mmmem_jax.models.frame_encoder import FrameEncoder
from mmmem_jax.perception import world

DIM = 64
GOLDEN = (-0.094950572, -0.10780453, 0.14017548)  # start of the first word's vector
CONFIG = worlds.WorldConfig(num_chunks=40, chunks_per_day=8)


@pytest.fixture(scope="module")
def encoder():
    return FrameEncoder(len(worlds.WORDS), hidden=16, rngs=nnx.Rngs(0))


class TestWords:
    def test_vectors_are_unit_and_apart(self):
        vectors = world.word_vectors(DIM)
        assert not np.any(vectors[0])
        np.testing.assert_allclose(np.linalg.norm(vectors[1:], axis=1), 1.0, atol=1e-6)
        cosine = vectors[1:] @ vectors[1:].T
        # Two words nearer than this would be one entity.
        limit = MemoryConfig().entity_similarity
        assert np.abs(cosine[~np.eye(len(cosine), dtype=bool)]).max() < limit

    def test_the_same_on_every_machine(self):
        again = world.word_vectors.__wrapped__(DIM)
        assert np.array_equal(again, world.word_vectors(DIM))
        np.testing.assert_allclose(again[1, :3], GOLDEN, atol=1e-7)

    def test_a_narration_is_the_unit_sum_of_its_words(self):
        vectors = world.word_vectors(DIM)
        out = world.embed_words(np.array([[3, 0, 5], [0, 0, 0]]), DIM)
        total = vectors[3] + vectors[5]
        np.testing.assert_allclose(out[0], total / np.linalg.norm(total), atol=1e-6)
        assert not np.any(out[1])


def test_change_is_the_distance_to_the_chunk_before():
    visual = np.array([[1, 0], [1, 0], [-1, 0], [0, 0], [0, 1]], np.float32)
    change = world.change_of(visual, np.zeros_like(visual))
    np.testing.assert_allclose(change, [1, 0, 2, 1, 1], atol=1e-6)
    assert change.dtype == np.float32
    assert world.change_of(visual[:1], visual[:1]).tolist() == [1]
    assert world.change_of(visual[:0], visual[:0]).shape == (0,)


def test_targets_are_the_words_shown():
    stream, _ = worlds.make_stream(0, 0, CONFIG)
    target = world.shown_words(stream)
    for t, row in enumerate(target):
        assert set(np.flatnonzero(row)) == set(stream.visible[t]) - {0}
    assert set(np.unique(target)) <= {0.0, 1.0}


class TestPerceive:
    def test_is_what_the_stream_tells(self, encoder):
        stream, questions = worlds.make_stream(0, 0, CONFIG)
        out = world.perceive(encoder, stream, questions, DIM)
        told = (stream.words > 0).sum(1)
        assert np.array_equal(out.tokens, told)
        length = np.linalg.norm(out.text.astype(np.float32), axis=1)
        np.testing.assert_allclose(length, told > 0, atol=2e-3)
        assert np.array_equal(out.mention_valid, stream.mention > 0)
        assert np.array_equal(out.relevant, stream.relevant)
        assert np.all(out.query_time == stream.span[-1, 1])
        assert np.all(out.valid)
        for name in ("visual", "coarse", "text", "mention", "query", "options"):
            assert getattr(out, name).dtype == np.float16
            assert np.all(np.isfinite(getattr(out, name)))

    def test_the_same_words_are_the_same_vector_told_and_asked(self, encoder):
        stream, questions = worlds.make_stream(0, 0, CONFIG)
        out = world.perceive(encoder, stream, questions, DIM)
        vectors = world.word_vectors(DIM).astype(np.float16)
        assert np.array_equal(out.mention, vectors[stream.mention])
        shown = world.embed_words(questions.options[0], DIM)
        np.testing.assert_allclose(out.options[0], shown, atol=1e-3)

    def test_a_stream_of_one_chunk(self, encoder):
        length, config = 1, worlds.WorldConfig(num_chunks=1)
        out = world.perceive(encoder, *worlds.make_stream(0, 0, config), DIM)
        assert out.visual.shape == out.text.shape == (length, DIM)
        assert out.change.shape == (length,)
        assert np.all(np.isfinite(out.query_time))

    def test_identical_frames_are_seen_alike(self, encoder):
        stream, _ = worlds.make_stream(0, 0, CONFIG)
        frames = np.repeat(worlds.render(stream)[:1], 5, axis=0)
        fine, coarse = world.see(*nnx.split(encoder), frames, DIM)
        np.testing.assert_allclose(fine, np.repeat(fine[:1], 5, axis=0), atol=1e-6)
        np.testing.assert_allclose(coarse, np.repeat(coarse[:1], 5, axis=0), atol=1e-6)
