"""Evaluation of a text run: every policy at every budget, results.json and the table."""

import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from mmmem_jax import provenance
from mmmem_jax.evals import text_policies
from mmmem_jax.evals.text_policies import Setting
from mmmem_jax.evals.text_protocol import Outcome, Text, prepare, rate, run_policy
from mmmem_jax.policies.manager import Manager
from mmmem_jax.train import checkpoints, text_job

LOG = logging.getLogger("mmmem_jax")
NOT_RULES = ("learned", "unlimited", "oracle_askable")


def summarise(name: str, outcome: Outcome) -> dict:
    """A policy's entry of results.json; `accuracy` is that on the made questions."""
    out: dict = {"name": name, "tokens": outcome.tokens, "slots": outcome.slots}
    for prefix, records in (("", outcome.made), ("official_", outcome.labelled)):
        recall = rate(records.hit, records.has_evidence)
        accuracy = rate(records.right, records.has_answer)
        out[f"{prefix}recall"], out[f"{prefix}recall_se"] = recall["mean"], recall["se"]
        out[f"{prefix}n"] = recall["n"]
        out[f"{prefix}accuracy"], out[f"{prefix}accuracy_se"] = accuracy["mean"], accuracy["se"]
        out[f"{prefix}accuracy_n"] = accuracy["n"]
    return out


def compare(
    config: ConfigDict,
    texts: Sequence[Text],
    models: Sequence[Manager],
    *,
    splits: Sequence[str],
    shares: Sequence[float],
) -> dict:
    """{split: {share: [entries]}}: the managers (one a seed), every rule, the oracle, unlimited."""
    top_k = config.eval.top_k
    results: dict = {split: {} for split in splits}
    run = functools.partial(run_policy, texts=texts, splits=splits, top_k=top_k)
    everything = run(text_policies.unlimited(config))
    train = [text for text in texts if text.stream.split == "train"][-1]
    for share in shares:
        started = time.monotonic()
        setting = Setting(config, share)
        makers = [
            functools.partial(
                text_policies.learned,
                setting,
                model,
                text_policies.margin_spread(model, train.items),
            )
            for model in models
        ]
        half_life = text_policies.tune(texts, makers[0], text_policies.HALF_LIVES, top_k)
        LOG.info("share %.4g: learned fades in %.3g h", share, half_life / text_policies.HOUR)
        ours = [run(make(half_life)) for make in makers]
        others = text_policies.fixed_rules(setting, texts)
        others["oracle_askable"] = text_policies.oracle_askable(setting)
        found = {name: run(policy) for name, policy in others.items()} | {"unlimited": everything}
        for split in splits:
            entries = [_mean_of_seeds([summarise("learned", seed[split]) for seed in ours])]
            entries += [summarise(name, by_split[split]) for name, by_split in found.items()]
            results[split][f"{share:.6g}"] = entries
            LOG.info("share %.4g of the tokens, %s\n%s", share, split, format_table(entries))
        LOG.info("share %.4g took %.0f s", share, time.monotonic() - started)
    return results


def _mean_of_seeds(entries: Sequence[dict]) -> dict:
    """The mean entry; `seeds` keeps the recall of each."""
    out = dict(entries[0])
    for key, value in out.items():
        if isinstance(value, float):
            out[key] = float(np.mean([entry[key] for entry in entries]))
    return out | {"seeds": [entry["recall"] for entry in entries]}


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


def full_evaluation(workdir: Path, *, step: int | None = None) -> dict:
    """Compares all policies at one checkpoint, prints the table, writes eval/results.json."""
    config = ConfigDict(checkpoints.read_config(workdir))
    streams = text_job.load_streams(config, with_options=True)
    model, step = text_job.load_manager(config, workdir, step)
    texts = prepare(text_job.fit_space(config, streams), streams)
    table = compare(config, texts, [model], splits=config.eval.splits, shares=config.eval.shares)
    results = {**provenance.provenance(), "seed": config.seed, "step": step, "table": table}
    provenance.write_json(workdir / "eval" / "results.json", results)
    for split, by_share in table.items():
        for share, entries in by_share.items():
            print(f"{split}, share of tokens kept {share}")
            print(format_table(entries))
    print(f"results: {workdir / 'eval' / 'results.json'}")
    return results
