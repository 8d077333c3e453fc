"""Evaluation of a text run: every policy at every budget, the results, the report and the table."""

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mmmem_jax import provenance
from mmmem_jax.evals import (
    follow,
    outputs,
    text_example,
    text_policies,
    text_questions,
    text_report,
)
from mmmem_jax.evals.table import NOT_RULES
from mmmem_jax.evals.text_policies import Setting
from mmmem_jax.evals.text_protocol import Outcome, Text, prepare, run_policy
from mmmem_jax.evals.text_questions import KINDS
from mmmem_jax.policies.manager import Manager
from mmmem_jax.train import checkpoints, text_job

LOG = logging.getLogger("mmmem_jax")


class Run(NamedTuple):
    """A run's config and all streams of its data, ready to be read by any policy."""

    config: ConfigDict
    texts: list[Text]


def load_run(workdir: Path) -> Run:
    """The config of a workdir and the data it names.

    Raises:
      UserError: if there is nothing to evaluate, or the data cannot be read.
    """
    config = ConfigDict(checkpoints.read_config(workdir))
    streams = text_job.load_streams(config, with_options=True)
    return Run(config, prepare(text_job.fit_space(config, streams), streams))


class Found(NamedTuple):
    """Every policy at one share, by name: learned, the rules, the oracle, unlimited memory."""

    makers: dict[str, Callable]  # learned: of the first seed
    runs: dict[str, list[dict[str, Outcome]]]  # outcomes by split; learned: one a seed


def run_all(
    config: ConfigDict,
    texts: Sequence[Text],
    models: Sequence[Manager],
    *,
    splits: Sequence[str],
    shares: Sequence[float],
) -> Iterator[tuple[str, Found]]:
    """Each share of the tokens, as text, and what all policies found with it."""
    if text_policies.tuning_text(texts) is None:
        LOG.warning(
            "no training stream has a question with evidence: constants are not tuned, each is the"
            " first of its grid"
        )
    run = functools.partial(run_policy, texts=texts, splits=splits, top_k=config.eval.top_k)
    unlimited = text_policies.unlimited(config)
    everything = [run(unlimited)]
    for share in shares:
        started = time.monotonic()
        setting = Setting(config, share)
        ours = text_policies.tuned_managers(setting, models, texts)
        others = text_policies.fixed_rules(setting, texts)
        others["oracle_askable"] = text_policies.oracle_askable(setting)
        runs = {"learned": [run(policy) for policy in ours]}
        runs |= {name: [run(policy)] for name, policy in others.items()}
        LOG.info("share %.4g took %.0f s", share, time.monotonic() - started)
        yield (
            f"{share:.6g}",
            Found(
                {"learned": ours[0], **others, "unlimited": unlimited},
                runs | {"unlimited": everything},
            ),
        )


def summarise(name: str, outcome: Outcome) -> dict:
    """A policy's entry of results.json; `accuracy` is that on the made questions.

    `share_of_seen` is the mean over made questions of budget / tokens seen when asked, at most 1:
    the budget is a share of the whole stream, but open from its first row. `uniform` keeps rows
    evenly spaced over the whole stream, so it gets nothing from that.
    """
    shares = outcome.share_of_seen
    out: dict = {
        "name": name,
        "tokens": outcome.tokens,
        "slots": outcome.slots,
        "share_of_seen": float(shares.mean()) if len(shares) else None,
    }
    for prefix, records in (("", outcome.made), ("official_", outcome.labelled)):
        out |= {f"{prefix}{key}": value for key, value in text_questions.rates(records).items()}
    return out


def entries_of(found: Found, split: str) -> list[dict]:
    """The entries of one share and split; `seeds` keeps the learned recall of each seed."""
    out = []
    for name, runs in found.runs.items():
        each = [summarise(name, run[split]) for run in runs]
        out.append(_mean_of_seeds(each) if name == "learned" else each[0])
    return out


def _mean_of_seeds(entries: Sequence[dict]) -> dict:
    out = dict(entries[0])
    for key, value in out.items():
        if isinstance(value, float):
            out[key] = float(np.mean([entry[key] for entry in entries]))
    return out | {"seeds": [entry["recall"] for entry in entries]}


def compare(
    config: ConfigDict,
    texts: Sequence[Text],
    models: Sequence[Manager],
    *,
    splits: Sequence[str],
    shares: Sequence[float],
) -> dict:
    """{split: {share: [entries]}}: the managers (one a seed), every rule, the oracle, unlimited.

    `by_type` of an entry is the recall of made questions by type, the mean over seeds for learned.
    """
    results: dict = {split: {} for split in splits}
    asked = {split: text_questions.asking(texts, split, "made") for split in splits}
    for share, found in run_all(config, texts, models, splits=splits, shares=shares):
        for split in splits:
            entries = results[split][share] = entries_of(found, split)
            for entry in entries:
                records = [run[split].made for run in found.runs[entry["name"]]]
                entry["by_type"] = text_questions.recall_by_type(asked[split], records)
            LOG.info("share %s, %s\n%s", share, split, format_table(results[split][share]))
    return results


def best_rule(entries: Sequence[dict], key: str) -> dict | None:
    """The fixed rule with the highest value of `key`, None where no rule has one."""
    named = [e for e in entries if e["name"] not in NOT_RULES and e[key] is not None]
    return max(named, key=lambda e: e[key], default=None)


