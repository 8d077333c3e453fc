"""XLM-RoBERTa cross-encoders in Flax NNX: how well a passage answers a query, read together.

Sources: XLM-R (arXiv 1911.02116), passage re-ranking by a cross-encoder (arXiv 1901.04085), the
folder layout of bge-reranker-v2-m3::

    config.json  model.safetensors  tokenizer.json
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from mmmem_jax.errors import UserError
from mmmem_jax.models.text_encoder import (
    BODY_KEYS,
    BertBody,
    BertConfig,
    load_model,
    load_tokenizer,
    pad_batch,
    read_sizes,
)

_KEYS = (
    *BODY_KEYS,
    (r"classifier\.dense\.(\w+)", r"dense.\1"),
    (r"classifier\.out_proj\.(\w+)", r"score.\1"),
)
# <s> query </s></s> passage </s>
_NUM_SPECIAL = 4
_MIN_TOKENS = 8  # leaves the query three tokens and the passage one


@dataclass(frozen=True)
class CrossEncoderConfig(BertConfig):
    """Sizes of a cross-encoder; `max_tokens` is what its positions hold, `padding_id` apart."""

    padding_id: int = 1  # positions count from the one after it


class CrossEncoder(BertBody):
    """Token ids of pairs to relevance logits."""

    def __init__(self, config: CrossEncoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.dense = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.score = nnx.Linear(config.hidden_size, 1, rngs=rngs)

    def __call__(self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, " B"]:
        """Scores a padded batch of pairs.

        Args:
          ids: [B, L] int32 tokens `<s> query </s></s> passage </s>`, padded on the right.
          mask: [B, L] bool, True on tokens, False on padding; at least one token a row.

        Returns:
          [B] float32 logits; their sigmoid is a score between 0 and 1.
        """
        positions = self.config.padding_id + jnp.cumsum(mask, axis=1) * mask
        # As BertEncoder: a score should not depend on the machine that made it.
        with jax.default_matmul_precision("highest"):
            first = self.states(ids, mask, positions)[:, 0]
            return self.score(jnp.tanh(self.dense(first)))[:, 0]


def load_cross_encoder(folder: str | Path) -> tuple[CrossEncoder, Tokenizer]:
    """Loads an XLM-RoBERTa cross-encoder and its tokenizer from a Hugging Face folder.

    Raises:
      UserError: a file is missing or unreadable, the model is not an XLM-RoBERTa with one label, or
        a tensor is missing, unknown or of the wrong shape.
    """
    folder = Path(folder)
    config = read_cross_encoder_config(folder)
    model = load_model(lambda: CrossEncoder(config, rngs=nnx.Rngs(0)), folder, _KEYS)
    return model, load_tokenizer(folder, ("<s>", "</s>"), config.vocab_size)


def read_cross_encoder_config(folder: Path) -> CrossEncoderConfig:
    """Reads config.json; see load_cross_encoder."""
    config, sizes = read_sizes(folder, "xlm-roberta")
    labels = config.get("id2label", ("0", "1"))  # a file without it means two
    if len(labels) != 1:
        raise UserError(
            f"{folder / 'config.json'} has {len(labels)} labels; a cross-encoder, which has 1, is"
            " needed"
        )
    padding_id = config.get("pad_token_id", 1)
    max_tokens = sizes["max_positions"] - padding_id - 1
    return CrossEncoderConfig(**sizes, pooling="cls", max_tokens=max_tokens, padding_id=padding_id)


def rerank_scores(
    model: CrossEncoder,
    tokenizer: Tokenizer,
    query: str,
    passages: Sequence[str],
    *,
    batch_size: int = 16,
    max_tokens: int = 512,
) -> np.ndarray:
    """Scores each passage as an answer to the query; equal passages are scored once.

    Args:
      model: from load_cross_encoder, as is `tokenizer`.
      tokenizer: splits a text into tokens.
      query: whole up to three quarters of the room for text, cut beyond.
      passages: any number of texts; each has the room that the query leaves, and is cut there.
      batch_size: B of every compiled program.
      max_tokens: of a pair, special tokens included, and never more than the model's own.

    Returns:
      float32 [len(passages)] logits, higher is more relevant.

    Raises:
      UserError: max_tokens is below 8.
    """
    max_tokens = min(max_tokens, model.config.max_tokens)
    if max_tokens < _MIN_TOKENS:
        raise UserError(f"max_tokens is {max_tokens}; a pair needs at least {_MIN_TOKENS}")
    unique = {passage: row for row, passage in enumerate(dict.fromkeys(passages))}
    pairs = _tokenize_pairs(tokenizer, query, [*unique], max_tokens)
    order = sorted(range(len(pairs)), key=lambda row: len(pairs[row]))
    scores = np.zeros(len(pairs), np.float32)
    graphdef, params = nnx.split(model)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = pad_batch([pairs[row] for row in rows], batch_size, max_tokens)
        scores[rows] = np.asarray(_score(graphdef, params, ids, mask))[: len(rows)]
    return scores[np.array([unique[passage] for passage in passages], np.int64)]


# As text_encoder's: nnx.jit would take longer to hand over the parameters than to score a pair.
@partial(jax.jit, static_argnames="graphdef")
def _score(
    graphdef: nnx.GraphDef, params: nnx.State, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float[Array, " B"]:
    return nnx.merge(graphdef, params)(ids, mask)


def _tokenize_pairs(
    tokenizer: Tokenizer, query: str, passages: Sequence[str], max_tokens: int
) -> list[list[int]]:
    """Returns the tokens of each pair, at most `max_tokens` of them."""
    first, last = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    asked, *answers = (
        encoding.ids
        for encoding in tokenizer.encode_batch([query, *passages], add_special_tokens=False)
    )
    room = max_tokens - _NUM_SPECIAL
    asked = asked[: room * 3 // 4]
    room -= len(asked)
    return [[first, *asked, last, last, *answer[:room], last] for answer in answers]
