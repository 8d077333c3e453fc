"""Rollouts of B streams x G generations through the memory, in one program.

A trajectory is cut into U credit units of `block_size` decisions. The SIB potential is read where
units end, so the reward of a unit is the change it caused; with `credit='trajectory'` there is one
unit. With `credit='state'` all generations of a group restart every unit from the memory of
generation 0: each unit is then a group of G traces sampled from one state, as in eq. 11.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmmem_jax import memory
from mmmem_jax.memory.types import Item, MemoryState

CREDITS = ("trajectory", "state", "step")


class Trajectory(NamedTuple):
    """What was decided and what it led to."""

    context: jax.Array  # [B, G, T, F] what the policy read of the memory
    action: jax.Array  # [B, G, T] int32
    log_prob: jax.Array  # [B, G, T] log pi_old(action)
    valid: jax.Array  # [B, 1, T] bool, False for padding
    task: jax.Array  # [B, G, U] change of the task reward over a unit
    length: jax.Array  # [B, G, U] change of the episodic tokens held
    last: jax.Array  # [B, G] task reward at the end
    final: object  # what `final_fn` reads at the end
    slots: jax.Array  # [B, G] episodes at the end
    tokens: jax.Array  # [B, G] episodic tokens at the end
    source_tokens: jax.Array  # [B, 1] tokens of the stream


def group_keys(rng_key: jax.Array, num_streams: int, num_generations: int) -> jax.Array:
    """Keys [B, G] that depend on (stream, generation) alone, so sharding cannot change a draw."""

    def key(b, g):
        return jax.random.fold_in(jax.random.fold_in(rng_key, b), g)

    b, g = jnp.arange(num_streams), jnp.arange(num_generations)
    return jax.vmap(lambda i: jax.vmap(lambda j: key(i, j))(g))(b)


def pad_to_units(items: Item, block_size: int) -> Item:
    """Items [B, T] with invalid ones after the last, until T is a multiple of `block_size`."""
    missing = -items.valid.shape[1] % block_size
    if not missing:
        return items
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)), items
    )


def episodic_tokens(state: MemoryState) -> Float[Array, "..."]:
    """Length(m) of eq. 10: text tokens the episodic stream holds."""
    held = jnp.where(state.episodic.valid, state.episodic.tokens, 0)
    return held.sum(-1).astype(jnp.float32)


def rollout(
    params,
    rng_key: jax.Array,
    *,
    items: Item,
    init_state: MemoryState,
    decide_fn: memory.pyramid.DecideFn,
    task_fn: Callable[[MemoryState], Float[Array, "B G"]],
    num_generations: int,
    credit: str,
    block_size: int = 1,
    final_fn: Callable[[MemoryState], object] = lambda states: (),
    shard: Callable = lambda x: x,
) -> Trajectory:
    """Samples G traces for each of B streams.

    Args:
      params: manager parameters, pi_old.
      rng_key: key of this rollout.
      items: chunks with leading axes [B, T]; padded by `pad_to_units`, which then is the T of
        what is returned.
      init_state: the memory before the first chunk, no leading axes.
      decide_fn: the policy.
      task_fn: R of eq. 10 in [B, G] from states with leading axes [B, G].
      num_generations: G.
      credit: 'trajectory', 'state' or 'step'.
      block_size: decisions in a credit unit; with `credit='trajectory'` it only pads.
      final_fn: what else to read of the memories at the end.
      shard: puts a tree with leading axes [B, G] on the mesh.

    Raises:
      ValueError: if `credit` is unknown.
    """
    if credit not in CREDITS:
        raise ValueError(f"credit must be one of {', '.join(CREDITS)}, got {credit!r}")
    items = pad_to_units(items, block_size)
    b, t = items.valid.shape
    # An empty stream is one unit without a decision.
    num_units = 1 if credit == "trajectory" or not t else t // block_size
    keys = shard(group_keys(rng_key, b, num_generations))
    states = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (b, num_generations, *jnp.shape(x))), init_state
    )
    # Without the barrier XLA evaluates the reader on the constant empty memory while compiling.
    states = jax.lax.optimization_barrier(shard(states))
    units = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(b, num_units, t // num_units, *x.shape[2:]), 1, 0), items
    )

    def one(key, state, chunk):
        return memory.scan(params, key, state, chunk, decide_fn=decide_fn)

    over_group = jax.vmap(one, in_axes=(0, 0, None))
    over_batch = jax.vmap(over_group)

    def unit(carry, chunk):
        states, task, tokens = carry
        states, out = over_batch(keys, states, chunk)
        new_task, new_tokens = task_fn(states), episodic_tokens(states)
        gain = (new_task - task, new_tokens - tokens)
        if credit == "state":
            states, new_task, new_tokens = jax.tree.map(
                lambda x: jnp.broadcast_to(x[:, :1], x.shape), (states, new_task, new_tokens)
            )
        return (shard(states), new_task, new_tokens), (out.context, out.action, out.log_prob, *gain)

    carry = (states, task_fn(states), episodic_tokens(states))
    (states, last, _), out = jax.lax.scan(unit, carry, units)
    context, action, log_prob, task, length = out

    def per_chunk(x):  # [U, B, G, block, ...] -> [B, G, T, ...]
        x = jnp.moveaxis(x, 0, 2)
        return shard(x.reshape(b, num_generations, t, *x.shape[4:]))

    return Trajectory(
        context=per_chunk(context),
        action=per_chunk(action),
        log_prob=per_chunk(log_prob),
        valid=items.valid[:, None],
        task=shard(jnp.moveaxis(task, 0, 2)),
        length=shard(jnp.moveaxis(length, 0, 2)),
        last=last,
        final=final_fn(states),
        slots=states.episodic.valid.sum(-1),
        tokens=episodic_tokens(states),
        source_tokens=jnp.where(items.valid, items.tokens, 0).sum(-1, keepdims=True),
    )
