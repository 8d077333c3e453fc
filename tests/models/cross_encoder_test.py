"""The cross-encoder against its formulas in NumPy; truncation, padding, the loader's refusals."""

import json
import math

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mmmem_jax.errors import UserError
from mmmem_jax.models import cross_encoder
from mmmem_jax.models.cross_encoder import load_cross_encoder, rerank_scores
from mmmem_jax.models.text_encoder import load_text_encoder

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # XLM-R's, at its ids
WORDS = "who put the red cup on table cat sat and then walk ed s".split()
CONFIG = {
    "model_type": "xlm-roberta",
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 66,  # of which the padding id and the one before hold no token
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "id2label": {"0": "LABEL_0"},
}
QUERY = "who put the cup on the table"
PASSAGES = [
    "the cat sat on the red table",
    "",
    "cats walked and walked and then sat",
    "the red cup " * 30,
    "unseen wörds",
    "the cat sat on the red table",
]


def save_tokenizer(path):
    """Writes a Unigram tokenizer with the pairs of RoBERTa, as XLM-R's tokenizer.json has them."""
    pieces = [(piece, -2.0) for word in WORDS for piece in (f"▁{word}", word)]
    tokenizer = Tokenizer(
        models.Unigram([(name, 0.0) for name in SPECIAL] + pieces + [("▁", -5.0)], unk_id=3)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")  # a folder may ask for what we undo
    tokenizer.enable_truncation(6)
    tokenizer.save(str(path))


def random_tensors():
    """Random weights under the names of a Hugging Face checkpoint, linear ones [out, in]."""
    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    layer = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "attention.output.LayerNorm": (width,),
        "intermediate.dense": (inner, width),
        "output.dense": (width, inner),
        "output.LayerNorm": (width,),
    }
    shapes = {
        "roberta.embeddings.word_embeddings": (CONFIG["vocab_size"], width),
        "roberta.embeddings.position_embeddings": (CONFIG["max_position_embeddings"], width),
        "roberta.embeddings.token_type_embeddings": (1, width),
        "roberta.embeddings.LayerNorm": (width,),
        **{f"roberta.encoder.layer.{n}.{name}": layer[name] for n in range(2) for name in layer},
        "classifier.dense": (width, width),
        "classifier.out_proj": (1, width),
    }
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = rng.normal(float(len(shape) == 1), 0.3, shape)
        if not name.endswith("embeddings"):
            tensors[f"{name}.bias"] = rng.normal(0, 0.3, shape[0])
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_cross_encoder(make_folder(tmp_path_factory.mktemp("reranker")))


