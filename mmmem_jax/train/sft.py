"""The supervised warm start: a model learns to decide as a teacher does, in a teacher's states."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from mmmem_jax.data.token_streams import TokenStream
from mmmem_jax.memory.traces import Traces
from mmmem_jax.memory.types import DISCARD, MERGE
from mmmem_jax.models.qwen3_vl import lora
from mmmem_jax.sib.token_prompts import Nodes
from mmmem_jax.sib.token_rollout import (
    Clip,
    Decider,
    clips_of,
    encode_frames,
    latest_nodes,
    remember,
    spread,
    trace_of,
)
from mmmem_jax.sib.token_update import decisions_of, gradient, log_probs_of
from mmmem_jax.train.state import TrainState


class Followed(NamedTuple):
    """What given actions led to."""

    nodes: Nodes  # [B, 1, T, L] the latest node's text in the state of each decision
    ids: jax.Array  # [B, 1, T, K] int32, what was written
    valid: jax.Array  # [B, 1, T, K] bool
    traces: Traces  # [B, 1] the memories at the end


def follow(
    decider: Decider, batch: TokenStream, action: Int[Array, "B T"], init_traces: Traces
) -> Followed:
    """Takes given actions, as a teacher or a fixed rule.

    Where the model writes, the trace is the caption, and on MERGE what the node holds and then the
    caption, as far as `max_new_tokens` go.
    """
    action_ids = jnp.array(decider.wording.action_ids)

    def step(traces, inputs):
        action, clip = inputs
        nodes = latest_nodes(traces)
        ids = action_ids[action][:, None]
        valid = jnp.ones(ids.shape, bool)
        if decider.writes:
            node = jax.tree.map(lambda x: x[:, 0], nodes)
            text, counts = jax.vmap(partial(_trace, decider))(action, node, clip)
            ids = jnp.concatenate([ids, text], axis=1)
            valid = jnp.concatenate([valid, counts], axis=1)
        ids, valid = ids[:, None], (valid & clip.valid[:, None])[:, None]
        written = trace_of(decider, ids, valid)
        return remember(decider, traces, action[:, None], clip, written), (nodes, ids, valid)

    traces = spread(init_traces, batch.valid.shape[0], 1)
    traces, out = jax.lax.scan(step, traces, (jnp.asarray(action).T, clips_of(batch)))
    return Followed(*jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), out), traces)


def _trace(decider: Decider, action: Int[Array, ""], node: Nodes, clip: Clip):
    """What follows the action: ids and validity [K - 1], the token that ends it included."""
    ids = jnp.concatenate([node.ids, clip.caption])
    valid = jnp.concatenate([node.valid & (action == MERGE), clip.caption_valid])
    valid = valid & (action != DISCARD)
    first = jnp.argsort(~valid, stable=True)[: decider.max_new_tokens - 2]
    count = valid[first].sum()
    place = jnp.arange(decider.max_new_tokens - 1)
    ids = jnp.pad(ids[first], (0, len(place) - len(first)))
    return jnp.where(place < count, ids, decider.wording.stop_ids[0]), place <= count


def make_update(
    decider: Decider,
    init_traces: Traces,
    optimizer: optax.GradientTransformation,
    *,
    clips_at_once: int = 1,
) -> Callable:
    """The update as a pure function: (state, batch, base) -> (state, metrics).

    The loss is the mean negative log-probability of the teacher's decisions, nats; of the three
    actions alone for the first token, as they are drawn.
    """

    def update(state: TrainState, batch: TokenStream, base: nnx.State):
        params = lora.join(state.params, base)
        visual = encode_frames(decider, nnx.merge(decider.graphdef, params), batch.patches)
        *written, _ = follow(decider, batch, batch.teacher, init_traces)
        decisions = decisions_of(batch, visual, *written, clips_at_once)
        log_prob, entropy = log_probs_of(decider, params, decisions)
        count = jnp.maximum(batch.valid.sum(), 1)
        weight = jnp.broadcast_to(-1.0 / count, log_prob.shape)
        no_weight = jnp.zeros_like(entropy)
        grads = gradient(decider, state.params, base, decisions, weight, no_weight)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": jnp.sum(log_prob * weight),
            "policy_entropy": jnp.sum(jnp.where(batch.valid[:, None], entropy, 0.0)) / count,
            "grad_norm": optax.tree.norm(grads),
        }
        params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, opt_state=opt_state, step=state.step + 1), metrics

    return update
