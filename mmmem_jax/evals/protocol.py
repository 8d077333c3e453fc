"""The evaluation protocol: every policy on the same streams, questions, reader and budget."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmmem_jax import memory
from mmmem_jax.data.encoded import EncodedStream, to_items, to_questions
from mmmem_jax.data.worlds import FAMILIES, FAMILY_LEVEL, SECONDS_PER_DAY
from mmmem_jax.memory.types import LEVELS, Item, MemoryConfig, MemoryState, StepOutput
from mmmem_jax.models import reader as reader_lib
from mmmem_jax.models.reader import Reader
from mmmem_jax.policies import manager, rules
from mmmem_jax.retrieval.top_down import RetrievalConfig, flat, top_down
from mmmem_jax.sib.rollout import episodic_tokens
from mmmem_jax.train import reader_phase


class Policy(NamedTuple):
    """A policy under its name, with the memory it runs on."""

    name: str
    decide_fn: Callable
    params: object
    config: MemoryConfig


class Records(NamedTuple):
    """What a policy's memories [S streams] answered to M questions each; NumPy arrays."""

    log_probs: np.ndarray  # [S, M, O] whole memory
    top_down_log_probs: np.ndarray  # [S, M, O]
    flat_log_probs: np.ndarray  # [S, M, O]
    answer_entropy: np.ndarray  # [S, M, steps]
    stop_step: np.ndarray  # [S, M]
    stop_level: np.ndarray  # [S, M] 0 schema, 1 episodic, 2 sensory
    tokens_read: np.ndarray  # [S, M] by top-down
    flat_tokens_read: np.ndarray  # [S, M]
    slots: np.ndarray  # [S]
    tokens: np.ndarray  # [S] text tokens the episodic stream holds, |m| of eq. 9 and 10
    tokens_all_levels: np.ndarray  # [S] text tokens the three levels hold
    source_tokens: np.ndarray  # [S] text tokens of the stream


@functools.partial(jax.jit, static_argnames=("decide_fn", "config"))
def build(params, rng_key, items: Item, *, decide_fn, config) -> tuple[MemoryState, StepOutput]:
    """Memories [S] of whole streams [S, T] under one policy."""
    start = memory.init(config)
    keys = jax.random.split(rng_key, items.valid.shape[0])

    def one(key, stream):
        return memory.scan(params, key, start, stream, decide_fn=decide_fn)

    return jax.vmap(one)(keys, items)


@functools.partial(jax.jit, static_argnames=("graphdef", "retrieval"))
def answer(graphdef, params, states: MemoryState, questions, *, retrieval: RetrievalConfig):
    """Whole-memory, top-down and flat answers of memories [S] to questions [S, M]."""
    model = nnx.merge(graphdef, params)

    def one(state, q):
        slots, asked = reader_lib.project(state), model.ask(q.query, q.options)
        answer_fn = functools.partial(model.answer, slots, asked)
        whole = jax.nn.log_softmax(answer_fn())
        found = top_down(state, q.query, q.options, answer_fn=answer_fn, config=retrieval)
        flat_log_probs, _, flat_tokens = flat(
            state, q.query, q.options, answer_fn=answer_fn, config=retrieval
        )
        return whole, found, flat_log_probs, flat_tokens

    return jax.vmap(one)(states, questions)


def evaluate(
    policy: Policy,
    reader: Reader,
    streams: EncodedStream,
    *,
    retrieval: RetrievalConfig,
    batch_size: int,
    seed: int = 0,
) -> Records:
    """Runs a policy over streams [S, T] and asks all their questions at the end of each."""
    graphdef, params = nnx.split(reader)
    parts = []
    for start in range(0, len(streams.valid), batch_size):
        batch = jax.tree.map(lambda x, i=start: x[i : i + batch_size], streams)
        items, questions = to_items(batch), to_questions(batch)
        key = jax.random.fold_in(jax.random.key(seed), start)
        states, _ = build(
            policy.params, key, items, decide_fn=policy.decide_fn, config=policy.config
        )
        # Rules differ in update constants only, which no answer depends on: one program serves all.
        states = states.replace(config=_shape_only(policy.config))
        whole, found, flat_log_probs, flat_tokens = answer(
            graphdef, params, states, questions, retrieval=retrieval
        )
        parts.append(
            Records(
                log_probs=whole,
                top_down_log_probs=found.log_probs,
                flat_log_probs=flat_log_probs,
                answer_entropy=found.answer_entropy,
                stop_step=found.stop_step,
                stop_level=found.stop_level,
                tokens_read=found.tokens_read,
                flat_tokens_read=flat_tokens,
                slots=states.episodic.valid.sum(-1),
                tokens=episodic_tokens(states),
                tokens_all_levels=states.tokens,
                source_tokens=jnp.where(items.valid, items.tokens, 0).sum(-1),
            )
        )
    return Records(*(np.concatenate(x) for x in zip(*jax.device_get(parts), strict=True)))


def _shape_only(config: MemoryConfig) -> MemoryConfig:
    """The capacities of a configuration with default constants."""
    names = ("sensory_slots", "episodic_slots", "schema_slots", "num_prototypes", "num_relations")
    return MemoryConfig(dim=config.dim, **{name: getattr(config, name) for name in names})


