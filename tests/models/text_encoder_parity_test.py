"""The sentence encoder against transformers' BertModel on folders as bge-*-en-v1.5 has them."""

import json

import numpy as np
import pytest

from mmmem_jax.models.text_encoder import BGE_QUERY_PREFIX, encode_texts, load_text_encoder

torch = pytest.importorskip("torch", reason="needs mmmem_jax[parity]")
transformers = pytest.importorskip("transformers", reason="needs mmmem_jax[parity]")
pytestmark = pytest.mark.parity

TEXTS = [
    "The cat sat on the mat.",
    "",
    "I put the two red cups on the table, and then walked.",
    "the cat walked " * 30,
    "wörds it cannot know 🙂",
]
WORDS = """
    [PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on mat i put two red cup ##s table and then walk ##ed
    represent this sentence for search ##ing relevant passage , . :
""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random BERT with the files of bge: its weights hold a pooler, which is not used."""
    path = tmp_path_factory.mktemp("bge")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    with torch.no_grad():  # norms and biases start at 1 and 0, where a mix-up would not show
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
    model.save_pretrained(path)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(path)
    (path / "1_Pooling").mkdir()
    modes = {"cls_token": True, "mean_tokens": False, "max_tokens": False}
    pooling = {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    pooling["word_embedding_dimension"] = 24
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 48, "do_lower_case": true}')
    return path


@pytest.fixture(scope="module")
def reference(folder):
    """A function from texts to the unit-length [CLS] states, padded to the longest text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder).eval()

    def embed(texts):
        batch = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        with torch.no_grad():
            first = model(**batch).last_hidden_state[:, 0]
        return torch.nn.functional.normalize(first, dim=-1).numpy()

    return embed


@pytest.mark.parametrize("prefix", ["", BGE_QUERY_PREFIX])
def test_embeddings(folder, reference, prefix):
    expected = reference([prefix + text for text in TEXTS])
    embeddings, _ = encode_texts(*load_text_encoder(folder), TEXTS, prefix=prefix, batch_size=5)
    error = np.abs(embeddings - expected).max() / np.abs(expected).max()
    print(f"max relative error of the embeddings: {error:.1e}")
    assert error < 1e-4
    assert (expected @ expected.T).min() < 0.95  # the texts are told apart


def test_the_folder_is_read_as_it_was_made(folder):
    encoder, _ = load_text_encoder(folder)
    assert encoder.config.pooling == "cls"
    assert encoder.config.max_tokens == 48
