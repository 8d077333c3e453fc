"""One SIB-GRPO update: rollouts from pi_old, the reward of eq. 10, a few clipped inner steps."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array

from mmmem_jax import memory
from mmmem_jax.data.encoded import EncodedStream, QuestionBatch, to_items, to_questions
from mmmem_jax.memory.types import ADD_NEW, DISCARD, MERGE, MemoryConfig, MemoryState
from mmmem_jax.models import reader as reader_lib
from mmmem_jax.policies import manager
from mmmem_jax.sib import advantages, losses, rewards
from mmmem_jax.sib.rollout import rollout


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
    step: jax.Array  # [] int32


def init_state(model: manager.Manager, optimizer: optax.GradientTransformation) -> ManagerState:
    """State of an untrained manager; the reference policy is where it starts from."""
    params = nnx.state(model, nnx.Param)
    return ManagerState(
        params=params,
        ref_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        step=jnp.asarray(0, jnp.int32),
    )


def make_task_fn(reader_graphdef, reader_params, questions: QuestionBatch, config, memory_config):
    """R of eq. 10 for memories [B, G]; the questions are embedded once for all of them."""
    model = nnx.merge(reader_graphdef, reader_params)
    asked = jax.vmap(model.ask)(questions.query, questions.options)
    empty = reader_lib.project(memory.init(memory_config))
    without = jax.vmap(lambda a: jax.nn.log_softmax(model.answer(empty, a)))(asked)

    def one(state: MemoryState, a, q: QuestionBatch, log_probs_without):
        log_probs = jax.nn.log_softmax(model.answer(reader_lib.project(state), a))
        return rewards.task_reward(log_probs, q.answer, q.valid, config.task, log_probs_without)

    over_group = jax.vmap(one, in_axes=(0, None, None, None))
    over_batch = jax.vmap(over_group)
    return lambda states: over_batch(states, asked, questions, without)


def _log_prob_of(logits, action):
    log_probs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]


def _share(action, valid, kind):
    hits = jnp.where(valid, action == kind, False).sum()
    return hits / jnp.maximum((valid & jnp.ones_like(action, bool)).sum(), 1)


def _rollout_metrics(traj, terms, reward, adv, config: SibConfig) -> dict[str, Array]:
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
    reader_graphdef,
    optimizer: optax.GradientTransformation,
    memory_config: MemoryConfig,
    config: SibConfig,
    *,
    shard: Callable = lambda x: x,
):
    """The update as a pure function: (state, reader_params, rng_key, batch) -> (state, metrics).

    `shard` puts trees with leading axes [B, G] on a ('data', 'group') mesh. At the first inner
    step pi_theta is pi_old, so every ratio is 1.
    """
    decide_fn = manager.make_decide_fn(graphdef)

    def update(state: ManagerState, reader_params, rng_key, batch: EncodedStream):
        items, questions = to_items(batch), to_questions(batch)
        task_fn = make_task_fn(reader_graphdef, reader_params, questions, config, memory_config)
        traj = rollout(
            state.params,
            jax.random.fold_in(rng_key, state.step),
            items,
            init_state=memory.init(memory_config),
            decide_fn=decide_fn,
            task_fn=task_fn,
            num_generations=config.num_generations,
            block_size=config.block_size,
            credit=config.credit,
            shard=shard,
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
            to_ref = jnp.where(traj.valid, ref_log_prob - log_prob, 0.0)
            count = jnp.maximum((traj.valid & jnp.ones_like(to_ref, bool)).sum(), 1)
            metrics |= {
                "policy_entropy": entropy,
                "kl_ref_k1": -to_ref.sum() / count,
                "kl_ref_k3": jnp.where(traj.valid, jnp.expm1(to_ref) - to_ref, 0.0).sum() / count,
            }
            loss = total / denominator - config.entropy_bonus * entropy
            return loss, metrics | {"loss": loss}

        def inner(carry, _):
            params, opt_state = carry
            grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
            metrics["grad_norm"] = optax.global_norm(grads)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), metrics

        (params, opt_state), inner_metrics = jax.lax.scan(
            inner, (state.params, state.opt_state), length=config.inner_epochs
        )
        metrics = _rollout_metrics(traj, terms, reward, adv, config)
        metrics |= {name: x[-1] for name, x in inner_metrics.items()}
        metrics["ratio_first"] = jnp.maximum(
            inner_metrics["ratio_max"][0], 1.0 / inner_metrics["ratio_min"][0]
        )
        state = state.replace(params=params, opt_state=opt_state, step=state.step + 1)
        return state, metrics

    return update
