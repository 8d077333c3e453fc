"""Entropy-driven top-down retrieval (Section 3.3, eq. 12, 13).

Evidence accumulates over steps: schema, then episodes, then sensory items. After each step the
answer entropy H_s is read; the search stops when H_s <= gamma, or when it fell by less than
epsilon for `patience` steps in a row. Answer entropy is over options, retrieval entropy over slots.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from mmmem_jax.kernels.retrieval_entropy import partial as parts
from mmmem_jax.memory.types import MemoryState
from mmmem_jax.retrieval import evidence as ev


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """top_k slots a step and steps a level, in reading order schema, episodic, sensory."""

    top_k: tuple[int, int, int] = (5, 2, 1)
    rounds: tuple[int, int, int] = (1, 4, 3)
    confidence: float = 0.8
    epsilon: float = 0.01
    patience: int = 5
    temperature: float = 0.1
    link_bonus: float = 0.1  # lifts what hangs under evidence read: grounded episodes, their items
    visual_tokens: tuple[int, int] = (4, 16)  # a coarse view, a full view: 4 x 4 pixel patches

    def __post_init__(self):
        if not 0.0 < self.confidence <= 1.0:
            raise ValueError(f"RetrievalConfig.confidence is in (0, 1], got {self.confidence}")
        if min(self.top_k) < 1 or min(self.rounds) < 0 or not sum(self.rounds):
            raise ValueError("RetrievalConfig needs top_k >= 1 and at least one round")
        if self.patience < 1:
            raise ValueError(f"RetrievalConfig.patience is at least 1, got {self.patience}")

    @property
    def step_levels(self) -> tuple[int, ...]:
        """Level read at each of the S steps."""
        return tuple(level for level in range(3) for _ in range(self.rounds[level]))

    @property
    def max_slots(self) -> int:
        """Slots that a search to its last step reads at most."""
        return sum(k * r for k, r in zip(self.top_k, self.rounds, strict=True))


@struct.dataclass
class RetrievalOutput:
    """The answer and the whole trace of the search, per question."""

    log_probs: jax.Array  # [Q, O] at the stop
    answer_entropy: jax.Array  # [Q, S] nats, after each step
    retrieval_entropy: jax.Array  # [Q, 3] nats, over the slots of each level
    entered: jax.Array  # [Q, N] int32, step at which a slot became evidence, S if it never would
    stop_step: jax.Array  # [Q] int32 in 0 .. S-1
    stop_level: jax.Array  # [Q] int32, SCHEMA / EPISODIC / SENSORY
    tokens_read: jax.Array  # [Q] int32, of the evidence up to the stop


def confidence_to_gamma(confidence: float, num_options: int) -> float:
    """Entropy in nats of (c, (1 - c) / (O - 1), ...): c = 0.8 gives 0.720 for 4 options.

    Raises:
      ValueError: if there are fewer than two options, or the confidence is over 1 or under that of
        a guess, 1 / O, below which the entropy would fall again.
    """
    if num_options < 2 or not 1.0 / num_options <= confidence <= 1.0:
        raise ValueError(
            "need 2 or more options and a confidence from 1 / options to 1, "
            f"got options, confidence: {num_options}, {confidence}"
        )
    rest = 1.0 - confidence
    spread = rest * np.log(rest / (num_options - 1)) if rest else 0.0
    return float(-(confidence * np.log(confidence) + spread))


def entropy(log_probs: Float[Array, "... O"]) -> Float[Array, "..."]:
    """H = -sum p log p in nats (eq. 13)."""
    return -jnp.sum(jnp.exp(log_probs) * jnp.where(log_probs > -1e9, log_probs, 0.0), axis=-1)


def _rank(scores, candidates):
    """Rank of every slot by falling score, `candidates` before all others. [Q, N]."""
    order = jnp.argsort(jnp.where(candidates, -scores, jnp.inf), axis=-1)
    return jnp.argsort(order, axis=-1)


def search(
    state: MemoryState,
    query: Float[Array, "Q D"],
    options: Float[Array, "Q O D"],
    config: RetrievalConfig,
) -> tuple[jax.Array, jax.Array]:
    """The order in which slots become evidence, before any answer is read.

    Returns:
      entered: int32 [Q, N], step at which each slot becomes evidence, S where it never does.
      retrieval_entropy: float32 [Q, 3] in nats, over the valid slots of each level.
    """
    return order(state, ev.slot_similarity(state, query, options), config)


def order(
    state: MemoryState, scores: Float[Array, "Q N"], config: RetrievalConfig
) -> tuple[jax.Array, jax.Array]:
    """What `search` returns, for any score of the slots; what hangs under evidence is lifted."""
    n1, n2 = state.sensory.valid.shape[0], state.episodic.valid.shape[0]
    valid, level = ev.slot_valid(state), ev.slot_levels(state)
    grounding, holds = ev.links(state)
    num_steps = len(config.step_levels)
    entered = jnp.full(scores.shape, num_steps, jnp.int32)
    first, entropies = 0, []
    for lv in range(3):
        if lv == ev.EPISODIC:
            read = (entered[:, n1 + n2 :] < num_steps).astype(jnp.float32)
            linked = (read @ grounding.astype(jnp.float32)) > 0
            scores = scores.at[:, n1 : n1 + n2].add(config.link_bonus * linked)
        elif lv == ev.SENSORY:
            read = (entered[:, n1 : n1 + n2] < num_steps).astype(jnp.float32)
            linked = (read @ holds.astype(jnp.float32)) > 0
            scores = scores.at[:, :n1].add(config.link_bonus * linked)
        candidates = jnp.broadcast_to(valid & (level == lv), scores.shape)
        logits = jnp.where(candidates, scores / config.temperature, -jnp.inf)
        entropies.append(parts.log_z_and_entropy(*parts.triple(logits))[1])
        k, rounds = config.top_k[lv], config.rounds[lv]
        rank = _rank(scores, candidates)
        entered = jnp.where(candidates & (rank < k * rounds), first + rank // k, entered)
        first += rounds
    return entered.astype(jnp.int32), jnp.stack(entropies, axis=-1)


AnswerFn = Callable[[Bool[Array, "Q N"]], Float[Array, "Q O"]]


def next_stall(stalled, drop, read, config: RetrievalConfig):
    """Steps in a row that lowered the entropy by less than epsilon, after one more.

    A step that found nothing to read neither stalls nor ends a stall.

    Args:
      stalled: int32, so far.
      drop: float32, H_{s-1} - H_s in nats.
      read: bool, whether the step read something.
      config: epsilon.
    """
    return jnp.where(read, jnp.where(drop < config.epsilon, stalled + 1, 0), stalled)


def may_stop(answer_entropy, stalled, gamma, config: RetrievalConfig):
    """Whether a search may stop at this entropy (nats), after `stalled` steps without a drop."""
    return (answer_entropy <= gamma) | (stalled >= config.patience)


def _stop_step(answer_entropy, entered, gamma, config: RetrievalConfig):
    """First step at which the search may stop, the last one if none. [Q]."""
    num_steps = answer_entropy.shape[-1]
    stalled = jnp.zeros(answer_entropy.shape[0], jnp.int32)
    stops = [may_stop(answer_entropy[:, 0], stalled, gamma, config)]
    for s in range(1, num_steps):
        drop = answer_entropy[:, s - 1] - answer_entropy[:, s]
        stalled = next_stall(stalled, drop, jnp.any(entered == s, axis=-1), config)
        stops.append(may_stop(answer_entropy[:, s], stalled, gamma, config))
    stop = jnp.stack(stops, axis=1)
    return jnp.where(jnp.any(stop, 1), jnp.argmax(stop, 1), num_steps - 1).astype(jnp.int32)


def top_down(
    state: MemoryState,
    query: Float[Array, "Q D"],
    options: Float[Array, "Q O D"],
    *,
    answer_fn: AnswerFn,
    config: RetrievalConfig,
) -> RetrievalOutput:
    """Answers Q questions of one memory, drilling down only while the answer is uncertain.

    Args:
      state: the memory, without batch axes.
      query: float32 [Q, D], question embeddings.
      options: float32 [Q, O, D], option embeddings.
      answer_fn: option logits [Q, O] from an evidence mask bool [Q, N].
      config: what is read at each step, and when to stop.
    """
    found = search(state, query, options, config)
    gamma = confidence_to_gamma(config.confidence, options.shape[1])
    return drill_down(state, found, answer_fn=answer_fn, gamma=gamma, config=config)


def drill_down(
    state: MemoryState,
    found: tuple[Int[Array, "Q N"], Float[Array, "Q 3"]],
    *,
    answer_fn: AnswerFn,
    gamma: Float[Array, "Q"] | float,
    config: RetrievalConfig,
) -> RetrievalOutput:
    """Answers after each step and stops once the entropy is `gamma` nats or less, or stalls.

    Args:
      state: the memory, without batch axes.
      found: `entered` and `retrieval_entropy` as `search` or `order` give them.
      answer_fn: option logits [Q, O] from an evidence mask bool [Q, N].
      gamma: answer entropy at which the search stops, nats.
      config: what is read at each step, and when a stall ends the search.
    """
    entered, retrieval_entropy = found
    levels = jnp.array(config.step_levels)

    def answer(step):
        return jax.nn.log_softmax(answer_fn(entered <= step), axis=-1)

    log_probs = jax.lax.map(answer, jnp.arange(len(levels))).swapaxes(0, 1)  # [Q, S, O]
    answer_entropy = entropy(log_probs)
    stop = _stop_step(answer_entropy, entered, gamma, config)
    tokens = ev.slot_tokens(state, config.visual_tokens)
    return RetrievalOutput(
        log_probs=jnp.take_along_axis(log_probs, stop[:, None, None], axis=1)[:, 0],
        answer_entropy=answer_entropy,
        retrieval_entropy=retrieval_entropy,
        entered=entered,
        stop_step=stop,
        stop_level=levels[stop],
        tokens_read=jnp.sum(jnp.where(entered <= stop[:, None], tokens, 0), axis=-1),
    )


def best_slots(
    state: MemoryState,
    query: Float[Array, "Q D"],
    options: Float[Array, "Q O D"],
    number: Int[Array, "Q 1"] | int,
) -> Bool[Array, "Q N"]:
    """Evidence mask of the `number` slots that fit best, whatever their level."""
    scores = ev.slot_similarity(state, query, options)
    candidates = jnp.broadcast_to(ev.slot_valid(state), scores.shape)
    return candidates & (_rank(scores, candidates) < number)


def flat(
    state: MemoryState,
    query: Float[Array, "Q D"],
    options: Float[Array, "Q O D"],
    *,
    answer_fn: AnswerFn,
    config: RetrievalConfig,
) -> tuple[Float[Array, "Q O"], Bool[Array, "Q N"], jax.Array]:
    """One-shot retrieval over all levels: as many slots as top-down may read, no early stop.

    Returns log-probabilities [Q, O], the evidence mask [Q, N] and the tokens read [Q].
    """
    evidence = best_slots(state, query, options, config.max_slots)
    tokens = jnp.sum(jnp.where(evidence, ev.slot_tokens(state, config.visual_tokens), 0), -1)
    return jax.nn.log_softmax(answer_fn(evidence)), evidence, tokens
