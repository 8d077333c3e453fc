"""Rollouts of B streams x G generations whose decisions a language model writes, in one program.

A decision is the model's first token, one of three; where it may write on, the rest is the trace,
the text of the node that it adds or rewrites. Else a node's text is the clip's caption. The state
that it decides in is the text of the latest node e* and the clip (eq. 2), so every prompt is read
anew; frames were encoded before, once for all generations, and with credit 'state' a group's prompt
is read once and its cache repeated.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mmmem_jax.data.token_streams import TokenStream
from mmmem_jax.memory import traces as traces_lib
from mmmem_jax.memory.traces import Traces
from mmmem_jax.memory.types import DISCARD
from mmmem_jax.models.qwen3_vl import generate
from mmmem_jax.models.qwen3_vl.modeling import Cache, Qwen3VL, init_cache
from mmmem_jax.models.qwen3_vl.vision import VisualTokens
from mmmem_jax.sib import token_prompts
from mmmem_jax.sib.rollout import CREDITS
from mmmem_jax.sib.token_prompts import Clips, Nodes, Wording

ReadFn = Callable[[Traces], Float[Array, "B G"]]


@dataclasses.dataclass(frozen=True)
class Decider:
    """How a model decides, the same in every update.

    Args:
      graphdef: of a Qwen3VL.
      wording: fixed parts of its prompts.
      patch_grid: rows and columns of patches of a frame.
      max_new_tokens: K; 1 decides only, more leave room for the trace.
      temperature: of sampling.
    """

    graphdef: nnx.GraphDef
    wording: Wording
    patch_grid: tuple[int, int]
    max_new_tokens: int = 1
    temperature: float = 0.7

    @property
    def writes(self) -> bool:
        """Whether the model writes traces."""
        return self.max_new_tokens > 1

    def token_grid(self, model: Qwen3VL) -> tuple[int, int]:
        """Rows and columns of tokens of a frame."""
        merge = model.config.vision.spatial_merge_size
        return self.patch_grid[0] // merge, self.patch_grid[1] // merge


class Clip(NamedTuple):
    """A clip of each of B streams, or with more axes before."""

    caption: jax.Array  # [B, C] int32
    caption_valid: jax.Array  # [B, C] bool
    valid: jax.Array  # [B] bool, False for padding


class TokenTrajectory(NamedTuple):
    """What was decided and what it led to; S is 1 where a group shares its states, else G."""

    nodes: Nodes  # [B, S, T, L] the latest node's text in the state of each decision
    ids: jax.Array  # [B, G, T, K] int32, what was written: action, trace, end
    token_valid: jax.Array  # [B, G, T, K] bool
    token_log_prob: jax.Array  # [B, G, T, K] log pi_old of each token, nats, 0 where not valid
    action: jax.Array  # [B, G, T] int32
    valid: jax.Array  # [B, 1, T] bool, False for padding
    task: jax.Array  # [B, G, U] change of the task reward over a unit
    length: jax.Array  # [B, G, U] change of the tokens held
    last: jax.Array  # [B, G] task reward at the end
    traces: Traces  # [B, G] the memories at the end
    slots: jax.Array  # [B, G] nodes at the end
    tokens: jax.Array  # [B, G] tokens held at the end
    source_tokens: jax.Array  # [B, 1] tokens of the stream's captions

    @property
    def log_prob(self) -> Float[Array, "B G T"]:
        """log pi_old(m | s) of whole decisions."""
        return self.token_log_prob.sum(-1)


def encode_frames(
    decider: Decider, model: Qwen3VL, patches: Float[Array, "B T P D"]
) -> VisualTokens:
    """The vision tower over all clips [T, ...], the frames of a clip being those of B streams."""

    def one(patches):
        config = model.config.vision
        return model.vision(token_prompts.frame_inputs(patches, decider.patch_grid, config))

    return jax.lax.stop_gradient(jax.lax.map(one, jnp.moveaxis(patches, 1, 0)))


def split_rows(model: Qwen3VL, tree):
    """Puts a tree with a leading axis of rows on the model's mesh, if it has one."""
    if model.mesh is None:
        return tree
    spec = NamedSharding(model.mesh, PartitionSpec(("data", "group")))
    return jax.lax.with_sharding_constraint(tree, spec)


