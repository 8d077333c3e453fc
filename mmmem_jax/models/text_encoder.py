"""BERT sentence encoders in Flax NNX, read from Hugging Face folders, and a cache of their output.

Sources: BERT (arXiv 1810.04805), Sentence-BERT pooling (arXiv 1908.10084). Any BERT-style encoder
folder loads: all-MiniLM-L6-v2, bge-*-en-v1.5, and so on::

    config.json  model.safetensors  tokenizer.json
    [1_Pooling/config.json]  [sentence_bert_config.json]
"""

import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer
from tqdm import tqdm

from mmmem_jax.errors import UserError
from mmmem_jax.models.json_object import read_object

_ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}
# A batch is padded to the next of these lengths, so a corpus needs a dozen compiled programs.
_LENGTHS = tuple(n for power in range(3, 13) for n in (2**power, 3 * 2 ** (power - 1))) + (8192,)
# What the model card of bge-*-en-v1.5 has before a short query that looks for longer passages.
BGE_QUERY_PREFIX = "Represent this sentence for searching relevant passages: "

_log = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nnx.Module)


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder, and how its token states become one sentence embedding."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"
    pooling: str = "mean"  # or "cls"
    max_tokens: int = 512  # longer texts are cut, special tokens included


class BertLayer(nnx.Module):
    """Post-norm transformer layer."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_heads
        self.activation = _ACTIVATIONS[config.activation]
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.attention_norm = _layer_norm(config, rngs)
        self.up = nnx.Linear(width, inner, rngs=rngs)
        self.down = nnx.Linear(inner, width, rngs=rngs)
        self.output_norm = _layer_norm(config, rngs)

    def __call__(self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        heads = (*x.shape[:2], self.num_heads, -1)
        query, key, value = (
            linear(x).reshape(heads) for linear in (self.query, self.key, self.value)
        )
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        x = self.attention_norm(x + self.out(attended.reshape(x.shape)))
        return self.output_norm(x + self.down(self.activation(self.up(x))))


class BertBody(nnx.Module):
    """Token ids to token states: the embeddings and the layers that every head shares."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        self.words = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.positions = nnx.Embed(config.max_positions, width, rngs=rngs)
        self.types = nnx.Embed(config.type_vocab_size, width, rngs=rngs)
        self.norm = _layer_norm(config, rngs)
        self.layers = nnx.List(BertLayer(config, rngs=rngs) for _ in range(config.num_layers))

    def states(
        self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"], positions: Int[Array, "... L"]
    ) -> Float[Array, "B L D"]:
        """Returns the last layer's float32 states; `mask` is False on padding.

        Call it under `jax.default_matmul_precision("highest")`, as the head that follows.
        """
        x = self.words(ids) + self.positions(positions) + self.types(jnp.zeros_like(ids))
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class BertEncoder(BertBody):
    """Token ids to unit-length sentence embeddings."""

    def __call__(self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        """Encodes a padded batch.

        Args:
          ids: [B, L] int32 word-piece ids, special tokens included.
          mask: [B, L] bool, True on tokens, False on padding; at least one token a row.

        Returns:
          [B, D] float32 embeddings of length 1.
        """
        # Accelerators would round the inputs of float32 products; embeddings should not depend on
        # the machine that made them.
        with jax.default_matmul_precision("highest"):
            x = self.states(ids, mask, jnp.arange(ids.shape[1]))
        if self.config.pooling == "cls":
            pooled = x[:, 0]
        else:
            weights = mask[:, :, None].astype(x.dtype)
            pooled = (x * weights).sum(axis=1) / weights.sum(axis=1)
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)


def _layer_norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs
    )


