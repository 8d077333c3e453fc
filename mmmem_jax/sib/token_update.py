"""One SIB-GRPO update of a language model with LoRA.

Decisions are scored again at the prompts they were taken at, a few clips of all streams at a time,
and the gradients added up. pi_old is the policy as it scores, not as it sampled: in bfloat16 what
is read whole rounds otherwise than what is read from a cache, and over a long trace that alone can
pass the clip. How far the two lie apart is logged.

The base model is an argument that nothing changes. The reference policy of eq. 10 is the model
without its adapter, also after a warm start: its probabilities say how far training has gone from
the public model.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from mmmem_jax.data.token_streams import TokenStream
from mmmem_jax.memory.traces import Traces
from mmmem_jax.models.qwen3_vl import generate, lora
from mmmem_jax.models.qwen3_vl.vision import VisualTokens
from mmmem_jax.sib import advantages, losses, rewards, token_prompts
from mmmem_jax.sib.token_prompts import Clips, Nodes
from mmmem_jax.sib.token_rollout import (
    Clip,
    Decider,
    TokenTrajectory,
    clips_of,
    encode_frames,
    rollout,
    split_rows,
)
from mmmem_jax.sib.update import rollout_metrics
from mmmem_jax.train.state import TrainState, step_key

# (parameters without adapter, memories [B, G], batch) -> log-probabilities of options [B, G, Q, O]
ReaderFn = Callable[[nnx.State, Traces, TokenStream], Float[Array, "B G Q O"]]


@dataclasses.dataclass(frozen=True)
class TokenSibConfig:
    """Constants of SIB-GRPO; see configs/qwen3_vl.py."""

    num_generations: int = 8
    credit: str = "state"
    discount: float = 0.7  # for credit 'step'
    task: str = "probability"
    beta1: float = 3e-5  # for each token held
    beta2: float = 1.5e-3
    std: str = "group"
    ratio: str = "sequence"
    clip_low: float = 0.2
    clip_high: float = 0.2
    inner_epochs: int = 1
    entropy_bonus: float = 0.0
    collapse_share: float = 0.98
    clips_at_once: int = 1  # of every stream, in a forward and backward pass


class Decisions(NamedTuple):
    """Decisions on T clips to be scored again, m clips of all streams at a time."""

    visual: VisualTokens  # leaves [T / m, m, ...]
    clips: Clip  # [T / m, m, B, ...]
    nodes: Nodes  # [T / m, m, B, S, L]
    ids: jax.Array  # [T / m, m, B, G, K] int32, what was written
    valid: jax.Array  # [T / m, m, B, G, K] bool


class Sampled(NamedTuple):
    """What pi_old did, and what that was worth."""

    traj: TokenTrajectory
    decisions: Decisions
    old_log_prob: jax.Array  # [B, G, T] of pi_old, nats
    old_entropy: jax.Array  # [B, S, T] of its actions, nats
    ref_log_prob: jax.Array  # [B, G, T] of the model without its adapter, nats
    terms: rewards.RewardTerms  # [B, G, U] each
    reward: jax.Array  # [B, G, U] eq. 10
    adv: advantages.Advantages


def in_pieces(tree, clips_at_once: int):
    """Leaves [B, G, T, ...] as [T / m, m, B, G, ...]."""

    def cut(x):
        x = jnp.moveaxis(x, 2, 0)
        return x.reshape(-1, clips_at_once, *x.shape[1:])

    return jax.tree.map(cut, tree)


def in_order(tree):
    """Leaves [T / m, m, B, G, ...] as [B, G, T, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 0, 2), tree)


def decisions_of(
    batch: TokenStream, visual: VisualTokens, nodes: Nodes, ids, valid, clips_at_once: int
) -> Decisions:
    """Decisions from nodes [B, S, T, L] and what was written [B, G, T, K]."""
    by_clip = jax.tree.map(
        lambda x: x.reshape(-1, clips_at_once, *x.shape[1:]), (visual, clips_of(batch))
    )
    return Decisions(*by_clip, *in_pieces((nodes, ids, valid), clips_at_once))


