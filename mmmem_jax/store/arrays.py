"""Items and memory states as bytes of safetensors, and back; nothing else is ever read."""

import dataclasses
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from mmmem_jax import memory
from mmmem_jax.errors import UserError
from mmmem_jax.memory import Item, MemoryConfig, MemoryState

HALF = ("visual", "coarse", "text", "mention")  # fields of an item kept in float16
MAX_STATE_BYTES = 4 << 30


def rounded(item: Item) -> Item:
    """`item` in NumPy, its embeddings rounded to what float16 holds, float32 as before.

    The store keeps items in float16. Who feeds the memory with the rounded item gets the same
    memory from the disk as the one that was live, bit by bit.

    Raises:
      ValueError: where a number is not finite, or too large for float16.
    """

    def leaf(name):
        x = np.asarray(getattr(item, name))
        if name not in HALF:
            return x
        with np.errstate(over="ignore"):
            half = x.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError(f"Item.{name} holds numbers that float16 cannot")
        return half.astype(np.float32)

    return Item(**{field.name: leaf(field.name) for field in dataclasses.fields(Item)})


def item_to_bytes(item: Item) -> bytes:
    """One item, embeddings in float16; `item` must be `rounded`."""
    table = {}
    for field in dataclasses.fields(Item):
        x = np.asarray(getattr(item, field.name))
        table[field.name] = x.astype(np.float16) if field.name in HALF else x
        if field.name in HALF and not np.array_equal(table[field.name].astype(np.float32), x):
            raise ValueError("the store keeps only items that store.rounded has rounded")
    return safetensors.numpy.save(table)


def item_from_bytes(data: bytes, dim: int) -> Item:
    """The item, in NumPy, float32 as `rounded` gave it.

    Raises:
      ValueError: where the bytes are not those of an item of `dim` numbers.
    """
    try:
        table = safetensors.numpy.load(data)
    except SafetensorError as error:
        raise ValueError(f"not safetensors: {error}") from None
    mentions = len(table.get("mention", ()))
    shapes = dict.fromkeys(("visual", "coarse", "text"), (dim,))
    shapes |= {"span": (2,), "mention": (mentions, dim), "mention_valid": (mentions,)}
    dtypes = dict.fromkeys(HALF, "float16") | {"span": "float32", "change": "float32"}
    dtypes |= dict.fromkeys(("tokens", "relation", "trace_id"), "int32")
    expected = {
        f.name: (shapes.get(f.name, ()), dtypes.get(f.name, "bool"))
        for f in dataclasses.fields(Item)
    }
    found = {name: (x.shape, x.dtype.name) for name, x in table.items()}
    if found != expected:
        raise ValueError("another shape than an item's")
    if not all(np.isfinite(x).all() for x in table.values()):
        raise ValueError("numbers that are none")
    return Item(**{k: x.astype(np.float32) if k in HALF else x for k, x in table.items()})


def _names(tree) -> list[str]:
    """A name for each leaf of a state: `sensory.visual`, `clock`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [".".join(key.name for key in path) for path in paths]


def expected_state(config: MemoryConfig) -> MemoryState:
    """Shapes and dtypes of a state of this config; nothing is allocated.

    Raises:
      ValueError: if it would take more than `MAX_STATE_BYTES`.
    """
    state = jax.eval_shape(lambda: memory.init(config))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    if size > MAX_STATE_BYTES:
        raise ValueError(f"a memory of {size / 2**30:.0f} GiB is over the limit")
    return state


def state_to_bytes(state: MemoryState) -> bytes:
    """Every leaf of a state with its own dtype."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
    return safetensors.numpy.save(dict(zip(_names(state), leaves, strict=True)))


def digest(data: bytes) -> str:
    """What tells a damaged snapshot from a whole one (safetensors has no checksum)."""
    return hashlib.sha256(data).hexdigest()


def read_state(path: Path, sha256: str, config: MemoryConfig) -> MemoryState:
    """The state in a snapshot, bit by bit as it was saved.

    Raises:
      FileNotFoundError: if there is no such file.
      UserError: if it cannot be read, is damaged, or holds a state of other shapes.
    """
    why = None
    try:
        data = path.read_bytes()
        if digest(data) != sha256:
            why = "its checksum differs"
        else:
            table = safetensors.numpy.load(data)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        why = error
    if why is None:
        shapes = expected_state(config)
        expected = [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)]
        found = {name: (x.shape, x.dtype) for name, x in table.items()}
        if found != dict(zip(_names(shapes), expected, strict=True)):
            why = "its arrays have other shapes than video.json says"
        elif not all(np.isfinite(x).all() for x in table.values()):
            why = "it holds numbers that are none"
    if why is not None:
        raise UserError(
            f"{path} is damaged ({why}), though its clips are whole: copy the file back, or delete "
            f"{path.parent} and build the video again"
        )
    leaves = [jnp.asarray(table[name]) for name in _names(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