# (checkpoint name, parameter path) of a BertBody; the first full match wins. A path of None is not
# used.
BODY_KEYS = (
    (r"(bert\.|roberta\.)?embeddings\.position_ids", None),
    (r"(bert\.|roberta\.)?embeddings\.word_embeddings\.weight", r"words.embedding"),
    (r"(bert\.|roberta\.)?embeddings\.position_embeddings\.weight", r"positions.embedding"),
    (r"(bert\.|roberta\.)?embeddings\.token_type_embeddings\.weight", r"types.embedding"),
    (r"(bert\.|roberta\.)?embeddings\.LayerNorm\.(\w+)", r"norm.\2"),
    *(
        (rf"(bert\.|roberta\.)?encoder\.layer\.(\d+)\.{name}\.(\w+)", rf"layers.\2.{path}.\3")
        for name, path in (
            (r"attention\.self\.query", "query"),
            (r"attention\.self\.key", "key"),
            (r"attention\.self\.value", "value"),
            (r"attention\.output\.dense", "out"),
            (r"attention\.output\.LayerNorm", "attention_norm"),
            (r"intermediate\.dense", "up"),
            (r"output\.dense", "down"),
            (r"output\.LayerNorm", "output_norm"),
        )
    ),
)
_ENCODER_KEYS = (*BODY_KEYS, (r"(bert\.)?pooler\..*|cls\..*", None))


def load_text_encoder(folder: str | Path) -> tuple[BertEncoder, Tokenizer]:
    """Loads a BERT-style sentence encoder and its tokenizer from a Hugging Face folder.

    Raises:
      UserError: a file is missing or unreadable, the model is not a BERT, or a tensor is missing,
        unknown or of the wrong shape.
    """
    folder = Path(folder)
    config = read_bert_config(folder)
    encoder = load_model(lambda: BertEncoder(config, rngs=nnx.Rngs(0)), folder, _ENCODER_KEYS)
    return encoder, load_tokenizer(folder, ("[CLS]", "[SEP]"), config.vocab_size)


def load_model(
    make_model: Callable[[], _Model], folder: Path, keys: Sequence[tuple[str, str | None]]
) -> _Model:
    """Fills what `make_model` makes, which is only shaped, with the folder's model.safetensors.

    Args:
      make_model: builds the model of the folder's config.json.
      folder: a Hugging Face folder.
      keys: (checkpoint name, parameter path) as in BODY_KEYS.

    Raises:
      UserError: the file is missing or unreadable, or a tensor is missing, unknown or misshapen.
    """
    weights = _required(folder, "model.safetensors")
    try:
        tensors = safetensors.flax.load_file(weights)
    except safetensors.SafetensorError as error:
        raise UserError(f"{weights} is not a safetensors file ({error}); fetch it again") from error
    graphdef, abstract = nnx.split(nnx.eval_shape(make_model))
    return nnx.merge(graphdef, _convert(tensors, abstract, keys, weights))


def load_tokenizer(folder: Path, special: Iterable[str], vocab_size: int) -> Tokenizer:
    """Reads the folder's tokenizer.json; it neither cuts nor pads.

    Raises:
      UserError: the file is missing or unreadable, lacks a `special` token or has more tokens than
        the model's `vocab_size`.
    """
    path = _required(folder, "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises no narrower class
        raise UserError(f"{path} is not a tokenizer ({error})") from error
    for token in special:
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{path} has no {token}; it is not the tokenizer of this model")
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"{path} has {tokenizer.get_vocab_size()} tokens, the model {vocab_size}; take both"
            " from the same folder"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_bert_config(folder: Path) -> BertConfig:
    """Reads config.json and, where they are, the sentence-transformers files beside it.

    Without a 1_Pooling/config.json the pooling is the mean, as sentence-transformers has it.
    """
    pooling = _read_optional(folder / "1_Pooling" / "config.json")
    sentence = _read_optional(folder / "sentence_bert_config.json")
    _, sizes = read_sizes(folder, "bert")
    modes = [mode for mode, on in pooling.items() if mode.startswith("pooling_mode_") and on]
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) > 1 or any(mode not in names for mode in modes):
        raise UserError(f"{folder / '1_Pooling/config.json'} pools by {modes}; mean or cls is read")
    positions = sizes["max_positions"]
    return BertConfig(
        **sizes,
        pooling=names[modes[0]] if modes else "mean",
        max_tokens=min(sentence.get("max_seq_length") or positions, positions),
    )


