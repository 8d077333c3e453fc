"""GGUF files: metadata, tensors as float32, and the byte-level BPE tokenizer they carry.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mmmem_jax.errors import UserError

# What reading a file of arbitrary bytes with the gguf package has been seen to raise.
_BROKEN = (ArithmeticError, LookupError, NotImplementedError, RecursionError, TypeError, ValueError)
_KINDS = {int: "a whole number", float: "a number", str: "a text", list: "a list"}
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of <|im_start|> and its like


class Gguf(NamedTuple):
    """An opened GGUF file; tensors stay on the disk until `to_float32` reads them."""

    path: Path
    metadata: Mapping[str, Any]  # whole numbers, numbers, texts, truth values and lists of these
    tensors: Mapping[str, gguf.ReaderTensor]

    def value(self, key: str, kind: type) -> Any:
        """Returns the metadata under `key`.

        Raises:
          UserError: it is missing or not of the kind (int, float, str or list).
        """
        value = self.metadata.get(key)
        if not isinstance(value, kind):
            raise UserError(f"{self.path} has no {key} that is {_KINDS[kind]}; fetch it again")
        return value

    def to_float32(self, name: str) -> np.ndarray:
        """Returns a tensor, dequantized, as float32 with the row-major shape of `shape(name)`.

        Raises:
          UserError: it is quantized in a way that is not read, or holds NaN or infinity.
        """
        tensor = self.tensors[name]
        try:
            with np.errstate(all="ignore"):  # damaged scales; told below
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except _BROKEN as error:
            raise UserError(f"{self.path}: {name} cannot be read ({_line(error)})") from error
        if values.dtype != np.float32 or not np.isfinite(values).all():
            raise UserError(f"{self.path}: {name} holds no finite floats; fetch it again")
        return values

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, slowest axis first."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))


def open_gguf(path: str | Path) -> Gguf:
    """Opens a GGUF file and reads its metadata.

    Raises:
      UserError: there is no such file, it is not GGUF, or it is cut off.
    """
    path = Path(path)
    try:
        with np.errstate(over="raise"):  # offsets of a damaged file
            reader = _BoundedReader(path)
            metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except _BROKEN as error:
        raise UserError(
            f"{path} is not a whole GGUF file ({_line(error)}); fetch it again"
        ) from error
    return Gguf(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def gguf_tokenizer(file: Gguf) -> Tokenizer:
    """Builds the byte-level BPE tokenizer that a GGUF file describes.

    Digits stand alone and words split as in GPT-2 (`tokenizer.ggml.pre` is "smollm"). Text that
    spells a control token such as <|im_end|> is encoded as plain text, so that nothing quoted in a
    prompt can end a turn; take these tokens by `tokenizer.token_to_id`.

    Raises:
      UserError: the file holds a tokenizer of another kind, or a damaged one.
    """
    for key, wanted in (("model", "gpt2"), ("pre", "smollm")):
        if (found := file.value(f"tokenizer.ggml.{key}", str)) != wanted:
            raise UserError(
                f"{file.path} has tokenizer.ggml.{key} {found!r}; only {wanted!r} is read"
            )
    tokens = file.value("tokenizer.ggml.tokens", list)
    types = file.value("tokenizer.ggml.token_type", list)
    merges = [tuple(str(m).split(" ")) for m in file.value("tokenizer.ggml.merges", list)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise UserError(f"{file.path} has doubled tokens, or not one type for each; fetch it again")
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the tokenizers library raises no narrower class
        raise UserError(
            f"{file.path} holds no byte-pair tokenizer ({_line(error)}); fetch it again"
        ) from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = (token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.encode_special_tokens = True
    return tokenizer


class _BoundedReader(gguf.GGUFReader):
    """Stops at a damaged length, where the plain reader reads nothing past the end for ever."""

    reads_left = 2**20  # SmolLM2 takes a quarter of them, some 250 bytes of memory each

    def _get(self, offset, dtype, count=1, override_order=None):
        self.reads_left -= 1
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if self.reads_left < 0 or end > self.data.size:
            raise ValueError("it is cut off, or a length in it is damaged")
        return super()._get(offset, dtype, count, override_order)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
