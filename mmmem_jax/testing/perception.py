"""A toy of the `lite` backbone: it names the colour of a picture, and embeds words at random.

For tests that go the whole way from a video to an answer without pretrained weights.
"""

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from mmmem_jax.models.conse import Labels
from mmmem_jax.models.text_encoder import BertConfig, BertEncoder, encode_texts
from mmmem_jax.perception.lite import DIM, Perception
from mmmem_jax.testing.videos import COLOURS

NAMES = ("red wall", "green field", "blue lake", "yellow taxi", "purple curtain")  # of COLOURS
_WORDS = """a an and perhaps photo of scene moving not slowly fast in the dark subtitle when was is
where seen there elephant submarine hello bread milk cheese red green blue yellow purple wall field
lake taxi curtain""".split()


def toy_tokenizer() -> Tokenizer:
    """Whole words of a small vocabulary, all others unknown."""
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    return tokenizer


def toy_perception() -> Perception:
    """Labels are NAMES; frames are told apart by their mean colour."""
    tokenizer = toy_tokenizer()
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=DIM, num_layers=1, num_heads=4,
        intermediate_size=16, max_positions=128, max_tokens=128,
    )  # fmt: skip
    encoder = BertEncoder(config, rngs=nnx.Rngs(0))
    # Words weigh more than places and than what the untrained layer adds.
    words = encoder.words.embedding
    words[...] = 3.0 * jax.random.normal(jax.random.key(1), words.shape)
    embeddings, _ = encode_texts(encoder, tokenizer, NAMES)
    labels = Labels(NAMES, embeddings)
    colours = np.array(COLOURS, np.float32)

    def see(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = images.reshape(len(images), -1, 3).mean(1, dtype=np.float32)
        distance = np.linalg.norm(mean[:, None] - colours, axis=-1)
        weight = np.exp(-distance / 10.0)
        probability = weight / weight.sum(1, keepdims=True)
        embedding = probability @ embeddings
        return embedding / np.linalg.norm(embedding, axis=-1, keepdims=True), probability

    return Perception(see, labels, encoder, tokenizer)