def accuracy_and_error(right: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """Accuracy over valid questions [S, M] and its standard error, clustered by stream."""
    n = int(valid.sum())
    if not n:
        return {"accuracy": None, "se": None, "n": 0}
    mean = float(right[valid].mean())
    residual = np.where(valid, right - mean, 0.0).sum(1)
    clusters = max(int(valid.any(1).sum()), 1)
    correction = clusters / max(clusters - 1, 1)
    se = float(np.sqrt(correction * np.sum(residual**2)) / n)
    return {"accuracy": mean, "se": se, "n": n}


def evidence_age(streams: EncodedStream) -> np.ndarray:
    """Days from the newest evidence of each question to its query time, [S, M]; NaN without."""
    newest = streams.evidence.max(-1)
    ends = np.pad(streams.span[..., 1], ((0, 0), (0, 1)))  # an empty stream has none to look up
    end = np.take_along_axis(ends, np.maximum(newest, 0), axis=1)
    return np.where(newest >= 0, (streams.query_time - end) / SECONDS_PER_DAY, np.nan)


def _level_shares(stop_level: np.ndarray) -> dict[str, float]:
    return {name: float(np.mean(stop_level == i)) for i, name in enumerate(LEVELS)}


def summarise(name: str, records: Records, streams: EncodedStream) -> dict:
    """The policy's entry of results.json."""
    valid = streams.question_valid
    right = records.log_probs.argmax(-1) == streams.answer
    of_answer = np.take_along_axis(records.log_probs, streams.answer[..., None], -1)[..., 0]
    families = {f: valid & (streams.family == i) for i, f in enumerate(FAMILIES)}
    age = evidence_age(streams)
    edges = np.linspace(0.0, max(np.nanmax(age, initial=0.0), 1e-6), 5)
    total = accuracy_and_error(right, valid)

    def accuracy_of(log_probs):
        return accuracy_and_error(log_probs.argmax(-1) == streams.answer, valid)["accuracy"]

    return {
        "name": name,
        "accuracy": total["accuracy"],
        "se": total["se"],
        "probability": float(np.exp(of_answer[valid]).mean()) if valid.any() else None,
        "ece": reader_phase.expected_calibration_error(records.log_probs[valid], right[valid])
        if valid.any()
        else None,
        "slots": float(records.slots.mean()),
        "tokens": float(records.tokens.mean()),
        "tokens_all_levels": float(records.tokens_all_levels.mean()),
        "compression": float(records.tokens.sum() / max(records.source_tokens.sum(), 1)),
        "accuracy_top_down": accuracy_of(records.top_down_log_probs),
        "tokens_read": float(records.tokens_read[valid].mean()) if valid.any() else None,
        "accuracy_flat": accuracy_of(records.flat_log_probs),
        "flat_tokens_read": float(records.flat_tokens_read[valid].mean()) if valid.any() else None,
        "by_family": [
            {
                "family": f,
                "level": LEVELS[FAMILY_LEVEL[i]],
                **accuracy_and_error(right, families[f]),
            }
            for i, f in enumerate(FAMILIES)
        ],
        "by_age": [
            {"lo": float(lo), "hi": float(hi)}
            | accuracy_and_error(right, valid & (age >= lo) & ((age < hi) | (hi == edges[-1])))
            for lo, hi in zip(edges[:-1], edges[1:], strict=True)
        ],
        "stop_levels": _level_shares(records.stop_level[valid]) if valid.any() else {},
        "stops_by_family": {
            f: _level_shares(records.stop_level[here]) for f, here in families.items() if here.any()
        },
    }


def learned_policy(model: manager.Manager, config: MemoryConfig) -> Policy:
    """The manager, taking its likeliest action."""
    graphdef, params = nnx.split(model)
    return Policy("learned", manager.make_decide_fn(graphdef, temperature=0.0), params, config)


def rule_policy(rule: rules.Rule, config: MemoryConfig) -> Policy:
    """A fixed rule on the shared memory configuration."""
    return Policy(rule.name, rule.decide_fn, rule.params, rule.configure(config))


def unlimited_policy(config: MemoryConfig, num_chunks: int) -> Policy:
    """Every chunk kept."""
    rule = rules.unlimited()
    return Policy(
        rule.name, rule.decide_fn, rule.params, reader_phase.unlimited_config(config, num_chunks)
    )


SIMILARITIES = (0.3, 0.5, 0.7, 0.9)
CHANGES = (0.3, 0.6, 0.9)
HALF_LIVES = (SECONDS_PER_DAY / 2, SECONDS_PER_DAY * 2)


def tune_rules(score: Callable[[rules.Rule], float]) -> dict[str, float]:
    """Constants of the fixed rules that score best; give it a score on training streams."""

    def best(make, grid):
        return max(grid, key=lambda value: score(make(value)))

    similarity = best(rules.similarity_merge, SIMILARITIES)
    return {
        "similarity": similarity,
        "surprise_change": best(rules.surprise, CHANGES),
        "half_life": best(lambda h: rules.forgetting_curve(h, similarity), HALF_LIVES),
    }


def with_slots(config: MemoryConfig, slots: int) -> MemoryConfig:
    """The same memory with another number of slots at every level."""
    return dataclasses.replace(
        config, sensory_slots=slots, episodic_slots=slots, schema_slots=slots
    )