def score(
    decider: Decider, params: nnx.State, piece: Decisions
) -> tuple[Float[Array, "m B G"], Float[Array, "m B S"]]:
    """Log-probabilities of decisions on m clips of all streams, and entropies of their actions.

    Args:
      decider: how they were decided.
      params: of the model whose probabilities are wanted.
      piece: a piece of decisions, leaves [m, ...].

    Returns:
      Nats, at the temperature that was sampled at; S is G where the model writes.
    """
    model = nnx.merge(decider.graphdef, params)
    m, b, g = piece.ids.shape[:3]
    states = g if decider.writes else piece.nodes.ids.shape[2]

    def to_rows(x):  # [m, B, 1 or S, ...]; as rows lie on the mesh, streams and generations first
        rest = x.shape[3:]
        x = jnp.moveaxis(jnp.broadcast_to(x, (m, b, states, *rest)), 0, 2)
        return x.reshape(b * states * m, *rest)

    def from_rows(x):
        return jnp.moveaxis(x.reshape(b, states, m, *x.shape[1:]), 2, 0)

    frame = jnp.arange(m * b).reshape(m, b)
    clips = Clips(piece.clips.caption, piece.clips.caption_valid, frame)
    clips = jax.tree.map(lambda x: to_rows(x[:, :, None]), clips)
    prompt = token_prompts.assemble(
        decider.wording, jax.tree.map(to_rows, piece.nodes), clips, decider.token_grid(model)
    )
    visual = _flat(piece.visual)
    if decider.writes:
        written = token_prompts.with_completions(prompt, to_rows(piece.ids), to_rows(piece.valid))
        log_prob, entropy = generate.completion_log_probs(
            model,
            split_rows(model, written),
            visual,
            num_new=decider.max_new_tokens,
            temperature=decider.temperature,
            first_ids=decider.wording.action_ids,
        )
        return from_rows(log_prob.sum(-1)), from_rows(entropy[:, 0])
    # A prompt's last token is never padding, and all that a group wrote is scored by it.
    hidden, _ = model(split_rows(model, prompt), visual)
    logits = model.logits(hidden[:, -1])[:, jnp.array(decider.wording.action_ids)]
    log_probs = from_rows(jax.nn.log_softmax(logits / decider.temperature))
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, -1)
    chosen = piece.ids == jnp.array(decider.wording.action_ids)  # [m, B, G, 3]
    log_prob = jnp.sum(jnp.where(chosen, log_probs, 0.0), -1)
    return jnp.where(piece.valid[..., 0], log_prob, 0.0), entropy


def _flat(visual: VisualTokens) -> VisualTokens:
    """The tokens of m clips, leaves [m, ...], as those of one batch of frames."""
    deepstack = jnp.moveaxis(visual.deepstack, 1, 0)
    width = deepstack.shape[-1]
    return VisualTokens(
        visual.embeddings.reshape(-1, width), deepstack.reshape(len(deepstack), -1, width)
    )


def log_probs_of(
    decider: Decider, params: nnx.State, decisions: Decisions
) -> tuple[Float[Array, "B G T"], Float[Array, "B S T"]]:
    """`score` of all decisions."""
    return in_order(jax.lax.map(lambda piece: score(decider, params, piece), decisions))


def gradient(
    decider: Decider,
    adapter: nnx.State,
    base: nnx.State,
    decisions: Decisions,
    log_prob_weight: Float[Array, "B G T"],
    entropy_weight: Float[Array, "B S T"],
) -> nnx.State:
    """Gradient of the weighted sum of log-probabilities and entropies, by the adapter."""
    clips_at_once = decisions.ids.shape[1]

    def weighted(adapter, piece, weights):
        found = score(decider, lora.join(adapter, base), piece)
        return sum(jnp.sum(x * w) for x, w in zip(found, weights, strict=True))

    def add(total, inputs):
        return jax.tree.map(jnp.add, total, jax.grad(weighted)(adapter, *inputs)), None

    weights = in_pieces((log_prob_weight, entropy_weight), clips_at_once)
    zero = jax.tree.map(jnp.zeros_like, adapter)
    return jax.lax.scan(add, zero, (decisions, weights))[0]


def make_optimizer(learning_rate: float, weight_decay: float = 0.0):
    """AdamW with gradients clipped to a norm of 1."""
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=weight_decay)
    )


