"""The questions of a text evaluation: recall and accuracy of groups, rows of questions.jsonl."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mmmem_jax.data.text_streams import Asked, TextStream
from mmmem_jax.data.timed_text import Question
from mmmem_jax.evals.text_policies import HOUR
from mmmem_jax.evals.text_protocol import Outcome, Records, Text, rate

NUM_AGES = 4  # groups of questions by the age of their evidence
KINDS = {"": "made", "official_": "labelled"}  # prefix in an entry: field of a stream


def rates(records: Records) -> dict:
    """Evidence recall and accuracy of some questions, with standard errors and counts."""
    recall = rate(records.hit, records.has_evidence)
    accuracy = rate(records.right, records.has_answer)
    return {
        "recall": recall["mean"],
        "recall_se": recall["se"],
        "n": recall["n"],
        "accuracy": accuracy["mean"],
        "accuracy_se": accuracy["se"],
        "accuracy_n": accuracy["n"],
    }


class Asking(NamedTuple):
    """The questions of a split in the order in which its records are."""

    questions: list[Question]
    streams: list[TextStream]  # that each is asked of
    age: np.ndarray  # [Q] hours from the end of the newest evidence to the question; NaN for none


def asking(texts: Sequence[Text], split: str, kind: str) -> Asking:
    """The questions of `kind`, "made" or "labelled", of a split."""
    pairs = []
    for text in texts:
        if text.stream.split == split:
            asked: Asked = getattr(text.stream, kind)
            pairs += [(question, text.stream) for question in asked.questions]
    age = np.array([evidence_age(*pair) for pair in pairs], np.float64)
    return Asking([q for q, _ in pairs], [s for _, s in pairs], age)


def evidence_age(question: Question, stream: TextStream) -> float:
    """Hours from the end of the newest evidence of the past to the question; NaN without."""
    when = stream.span[-1, 1] if question.query_time is None else question.query_time
    ends = [end for _, end in question.evidence if end <= when]
    return (when - max(ends)) / HOUR if ends else np.nan


def groups(asked: Asking, records: Records) -> dict:
    """Recall and accuracy by type of question and by age of the evidence (h)."""

    def rates_of(chosen):
        return rates(Records(*(values[chosen] for values in records)))

    types = np.array([question.type for question in asked.questions], object)
    edges = np.linspace(0.0, max(np.nanmax(asked.age, initial=0.0), 1e-6), NUM_AGES + 1)
    group = np.searchsorted(edges[1:-1], asked.age, side="right")
    known = ~np.isnan(asked.age)
    return {
        "by_type": [{"type": kind, **rates_of(types == kind)} for kind in sorted(set(types))],
        "by_age": [
            {"lo": float(lo), "hi": float(hi), **rates_of(known & (group == i))}
            for i, (lo, hi) in enumerate(zip(edges[:-1], edges[1:], strict=True))
        ],
    }


def recall_by_type(asked: Asking, seeds: Sequence[Records]) -> list[dict]:
    """Recall by type of question, the mean over the records of several seeds."""
    found = [groups(asked, records)["by_type"] for records in seeds]
    return [
        {"type": rows[0]["type"], "n": rows[0]["n"]}
        | {key: _mean([row[key] for row in rows]) for key in ("recall", "recall_se")}
        for rows in zip(*found, strict=True)
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def question_rows(
    texts: Sequence[Text], split: str, outcomes: Sequence[tuple[str, float, Outcome]]
) -> Iterator[dict]:
    """One dict a question and (policy, share, outcome), for questions.jsonl.

    `hit` and `held` are null where no row of the past is evidence, `right` where no answer is
    known, `chosen` where the memory was empty or there are no options.
    """
    for kind in KINDS.values():
        asked = asking(texts, split, kind)
        for name, share, outcome in outcomes:
            head = {"policy": name, "share": share, "split": split, "asked": kind}
            yield from (head | row for row in _rows(asked, getattr(outcome, kind)))


def _rows(asked: Asking, records: Records) -> Iterator[dict]:
    columns = Records(*(values.tolist() for values in records))
    for i, (question, stream, age) in enumerate(zip(*asked, strict=True)):
        record = Records(*(values[i] for values in columns))
        yield {
            "stream": stream.name,
            "qid": question.qid,
            "type": question.type,
            "question": question.question,
            "query_time": question.query_time,
            "answer": question.answer,
            "chosen": record.chosen if record.chosen >= 0 else None,
            "right": record.right if record.has_answer else None,
            "held": record.held if record.has_evidence else None,
            "hit": record.hit if record.has_evidence else None,
            "evidence_age_hours": None if np.isnan(age) else round(float(age), 4),
        }
