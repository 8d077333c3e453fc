"""The encoder against recorded torch outputs; the loader's refusals, the cache."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from mmmem_jax.errors import UserError
from mmmem_jax.models import text_encoder, weights
from mmmem_jax.models.text_encoder import cached_embeddings, encode_texts, load_text_encoder

HERE = Path(__file__).parent
TINY = HERE / "tiny_bert"
REFERENCE = json.loads((HERE / "text_encoder_reference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tiny():
    return load_text_encoder(TINY)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "bert"))


def change_tensors(folder, change):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def pool_by(folder, **modes):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))


class TestParity:
    def test_tiny_bert_mean_pooling(self, tiny):
        embeddings, _ = encode_texts(*tiny, REFERENCE["sentences"], batch_size=4)
        np.testing.assert_allclose(embeddings, REFERENCE["tiny_mean"], rtol=0, atol=1e-5)

    def test_tiny_bert_cls_pooling(self, folder):
        pool_by(folder, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
        embeddings, _ = encode_texts(*load_text_encoder(folder), REFERENCE["sentences"])
        np.testing.assert_allclose(embeddings, REFERENCE["tiny_cls"], rtol=0, atol=1e-5)

    def test_minilm(self):
        try:
            minilm = weights.fetch_minilm()
        except UserError as error:
            pytest.skip(f"all-MiniLM-L6-v2 is not to be had: {error}")
        encoder, tokenizer = load_text_encoder(minilm)
        embeddings, counts = encode_texts(encoder, tokenizer, REFERENCE["sentences"], batch_size=2)
        assert np.abs(embeddings - np.array(REFERENCE["minilm"])).max() < 1e-5
        assert counts[:2].tolist() == [2, 10]
        assert counts[4] == 0

    def test_names_of_other_checkpoints_load_alike(self, folder, tiny):
        def rename(tensors):
            for name in list(tensors):
                old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
                old = old.replace("LayerNorm.bias", "LayerNorm.beta")
                tensors[f"bert.{old}"] = tensors.pop(name)
            tensors["cls.predictions.bias"] = np.zeros(3, np.float32)

        change_tensors(folder, rename)
        texts = REFERENCE["sentences"][:2]
        again, _ = encode_texts(*load_text_encoder(folder), texts, batch_size=2)
        assert np.array_equal(again, encode_texts(*tiny, texts, batch_size=2)[0])


class TestEncodeTexts:
    def test_rows_do_not_depend_on_their_batch(self, tiny):
        texts = REFERENCE["sentences"][1:3]
        together, counts = encode_texts(*tiny, texts, batch_size=8)
        for text, row, count in zip(texts, together, counts, strict=True):
            alone, alone_count = encode_texts(*tiny, [text], batch_size=1)
            np.testing.assert_allclose(alone[0], row, atol=2e-6)
            assert alone_count[0] == count

    def test_unit_length_and_counts_before_the_cut(self, tiny):
        long = "the cat " * 100
        embeddings, counts = encode_texts(*tiny, ["cups", long, "", "cups"], batch_size=2)
        assert embeddings.shape == (4, 24)
        assert embeddings.dtype == np.float32
        assert counts.tolist() == [2, 200, 0, 2]
        assert counts.dtype == np.int32
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
        assert np.array_equal(embeddings[0], embeddings[3])

    def test_equal_texts_are_embedded_once(self, tiny, monkeypatch):
        seen = []
        encode = text_encoder._encode
        monkeypatch.setattr(
            text_encoder, "_encode", lambda *args: seen.append(args[-1].sum()) or encode(*args)
        )
        encode_texts(*tiny, ["the cat"] * 50 + ["the mat"] * 50, batch_size=2)
        assert len(seen) == 1

    def test_no_texts(self, tiny):
        embeddings, counts = encode_texts(*tiny, [])
        assert embeddings.shape == (0, 24)
        assert counts.shape == (0,)


class TestRefusals:
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
    def test_a_missing_or_broken_file_is_named(self, folder, name):
        (folder / name).write_bytes(b"not this")
        with pytest.raises(UserError, match=name):
            load_text_encoder(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"has no {name}"):
            load_text_encoder(folder)

    def test_tensors_name_themselves(self, folder):
        name = "encoder.layer.1.output.dense.weight"
        change_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:, :5].copy()}))
        with pytest.raises(
            UserError, match=r"1\.output\.dense\.weight has shape \(24, 5\).*24, 40"
        ):
            load_text_encoder(folder)
        change_tensors(folder, lambda tensors: tensors.pop(name))
        with pytest.raises(UserError, match=r"no tensor for layers\.1\.down\.kernel \(1 missing\)"):
            load_text_encoder(folder)

    @pytest.mark.parametrize("name", ["encoder.layer.7.output.dense.bias", "lora.down"])
    def test_an_unknown_tensor_names_itself(self, folder, name):
        change_tensors(folder, lambda tensors: tensors.update({name: np.zeros(24, np.float32)}))
        with pytest.raises(UserError, match="unknown tensor " + name.replace(".", r"\.")):
            load_text_encoder(folder)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"model_type": "roberta"}, "model_type 'roberta'"),
            ({"hidden_act": "silu"}, "hidden_act 'silu'"),
            ({"position_embedding_type": "relative_key"}, "not absolute"),
            ({"num_attention_heads": 5}, "do not divide"),
            ({"vocab_size": 10}, "30 tokens, the model 10|shape"),
        ],
    )
    def test_a_model_that_is_not_read(self, folder, change, reason):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=reason):
            load_text_encoder(folder)

    def test_a_pooling_that_is_not_read(self, folder):
        pool_by(folder, pooling_mode_max_tokens=True, pooling_mode_mean_tokens=False)
        with pytest.raises(UserError, match="pooling_mode_max_tokens"):
            load_text_encoder(folder)


class TestCache:
    TEXTS = ("the cat sat", "two red cups", "the cat sat")

    def test_second_call_reads_what_the_first_kept(self, tmp_path, monkeypatch):
        first = cached_embeddings(self.TEXTS, TINY, tmp_path)
        monkeypatch.setattr(text_encoder, "load_text_encoder", None)  # any use would fail
        second = cached_embeddings(self.TEXTS, TINY, tmp_path)
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        exact, _ = encode_texts(*load_text_encoder(TINY), self.TEXTS)
        np.testing.assert_allclose(first[0], exact, atol=1e-3)
        assert first[0].dtype == np.float32
        assert len(list(tmp_path.iterdir())) == 1

    def test_other_texts_or_weights_are_other_entries(self, tmp_path, folder):
        cache = tmp_path / "cache"
        cached_embeddings(self.TEXTS, TINY, cache)
        cached_embeddings(self.TEXTS[::-1][1:], TINY, cache)
        change_tensors(folder, lambda t: t["embeddings.LayerNorm.bias"].__iadd__(1))
        cached_embeddings(self.TEXTS, folder, cache)
        assert len(list(cache.iterdir())) == 3

    def test_a_broken_entry_is_made_again(self, tmp_path):
        first, _ = cached_embeddings(self.TEXTS, TINY, tmp_path)
        (entry,) = tmp_path.iterdir()
        entry.write_bytes(entry.read_bytes()[:50])
        again, _ = cached_embeddings(self.TEXTS, TINY, tmp_path)
        assert np.array_equal(first, again)


def test_padding_rows_and_tokens_do_not_leak(tiny):
    encoder, _ = tiny
    ids = np.array([[2, 5, 6, 3, 9, 9]], np.int32)
    mask = np.array([[1, 1, 1, 1, 0, 0]], bool)
    padded = encoder(ids, mask)
    exact = encoder(ids[:, :4], mask[:, :4])
    np.testing.assert_allclose(padded, exact, atol=2e-6)
