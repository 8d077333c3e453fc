"""The cross-encoder against transformers' XLMRobertaForSequenceClassification, with padding."""

import json

import numpy as np
import pytest

from mmmem_jax.models.cross_encoder import load_cross_encoder, rerank_scores
from tests.models.cross_encoder_test import CONFIG, PASSAGES, QUERY, save_tokenizer

torch = pytest.importorskip("torch", reason="needs mmmem_jax[parity]")
transformers = pytest.importorskip("transformers", reason="needs mmmem_jax[parity]")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What transformers saves of a tiny random model in which every weight matters."""
    path = tmp_path_factory.mktemp("reranker")
    sizes = {
        name: value for name, value in CONFIG.items() if name not in ("model_type", "id2label")
    }
    config = transformers.XLMRobertaConfig(**sizes, num_labels=1, initializer_range=0.3)
    torch.manual_seed(0)
    model = transformers.XLMRobertaForSequenceClassification(config)
    with torch.no_grad():  # norms and biases start at 1 and 0, where a mix-up would not show
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
    model.save_pretrained(path)
    save_tokenizer(path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def reference(folder):
    """A function from a query and passages to token ids and logits, padded to the longest."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>"
    )
    model = transformers.XLMRobertaForSequenceClassification.from_pretrained(folder).eval()

    def score(query, passages, max_tokens):
        batch = tokenizer(
            [query] * len(passages),
            list(passages),
            padding=True,
            truncation="only_second",
            max_length=max_tokens,
            return_tensors="pt",
        )
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits[:, 0].numpy()

    return score


@pytest.mark.parametrize("max_tokens", [64, 20])
def test_logits(folder, reference, max_tokens):
    expected = reference(QUERY, PASSAGES, max_tokens)
    scores = rerank_scores(
        *load_cross_encoder(folder), QUERY, PASSAGES, batch_size=6, max_tokens=max_tokens
    )
    error = np.abs(scores - expected).max() / np.abs(expected).max()
    print(f"max relative error of the logits: {error:.1e}")
    assert error < 1e-4
    assert np.ptp(expected) > 0.1  # the passages are told apart


def test_a_saved_config_reads_as_it_was_made(folder):
    model, _ = load_cross_encoder(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["model_type"] == "xlm-roberta"
    assert model.config.layer_norm_eps == saved["layer_norm_eps"] == 1e-5
    assert model.config.type_vocab_size == saved["type_vocab_size"] == 1
    assert model.config.max_tokens == 64
