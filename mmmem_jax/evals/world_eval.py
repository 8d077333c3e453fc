"""Evaluation of a world run: load its checkpoints, compare policies, write results and report."""

import json
import logging
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mmmem_jax import provenance
from mmmem_jax.data import worlds
from mmmem_jax.data.encoded import EncodedStream
from mmmem_jax.evals import follow, outputs, protocol, report, table
from mmmem_jax.evals.example import make_example
from mmmem_jax.evals.protocol import Policy
from mmmem_jax.memory.types import LEVELS
from mmmem_jax.models.frame_encoder import FrameEncoder
from mmmem_jax.models.reader import Reader
from mmmem_jax.policies import rules
from mmmem_jax.train import checkpoints, world_job

LOG = logging.getLogger("mmmem_jax")


class Run(NamedTuple):
    """A trained run: config, networks, and the held-out streams as its eye sees them."""

    config: ConfigDict
    eye: FrameEncoder
    reader: Reader
    worlds: list  # of (Stream, Questions)
    streams: EncodedStream


def load_run(workdir: Path, *, num_streams: int | None = None, split: str = "test") -> Run:
    """Eye and reader of a workdir, and the first streams of a split.

    Raises:
      UserError: if a phase has no checkpoint yet.
    """
    config = ConfigDict(checkpoints.read_config(workdir))
    models = world_job.make_models(config)
    eye = world_job.load_eye(config, workdir, models.eye)
    reader = world_job.load_reader(workdir, models.reader)
    made = world_job.make_streams(config, split, num_streams or config.streams[split])
    return Run(config, eye, reader, made, world_job.encode_streams(eye, made, config.dim))


def evaluate(run: Run, policy: Policy, *, streams: EncodedStream | None = None, **kwargs):
    """`protocol.evaluate` with the run's reader, retrieval and streams."""
    return protocol.evaluate(
        policy,
        run.reader,
        run.streams if streams is None else streams,
        retrieval=world_job.retrieval_config(run.config),
        batch_size=kwargs.pop("batch_size", run.config.eval.batch_size),
        **kwargs,
    )


def tuned_rules(run: Run, workdir: Path, num_slots: int | None = None) -> list[rules.Rule]:
    """The fixed rules for a number of slots, the run's own for None.

    Their constants are tuned on training streams at the run's own budget, once per workdir.
    """
    path = workdir / "eval" / "rules.json"
    config = world_job.memory_config(run.config)
    if path.exists():
        constants = json.loads(path.read_text())
    else:
        few = min(16, run.config.streams.train)
        train = world_job.perceived(run.config, run.eye, "train", few)

        def score(rule):
            records = evaluate(run, protocol.rule_policy(rule, config), streams=train)
            return protocol.summarise(rule.name, records, train)["accuracy"]

        constants = protocol.tune_rules(score)
        provenance.write_json(path, constants)
    num_slots = num_slots or config.episodic_slots
    return rules.fixed_rules(run.config.world.num_chunks, num_slots, **constants)


def rule_policies(run: Run, workdir: Path) -> list[Policy]:
    """Every tuned rule at the run's budget."""
    config = world_job.memory_config(run.config)
    return [protocol.rule_policy(rule, config) for rule in tuned_rules(run, workdir)]


def compare(run: Run, workdir: Path, learned: Policy) -> tuple[list[dict], dict]:
    """Entries of results.json and the records of every policy by name."""
    config = world_job.memory_config(run.config)
    num_chunks = run.config.world.num_chunks
    policies = [learned, *rule_policies(run, workdir)]
    entries, records = [], {}
    for policy in policies:
        records[policy.name] = evaluate(run, policy)
        entries.append(protocol.summarise(policy.name, records[policy.name], run.streams))
        LOG.info("%s: accuracy %.3f", policy.name, entries[-1]["accuracy"])
    unlimited = protocol.unlimited_policy(config, num_chunks)
    records["unlimited"] = evaluate(run, unlimited, batch_size=4)
    entries.append(protocol.summarise("unlimited", records["unlimited"], run.streams))
    return entries, records


