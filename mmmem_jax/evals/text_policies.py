"""What is compared on timed text: the manager as a ranking, and every fixed rule, tuned.

A policy depends on the stream it reads, since its budget does: a maker takes a Text and gives a
Policy.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from mmmem_jax.data.text_streams import Asked, evidence_rows
from mmmem_jax.evals.protocol import Policy
from mmmem_jax.evals.text_protocol import Text, rate, run_policy
from mmmem_jax.memory.types import (
    ADD_NEW,
    DISCARD,
    MERGE,
    Item,
    ManagerOutput,
    MemoryConfig,
    MemoryState,
)
from mmmem_jax.policies import manager, rules, text_rules
from mmmem_jax.train import text_job

LOG = logging.getLogger("mmmem_jax")
HOUR = 3600.0
HALF_LIVES = (HOUR, 2 * HOUR, 4 * HOUR, 8 * HOUR, 16 * HOUR, 1e9)  # s
SIMILARITIES = (0.3, 0.5, 0.7, 0.9)
CHANGES = (0.3, 0.6, 0.9)
_NEUTRAL = np.zeros(manager.NUM_CONTEXT, np.float32)
_TUNED_ON = 600  # questions of the training stream that constants are tuned on


def decide_ranked(graphdef, params, rng_key, state: MemoryState, item: Item) -> ManagerOutput:
    """The manager as a ranking of rows: nothing is discarded before the budget asks for it.

    Rows that met different memories must compare, so each is read beside a neutral context.
    `params` are the manager's, the spread of its margins and a half life (s): strengths fade by one
    spread in a half life, as in the forgetting curve.
    """
    network, spread, half_life = params
    logits = manager.logits_fn(graphdef, network, manager.item_features(item), _NEUTRAL)
    action = jnp.where(
        logits[MERGE] > jnp.maximum(logits[ADD_NEW], logits[DISCARD]), MERGE, ADD_NEW
    )
    return ManagerOutput(
        logits=logits,
        action=action.astype(jnp.int32),
        log_prob=jax.nn.log_softmax(logits)[action],
        strength=(logits[ADD_NEW] - logits[DISCARD]) / spread + item.span[1] / half_life,
        context=_NEUTRAL,
    )


def margin_spread(model: manager.Manager, items: Item) -> float:
    """Standard deviation of the margins over a stream's rows."""

    @jax.jit
    def margins(items):
        logits = model(manager.item_features(items), _NEUTRAL)
        return logits[:, ADD_NEW] - logits[:, DISCARD]

    values = np.asarray(margins(items))[np.asarray(items.valid)]
    return max(float(values.std()), 1e-6)


