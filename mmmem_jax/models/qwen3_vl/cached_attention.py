"""Attention to what was read before and is kept, of which only what is filled is looked at.

A cache has slots for all that a conversation may come to; a dense product with it costs that much
from the first token on, and half of what it costs within a long piece is hidden by causality. Here
blocks of queries go over blocks of slots, up to the last that they may look at, with the softmax
made up as they go (Milakov and Gimelshein, arXiv 1805.02867; Rabe and Staats, arXiv 2112.05682):
one program for however much is filled, and no scores larger than a block.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmmem_jax.models.qwen3_vl.attention import attend

# Measured on CPUs, where 128 to 512 of each are within a fifth of these.
QUERY_BLOCK, SLOT_BLOCK = 256, 512
LOWEST = -1e30  # score of a slot that may not be looked at; finite, so that no block is all -inf


class Past(NamedTuple):
    """What all layers have read, which of them is at work, and where what it reads now begins."""

    keys: jax.Array  # [N, B, S, K, H]
    values: jax.Array  # [N, B, S, K, H]
    valid: jax.Array  # [B, S] bool, slots that count, those of what is read now included
    layer: jax.Array  # [] int32
    length: jax.Array  # [] int32


def written(past: Past, key: Float[Array, "B L K H"], value: Float[Array, "B L K H"]) -> Past:
    """What was read, with the keys and values of what is read now."""
    at = (past.layer, 0, past.length, 0, 0)
    keys, values = (
        jax.lax.dynamic_update_slice(stack, new[None].astype(stack.dtype), at)
        for stack, new in ((past.keys, key), (past.values, value))
    )
    return past._replace(keys=keys, values=values)


def attend_past(
    query: Float[Array, "B L N H"], past: Past, *, implementation: str = "xla"
) -> Float[Array, "B L N H"]:
    """Causal softmax attention of L new tokens to all valid slots up to their own; in float32.

    Not differentiable in reverse: the number of blocks is known on the device alone.

    Args:
      query: of N heads, a multiple of those of the keys.
      past: with the new tokens `written` into it.
      implementation: 'cudnn' looks at all slots with a mask, which is one kernel on a GPU; else
        what is filled is gone through in blocks, where there is more than one.
    """
    if implementation == "cudnn" or past.keys.shape[2] <= SLOT_BLOCK:
        keys, values = past.keys[past.layer], past.values[past.layer]
        mask = _may_look(past, past.length, query.shape[1], 0, keys.shape[1])
        return attend(query, keys, values, mask=mask, implementation=implementation)
    batch, length, heads, size = query.shape
    kv_heads, block = past.keys.shape[3], min(QUERY_BLOCK, length)
    scaled = (query.astype(jnp.float32) * size**-0.5).astype(query.dtype)
    padded = jnp.pad(scaled, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    blocks = padded.reshape(batch, -1, block, kv_heads, heads // kv_heads, size)
    starts = past.length + block * jnp.arange(blocks.shape[1])
    one = partial(_block_attention, past)
    out = jax.lax.map(lambda block: one(*block), (blocks.transpose(1, 0, 3, 4, 2, 5), starts))
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, size)[:, :length]


def _block_attention(past: Past, query: Float[Array, "B K G Q H"], start) -> Array:
    """Of queries whose first is in slot `start`, to the slots up to their own."""
    slots, length = past.keys.shape[2], query.shape[3]
    size = SLOT_BLOCK
    count = jnp.minimum((start + length + size - 1) // size, -(-slots // size))

    def add_block(number, carry):
        most, total, out = carry
        at = jnp.minimum(number * size, slots - size)  # the last block reaches back
        keys, values = (_slots(stack, past.layer, at, size) for stack in (past.keys, past.values))
        mask = _may_look(past, start, length, at, size)
        mask &= at + jnp.arange(size) >= number * size
        scores = jnp.einsum("bkgqh,bskh->bkgqs", query, keys, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], scores, LOWEST)
        highest = jnp.maximum(most, scores.max(-1))
        weights, kept = jnp.exp(scores - highest[..., None]), jnp.exp(most - highest)
        read = jnp.einsum(
            "bkgqs,bskh->bkgqh",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return highest, total * kept + weights.sum(-1), out * kept[..., None] + read

    empty = jnp.full(query.shape[:-1], LOWEST), jnp.zeros(query.shape[:-1]), jnp.zeros(query.shape)
    _, total, out = jax.lax.fori_loop(0, count, add_block, empty)
    return (out / total[..., None]).astype(query.dtype)


def _slots(stack: Float[Array, "N B S K H"], layer, at, size: int) -> Float[Array, "B s K H"]:
    """`size` slots of a layer, from `at` on."""
    _, batch, _, heads, width = stack.shape
    return jax.lax.dynamic_slice(stack, (layer, 0, at, 0, 0), (1, batch, size, heads, width))[0]


def _may_look(past: Past, start, length: int, at, size: int) -> Bool[Array, "B L s"]:
    """Which of `size` slots from `at` on the queries in slots from `start` on may look at."""
    before = at + jnp.arange(size) <= start + jnp.arange(length)[:, None]
    return before & jax.lax.dynamic_slice_in_dim(past.valid, at, size, axis=1)[:, None]