def make_folder(path):
    safetensors.numpy.save_file(random_tensors(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_tokenizer(path / "tokenizer.json")
    return path


def change_tensors(folder, change):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def expected_logit(ids):
    """The logit of one unpadded pair in float64, from the names of the checkpoint."""
    tensors = {name: value.astype(np.float64) for name, value in random_tensors().items()}

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG["layer_norm_eps"])
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def heads(name, x):
        return linear(name, x).reshape(len(x), CONFIG["num_attention_heads"], -1).swapaxes(0, 1)

    embeddings = "roberta.embeddings"
    x = tensors[f"{embeddings}.word_embeddings.weight"][ids]
    x = x + tensors[f"{embeddings}.position_embeddings.weight"][2 : 2 + len(ids)]
    x = norm(f"{embeddings}.LayerNorm", x + tensors[f"{embeddings}.token_type_embeddings.weight"])
    for n in range(CONFIG["num_hidden_layers"]):
        layer = f"roberta.encoder.layer.{n}"
        query, key, value = (
            heads(f"{layer}.attention.self.{name}", x) for name in ("query", "key", "value")
        )
        weights = np.exp(query @ key.swapaxes(1, 2) / math.sqrt(query.shape[-1]))
        attended = (weights / weights.sum(-1, keepdims=True)) @ value
        attended = attended.swapaxes(0, 1).reshape(x.shape)
        x = norm(
            f"{layer}.attention.output.LayerNorm",
            x + linear(f"{layer}.attention.output.dense", attended),
        )
        up = linear(f"{layer}.intermediate.dense", x)
        up = up * (1 + np.vectorize(math.erf)(up / math.sqrt(2))) / 2
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", up))
    return linear("classifier.out_proj", np.tanh(linear("classifier.dense", x[0])))[0]


def test_logits_follow_the_formulas(loaded):
    model, tokenizer = loaded
    scores = rerank_scores(model, tokenizer, QUERY, PASSAGES[:3], batch_size=3)
    expected = [expected_logit(tokenizer.encode(QUERY, text).ids) for text in PASSAGES[:3]]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


class TestRerankScores:
    def test_order_and_batches_do_not_change_scores(self, loaded):
        scores = rerank_scores(*loaded, QUERY, PASSAGES, batch_size=3)
        backwards = rerank_scores(*loaded, QUERY, PASSAGES[::-1], batch_size=3)
        np.testing.assert_array_equal(scores, backwards[::-1])
        for row in (0, 1):  # each beside longer ones above
            alone = rerank_scores(*loaded, QUERY, [PASSAGES[row]], batch_size=3)
            np.testing.assert_allclose(scores[row], alone[0], rtol=1e-4)
        assert len(np.unique(scores)) == 5  # of six passages two are equal

    def test_query_and_passage_are_told_apart(self, loaded):
        there = rerank_scores(*loaded, "the cat", ["red cup"], batch_size=3)
        back = rerank_scores(*loaded, "red cup", ["the cat"], batch_size=3)
        assert abs(there - back) > 1e-3

    def test_equal_passages_are_scored_once(self, loaded, monkeypatch):
        seen = []
        score = cross_encoder._score
        monkeypatch.setattr(
            cross_encoder, "_score", lambda *args: seen.append(args[-1].sum()) or score(*args)
        )
        scores = rerank_scores(*loaded, QUERY, ["the cat"] * 50 + ["the cup"] * 50, batch_size=3)
        assert len(seen) == 1
        assert len(np.unique(scores)) == 2

    def test_few_shapes_are_compiled(self, loaded, monkeypatch):
        shapes = []
        monkeypatch.setattr(
            cross_encoder, "_score", lambda *args: shapes.append(args[-1].shape) or np.zeros(8)
        )
        rerank_scores(*loaded, "who", ["cat " * n for n in range(40)], batch_size=8)
        assert shapes == [(8, 12), (8, 24), (8, 32), (8, 48), (8, 48)]

    def test_no_passages(self, loaded):
        assert rerank_scores(*loaded, QUERY, []).shape == (0,)

    def test_too_few_tokens_for_a_pair(self, loaded):
        with pytest.raises(UserError, match="max_tokens is 7; .* at least 8"):
            rerank_scores(*loaded, QUERY, PASSAGES, max_tokens=7)


class TestTruncation:
    @pytest.fixture
    def pairs(self, loaded, monkeypatch):
        """A function from the arguments of rerank_scores to the pairs it scores, as tokens."""
        seen = []

        def record(graphdef, params, ids, mask):
            seen.extend(row[on].tolist() for row, on in zip(ids, mask, strict=True))
            return np.zeros(len(ids), np.float32)

        monkeypatch.setattr(cross_encoder, "_score", record)

        def scored(query, passage, **options):
            seen.clear()
            rerank_scores(*loaded, query, [passage], batch_size=1, **options)
            return seen[0]

        return scored

    @pytest.mark.parametrize("max_tokens", [8, 20, 64, 512])
    def test_a_long_passage_fills_what_the_query_leaves(self, loaded, pairs, max_tokens):
        _, tokenizer = loaded
        query, passage = "who sat", "the red cup " * 40
        ids = pairs(query, passage, max_tokens=max_tokens)
        assert len(ids) == min(max_tokens, 64)  # 66 positions hold 64 tokens
        uncut = tokenizer.encode(query, passage).ids
        assert ids == [*uncut[: len(ids) - 1], 2]

    def test_short_pairs_are_whole(self, loaded, pairs):
        _, tokenizer = loaded
        for passage in PASSAGES[:3]:
            assert pairs(QUERY, passage) == tokenizer.encode(QUERY, passage).ids

    def test_a_long_query_leaves_a_quarter(self, loaded, pairs):
        _, tokenizer = loaded
        cat, cup = tokenizer.token_to_id("▁cat"), tokenizer.token_to_id("▁cup")
        ids = pairs("cat " * 99, "cup " * 99, max_tokens=24)
        assert ids == [0, *[cat] * 15, 2, 2, *[cup] * 5, 2]


class TestPadding:
    def test_what_is_masked_does_not_leak(self, loaded):
        model, tokenizer = loaded
        graphdef, params = nnx.split(model)
        ids = tokenizer.encode("who sat", "the red cup").ids
        mask = np.zeros((3, 12), bool)
        mask[:, : len(ids)] = True
        mask[2] = np.arange(12) < 1  # a row that only fills up
        padded = np.stack([np.pad(ids, (0, 12 - len(ids)), constant_values=n) for n in (0, 1, 9)])
        scores = cross_encoder._score(graphdef, params, padded.astype(np.int32), mask)
        np.testing.assert_allclose(scores[:2], expected_logit(ids), rtol=1e-4)
        assert np.isfinite(scores[2])

    def test_positions_count_tokens_from_after_the_padding_id(self, loaded, monkeypatch):
        model, _ = loaded
        seen = []

        def states(self, ids, mask, positions):
            seen.append(np.asarray(positions))
            return np.zeros((*ids.shape, 24), np.float32)

        monkeypatch.setattr(cross_encoder.CrossEncoder, "states", states)
        mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
        model(np.zeros((2, 5), np.int32), mask)
        assert seen[0].tolist() == [[2, 3, 4, 5, 6], [2, 3, 4, 1, 1]]


class TestRefusals:
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
    def test_a_missing_or_broken_file_is_named(self, folder, name):
        (folder / name).write_bytes(b"not this")
        with pytest.raises(UserError, match=name):
            load_cross_encoder(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"has no {name}"):
            load_cross_encoder(folder)

    def test_tensors_name_themselves(self, folder):
        name = "classifier.out_proj.weight"
        change_tensors(folder, lambda tensors: tensors.update({name: np.ones((3, 24), "f4")}))
        with pytest.raises(UserError, match=r"classifier\.out_proj\.weight has shape \(3, 24\)"):
            load_cross_encoder(folder)
        change_tensors(folder, lambda tensors: tensors.pop(name))
        with pytest.raises(UserError, match=r"no tensor for score\.kernel \(1 missing\)"):
            load_cross_encoder(folder)

    @pytest.mark.parametrize("name", ["roberta.encoder.layer.2.output.dense.bias", "lm_head.bias"])
    def test_an_unknown_tensor_names_itself(self, folder, name):
        change_tensors(folder, lambda tensors: tensors.update({name: np.zeros(24, "f4")}))
        with pytest.raises(UserError, match="unknown tensor " + name.replace(".", r"\.")):
            load_cross_encoder(folder)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"model_type": "bert"}, "model_type 'bert'; only 'xlm-roberta' is read"),
            ({"id2label": {"0": "no", "1": "yes"}}, "has 2 labels"),
            ({"hidden_act": "silu"}, "hidden_act 'silu'"),
            ({"position_embedding_type": "relative_key"}, "not absolute"),
            ({"num_attention_heads": 5}, "do not divide"),
            ({"max_position_embeddings": 70}, r"position_embeddings\.weight has shape \(66, 24\)"),
        ],
    )
    def test_a_model_that_is_not_read(self, folder, change, reason):
        (folder / "config.json").write_text(json.dumps(CONFIG | change))
        with pytest.raises(UserError, match=reason):
            load_cross_encoder(folder)

    @pytest.mark.parametrize("key", ["hidden_size", "id2label", "max_position_embeddings"])
    def test_a_config_that_lacks_a_size(self, folder, key):
        config = {name: value for name, value in CONFIG.items() if name != key}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=rf"no '{key}'|2 labels"):
            load_cross_encoder(folder)

    def test_another_model_s_tokenizer(self, folder):
        bert = Tokenizer(models.WordPiece({"[UNK]": 0, "[CLS]": 1}, unk_token="[UNK]"))
        bert.save(str(folder / "tokenizer.json"))
        with pytest.raises(UserError, match=r"tokenizer\.json has no <s>"):
            load_cross_encoder(folder)

    def test_the_sentence_encoder_refuses_a_cross_encoder(self, folder):
        with pytest.raises(UserError, match="model_type 'xlm-roberta'; only 'bert' is read"):
            load_text_encoder(folder)