def format_table(entries: Sequence[dict]) -> str:
    """Recall and accuracy of each policy in aligned ASCII."""
    keys = ("recall", "accuracy", "official_recall", "official_accuracy")

    def cell(entry, key):
        if entry[key] is None:
            return "-"
        return f"{entry[key]:.3f} +- {entry[key + '_se']:.3f}"

    order = sorted(entries, key=lambda e: (e["name"] in NOT_RULES[1:], -(e["recall"] or 0.0)))
    lines = ["policy".ljust(18) + "".join(k.rjust(20) for k in keys) + "tokens".rjust(9)]
    for e in order:
        cells = "".join(cell(e, k).rjust(20) for k in keys)
        lines.append(e["name"].ljust(18) + cells + f"{e['tokens']:9.0f}")
    return "\n".join(lines)


def format_tables(table: dict) -> str:
    """The table of every split and share, each under a line that names them."""
    return "\n".join(
        f"{split}, share of tokens kept {share}\n{format_table(entries)}"
        for split, by_share in table.items()
        for share, entries in by_share.items()
    )


def tabulate(run: Run, found: dict[str, Found]) -> dict:
    """{split: {share: [entries]}} as `compare` gives it, with groups of questions."""
    table: dict = {}
    for split in run.config.eval.splits:
        asked = {
            prefix: text_questions.asking(run.texts, split, kind) for prefix, kind in KINDS.items()
        }
        table[split] = {share: entries_of(at, split) for share, at in found.items()}
        for share, entries in table[split].items():
            for entry in entries:
                outcome = found[share].runs[entry["name"]][0][split]
                for prefix, kind in KINDS.items():
                    by = text_questions.groups(asked[prefix], getattr(outcome, kind))
                    entry |= {f"{prefix}{key}": rows for key, rows in by.items()}
    return table


def learned_and_best(found: Found, split: str) -> list[str]:
    """Names of the learned manager and of the rule of highest recall, if one has any."""
    best = best_rule(entries_of(found, split), "recall")
    return ["learned", best["name"]] if best else ["learned"]


def question_rows(run: Run, found: dict[str, Found]) -> Iterator[dict]:
    """`text_questions.question_rows` of every split, for three of the policies.

    Learned and the best rule (by recall) at each share, and unlimited memory once, as share 1: all
    policies would be hundreds of thousands of rows on real days.
    """
    for split in run.config.eval.splits:
        chosen = [
            (name, float(share), at.runs[name][0][split])
            for share, at in found.items()
            for name in learned_and_best(at, split)
        ]
        (everything,) = next(iter(found.values())).runs["unlimited"]
        chosen.append(("unlimited", 1.0, everything[split]))
        yield from text_questions.question_rows(run.texts, split, chosen)


def example_of(run: Run, found: dict[str, Found]) -> dict:
    """The example of the report: learned and the best rule at the first share, last split."""
    split = run.config.eval.splits[-1]
    share, at = next(iter(found.items()))
    names = learned_and_best(at, split)
    hits = {name: at.runs[name][0][split].made.hit for name in names}
    makers = {name: at.makers[name] for name in names}
    example = text_example.make_example(run.config, run.texts, split, makers, hits)
    return {"split": split, "share": share} | example if example else {}


def full_evaluation(run: Run, workdir: Path, step: int, model: Manager) -> dict:
    """Compares all policies at one checkpoint and writes everything below workdir/eval."""
    settings = run.config.eval
    started = time.monotonic()
    found = dict(
        run_all(run.config, run.texts, [model], splits=settings.splits, shares=settings.shares)
    )
    streams = [text.stream for text in run.texts if text.stream.split in settings.splits]
    results = {
        "title": "What the memory learned to keep of timed text",
        **provenance.provenance(),
        "seed": run.config.seed,
        "step": step,
        "num_streams": len(streams),
        "num_questions": sum(len(s.made.questions) + len(s.labelled.questions) for s in streams),
        "top_k": settings.top_k,
        "table": tabulate(run, found),
        "example": example_of(run, found),
        "seconds": time.monotonic() - started,
    }
    outputs.write_outputs(
        workdir,
        results,
        question_rows(run, found),
        write_report=text_report.write_report,
        plot_summary=text_report.plot_summary,
    )
    return results


def light_evaluation(run: Run, model: Manager) -> dict:
    """The learned manager alone, at the first share, on the made questions of the first split."""
    split, share = run.config.eval.splits[0], run.config.eval.shares[0]
    (policy,) = text_policies.tuned_managers(Setting(run.config, share), [model], run.texts)
    top_k = run.config.eval.top_k
    outcome = run_policy(policy, run.texts, (split,), top_k=top_k, labelled=False)[split]
    held = {"slots": outcome.slots, "tokens": outcome.tokens}
    return {"split": split, "share": share, **text_questions.rates(outcome.made), **held}


def follow_run(run: Run, workdir: Path, *, poll_seconds: float, timeout: float) -> None:
    """`light_evaluation` of every new checkpoint of the manager until the last step is there."""

    def evaluate(step: int) -> dict:
        return light_evaluation(run, text_job.load_manager(run.config, workdir, step)[0])

    num_steps = run.config.manager.num_steps
    follow.follow(workdir, num_steps, evaluate, poll_seconds=poll_seconds, timeout=timeout)
