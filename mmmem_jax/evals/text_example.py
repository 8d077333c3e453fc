"""One question to a memory of timed text: what two policies retrieve for it, with the texts."""

from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from mmmem_jax.data import text_streams
from mmmem_jax.data.timed_text import Event
from mmmem_jax.evals.text_protocol import Text, replay
from mmmem_jax.retrieval import text_search
from mmmem_jax.train import text_job

MAX_ROWS = 8  # of one node, shown


def make_example(
    config: ConfigDict,
    texts: Sequence[Text],
    split: str,
    makers: dict[str, Callable],
    hits: dict[str, np.ndarray],
) -> dict:
    """What the policies' memories return to one made question, as plain JSON; {} without questions.

    Args:
      config: of the run; its data folder is read again, for the words of the rows.
      texts: all streams.
      split: whose questions to choose from.
      makers: text -> Policy by name, the policy to look at first.
      hits: bool [Q] by name, which of the split's made questions each policy finds evidence of.
    """
    asked = [(text, i) for text in texts if text.stream.split == split
             for i in range(len(text.stream.made.questions))]  # fmt: skip
    if not asked:
        return {}
    text, i = asked[choose(list(hits.values()))]
    stream, question = text.stream, text.stream.made.questions[i]
    events = _events(config, stream.name)
    is_evidence = np.zeros(len(events), bool)
    is_evidence[text_streams.evidence_rows(stream.span, question)] = True

    def row(t: int) -> dict:
        event = events[t]
        told = {"t0": event.t0, "t1": event.t1, "kind": event.kind, "text": event.text}
        return told | {"evidence": bool(is_evidence[t])}

    return {
        "stream": stream.name,
        "question": question.question,
        "type": question.type,
        "query_time": question.query_time,
        "options": list(question.options),
        "answer": question.answer,
        "evidence": [row(t) for t in np.flatnonzero(is_evidence)[:MAX_ROWS]],
        "policies": [
            {"name": name} | _retrieved(make(text), text, i, is_evidence, row, config.eval.top_k)
            for name, make in makers.items()
        ],
    }


def choose(hits: Sequence[np.ndarray]) -> int:
    """The first question that only the first policy has a hit on; else its first hit; else 0."""
    ours = hits[0]
    alone = ours & ~np.any(hits[1:], axis=0)
    return int(np.argmax(alone if alone.any() else ours))


def _events(config: ConfigDict, stream_name: str) -> tuple[Event, ...]:
    """The rows of a stream, which keeps their embeddings alone."""
    parts = text_job.read_parts(config)
    (found,) = (data.events for name, _, _, data in parts if name == stream_name)
    return found[: config.rows_per_stream or None]


def _retrieved(policy, text: Text, i: int, is_evidence: np.ndarray, row, top_k: int) -> dict:
    """The option chosen and the best nodes of a memory at the time of made question i."""
    stream, asked = text.stream, text.stream.made
    question = asked.questions[i]
    when = np.inf if question.query_time is None else question.query_time
    (kept,) = replay(policy, text, [when])
    wanted = np.concatenate([asked.query[i][None], asked.options[i]])
    scores = text_search.node_scores(kept, wanted, stream.tokens, stream.embedding)
    hits = text_search.node_hits(kept, stream.tokens, is_evidence)
    rows_of = np.split(kept.row, np.unique(kept.node, return_index=True)[1][1:])
    best = np.argsort(-scores[0], kind="stable")[:top_k]
    return {
        "chosen": text_search.choose_option(scores[1:]),
        "num_rows": len(kept.row),
        "num_past": int(np.sum(stream.span[:, 1] <= when)),
        "nodes": [
            {
                "score": float(scores[0, n]),
                "hit": bool(hits[n]),
                "num_rows": len(rows_of[n]),
                "rows": [row(t) for t in rows_of[n][:MAX_ROWS]],
            }
            for n in best
        ],
    }