def frontier(run: Run, workdir: Path, learned: Policy, entries: list[dict]) -> list[dict]:
    """Accuracy against tokens held at several slot budgets: learned and the best fixed rule."""
    best = table.best_rule({"policies": entries})
    base = world_job.memory_config(run.config)
    points = []
    for slots in sorted({*run.config.eval.slots, base.episodic_slots}):
        config = protocol.with_slots(base, slots)
        chosen = [learned._replace(config=config)]
        chosen += [
            protocol.rule_policy(rule, config)
            for rule in tuned_rules(run, workdir, slots)
            if best is not None and rule.name == best["name"]
        ]
        for policy in chosen:
            entry = protocol.summarise(policy.name, evaluate(run, policy), run.streams)
            keys = ("tokens", "accuracy", "se")
            points.append({"policy": policy.name, "slots": slots} | {k: entry[k] for k in keys})
    return points


def question_rows(run: Run, records: dict[str, protocol.Records]):
    """One dict a question and policy, for questions.jsonl."""
    age = protocol.evidence_age(run.streams)
    for name, r in records.items():
        for s, m in zip(*np.nonzero(run.streams.question_valid), strict=True):
            words = run.worlds[s][1].words[m]
            yield {
                "policy": name,
                "stream": int(s),
                "question": " ".join(worlds.WORDS[w] for w in words if w),
                "family": worlds.FAMILIES[run.streams.family[s, m]],
                "answer": int(run.streams.answer[s, m]),
                "log_probs": [round(float(x), 4) for x in r.log_probs[s, m]],
                "top_down_log_probs": [round(float(x), 4) for x in r.top_down_log_probs[s, m]],
                "stop_level": LEVELS[r.stop_level[s, m]],
                "stop_step": int(r.stop_step[s, m]),
                "tokens_read": int(r.tokens_read[s, m]),
                "evidence_age_days": round(float(age[s, m]), 3),
            }


def full_evaluation(run: Run, workdir: Path, step: int, learned: Policy) -> dict:
    """Compares all policies at one checkpoint and writes everything below workdir/eval."""
    started = time.monotonic()
    entries, records = compare(run, workdir, learned)
    valid = run.streams.question_valid
    results = {
        "title": "What the memory learned to keep",
        **provenance.provenance(),
        "seed": run.config.seed,
        "step": step,
        "num_streams": len(valid),
        "num_questions": int(valid.sum()),
        "reader_ece": entries[0]["ece"],
        "policies": entries,
        "frontier": frontier(run, workdir, learned, entries),
        "example": make_example(
            learned,
            run.reader,
            run.worlds[0],
            jax.tree.map(lambda x: x[:1], run.streams),
            world_job.retrieval_config(run.config),
        ),
        "seconds": time.monotonic() - started,
    }
    outputs.write_outputs(
        workdir,
        results,
        question_rows(run, records),
        write_report=report.write_report,
        plot_summary=table.plot_summary,
    )
    return results


def load_learned(run: Run, workdir: Path, step: int | None) -> tuple[Policy, int]:
    """The manager of a checkpoint (the newest for None) as a policy, and its step."""
    model = world_job.make_models(run.config).manager
    model, step = world_job.load_manager(run.config, workdir, model, step)
    return protocol.learned_policy(model, world_job.memory_config(run.config)), step


def follow_run(run: Run, workdir: Path, *, poll_seconds: float, timeout: float) -> None:
    """Evaluates the learned manager at every new checkpoint until the last step is there."""

    def evaluate_step(step: int) -> dict:
        policy, _ = load_learned(run, workdir, step)
        entry = protocol.summarise("learned", evaluate(run, policy), run.streams)
        return {k: entry[k] for k in ("accuracy", "se", "slots", "tokens")}

    num_steps = run.config.manager.num_steps
    follow.follow(workdir, num_steps, evaluate_step, poll_seconds=poll_seconds, timeout=timeout)
