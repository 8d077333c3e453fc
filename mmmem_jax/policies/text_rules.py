"""Fixed rules for timed text: what one would keep of a day's rows by their words alone.

They read the features that `data.text_streams` puts where pixels would be. As in `policies.rules`,
one `decide` runs them all, told apart by their parameters.
"""

import jax.numpy as jnp

from mmmem_jax.data.text_streams import FEATURE_CENTRE, FEATURE_SCALE, IDF_SUM, SPOKEN
from mmmem_jax.memory.types import ADD_NEW, DISCARD, Item, ManagerOutput, MemoryState

_NAMES = ("highest_idf", "idf_forgetting", "transcripts_only")


def highest_idf() -> tuple[str, dict]:
    """Keeps the rows whose content words have the highest summed inverse document frequency."""
    return _rule("highest_idf")


def idf_forgetting(half_life: float) -> tuple[str, dict]:
    """The forgetting curve with summed idf as salience: idf * 2^(-age / half_life), in seconds."""
    return _rule("idf_forgetting", half_life)


def transcripts_only() -> tuple[str, dict]:
    """Keeps what was said, the newest first, and nothing that was only described."""
    return _rule("transcripts_only")


def _rule(name: str, half_life: float = 1.0) -> tuple[str, dict]:
    """A rule's name and its parameters for `decide`."""
    rule = jnp.asarray(_NAMES.index(name), jnp.int32)
    return name, {"rule": rule, "half_life": jnp.asarray(half_life, jnp.float32)}


def decide(params, noise, state: MemoryState, item: Item) -> ManagerOutput:
    """The decision of the rule that `params` describe."""
    idf = item.visual[IDF_SUM] * FEATURE_SCALE[IDF_SUM] + FEATURE_CENTRE[IDF_SUM]
    idf, time = jnp.maximum(idf, 0.0), item.span[1]
    strengths = (idf, jnp.log2(idf + 1e-2) + time / params["half_life"], time)
    drops = (params["rule"] == _NAMES.index("transcripts_only")) & (item.visual[SPOKEN] <= 0)
    return _decision(jnp.where(drops, DISCARD, ADD_NEW), jnp.stack(strengths)[params["rule"]])


def decide_oracle(params, noise, state: MemoryState, item: Item) -> ManagerOutput:
    """Keeps the rows of the highest `params` [T]: a line to read results by, not a rule."""
    return _decision(ADD_NEW, params[item.trace_id])


def _decision(action, strength) -> ManagerOutput:
    return ManagerOutput(
        logits=jnp.zeros(3),
        action=jnp.asarray(action, jnp.int32),
        log_prob=jnp.asarray(0.0),
        strength=jnp.asarray(strength, jnp.float32),
        context=jnp.zeros(0),
    )
