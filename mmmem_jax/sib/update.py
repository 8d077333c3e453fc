"""One SIB-GRPO update: rollouts from pi_old, the reward of eq. 10, a few clipped inner steps."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array

from mmmem_jax import memory
from mmmem_jax.data.encoded import EncodedStream, QuestionBatch, to_items, to_questions
from mmmem_jax.memory.types import ADD_NEW, DISCARD, LEVELS, MERGE, MemoryConfig, MemoryState
from mmmem_jax.models import reader as reader_lib
from mmmem_jax.policies import manager
from mmmem_jax.retrieval.top_down import RetrievalConfig, top_down
from mmmem_jax.sib import advantages, losses, objective, rewards
from mmmem_jax.sib.rollout import pad_to_units, rollout


@dataclasses.dataclass(frozen=True)
class SibConfig:
    """Constants of SIB-GRPO; defaults are those of the main job."""

    num_generations: int = 8
    block_size: int = 8
    credit: str = "step"
    discount: float = 0.7
    task: str = "probability"
    beta1: float = 5e-4
    beta2: float = 1e-4
    std: str = "batch"
    ratio: str = "length_normalised"
    clip_low: float = 0.2
    clip_high: float = 0.2
    inner_epochs: int = 4
    entropy_bonus: float = 0.003
    collapse_share: float = 0.98


@struct.dataclass
class ManagerState:
    """Everything an update reads and writes."""

    params: nnx.State
    ref_params: nnx.State
    opt_state: optax.OptState
    rng: jax.Array  # [2] uint32, key data; update i uses fold_in(key, i)
    step: jax.Array  # [] int32


def init_state(
    model: manager.Manager, optimizer: optax.GradientTransformation, rng_key: jax.Array
) -> ManagerState:
    """State of an untrained manager; the reference policy is where it starts from."""
    params = nnx.state(model, nnx.Param)
    return ManagerState(
        params=params,
        ref_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(rng_key),
        step=jnp.asarray(0, jnp.int32),
    )


class TaskFns(NamedTuple):
    """What a batch's questions make of memories [B, G]."""

    reward: Callable[[MemoryState], Array]  # R of eq. 10, [B, G]
    final: Callable[[MemoryState], dict[str, Array]]  # what is logged of the memories at the end
    entropy: Array | float  # H(Y) of what is asked for the relevance bound, nats, [B, 1] or []


def reader_task(
    graphdef, params, kind: str, memory_config: MemoryConfig, retrieval: RetrievalConfig
):
    """(batch) -> TaskFns that let the fixed reader answer; questions are embedded once a batch.

    At the end the first generation of each group is also searched top down, to log where it stops.
    """
    if kind not in rewards.TASKS:
        raise ValueError(f"task must be one of {', '.join(rewards.TASKS)}, got {kind!r}")

    def make(batch: EncodedStream) -> TaskFns:
        model, questions = nnx.merge(graphdef, params), to_questions(batch)
        asked = jax.vmap(model.ask)(questions.query, questions.options)
        empty = reader_lib.project(memory.init(memory_config))
        without = jax.vmap(lambda a: jax.nn.log_softmax(model.answer(empty, a)))(asked)

        def score(task):
            def one(state: MemoryState, a, q: QuestionBatch, log_probs_without):
                log_probs = jax.nn.log_softmax(model.answer(reader_lib.project(state), a))
                return rewards.task_reward(log_probs, q.answer, q.valid, task, log_probs_without)

            over_group = jax.vmap(one, in_axes=(0, None, None, None))
            return lambda states: jax.vmap(over_group)(states, asked, questions, without)

        def stop_levels(states):
            def one(state: MemoryState, a, q: QuestionBatch):
                answer_fn = functools.partial(model.answer, reader_lib.project(state), a)
                found = top_down(state, q.query, q.options, answer_fn=answer_fn, config=retrieval)
                stops = jax.nn.one_hot(found.stop_level, len(LEVELS)) * q.valid[:, None]
                return stops.sum(0) / jnp.maximum(q.valid.sum(), 1)

            first = jax.tree.map(lambda x: x[:, 0], states)
            num_asked = jnp.maximum(questions.valid.any(-1).sum(), 1)  # the others stop nowhere
            shares = jax.vmap(one)(first, asked, questions).sum(0) / num_asked
            return {f"stop_{name}": shares[i] for i, name in enumerate(LEVELS)}

        def final(states):
            return {"log_prob": score("log_prob")(states), **stop_levels(states)}

        # Options are shuffled, so each is as likely to be right.
        return TaskFns(score(kind), final, math.log(questions.options.shape[-2]))

    return make


def _log_prob_of(logits, action):
    log_probs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]


def _share(action, valid, kind):
    hits = jnp.where(valid, action == kind, False).sum()
    return hits / jnp.maximum((valid & jnp.ones_like(action, bool)).sum(), 1)


