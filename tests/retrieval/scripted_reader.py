"""A reader whose answers are a script's, in the place of a language model."""

import re
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from mmmem_jax.retrieval import qwen3_vl as reading


class Talk(NamedTuple):
    """What a scripted reader was told so far: a token a letter."""

    text: str
    read: int


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def make_reader(
    choose, *, say="", ended=True, encode=lambda text: [ord(c) for c in text], context=10**6
):
    """A reader whose `choose` gives logits from the text so far and the ids; `log` holds calls."""
    log = SimpleNamespace(scored=[], asked=[])

    def tell(talk, text):
        assert len(talk.text + text) <= context
        return Talk(talk.text + text, talk.read + len(text))

    def beginning(talk, text, leave):
        return text[: max(context - len(talk.text) - leave, 0)]

    def look(talk, frames, seconds, leave):
        shown = f"[{len(frames)} frames at {seconds}]"
        return tell(talk, shown) if beginning(talk, shown, leave) == shown else talk

    def scored(talk, ids):
        log.scored.append(talk.text)
        return log_softmax(choose(talk.text, ids)).astype(np.float32)

    def spoken(talk, max_new_tokens):
        log.asked.append(talk.text)
        return reading.Said(say, (1,), (0.0,), ended), Talk(talk.text + say, talk.read + len(say))

    reader = reading.Reader(
        begin=lambda: Talk("", 0),
        tell=tell,
        beginning=beginning,
        look=look,
        mark=lambda talk: talk,
        rewind=lambda talk, place: place._replace(read=talk.read),
        choose=scored,
        say=spoken,
        encode=encode,
        tokens_read=lambda talk: talk.read,
    )
    return reader, log


def options_in(text: str) -> list[str]:
    """The options as they were shown, in order."""
    return re.findall(r"^[A-Z]\. (.+)$", text, re.MULTILINE)