def make_update(
    decider: Decider,
    reader_fn: ReaderFn,
    init_traces: Traces,
    optimizer: optax.GradientTransformation,
    config: TokenSibConfig,
    *,
    shard: Callable = lambda x: x,
):
    """The update as a pure function: (state, batch, base) -> (state, metrics).

    The gradient of the loss is taken by the log-probabilities first, which needs them of all clips,
    and then piece by piece by the adapter: exact for any credit and ratio, for one forward pass
    more. At the first inner step pi_theta is pi_old, so every ratio is 1. `ratio_first` is the
    largest ratio, either way, of pi_old to what was sampled from.

    Args:
      decider: how the model decides.
      reader_fn: answers the questions from memories.
      init_traces: the memory before the first clip.
      optimizer: of the adapter.
      config: constants.
      shard: puts trees with leading axes [B, G] on the mesh.
    """

    def update(state: TrainState, batch: TokenStream, base: nnx.State):
        sampled = sample(decider, reader_fn, init_traces, config, state, batch, base, shard=shard)
        (adapter, opt_state), learned = learn(decider, optimizer, config, state, sampled, base)
        traj = sampled.traj
        metrics = rollout_metrics(traj, sampled.terms, sampled.reward, sampled.adv, config)
        metrics["tokens_dropped"] = traj.traces.dropped.mean()
        units = sampled.reward.shape[-1]
        log_ratio = losses.unit_log_ratio(
            sampled.old_log_prob, traj.log_prob, traj.valid, units, config.ratio
        )
        metrics |= learned | {"ratio_first": jnp.exp(jnp.abs(log_ratio).max())}
        state = state.replace(params=adapter, opt_state=opt_state, step=state.step + 1)
        return state, metrics

    return update


def sample(
    decider: Decider,
    reader_fn: ReaderFn,
    init_traces: Traces,
    config: TokenSibConfig,
    state: TrainState,
    batch: TokenStream,
    base: nnx.State,
    *,
    shard: Callable,
) -> Sampled:
    """A rollout of a state's policy and its rewards; arguments are those of `make_update`."""
    params = lora.join(state.params, base)
    ref_params = lora.join(lora.without_lora(state.params), base)
    visual = encode_frames(decider, nnx.merge(decider.graphdef, params), batch.patches)

    def read_fn(traces):
        log_probs = reader_fn(ref_params, traces, batch)
        return rewards.task_reward(
            log_probs, batch.answer[:, None], batch.asked[:, None], config.task
        )

    traj = rollout(
        decider, params, step_key(state), batch, visual,
        init_traces=init_traces, read_fn=read_fn, num_generations=config.num_generations,
        credit=config.credit, shard=shard,
    )  # fmt: skip
    decisions = decisions_of(
        batch, visual, traj.nodes, traj.ids, traj.token_valid, config.clips_at_once
    )
    old_log_prob, old_entropy = log_probs_of(decider, params, decisions)
    ref_log_prob, _ = log_probs_of(decider, ref_params, decisions)
    terms = rewards.terms(traj.task, traj.length, old_log_prob, ref_log_prob, traj.valid)
    reward = rewards.weigh(terms, config.beta1, config.beta2)
    adv = advantages.advantages(
        reward, credit=config.credit, discount=config.discount, std=config.std
    )
    return Sampled(traj, decisions, old_log_prob, old_entropy, ref_log_prob, terms, reward, adv)


def learn(
    decider: Decider,
    optimizer: optax.GradientTransformation,
    config: TokenSibConfig,
    state: TrainState,
    sampled: Sampled,
    base: nnx.State,
) -> tuple[tuple[nnx.State, optax.OptState], dict[str, jax.Array]]:
    """The inner steps of an update: adapter and optimizer state after them, metrics of the last."""

    def loss_fn(log_prob, entropy):
        return _loss(log_prob, entropy, sampled, config)

    def step(carry, found):
        adapter, opt_state = carry
        weights, metrics = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(*found)
        grads = gradient(decider, adapter, base, sampled.decisions, *weights)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, opt_state, adapter)
        return (optax.apply_updates(adapter, updates), opt_state), metrics

    def again(carry, _):
        return step(carry, log_probs_of(decider, lora.join(carry[0], base), sampled.decisions))

    carry = state.params, state.opt_state
    carry, metrics = step(carry, (sampled.old_log_prob, sampled.old_entropy))
    if config.inner_epochs > 1:
        carry, rest = jax.lax.scan(again, carry, length=config.inner_epochs - 1)
        metrics = jax.tree.map(lambda x: x[-1], rest)
    return carry, metrics


def _loss(log_prob, entropy, sampled: Sampled, config: TokenSibConfig):
    """The clipped surrogate of eq. 11 with an entropy bonus, and what is logged of it."""
    traj, adv = sampled.traj, sampled.adv
    total, denominator, metrics = losses.sib_grpo_loss(
        log_prob,
        sampled.old_log_prob,
        adv.value,
        adv.weight,
        traj.valid,
        ratio=config.ratio,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )
    decided = traj.valid & jnp.ones_like(entropy, bool)
    mean_entropy = jnp.sum(jnp.where(decided, entropy, 0.0)) / jnp.maximum(decided.sum(), 1)
    loss = total / denominator - config.entropy_bonus * mean_entropy
    metrics |= losses.reference_divergence(log_prob, sampled.ref_log_prob, traj.valid)
    return loss, metrics | {"loss": loss, "policy_entropy": mean_entropy}