def held(traces: Traces) -> Float[Array, "..."]:
    """Length(m) of eq. 10: tokens of memories with any leading axes."""
    return traces_lib.length(traces).astype(jnp.float32)


def latest_nodes(traces: Traces) -> Nodes:
    """The text of e* of memories with any leading axes."""
    at = jnp.maximum(traces.latest, 0)[..., None, None]
    ids = jnp.take_along_axis(traces.ids, at, axis=-2)[..., 0, :]
    valid = jnp.take_along_axis(traces.valid, at, axis=-2)[..., 0, :]
    return Nodes(ids, valid & (traces.latest >= 0)[..., None])


def remember(
    decider: Decider,
    traces: Traces,
    action: Int[Array, "B G"],
    clip: Clip,
    written: Nodes,
) -> Traces:
    """Memories [B, G] after decisions on clips [B]; `written` counts where the model writes."""
    text = written
    if not decider.writes:
        shape = (*action.shape, clip.caption.shape[-1])
        text = Nodes(
            jnp.broadcast_to(clip.caption[:, None], shape),
            jnp.broadcast_to(clip.caption_valid[:, None], shape),
        )
    action = jnp.where(clip.valid[:, None], action, DISCARD)
    merge = "rewrite" if decider.writes else "append"

    def one(traces, action, ids, valid):
        return traces_lib.update(traces, action, ids, valid, merge=merge)

    return jax.vmap(jax.vmap(one))(traces, action, *text)


def trace_of(decider: Decider, ids: Int[Array, "... K"], valid) -> Nodes:
    """What was written between the action and the end."""
    ends = jnp.any(ids[..., None] == jnp.array(decider.wording.stop_ids), axis=-1)
    return Nodes(ids[..., 1:], (valid & ~ends)[..., 1:])


def action_of(decider: Decider, ids: Int[Array, "... K"]) -> Int[Array, "..."]:
    """The action that a first token stands for."""
    return jnp.argmax(ids[..., :1] == jnp.array(decider.wording.action_ids), axis=-1)


def rollout(
    decider: Decider,
    params: nnx.State,
    rng_key: jax.Array,
    batch: TokenStream,
    visual: VisualTokens,
    *,
    init_traces: Traces,
    read_fn: ReadFn,
    num_generations: int,
    credit: str,
    shard: Callable = lambda x: x,
) -> TokenTrajectory:
    """Samples G traces for each of B streams; a credit unit is a decision, or a whole trajectory.

    Args:
      decider: how it is decided.
      params: of the model, pi_old.
      rng_key: key of this rollout; a draw depends on stream, generation and clip alone.
      batch: streams [B, T, ...].
      visual: from `encode_frames`.
      init_traces: the memory before the first clip, no leading axes.
      read_fn: the task reward of memories [B, G].
      num_generations: G.
      credit: 'state' lets all generations go on from generation 0 after each decision (eq. 11),
        'step' lets each go its own way, 'trajectory' credits it for its end.
      shard: puts a tree with leading axes [B, G] on the mesh.

    Raises:
      ValueError: if `credit` is unknown.
    """
    if credit not in CREDITS:
        raise ValueError(f"credit must be one of {', '.join(CREDITS)}, got {credit!r}")
    b, t = batch.valid.shape
    shared = credit == "state"
    traces = shard(spread(init_traces, b, num_generations))

    def step(carry, inputs):
        traces, task, tokens = carry
        number, clip, visual = inputs
        nodes = latest_nodes(jax.tree.map(lambda x: x[:, :1], traces) if shared else traces)
        key = jax.random.fold_in(rng_key, number)
        written, action, traces = decide(decider, params, key, traces, nodes, clip, visual, shard)
        new_tokens = held(traces)
        new_task = task if credit == "trajectory" else read_fn(traces)
        gain = (new_task - task, new_tokens - tokens)
        if shared:
            traces, new_task, new_tokens = jax.tree.map(
                lambda x: jnp.broadcast_to(x[:, :1], x.shape), (traces, new_task, new_tokens)
            )
        return (shard(traces), new_task, new_tokens), (nodes, written, action, *gain)

    first = read_fn(traces)
    (traces, last, tokens), out = jax.lax.scan(
        step, (traces, first, held(traces)), (jnp.arange(t), clips_of(batch), visual)
    )
    nodes, written, action, task, length = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), out)
    if credit == "trajectory":
        last = read_fn(traces)
        task, length = (last - first)[..., None], length.sum(-1, keepdims=True)
    decided = batch.valid[:, None, :, None]
    return TokenTrajectory(
        nodes=nodes,
        ids=written.ids,
        token_valid=written.valid & decided,
        token_log_prob=jnp.where(decided, written.log_probs, 0.0),
        action=action,
        valid=batch.valid[:, None],
        task=shard(task),
        length=shard(length),
        last=last,
        traces=traces,
        slots=(traces_lib.numbers(traces) >= 0).sum(-1),
        tokens=tokens,
        source_tokens=(batch.caption_valid & batch.valid[..., None]).sum((1, 2))[:, None],
    )


