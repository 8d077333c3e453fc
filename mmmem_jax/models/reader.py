"""The reader q_phi(y | m): option logits of questions from the slots of a memory (eq. 6).

Every (question, option) pair is matched with every slot of the three levels: how well the slot's
vectors fit the question, the option, and both at once, next to the slot's time, size and level.
Softmax heads look at the slots that fit best, counting heads add up all that fit; how the match
features are weighed depends on the question. The readings feed a small network that gives a logit.
What depends on the memory (`project`) is apart from what depends on the question (`ask`), so
neither is computed again when the other changes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from mmmem_jax.memory.types import MemoryState

NUM_BANKS = 3
NUM_MATCH = 3 * NUM_BANKS  # question, option, and their product, per bank
NUM_SLOT = 7
NUM_FEATURES = NUM_MATCH + NUM_SLOT
NUM_LEVELS = 3


class Slots(NamedTuple):
    """What the reader needs of N = N1 + N2 + N3 slots, ordered sensory, episodic, schema."""

    banks: jax.Array  # [N, 3, D] vectors to match: what is seen, what is told
    features: jax.Array  # [N, NUM_SLOT]
    valid: jax.Array  # [N] bool
    counts: tuple[int, int, int]  # N1, N2, N3


class AskedQuestions(NamedTuple):
    """What Q questions with O options look for."""

    query: jax.Array  # [Q, D]
    options: jax.Array  # [Q, O, D]
    weights: jax.Array  # [Q, O, 3, H, NUM_FEATURES], per level and head
    hidden: jax.Array  # [Q, O, F]
    gate: jax.Array  # [Q, O, F], how each reading bears on the option: a morning is a time of day


def slot_features(
    span: Float[Array, "N 2"], count: Float[Array, "N"], now: Float[Array, ""]
) -> Float[Array, "N 7"]:
    """Relative time, log age and length in days, time of day as an angle, log count, one."""
    middle = span.mean(-1)
    age = jnp.maximum(now - span[:, 1], 0.0)
    angle = 2 * jnp.pi * jnp.mod(middle, 86_400.0) / 86_400.0
    return jnp.stack(
        [
            middle / jnp.maximum(now, 1.0),
            jnp.log1p(age / 3600.0) / 8.0,
            jnp.log1p((span[:, 1] - span[:, 0]) / 3600.0) / 8.0,
            jnp.sin(angle),
            jnp.cos(angle),
            jnp.log1p(count) / 4.0,
            jnp.ones_like(age),
        ],
        axis=-1,
    )


def project(state: MemoryState) -> Slots:
    """The slots of a memory without batch axes."""
    now = state.clock
    s, e, g = state.sensory, state.episodic, state.schema

    def banks(*vectors):
        zeros = [jnp.zeros_like(vectors[0])] * (NUM_BANKS - len(vectors))
        return jnp.stack([*vectors, *zeros], axis=1)

    valid = jnp.concatenate([s.valid, e.valid, g.valid])
    views = [e.prototypes[:, k] for k in range(min(2, e.prototypes.shape[1]))]
    return Slots(
        banks=jnp.concatenate(
            [banks(s.text, s.visual), banks(e.text, *views), banks(g.gloss, g.profile, g.embedding)]
        ),
        # Zero, not merely masked, where nothing is valid: 0 * NaN is NaN.
        features=jnp.where(
            valid[:, None],
            jnp.concatenate(
                [
                    slot_features(s.span, jnp.ones(s.valid.shape), now),
                    slot_features(e.span, e.count, now),
                    slot_features(g.span, g.mentions, now),
                ]
            ),
            0.0,
        ),
        valid=valid,
        counts=(s.valid.shape[0], e.valid.shape[0], g.valid.shape[0]),
    )


def _match_bias(num_heads: int) -> jax.Array:
    """Initial feature weights: even heads look where question and option fit, odd ones where the
    question alone does, as questions of time and number need."""
    bias = jnp.zeros((NUM_LEVELS, num_heads, 3, NUM_BANKS))
    bias = bias.at[:, 0::2].set(jnp.array([4.0, 4.0, 16.0])[:, None])
    bias = bias.at[:, 1::2, 0].set(14.0)
    bias = bias.reshape(NUM_LEVELS, num_heads, NUM_MATCH)
    return jnp.pad(bias, ((0, 0), (0, 0), (0, NUM_SLOT)))


class Reader(nnx.Module):
    """A reader of `num_heads` softmax and `num_sum_heads` counting heads."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 3,
        num_sum_heads: int = 2,
        hidden: int = 64,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_sum_heads = num_heads, num_sum_heads
        heads = num_heads + num_sum_heads
        small = nnx.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
        self.question = nnx.Linear(2 * dim, hidden, rngs=rngs)
        self.weights = nnx.Linear(
            hidden, NUM_LEVELS * heads * NUM_FEATURES, kernel_init=small, rngs=rngs
        )
        self.weights.bias[...] = _match_bias(heads).reshape(-1)
        self.hidden = nnx.Linear(hidden, hidden, rngs=rngs)
        self.gate = nnx.Linear(hidden, hidden, rngs=rngs)
        self.read = nnx.Linear(heads * (NUM_SLOT + 1), hidden, use_bias=False, rngs=rngs)
        self.mid = nnx.Linear(hidden, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, 1, rngs=rngs)
        self.log_temperature = nnx.Param(jnp.zeros(()))

    def ask(self, query: Float[Array, "Q D"], options: Float[Array, "Q O D"]) -> AskedQuestions:
        """What the pairs of question and option look for."""
        q = jnp.broadcast_to(query[:, None], options.shape)
        x = jax.nn.gelu(self.question(jnp.concatenate([q, options], -1)))
        heads = self.num_heads + self.num_sum_heads
        weights = self.weights(x).reshape(*x.shape[:2], NUM_LEVELS, heads, NUM_FEATURES)
        return AskedQuestions(query, options, weights, self.hidden(x), 1.0 + self.gate(x))

    def answer(
        self, slots: Slots, asked: AskedQuestions, evidence: Bool[Array, "Q N"] | None = None
    ) -> Float[Array, "Q O"]:
        """Calibrated option logits from all valid slots, or from each question's `evidence`."""
        mask = slots.valid[None] if evidence is None else slots.valid & evidence
        mask = mask[:, None, None, :]  # [Q or 1, 1, 1, N]
        scores = _scores(slots, asked)
        soft, sums = jnp.split(scores, [self.num_heads], axis=2)
        # One empty slot of score 0 gives the softmax somewhere to look when nothing fits.
        top = jnp.maximum(jnp.max(jnp.where(mask, soft, -jnp.inf), -1, keepdims=True), 0.0)
        top = jax.lax.stop_gradient(top)
        fit = jnp.where(mask, jnp.exp(jnp.where(mask, soft, 0.0) - top), 0.0)
        total = fit.sum(-1, keepdims=True) + jnp.exp(-top)
        count = jnp.where(mask, jax.nn.sigmoid(sums - 4.0), 0.0)
        attention = jnp.concatenate([fit / total, count], axis=2)
        # A softmax head also tells how well its slots fit, a counting head how many do.
        strength = jnp.concatenate([jnp.log(total) + top, count.sum(-1, keepdims=True)], axis=2)
        found = jnp.einsum("qohn,nf->qohf", attention, slots.features)
        found = jnp.concatenate([found, strength], -1)
        x = self.read(found.reshape(*found.shape[:2], -1))
        x = jax.nn.gelu(x * asked.gate + asked.hidden)
        x = jax.nn.gelu(self.mid(x))
        return self.out(x)[..., 0] * jnp.exp(-self.log_temperature[...])


def _scores(slots: Slots, asked: AskedQuestions) -> Float[Array, "Q O H N"]:
    """Weighted match of every pair with every slot, per head.

    The sum over banks is written out so that it fuses into one pass over [Q, O, H, N].
    """
    with_query = jnp.einsum("qd,nbd->bqn", asked.query, slots.banks)[:, :, None, None]
    with_option = jnp.einsum("qod,nbd->bqon", asked.options, slots.banks)[:, :, :, None]
    levels, start = [], 0
    for level, n in enumerate(slots.counts):
        here = slice(start, start + n)
        w = asked.weights[:, :, level]  # [Q, O, H, F]
        score = jnp.einsum("qohf,nf->qohn", w[..., NUM_MATCH:], slots.features[here])
        for bank in range(NUM_BANKS):
            q, o = with_query[bank][..., here], with_option[bank][..., here]
            w_q, w_o, w_both = (w[..., k * NUM_BANKS + bank, None] for k in range(3))
            score = score + w_q * q + (w_o + w_both * q) * o
        levels.append(score)
        start += n
    return jnp.concatenate(levels, -1)