def rollout_metrics(traj, terms, reward, adv, config: SibConfig) -> dict[str, Array]:
    """What is logged of a batch of rollouts, reward terms before and after weighting."""
    total = {name: getattr(terms, name).sum(-1) for name in terms._fields}
    shares = {
        "add": _share(traj.action, traj.valid, ADD_NEW),
        "merge": _share(traj.action, traj.valid, MERGE),
        "discard": _share(traj.action, traj.valid, DISCARD),
    }
    source = jnp.maximum(traj.source_tokens, 1)
    return {
        "task_reward": traj.last.mean(),
        "reward": reward.sum(-1).mean(),
        "reward_task": total["task"].mean(),
        "reward_length": total["length"].mean(),
        "reward_length_weighted": -config.beta1 * total["length"].mean(),
        "reward_log_ratio": total["log_ratio"].mean(),
        "reward_log_ratio_weighted": -config.beta2 * total["log_ratio"].mean(),
        "zero_std_share": adv.zero_share,
        **{f"share_{name}": share for name, share in shares.items()},
        **{
            f"collapse_{n}": (s > config.collapse_share).astype(jnp.int32)
            for n, s in shares.items()
        },
        "slots_held": traj.slots.mean(),
        "tokens_held": traj.tokens.mean(),
        "compression": jnp.mean(traj.tokens / source),
    }


def make_update(
    graphdef,
    make_task: Callable[[EncodedStream], TaskFns],
    optimizer: optax.GradientTransformation,
    memory_config: MemoryConfig,
    config: SibConfig,
    *,
    shard: Callable = lambda x: x,
):
    """The update as a pure function: (state, batch) -> (state, metrics).

    `make_task` says what a memory is worth to the batch's questions (`reader_task` lets the reader
    answer them). `shard` puts trees with leading axes [B, G] on a ('data', 'group') mesh. At the
    first inner step pi_theta is pi_old, so every ratio is 1.
    """
    decide_fn = manager.make_decide_fn(graphdef)

    lam = config.beta1 / config.beta2 if config.beta2 else 0.0  # rate in nats a token (eq. 9)

    def update(state: ManagerState, batch: EncodedStream):
        items, task = pad_to_units(to_items(batch), config.block_size), make_task(batch)
        rng_key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        sample = functools.partial(
            rollout, items=items, init_state=memory.init(memory_config), decide_fn=decide_fn
        )
        traj = sample(
            state.params,
            rng_key,
            task_fn=task.reward,
            final_fn=task.final,
            num_generations=config.num_generations,
            block_size=config.block_size,
            credit=config.credit,
            shard=shard,
        )
        ref = sample(
            state.ref_params,
            jax.random.fold_in(rng_key, 1),
            task_fn=lambda states: jnp.zeros(states.clock.shape),
            num_generations=1,
            credit="trajectory",
        )
        seen = manager.item_features(items)[:, None]
        ref_logits = manager.logits_fn(graphdef, state.ref_params, seen, traj.context)
        ref_log_prob = _log_prob_of(ref_logits, traj.action)
        terms = rewards.terms(traj.task, traj.length, traj.log_prob, ref_log_prob, traj.valid)
        reward = rewards.weigh(terms, config.beta1, config.beta2)
        adv = advantages.advantages(
            reward, credit=config.credit, discount=config.discount, std=config.std
        )

        def loss_fn(params):
            logits = manager.logits_fn(graphdef, params, seen, traj.context)
            log_prob = _log_prob_of(logits, traj.action)
            total, denominator, metrics = losses.sib_grpo_loss(
                log_prob,
                traj.log_prob,
                adv.value,
                adv.weight,
                traj.valid,
                ratio=config.ratio,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
            )
            entropy = losses.policy_entropy(logits, traj.valid)
            metrics |= losses.reference_divergence(log_prob, ref_log_prob, traj.valid)
            metrics["policy_entropy"] = entropy
            loss = total / denominator - config.entropy_bonus * entropy
            return loss, metrics | {"loss": loss}

        def inner(carry, _):
            params, opt_state = carry
            grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
            metrics["grad_norm"] = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), metrics

        (params, opt_state), inner_metrics = jax.lax.scan(
            inner, (state.params, state.opt_state), length=config.inner_epochs
        )
        metrics = rollout_metrics(traj, terms, reward, adv, config)
        ref_from = manager.logits_fn(graphdef, state.params, seen, ref.context)
        gained = jnp.where(ref.valid, _log_prob_of(ref_from, ref.action) - ref.log_prob, 0.0)
        drawn = objective.Draws(terms.log_ratio.sum(-1), traj.tokens)
        if config.credit == "state":  # the memory at the end is the work of generation 0 alone
            drawn = objective.Draws(*(x[:, :1] for x in drawn))
        log_z, counts = objective.log_partition(
            drawn, objective.Draws(gained.sum(-1), ref.tokens), lam
        )
        final = dict(traj.final)
        log_prob_answer = final.pop("log_prob")
        asked = batch.question_valid.any(-1, keepdims=True)
        metrics |= final
        metrics["bound_relevance"] = objective.relevance_bound(
            log_prob_answer, task.entropy, jnp.broadcast_to(asked, log_prob_answer.shape)
        )
        metrics["bound_rate"] = objective.rate_bound(drawn, log_z, lam)
        metrics["bound_rate_ref"] = objective.rate_bound(drawn, jnp.asarray(0.0), 0.0)
        metrics["bound_rate_counts"] = counts
        metrics |= {name: x[-1] for name, x in inner_metrics.items()}
        metrics["ratio_first"] = jnp.maximum(
            inner_metrics["ratio_max"][0], 1.0 / inner_metrics["ratio_min"][0]
        )
        state = state.replace(params=params, opt_state=opt_state, step=state.step + 1)
        return state, metrics

    return update
