"""The evaluation protocol on timed text: every policy on the same streams, budgets and questions.

Strictly causal: a question is answered by the memory that has read exactly the rows that ended by
its query time. The token budget is a share of the whole stream's tokens, open from its first row
on: when a question is asked it is a larger share of what was seen (`Outcome.share_of_seen`). A
question made from a stream searches that stream's memory. A labelled question searches the memories
its video's earlier streams ended with (a day's memory is closed with the day) and the current one.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmmem_jax import memory
from mmmem_jax.data import text_streams
from mmmem_jax.data.encoded import to_items
from mmmem_jax.data.text_streams import Asked, TextStream
from mmmem_jax.evals.protocol import Policy
from mmmem_jax.memory.types import Item, MemoryState
from mmmem_jax.retrieval import text_search
from mmmem_jax.retrieval.text_search import Kept


class Text(NamedTuple):
    """A stream with the items the memory reads, padded to a length that streams share."""

    stream: TextStream
    items: Item  # [T_max]


class Records(NamedTuple):
    """What a policy's memories answered to Q questions."""

    hit: np.ndarray  # [Q] bool, evidence among the top k nodes
    held: np.ndarray  # [Q] bool, evidence among all nodes of the memory
    has_evidence: np.ndarray  # [Q] bool, some row of the past is evidence
    right: np.ndarray  # [Q] bool, the right option was chosen
    has_answer: np.ndarray  # [Q] bool
    chosen: np.ndarray  # [Q] int, the option chosen, -1 for none


_NONE = Records(*[np.zeros(0, bool)] * 5, chosen=np.zeros(0, int))


def prepare(space, streams: Sequence[TextStream]) -> list[Text]:
    """Streams as items on the device; padding lets one program run them all."""
    encoded = [text_streams.encode(space, stream) for stream in streams]
    longest = max(len(x.valid) for x in encoded)
    rng = np.random.default_rng(0)  # draws no question: none fit into 0 places
    items = [to_items(text_streams.cut_segment(x, 0, longest, 0, rng)) for x in encoded]
    return [Text(*each) for each in zip(streams, items, strict=True)]


@functools.partial(jax.jit, static_argnames="decide_fn", donate_argnames=("state", "node_of_row"))
def _advance(params, rng_key, state, node_of_row, items, start, stop, *, decide_fn):
    """Reads rows [start, stop) and notes the node each went into."""

    def body(t, carry):
        state, node_of_row = carry
        row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, t, 1), items)
        state, out = memory.scan(params, rng_key, state, row, decide_fn=decide_fn)
        return state, node_of_row.at[t].set(out.node_id[0])

    return jax.lax.fori_loop(start, stop, body, (state, node_of_row))


def replay(policy: Policy, text: Text, times: Iterable[float], *, seed: int = 0) -> list[Kept]:
    """What the policy's memory holds at each of the rising absolute `times` (s)."""
    ends = text.stream.span[:, 1]
    state = memory.init(policy.config)
    node_of_row = jnp.full(text.items.valid.shape, -1, jnp.int32)
    key, done, found = jax.random.key(seed), 0, []
    for t in times:
        stop = int(np.searchsorted(ends, t, side="right"))
        if stop > done or not found:
            state, node_of_row = _advance(
                policy.params, key, state, node_of_row, text.items, done, stop,
                decide_fn=policy.decide_fn,
            )  # fmt: skip
            done = stop
            found.append(_kept(state, node_of_row, done))
        else:
            found.append(found[-1])
    return found


def _kept(state: MemoryState, node_of_row, done: int) -> Kept:
    stream = state.episodic
    # Copies: the buffers are donated to the next call.
    node_id, valid = np.array(stream.node_id), np.array(stream.valid)
    return text_search.kept_rows(np.array(node_of_row)[:done], node_id, valid)


def query_times(asked: Asked) -> list[float]:
    """Times of the questions (s), infinity where a question has none."""
    return [np.inf if q.query_time is None else q.query_time for q in asked.questions]


def score(asked: Asked, kept: Sequence[Kept], past: Sequence[TextStream], *, top_k: int) -> Records:
    """Answers each question from the rows held when it was asked.

    Args:
      asked: Q questions.
      kept: Q memories; rows are numbered through all streams of `past`.
      past: the streams, in order, that the questions may look into.
    """
    embedding = np.concatenate([s.embedding for s in past])
    span = np.concatenate([s.span for s in past])
    tokens = np.concatenate([s.tokens for s in past])
    rows = []
    for question, query, options, when, held in zip(
        asked.questions, asked.query, _options(asked), query_times(asked), kept, strict=True
    ):
        found = text_streams.evidence_rows(span, question)
        is_evidence = np.zeros(len(tokens), bool)
        is_evidence[found] = True
        texts = np.concatenate([query[None], options])
        scores = text_search.node_scores(held, texts, tokens, embedding)
        hits = text_search.node_hits(held, tokens, is_evidence)
        chosen = text_search.choose_option(scores[1:]) if len(options) else None
        rows.append(
            (
                text_search.recall_at(scores[0], hits, top_k),
                hits.any(),
                bool(np.any(span[found, 1] <= when)),
                chosen is not None and chosen == question.answer,
                question.answer is not None and len(options) > 0,
                -1 if chosen is None else chosen,
            )
        )
    columns = np.array(rows, int).reshape(-1, len(_NONE)).T
    return Records(*(x.astype(none.dtype) for x, none in zip(columns, _NONE, strict=True)))


