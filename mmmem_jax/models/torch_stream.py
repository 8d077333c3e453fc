"""Reads the tensors of a legacy torch checkpoint (before the zip format of 1.6) without torch.

Such a file is five pickles and then raw storages::

    magic number | protocol version | sizes and byte order | the saved dict | storage keys
    for each key: element count (int64), elements (little endian)

Nothing in the file is executed: its few pickle instructions are read by `pickletools`, which only
parses, and put together here by a stack machine that knows strings, numbers, containers, storages
and tensors, and no way to import or call anything else.
"""

import io
import math
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmmem_jax.errors import UserError

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
}
_ORDERED_DICT = "collections.OrderedDict"
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_GLOBALS = {_ORDERED_DICT, _REBUILD_TENSOR, *(f"torch.{name}" for name in _DTYPES)}
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class _Global:
    """The name of a function or type; only a name."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Elements that lie further on in the file."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A strided view of a storage; offset and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Damaged(Exception):
    """What is wrong with the file, without its name."""


def read_torch_stream(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a state dict that `torch.save` of torch 1.5 or older wrote on a little-endian machine.

    Args:
      path: a file that holds one dict of tensors, such as `module.state_dict()`.

    Returns:
      Each tensor by its name, in the file's order, in its own dtype; tensors that shared a storage
      share it still.

    Raises:
      UserError: the file is missing, truncated or damaged, names anything that a dict of tensors
        does not need, or has a tensor that reaches beyond its storage.
    """
    path = Path(path)
    try:
        stream = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); fetch it again") from error
    try:
        tensors = _read_tensors(stream)
        storages = _read_storages(stream, {tensor.storage for tensor in tensors.values()})
        return {name: _view(name, tensor, storages) for name, tensor in tensors.items()}
    except _Damaged as error:
        raise UserError(f"{path} is not a legacy torch stream: {error}; fetch it again") from error


def _read_tensors(stream: io.BytesIO) -> dict[str, _Tensor]:
    if _unpickle(stream) != _MAGIC_NUMBER:
        raise _Damaged("it does not start with torch's magic number")
    if _unpickle(stream) != _PROTOCOL_VERSION:
        raise _Damaged(f"its protocol version is not {_PROTOCOL_VERSION}")
    system = _unpickle(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Damaged("it was not written on a little-endian machine")
    tensors = _unpickle(stream)
    if not isinstance(tensors, dict):
        raise _Damaged("it holds no dict of tensors")
    for name, tensor in tensors.items():
        if not isinstance(tensor, _Tensor):
            raise _Damaged(f"{name[:99]!r} is not a tensor")
    return tensors


def _read_storages(stream: io.BytesIO, wanted: set[_Storage]) -> dict[str, np.ndarray]:
    """Reads the storages that follow the pickles: exactly those wanted, and nothing after them."""
    declared = {storage.key: storage for storage in wanted}
    keys = _unpickle(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _Damaged("it has no list of storages")
    if len(declared) < len(wanted) or sorted(keys) != sorted(declared):
        raise _Damaged("its tensors and its list of storages disagree")
    storages = {}
    for key in keys:
        dtype, count = np.dtype(declared[key].dtype), declared[key].count
        if int.from_bytes(stream.read(8), "little") != count:
            raise _Damaged(f"storage {key[:99]!r} is not as large as its tensors say")
        if count * dtype.itemsize > len(stream.getbuffer()) - stream.tell():
            raise _Damaged("it ends early")
        storages[key] = np.frombuffer(stream.read(count * dtype.itemsize), dtype)
    if stream.read(1):
        raise _Damaged("bytes follow its last storage")
    return storages


def _view(name: str, tensor: _Tensor, storages: dict[str, np.ndarray]) -> np.ndarray:
    storage = storages[tensor.storage.key]
    # A dimension of size 1 is never stepped along, so its stride may be anything.
    strides = [
        stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.strides, strict=True)
    ]
    last = tensor.offset + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)
    )
    # The second bound keeps a stride of 0 from making a giant out of a few bytes.
    if last >= storage.size or math.prod(tensor.shape) > storage.size:
        raise _Damaged(f"tensor {name[:99]!r} reaches beyond its storage")
    return np.lib.stride_tricks.as_strided(
        storage[tensor.offset :],
        tensor.shape,
        [stride * storage.itemsize for stride in strides],
        writeable=False,
    )


def _unpickle(stream: io.BytesIO) -> Any:
    """Reads one pickle of protocol 2 and leaves `stream` behind it."""
    stack, marks, memo = [], [], {}

    def since_mark() -> list:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    try:
        for opcode, argument, _ in pickletools.genops(stream):
            match opcode.name:
                case "PROTO":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    marks.append(len(stack))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                    stack.append(argument)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    values = [stack.pop() for _ in range(int(opcode.name[-1]))]
                    stack.append(tuple(reversed(values)))
                case "APPEND":
                    value = stack.pop()
                    _container(stack[-1], list).append(value)
                case "APPENDS":
                    values = since_mark()
                    _container(stack[-1], list).extend(values)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _container(stack[-1], dict)[_name(key)] = value
                case "SETITEMS":
                    values = since_mark()
                    pairs = zip(map(_name, values[::2]), values[1::2], strict=True)
                    _container(stack[-1], dict).update(pairs)
                case "BUILD":  # module versions, which a state dict carries as an attribute
                    stack.pop()
                    _container(stack[-1], dict)
                case "GLOBAL":
                    stack.append(_global(argument))
                case "BINPERSID":
                    stack.append(_storage(stack.pop()))
                case "REDUCE":
                    arguments = stack.pop()
                    stack.append(_reduce(stack.pop(), arguments))
                case name:
                    raise _Damaged(f"it holds a pickle instruction that no tensor needs ({name})")
    # What pickletools raises for bad bytes; a stack, mark or memo without the entry asked for.
    except (ValueError, IndexError, KeyError) as error:
        raise _Damaged("its pickles are damaged") from error
    raise _Damaged("its pickles are damaged")


def _container(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise _Damaged(f"its pickles fill a {type(value).__name__} as if it were a {kind.__name__}")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise _Damaged(f"a dict in it has a key of type {type(value).__name__}")
    return value


def _global(argument: str) -> _Global:
    name = argument.replace(" ", ".", 1)  # pickletools gives "module name"
    if name not in _GLOBALS:
        raise _Damaged(f"it asks for {name[:99]!r}, which no tensor needs")
    return _Global(name)


def _storage(identity: Any) -> _Storage:
    match identity:
        case ("storage", _Global(kind), str(key), str(), int(count), None) if count >= 0:
            if dtype := _DTYPES.get(kind.removeprefix("torch.")):
                return _Storage(key, dtype, count)
    raise _Damaged("it names a storage in a way that is not read")


def _reduce(function: Any, arguments: Any) -> dict | _Tensor:
    """Stands in for the two calls of a state dict: an empty dict, and a view of a storage."""
    match function, arguments:
        case _Global(name), () if name == _ORDERED_DICT:
            return {}
        case (
            _Global(name),
            (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), _),
        ) if name == _REBUILD_TENSOR:
            numbers = (offset, *shape, *strides)
            plain = all(type(number) is int and number >= 0 for number in numbers)
            if plain and 0 not in shape and len(shape) == len(strides) <= _MAX_DIMENSIONS:
                return _Tensor(storage, offset, shape, strides)
            raise _Damaged("it has a tensor of impossible shape, offset or strides")
    raise _Damaged("it calls something in a way that no tensor needs")