def read_sizes(folder: Path, model_type: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the config.json of a model with BERT's layers.

    Returns:
      config: the file's content.
      sizes: the fields of BertConfig that it sets, all but `pooling` and `max_tokens`.

    Raises:
      UserError: the file is missing or unreadable, or is of another model than is read.
    """
    path = _required(folder, "config.json")
    config = read_object(path)
    if config.get("model_type") != model_type:
        raise UserError(
            f"{path} is of model_type {config.get('model_type')!r}; only {model_type!r} is read"
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{path} has positions that are not absolute; only these are read")
    if config.get("hidden_act", "gelu") not in _ACTIVATIONS:
        raise UserError(f"{path} has hidden_act {config['hidden_act']!r}, not {[*_ACTIVATIONS]}")
    if config.get("hidden_size", 0) % config.get("num_attention_heads", 1):
        raise UserError(f"{path} has a hidden_size that its attention heads do not divide")
    try:
        sizes = {
            "vocab_size": config["vocab_size"],
            "hidden_size": config["hidden_size"],
            "num_layers": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "intermediate_size": config["intermediate_size"],
            "max_positions": config["max_position_embeddings"],
            "type_vocab_size": config.get("type_vocab_size", 2),
            "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
            "activation": config.get("hidden_act", "gelu"),
        }
    except KeyError as error:
        raise UserError(f"{path} has no {error}; it is no whole {model_type!r} config") from error
    return config, sizes


def encode_texts(
    encoder: BertEncoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    prefix: str = "",
    batch_size: int = 64,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds `texts`; equal texts are embedded once.

    Args:
      encoder: from load_text_encoder, as is `tokenizer`.
      tokenizer: splits a text into word pieces.
      texts: any number of texts; those over the encoder's max_tokens are cut.
      prefix: an instruction to put before every text, such as BGE_QUERY_PREFIX before queries.
      batch_size: B of every compiled program.
      progress: show a progress bar.

    Returns:
      embeddings: float32 [len(texts), D], of length 1.
      token_counts: int32 [len(texts)], word pieces without special tokens, before any cut; the
        prefix counts.
    """
    unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    pieces = [
        encoding.ids
        for encoding in tokenizer.encode_batch(
            [prefix + text for text in unique], add_special_tokens=False
        )
    ]
    order = sorted(range(len(pieces)), key=lambda row: len(pieces[row]))
    embeddings = np.zeros((len(pieces), encoder.config.hidden_size), np.float32)
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    room = encoder.config.max_tokens - 2
    graphdef, params = nnx.split(encoder)
    with tqdm(total=len(order), desc="embedding", unit="text", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = [[first, *pieces[row][:room], last] for row in rows]
            ids, mask = pad_batch(tokens, batch_size, encoder.config.max_tokens)
            embeddings[rows] = np.asarray(_encode(graphdef, params, ids, mask))[: len(rows)]
            bar.update(len(rows))
    index = np.array([unique[text] for text in texts], np.int64)
    counts = np.array([len(ids) for ids in pieces], np.int32)
    return embeddings[index], counts[index]


def cached_embeddings(
    texts: Sequence[str],
    folder: str | Path,
    cache_dir: str | Path,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds `texts` with the encoder in `folder`, or reads what an earlier call kept.

    One safetensors file per list of texts, named by the SHA-256 of the encoder's files and the
    texts; an unreadable one is made again. Embeddings are kept, and returned, rounded to float16.

    Returns:
      embeddings: float32 [len(texts), D]; token_counts: int32 [len(texts)]; see encode_texts.
    """
    folder, cache_dir = Path(folder), Path(cache_dir)
    path = cache_dir / f"{_cache_key(texts, folder)}.safetensors"
    kept = _read_cache(path, len(texts))
    if kept is None:
        encoder, tokenizer = load_text_encoder(folder)
        embeddings, counts = encode_texts(
            encoder, tokenizer, texts, batch_size=batch_size, progress=progress
        )
        kept = {"embeddings": embeddings.astype(np.float16), "token_counts": counts}
        _write_atomically(path, safetensors.numpy.save(kept))
    return kept["embeddings"].astype(np.float32), kept["token_counts"]


# nnx.jit would take ten times as long to hand over the parameters as one sentence takes to embed.
@partial(jax.jit, static_argnames="graphdef")
def _encode(
    graphdef: nnx.GraphDef, params: nnx.State, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float[Array, "B D"]:
    return nnx.merge(graphdef, params)(ids, mask)


def pad_batch(
    tokens: Sequence[Sequence[int]], rows: int, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pads token lists on the right to one of few lengths, at most `max_tokens`.

    Returns:
      ids: int32 [rows, L], 0 on padding; mask: bool [rows, L], True on tokens. Rows past those of
      `tokens` fill up the batch: one token 0 each.
    """
    longest = max(len(ids) for ids in tokens)
    length = min(next((n for n in _LENGTHS if n >= longest), longest), max_tokens)
    ids = np.zeros((rows, length), np.int32)
    mask = np.zeros((rows, length), bool)
    mask[:, 0] = True  # rows that only fill up the batch still need a token
    for row, values in enumerate(tokens):
        ids[row, : len(values)] = values
        mask[row, : len(values)] = True
    return ids, mask


def _convert(
    tensors: Mapping[str, jax.Array],
    abstract: nnx.State,
    keys: Sequence[tuple[str, str | None]],
    source: Path,
) -> nnx.State:
    """Renames, transposes and checks a checkpoint's tensors against the model's parameters."""
    wanted = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract)}
    found: dict[str, jax.Array] = {}
    for name, tensor in tensors.items():
        path = _parameter_path(name, keys)
        if path is None:
            continue
        if path not in wanted:
            raise UserError(f"{source} holds an unknown tensor {name}; it does not fit config.json")
        value = tensor.T if path.endswith(".kernel") else tensor
        if value.shape != wanted[path].shape:
            shape = wanted[path].shape[::-1] if path.endswith(".kernel") else wanted[path].shape
            raise UserError(f"{source}: {name} has shape {tensor.shape}, config.json says {shape}")
        found[path] = value.astype(jnp.float32)
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(
            f"{source} has no tensor for {missing[0]} ({len(missing)} missing); fetch it again"
        )
    flat = [
        (path, leaf.replace(found[".".join(map(str, path))]))
        for path, leaf in nnx.to_flat_state(abstract)
    ]
    return nnx.from_flat_state(flat)


def _parameter_path(name: str, keys: Sequence[tuple[str, str | None]]) -> str | None:
    """Returns the model's path for a checkpoint name, None if unused, the name if unknown."""
    for pattern, path in keys:
        if match := re.fullmatch(pattern, name):
            if path is None:
                return None
            prefix, leaf = match.expand(path).rsplit(".", 1)
            is_norm = prefix.endswith("norm")
            renamed = {
                "weight": "scale" if is_norm else "kernel",
                "gamma": "scale",  # names of early TensorFlow checkpoints
                "beta": "bias",
            }
            return f"{prefix}.{renamed.get(leaf, leaf)}"
    return name


def _required(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise UserError(
            f"{folder} has no {name}; an encoder folder holds config.json, model.safetensors and"
            " tokenizer.json"
        )
    return folder / name


def _read_optional(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    return read_object(path) if path.is_file() else {}


def _cache_key(texts: Sequence[str], folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        with _required(folder, name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for name in ("1_Pooling/config.json", "sentence_bert_config.json"):
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
        digest.update(hashlib.sha256(content).digest())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def _read_cache(path: Path, rows: int) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        kept = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        _log.warning("%s is unreadable (%s); embedding again", path, error)
        return None
    return kept if len(kept.get("embeddings", ())) == rows == len(kept["token_counts"]) else None


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
