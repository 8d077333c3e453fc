"""Training and calibrating the reader q_phi(y | m) (eq. 6, 8: the bound is maximised over phi too).

The reader sees memories of random policies, of unlimited memory, and parts of them as top-down
retrieval would read them, so that it is calibrated on whatever a manager leaves behind.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from mmmem_jax import memory
from mmmem_jax.data.encoded import EncodedStream, QuestionBatch, to_items, to_questions
from mmmem_jax.memory.types import Item, MemoryConfig, MemoryState
from mmmem_jax.models import reader as reader_lib
from mmmem_jax.policies import manager, rules, varied
from mmmem_jax.retrieval.top_down import RetrievalConfig, best_slots, search


def unlimited_config(config: MemoryConfig, num_chunks: int) -> MemoryConfig:
    """A slot for every chunk, and for every entity that so many chunks are likely to bring."""
    return dataclasses.replace(
        config,
        sensory_slots=num_chunks,
        episodic_slots=num_chunks,
        schema_slots=max(config.schema_slots, min(64, num_chunks)),
    )


def varied_memories(rng_key: jax.Array, items: Item, config: MemoryConfig) -> MemoryState:
    """Memories [B] of a random policy each."""
    num_streams = items.valid.shape[0]
    keys = jax.random.split(rng_key, (2, num_streams))
    num_features = manager.item_features(jax.tree.map(lambda x: x[0, 0], items)).shape[0]
    policies = jax.vmap(lambda key: varied.draw(key, num_features))(keys[0])
    start = memory.init(config)

    def one(policy, key, stream):
        return memory.scan(policy, key, start, stream, decide_fn=varied.decide)[0]

    return jax.vmap(one)(policies, keys[1], items)


def full_memories(items: Item, config: MemoryConfig) -> MemoryState:
    """Memories [B] that hold every chunk."""
    start = memory.init(unlimited_config(config, items.valid.shape[1]))
    rule, key = rules.unlimited(), jax.random.key(0)

    def one(stream):
        return memory.scan(rule.params, key, start, stream, decide_fn=rule.decide_fn)[0]

    return jax.vmap(one)(items)


def _answer(model, state, questions: QuestionBatch, depth, flat, retrieval: RetrievalConfig):
    """Option logits of one memory, each question reading evidence of its own.

    That is the search to its `depth`, or its `flat` best slots of any level where that is not 0.
    """
    query, options = questions.query, questions.options
    evidence = search(state, query, options, retrieval)[0] <= depth[:, None]
    if flat is not None:
        best = best_slots(state, query, options, flat[:, None])
        evidence = jnp.where(flat[:, None] > 0, best, evidence)
    return model.answer(reader_lib.project(state), model.ask(query, options), evidence)


def make_loss_fn(
    graphdef,
    memory_config: MemoryConfig,
    retrieval: RetrievalConfig,
    num_unlimited: int,
    flat_share: float = 0.0,
):
    """loss_fn(params, rng_key, batch) -> (-E log q(y | m), metrics).

    The last `num_unlimited` streams of a batch are read from unlimited memories. Half the questions
    read the whole memory; of the others, `flat_share` read the best slots of any level, as flat
    retrieval would, and the rest what the search has read after some step.
    """
    num_steps = len(retrieval.step_levels)

    def draw_flat(rng_key, whole):
        keys = jax.random.split(rng_key)
        chosen = jax.random.bernoulli(keys[0], flat_share, whole.shape) & ~whole
        return jnp.where(
            chosen, jax.random.randint(keys[1], whole.shape, 1, retrieval.max_slots + 1), 0
        )

    def log_likelihood(params, rng_key, states, questions: QuestionBatch):
        model = nnx.merge(graphdef, params)
        shape = questions.answer.shape
        keys = jax.random.split(rng_key)
        whole = jax.random.bernoulli(keys[0], 0.5, shape)
        depth = jnp.where(whole, num_steps, jax.random.randint(keys[1], shape, 0, num_steps))
        flat = draw_flat(jax.random.fold_in(rng_key, 2), whole) if flat_share else None
        # Whole memory means every slot, also those the search would never reach.
        logits = jax.vmap(lambda s, q, d, f: _answer(model, s, q, d, f, retrieval))(
            states, questions, depth, flat
        )
        right = jnp.argmax(logits, -1) == questions.answer
        log_probs = jax.nn.log_softmax(logits)
        log_prob = jnp.take_along_axis(log_probs, questions.answer[..., None], -1)[..., 0]
        return jnp.where(questions.valid, log_prob, 0.0), right & whole, whole & questions.valid

    def loss_fn(params, rng_key, batch: EncodedStream):
        items, questions = to_items(batch), to_questions(batch)
        limited = slice(0, len(batch.valid) - num_unlimited)
        full = slice(limited.stop, None)
        keys = jax.random.split(rng_key, 3)

        def part(tree, where):
            return jax.tree.map(lambda x: x[where], tree)

        states = varied_memories(keys[0], part(items, limited), memory_config)
        outputs = [log_likelihood(params, keys[1], states, part(questions, limited))]
        if num_unlimited:
            states = full_memories(part(items, full), memory_config)
            outputs.append(log_likelihood(params, keys[2], states, part(questions, full)))
        log_prob, right, whole = (jnp.concatenate(x) for x in zip(*outputs, strict=True))
        loss = -log_prob.sum() / jnp.maximum(questions.valid.sum(), 1)

        def accuracy(where):
            return (right & whole)[where].sum() / jnp.maximum(whole[where].sum(), 1)

        metrics = {"loss": loss, "accuracy": accuracy(limited)}
        if num_unlimited:
            metrics["accuracy_unlimited"] = accuracy(full)
        return loss, metrics

    return loss_fn


def expected_calibration_error(
    log_probs: Float[np.ndarray, "N O"], right: np.ndarray, num_bins: int = 15
) -> float:
    """ECE (Guo et al., arXiv 1706.04599): mean gap of confidence and accuracy over equal bins."""
    confidence = np.exp(log_probs.max(-1))
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    gaps = [
        np.abs(np.sum(confidence[bins == b]) - np.sum(right[bins == b])) for b in range(num_bins)
    ]
    return float(np.sum(gaps) / max(len(right), 1))


def fit_temperature(
    logits: Float[Array, "N O"], answer: Array, *, num_steps: int = 200
) -> Float[Array, ""]:
    """log temperature that maximises the likelihood of held-out answers (temperature scaling).

    0, a temperature of 1, where there are none.
    """
    if not len(answer):
        return jnp.zeros(())
    optimizer = optax.adam(0.05)

    def loss_fn(log_temperature):
        return optax.softmax_cross_entropy_with_integer_labels(
            logits * jnp.exp(-log_temperature), answer
        ).mean()

    def body(carry, _):
        value, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(value), opt_state)
        return (optax.apply_updates(value, updates), opt_state), None

    start = jnp.zeros(())
    (value, _), _ = jax.lax.scan(body, (start, optimizer.init(start)), length=num_steps)
    return value


def calibrate(
    graphdef, params: nnx.State, rng_key, streams: EncodedStream, memory_config: MemoryConfig
) -> tuple[nnx.State, dict[str, float]]:
    """Sets the reader's temperature on one half of held-out memories, reports ECE on the other."""
    items, questions = to_items(streams), to_questions(streams)
    model = nnx.merge(graphdef, params)

    @jax.jit
    def logits_of(items, questions):
        states = varied_memories(rng_key, items, memory_config)
        asked = jax.vmap(model.ask)(questions.query, questions.options)
        return jax.vmap(lambda s, a: model.answer(reader_lib.project(s), a))(states, asked)

    logits = logits_of(items, questions)
    half = len(logits) // 2
    valid = np.asarray(questions.valid)
    fit_part, test_part = (slice(0, half), slice(half, None))
    log_temperature = fit_temperature(
        logits[fit_part][valid[fit_part]], questions.answer[fit_part][valid[fit_part]]
    )
    held_out = np.asarray(logits[test_part])[valid[test_part]]
    right = held_out.argmax(-1) == np.asarray(questions.answer[test_part])[valid[test_part]]

    def ece(scale):
        return expected_calibration_error(np.asarray(jax.nn.log_softmax(held_out * scale)), right)

    report = {"ece_before": ece(1.0), "ece": ece(float(jnp.exp(-log_temperature)))}
    model.log_temperature[...] += log_temperature
    return nnx.state(model, nnx.Param), report | {"temperature": float(jnp.exp(log_temperature))}