def decide(
    decider: Decider,
    params: nnx.State,
    rng_key: jax.Array,
    traces: Traces,
    nodes: Nodes,
    clip: Clip,
    visual: VisualTokens,
    shard: Callable,
) -> tuple[generate.Generated, Int[Array, "B G"], Traces]:
    """What memories [B, G] are told of clips [B] in the states of nodes [B, S, L].

    Returns:
      What was written [B, G, K], the actions, and the memories after them.
    """
    lead = traces.count.shape
    written = write(decider, params, rng_key, nodes, clip, visual, lead[1])
    written = shard(jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), written))
    action = action_of(decider, written.ids)
    trace = trace_of(decider, written.ids, written.valid)
    return written, action, remember(decider, traces, action, clip, trace)


def write(
    decider: Decider,
    params: nnx.State,
    rng_key: jax.Array,
    nodes: Nodes,
    clip: Clip,
    visual: VisualTokens,
    num_generations: int,
) -> generate.Generated:
    """What B * G generations write about clips [B] in the states of nodes [B, S, L]."""
    model = nnx.merge(decider.graphdef, params)
    b, states = nodes.ids.shape[:2]
    # One prompt a group would leave the devices of a group's axis of the mesh without a row.
    copies = states if states > 1 or model.mesh is None else model.mesh.shape["group"]
    nodes = jax.tree.map(
        lambda x: jnp.repeat(x, copies // states, axis=1).reshape(b * copies, -1), nodes
    )
    rows = Clips(
        jnp.repeat(clip.caption, copies, axis=0),
        jnp.repeat(clip.caption_valid, copies, axis=0),
        jnp.repeat(jnp.arange(b), copies),
    )
    prompt = token_prompts.assemble(decider.wording, nodes, rows, decider.token_grid(model))
    prompt = split_rows(model, prompt)
    num_slots = prompt.ids.shape[1] + decider.max_new_tokens - 1
    cache = init_cache(model.config.text, b * copies, num_slots, model.dtype)
    _, cache = model(prompt, visual, _split_cache(model, cache))
    cache = _split_cache(model, generate.repeat(cache, num_generations // copies))
    written, _ = generate.decode(
        decider.graphdef,
        params,
        rng_key,
        cache,
        max_new_tokens=decider.max_new_tokens,
        stop_ids=decider.wording.stop_ids,
        temperature=decider.temperature,
        first_ids=decider.wording.action_ids,
    )
    return written


def clips_of(batch: TokenStream) -> Clip:
    """What a batch shows of its clips, T first."""
    clips = Clip(batch.caption, batch.caption_valid, batch.valid)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), clips)


def spread(tree, batch_size: int, num_generations: int):
    """A tree without leading axes, [B, G] times."""
    lead = (batch_size, num_generations)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *jnp.shape(x))), tree)


def _split_cache(model: Qwen3VL, cache: Cache) -> Cache:
    """Puts rows and heads of a cache on the model's mesh, if it has one."""
    if model.mesh is None:
        return cache
    spec = PartitionSpec(None, ("data", "group"), None, "model")
    keys, values = jax.lax.with_sharding_constraint(
        (cache.keys, cache.values), NamedSharding(model.mesh, spec)
    )
    return cache.replace(keys=keys, values=values)