def _options(asked: Asked) -> Sequence[np.ndarray]:
    """Option embeddings, empty ones where they were not made."""
    empty = np.zeros((0, asked.query.shape[1]), np.float32)
    return asked.options or (empty,) * len(asked.questions)


class Outcome(NamedTuple):
    """A policy on a stream, or on those of a split."""

    made: Records
    labelled: Records
    tokens: float  # held when the streams ended, mean
    slots: float
    share_of_seen: np.ndarray  # [Q] of made questions: budget / tokens seen when asked, at most 1


def run_policy(
    make_policy: Callable[[Text], Policy],
    texts: Sequence[Text],
    splits: Sequence[str],
    *,
    top_k: int,
    labelled: bool = True,
    seed: int = 0,
) -> dict[str, Outcome]:
    """Runs a policy once over the streams that the questions of `splits` look into.

    Args:
      make_policy: the policy for a stream.
      texts: all streams, in the order in which those of a video follow each other.
      splits: whose questions are asked.
      top_k: nodes that recall looks at.
      labelled: ask the labelled questions too; for them a video's earlier streams are read.
      seed: of policies that draw.
    """
    found = {split: [] for split in splits}
    closed: dict[str, list[tuple[Kept, TextStream]]] = {}
    asking = {text.stream.video for text in texts if text.stream.split in splits}
    for text in texts:
        stream, asked = text.stream, text.stream.split in splits
        if not asked and not (labelled and stream.video in asking):
            continue
        groups = (stream.made, stream.labelled) if asked else ()
        times = sorted({np.inf}.union(*map(query_times, groups)))
        policy = make_policy(text)
        held = dict(zip(times, replay(policy, text, times, seed=seed), strict=True))
        before = closed.setdefault(stream.video, [])
        if asked:
            made = [held[t] for t in query_times(stream.made)]
            past = [*(s for _, s in before), stream]
            joined = [
                _join([*(k for k, _ in before), held[t]], past)
                for t in (query_times(stream.labelled) if labelled else ())
            ]
            told = score(stream.labelled, joined, past, top_k=top_k) if joined else _NONE
            end = held[np.inf]
            found[stream.split].append(
                Outcome(
                    made=score(stream.made, made, [stream], top_k=top_k),
                    labelled=told,
                    tokens=float(stream.tokens[end.row].sum()),
                    slots=float(len(np.unique(end.node))),
                    share_of_seen=share_of_seen(stream, policy.config.token_budget),
                )
            )
        before.append((held[np.inf], stream))
    return {split: _pool(outcomes) for split, outcomes in found.items()}


def share_of_seen(stream: TextStream, budget: int | None) -> np.ndarray:
    """A budget as a share of the tokens seen when each made question is asked, [Q]; at most 1."""
    rows = np.searchsorted(stream.span[:, 1], query_times(stream.made), side="right")
    seen = np.concatenate([[0], np.cumsum(stream.tokens)])[rows]
    if budget is None:
        return np.ones(len(rows))
    return np.minimum(1.0, budget / np.maximum(seen, 1))


def _pool(outcomes: Sequence[Outcome]) -> Outcome:
    """Questions of several streams together, the mean of what the memories held."""
    return Outcome(
        made=_stack([o.made for o in outcomes]),
        labelled=_stack([o.labelled for o in outcomes]),
        tokens=float(np.mean([o.tokens for o in outcomes])),
        slots=float(np.mean([o.slots for o in outcomes])),
        share_of_seen=np.concatenate([o.share_of_seen for o in outcomes]),
    )


def _join(kept: Sequence[Kept], past: Sequence[TextStream]) -> Kept:
    """Memories of streams that follow each other as one; rows and nodes are numbered through."""
    row = np.cumsum([0, *(len(stream.tokens) for stream in past[:-1])])
    node = np.cumsum([0, *(int(k.node.max(initial=-1)) + 1 for k in kept[:-1])])
    return Kept(
        np.concatenate([k.row + r for k, r in zip(kept, row, strict=True)]),
        np.concatenate([k.node + n for k, n in zip(kept, node, strict=True)]),
    )


def _stack(records: Sequence[Records]) -> Records:
    return Records(*(np.concatenate(x) for x in zip(_NONE, *records, strict=True)))


def rate(value: np.ndarray, counts: np.ndarray) -> dict[str, float | int | None]:
    """Mean of `value` where `counts`, its binomial standard error and n."""
    n = int(counts.sum())
    if not n:
        return {"mean": None, "se": None, "n": 0}
    mean = float(value[counts].mean())
    return {"mean": mean, "se": float(np.sqrt(mean * (1.0 - mean) / n)), "n": n}
