"""Scores, log Z, entropy and the top k of a bank of keys: one function, several implementations."""

import functools
import importlib
import importlib.resources
import json
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import custom_batching
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jaxtyping import Array, Bool, Float, Int

from mmmem_jax.kernels.retrieval_entropy import partial as parts
from mmmem_jax.kernels.retrieval_entropy import reference, xla

Implementation = Literal["reference", "xla", "mosaic_gpu", "pallas_tpu"]
IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu", "pallas_tpu")


def retrieval_entropy(
    query: Float[Array, "B D"],
    keys: Float[Array, "N D"] | Float[Array, "B N D"] | Int[Array, "N D"],
    mask: Bool[Array, "N"] | Bool[Array, "B N"] | None = None,
    *,
    temperature: float | Float[Array, ""],
    top_k: int,
    scales: Float[Array, "N"] | None = None,
    values: Float[Array, "N V"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """Retrieval entropy of each query over a bank of keys, in nats, and its k best keys.

    With logits s_i = query . keys_i / temperature over the valid slots, p = softmax(s):
    log Z = log sum exp s, H = -sum p log p. Sums are float32; products are of the bank's precision
    (the query is rounded to bfloat16 for a bfloat16 or int8 bank). What a masked slot holds, NaN
    too, is of no account. Differentiable in both modes, and again, in query, floating keys, scales,
    values and temperature, through log_z, entropy, top_values and the read-out.

    Args:
      query: float [B, D].
      keys: float32 or bfloat16 [N, D], or [B, N, D] a bank for each query; or int8 [N, D] with
        `scales`.
      mask: bool, which slots are valid; None: all.
      temperature: positive.
      top_k: K, at least 1; may exceed N.
      scales: float32 [N], what each row of an int8 bank is multiplied by.
      values: float [N, V] to read out, with a shared bank.
      implementation: None takes what was measured to be the fastest (`choose`). "xla" takes any
        bank; "pallas_tpu" a shared one without values or a mask per query; "mosaic_gpu" of these
        bfloat16 ones of some sizes.

    Returns:
      log_z float32 [B], entropy float32 [B], top_values float32 [B, K] falling, top_indices int32
      [B, K]; of equal logits the lowest index first; -inf and -1 where there are fewer than K valid
      slots. Without any, log_z is -inf and the entropy 0. With `values`, also sum p v [B, V].

    Raises:
      ValueError: if the shapes or dtypes do not fit, or the implementation does not take them.
    """
    bank = xla.Bank(keys, scales, mask, values)
    check(query, bank, top_k)
    implementation = pick(implementation, query.shape, bank, top_k)
    inverse = 1.0 / jnp.asarray(temperature, jnp.float32)
    if implementation == "reference":
        outputs = _reference(top_k, query, bank, inverse)
    else:
        outputs = _call(top_k, implementation, query, bank, inverse)
    return outputs[:4] if values is None else outputs


def pick(implementation: str | None, query_shape, bank: xla.Bank, top_k: int) -> str:
    """The implementation asked for if it takes the bank, or else the one to `choose`."""
    if implementation is None:
        return choose(query_shape, bank, top_k)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation not in ("reference", "xla") and not _takes(implementation, bank):
        raise ValueError(
            f"{implementation} takes a shared bank without values or a mask per query, mosaic_gpu "
            "of bfloat16 alone, D a multiple of 64, N of 32 and at least 512; got "
            f"{bank.keys.dtype} {bank.keys.shape}"
        )
    return implementation


def choose(query_shape: tuple[int, int], bank: xla.Bank, top_k: int) -> str:
    """The implementation that was the fastest at the nearest size measured on this device.

    XLA where this device or dtype was not measured, or the other does not take the bank.
    """
    names = available(bank)
    kind = jax.devices()[0].device_kind
    dtype = str(bank.keys.dtype)
    rows = [
        row
        for row in measurements()
        if row["device"] == kind
        and row["dtype"] == dtype
        and set(names) <= set(row["microseconds"])
    ]
    here = (query_shape[0], *bank.keys.shape[-2:], top_k)

    def distance(row: dict) -> float:
        there = (row["queries"], row["keys"], row["dim"], row["top_k"])
        return sum(abs(math.log(a / b)) for a, b in zip(here, there, strict=True))

    nearest = min(rows, key=distance, default=None)
    return "xla" if nearest is None else min(names, key=nearest["microseconds"].get)


def available(bank: xla.Bank) -> list[str]:
    """The implementations that run on the default device and take such a bank; "xla" is first."""
    name = {"gpu": "mosaic_gpu", "tpu": "pallas_tpu"}.get(jax.default_backend())
    takes = name is not None and _module(name).runs_here() and _takes(name, bank)
    return ["xla"] + [name] * takes


def _module(name: str):
    """A kernel's module; Pallas takes long to import, so only where it is needed."""
    return importlib.import_module(f"{__package__}.{name}")


@functools.cache
def measurements() -> list[dict]:
    """The table that `choose` reads; benchmarks/kernel.py writes it."""
    file = importlib.resources.files(__package__) / "measurements.json"
    return json.loads(file.read_text())["rows"]


def _takes(name: str, bank: xla.Bank) -> bool:
    """Whether the kernel takes such a bank."""
    shared = bank.keys.ndim == 2 and (bank.mask is None or bank.mask.ndim == 1)
    return shared and bank.values is None and _module(name).supported(bank)


def check(query, bank: xla.Bank, top_k: int) -> None:
    """Raises ValueError if the shapes and dtypes do not fit."""
    keys = bank.keys
    if query.ndim != 2 or keys.ndim not in (2, 3) or keys.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"need query [B D], keys [N D] or [B N D]; got {query.shape}, {keys.shape}"
        )
    num_queries, size = query.shape[0], bank.size
    if not size or not num_queries or (keys.ndim == 3 and keys.shape[0] != num_queries):
        raise ValueError(f"need B, N >= 1 and one B; got {query.shape}, {keys.shape}")
    if keys.dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
        raise ValueError(f"keys are float32, bfloat16 or int8, got {keys.dtype}")
    if (keys.dtype == jnp.int8) != (bank.scales is not None):
        raise ValueError(f"scales belong to int8 keys, and int8 keys need them; got {keys.dtype}")
    if top_k < 1:
        raise ValueError(f"top_k is at least 1, got {top_k}")
    mask, values, scales = bank.mask, bank.values, bank.scales
    if mask is not None and (
        mask.dtype != jnp.bool_ or mask.shape not in ((size,), (num_queries, size))
    ):
        raise ValueError(f"mask is bool [N] or [B N], got {mask.dtype} {mask.shape}")
    if scales is not None and (scales.shape != (size,) or keys.ndim == 3):
        raise ValueError(f"scales [N] go with keys [N D], got {scales.shape}, {keys.shape}")
    if values is not None and (values.ndim != 2 or len(values) != size or keys.ndim == 3):
        raise ValueError(f"values [N V] go with keys [N D], got {values.shape}, {keys.shape}")


def _reference(top_k: int, query, bank: xla.Bank, inverse):
    """The oracle on a dequantised bank, in float32."""
    keys = bank.keys.astype(jnp.float32)
    if bank.keys.dtype != jnp.float32:
        query = query.astype(jnp.bfloat16)
    keys = keys if bank.scales is None else keys * bank.scales[:, None]
    return reference.retrieval_entropy(
        query.astype(jnp.float32),
        keys,
        bank.mask,
        temperature=1.0 / inverse,
        top_k=top_k,
        values=bank.values,
    )


def summary(top_k: int, implementation: str, query, bank: xla.Bank, inverse) -> parts.Partial:
    """The bank's summary for the queries, by XLA or the kernel."""
    by_xla = functools.partial(xla.summary, top_k=top_k)
    if implementation == "xla":
        return by_xla(query, bank, inverse)
    kernel = custom_batching.custom_vmap(
        functools.partial(_module(implementation).summary, top_k=top_k)
    )

    @kernel.def_vmap
    def _(axis_size, in_batched, query, bank, inverse):
        if any(jax.tree.leaves(in_batched[1:])):
            axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
            out = jax.vmap(by_xla, in_axes=axes, axis_size=axis_size)(query, bank, inverse)
        else:  # more queries of the same bank, which is still read once
            shape = query.shape[:2]
            out = kernel(query.reshape(-1, query.shape[-1]), bank, inverse)
            out = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return kernel(query, bank, inverse)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _call(top_k: int, implementation: str, query, bank: xla.Bank, inverse):
    return parts.finish(summary(top_k, implementation, query, bank, inverse))


def _jvp(top_k: int, implementation: str, primals, tangents):
    outputs = _call(top_k, implementation, *primals)
    return outputs, with_indices(outputs, xla.tangents(*primals, outputs, directions(tangents)))


_call.defjvp(_jvp, symbolic_zeros=True)


def directions(tangents):
    """Tangents with None in place of zeros that JAX knows to be zeros."""
    return jax.tree.map(lambda t: None if isinstance(t, SymbolicZero) else t, tangents)


def with_indices(outputs, tangents):
    """Tangents of all outputs from those of the floating ones: an index has none."""
    return (*tangents[:3], zero_from_primal(outputs[3], symbolic_zeros=True), *tangents[3:])