class Setting(NamedTuple):
    """What all policies share at one budget."""

    config: ConfigDict
    share: float

    def memory(self, text: Text) -> MemoryConfig:
        """The memory of a stream: a share of its tokens, with slots enough for them."""
        budget = max(1, int(self.share * int(text.stream.tokens.sum())))
        budget = min(budget, int(text.stream.tokens.sum()))
        slots = max(8, -(-budget // self.config.eval.tokens_per_slot))
        return text_job.memory_config(self.config, slots, budget)


def learned(setting: Setting, model: manager.Manager, spread: float, half_life: float):
    """text -> Policy of the manager."""
    graphdef, params = nnx.split(model)
    decide_fn = _decide_fn(graphdef)
    values = (params, jnp.float32(spread), jnp.float32(half_life))
    return lambda text: Policy("learned", decide_fn, values, setting.memory(text))


def tuned_managers(setting: Setting, models: Sequence[manager.Manager], texts: Sequence[Text]):
    """The managers (one a seed) as makers of policies; the half life is tuned for the first."""
    train = [text for text in texts if text.stream.split == "train"][-1]
    makers = [
        functools.partial(learned, setting, model, margin_spread(model, train.items))
        for model in models
    ]
    half_life = tune(texts, makers[0], HALF_LIVES, setting.config.eval.top_k)
    LOG.info("share %.4g: learned fades in %.3g h", setting.share, half_life / HOUR)
    return [make(half_life) for make in makers]


@functools.cache
def _decide_fn(graphdef):
    """One function a network, so that its compiled programs are found again."""
    return functools.partial(decide_ranked, graphdef)


def rule(setting: Setting, make: Callable[[Text], rules.Rule]):
    """text -> Policy of a general rule."""

    def policy(text: Text) -> Policy:
        made = make(text)
        config = made.configure(setting.memory(text))
        return Policy(made.name, made.decide_fn, made.params, config)

    return policy


def text_rule(setting: Setting, named: tuple[str, dict]):
    """text -> Policy of a rule for text."""
    name, params = named
    return lambda text: Policy(name, text_rules.decide, params, setting.memory(text))


def unlimited(config: ConfigDict):
    """text -> Policy that keeps every row."""
    made = rules.unlimited()

    def policy(text: Text) -> Policy:
        size = text_job.memory_config(config, len(text.items.valid), None)
        return Policy(made.name, made.decide_fn, made.params, size)

    return policy


def oracle_askable(setting: Setting):
    """text -> Policy that keeps random rows of those a question could be made from.

    It knows which rows are askable, not which will be asked about: no upper bound.
    """

    def policy(text: Text) -> Policy:
        chance = np.random.default_rng(0).random(len(text.items.valid))
        strengths = np.zeros(len(chance), np.float32)
        strengths[: len(text.stream.askable)] = text.stream.askable
        params = jnp.asarray(strengths + chance, jnp.float32)
        return Policy("oracle_askable", text_rules.decide_oracle, params, setting.memory(text))

    return policy


def _every(asked: Asked, number: int) -> Asked:
    """About `number` of the questions, evenly spaced in time."""
    step = max(1, len(asked.questions) // number)
    return Asked(asked.questions[::step], asked.query[::step], asked.options[::step])


def tuning_text(texts: Sequence[Text]) -> Text | None:
    """The last training stream that has a made question with evidence; None if none has."""
    for text in reversed(texts):
        stream = text.stream
        if stream.split == "train" and any(
            len(evidence_rows(stream.span, question)) for question in stream.made.questions
        ):
            return text
    return None


def tune(texts: Sequence[Text], make: Callable, grid: Sequence[float], top_k: int):
    """The value of `grid` under which `tuning_text`'s questions find most evidence.

    The first of equals, and where there is no such stream.
    """
    last = tuning_text(texts)
    if last is None:
        return grid[0]
    thinned = last._replace(stream=last.stream._replace(made=_every(last.stream.made, _TUNED_ON)))

    def recall(value):
        found = run_policy(make(value), [thinned], ("train",), top_k=top_k, labelled=False)["train"]
        return rate(found.made.hit, found.made.has_evidence)["mean"] or 0.0

    return max(grid, key=recall)


def fixed_rules(setting: Setting, texts: Sequence[Text]) -> dict[str, Callable]:
    """Every rule by name, constants tuned at this budget on `tuning_text`."""
    config, share = setting.config, setting.share
    best = functools.partial(tune, texts, top_k=config.eval.top_k)
    general, worded = functools.partial(rule, setting), functools.partial(text_rule, setting)

    def merge(value):
        return general(lambda _: rules.similarity_merge(value))

    similarity = best(merge, SIMILARITIES)

    def segments(value):
        return general(lambda _: rules.surprise(value))

    def fading(value):
        return general(lambda _: rules.forgetting_curve(value, similarity))

    def idf_fading(value):
        return worded(text_rules.idf_forgetting(value))

    def clustered(text):
        policy = general(lambda _: rules.kmeans())(text)
        slots = max(2, policy.config.token_budget // config.eval.tokens_per_cluster)
        return policy._replace(config=dataclasses.replace(policy.config, episodic_slots=slots))

    def spaced(text):
        num_rows = len(text.stream.tokens)
        return rules.uniform(num_rows, max(1, round(share * num_rows)))

    return {
        "keep_recent": general(lambda _: rules.keep_recent()),
        "uniform": general(spaced),
        "reservoir": general(lambda _: rules.reservoir()),
        "similarity_merge": merge(similarity),
        "surprise": segments(best(segments, CHANGES)),
        "kmeans": clustered,
        "forgetting_curve": fading(best(fading, HALF_LIVES)),
        "highest_idf": worded(text_rules.highest_idf()),
        "idf_forgetting": idf_fading(best(idf_fading, HALF_LIVES)),
        "transcripts_only": worded(text_rules.transcripts_only()),
    }
