"""Made streams of clips: known evidence, disjoint splits, perception that can be unsure."""

import hashlib

import numpy as np
import pytest

from mmmem_jax.data import lite_streams
from mmmem_jax.data.lite_streams import SPLITS, LiteConfig
from mmmem_jax.errors import UserError

DIM = 24
WORLD = LiteConfig(num_clips=48, num_questions=16)


def embed(texts):
    """Deterministic unit vectors of texts, and their words as tokens."""
    seeds = [int.from_bytes(hashlib.sha256(t.encode()).digest()[:4], "little") for t in texts]
    rows = np.array([np.random.default_rng(s).normal(size=DIM) for s in seeds], np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows, np.array([len(t.split()) for t in texts], np.int32)


@pytest.fixture(scope="module")
def labels():
    return lite_streams.make_labels([f"thing{i}" for i in range(100)], embed)


@pytest.fixture(scope="module")
def streams(labels):
    return [lite_streams.make_stream(0, i, "train", labels, WORLD) for i in range(3)]


def test_a_stream_follows_from_its_seed_split_and_number(labels, streams):
    again = lite_streams.make_stream(0, 1, "train", labels, WORLD)
    assert again.captions == streams[1].captions
    assert again.questions == streams[1].questions
    np.testing.assert_array_equal(again.visual, streams[1].visual)
    assert streams[0].captions != streams[1].captions


def test_splits_share_nothing():
    for values in (range(100), lite_streams.PEOPLE, lite_streams.THINGS, lite_streams.SMALL_TALK):
        parts = [lite_streams.share_of(values, split) for split in SPLITS]
        assert sorted(x for part in parts for x in part) == sorted(values)
        assert all(parts)


def test_what_was_said_is_asked_of_the_clip_that_says_it(streams):
    said = lite_streams.FAMILIES.index("said")
    facts = [(s, q) for s in streams for q in s.questions if q.family == said]
    assert facts
    for stream, question in facts:
        assert all("Subtitle" in stream.captions[t] for t in question.evidence)


def test_nothing_is_asked_of_blank_clips_but_what_was_said(streams):
    said = lite_streams.FAMILIES.index("said")
    assert any(stream.empty.any() for stream in streams)
    for stream in streams:
        for question in stream.questions:
            assert question.evidence
            if question.family != said:
                assert not stream.empty[list(question.evidence)].any()


def test_views_are_of_unit_length_and_clips_follow_each_other(streams):
    for stream in streams:
        np.testing.assert_allclose(np.linalg.norm(stream.visual, axis=-1), 1.0, rtol=1e-5)
        np.testing.assert_array_equal(stream.span[1:, 0], stream.span[:-1, 1])
        assert (np.diff(stream.span, axis=1) <= 10.0).all()


def test_encoded_streams_keep_evidence_and_pad_questions(streams):
    batch = lite_streams.encode(streams, WORLD, embed)
    assert batch.text.shape == (3, 48, DIM)
    assert batch.query.shape == (3, 16, DIM)
    for s, stream in enumerate(streams):
        assert batch.question_valid[s].sum() == len(stream.questions)
        for m, question in enumerate(stream.questions):
            found = batch.evidence[s, m]
            kept = set(found[found >= 0].tolist())
            assert kept <= set(question.evidence)
            assert len(kept) == min(len(set(question.evidence)), lite_streams.MAX_EVIDENCE)
    assert (batch.evidence[~batch.question_valid] == -1).all()


def test_conse_of_one_sure_label_is_its_embedding(labels):
    sure = np.zeros((1, 100), np.float32)
    sure[0, 7] = 1.0
    view = lite_streams.conse(sure, labels.embedding)
    np.testing.assert_allclose(view[0], labels.embedding[7], atol=1e-6)


@pytest.mark.parametrize("content", [None, "[", "[1, 2]", '["a"]'])
def test_class_names_that_cannot_be_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "imagenet1k_clean_names.json").write_text(content)
    with pytest.raises(UserError, match="imagenet1k_clean_names.json"):
        lite_streams.read_label_names(tmp_path)


def test_shares_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="shares"):
        LiteConfig(told_share=0.7, talk_share=0.6)
