"""Evaluation of a lite run: the manager and every fixed rule on held-out made streams.

A question is asked when its stream has ended. Nodes are retrieved by what was told or seen; every
policy may read equally many clips, so that large nodes give no advantage.
"""

import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmmem_jax import provenance
from mmmem_jax.data.encoded import EncodedStream, to_items, to_questions
from mmmem_jax.data.lite_streams import FAMILIES
from mmmem_jax.evals import follow, outputs, protocol
from mmmem_jax.evals.protocol import Policy
from mmmem_jax.evals.table import NOT_RULES, number, plus_minus
from mmmem_jax.memory.types import MemoryConfig, MemoryState
from mmmem_jax.policies import rules, shipped
from mmmem_jax.policies.manager import Manager
from mmmem_jax.retrieval.text_search import node_cosines
from mmmem_jax.sib.rollout import episodic_tokens
from mmmem_jax.train import checkpoints, lite_job, text_job
from mmmem_jax.train.metrics import read_metrics

LOG = logging.getLogger("mmmem_jax")
SIMILARITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
CHANGES = (0.05, 0.1, 0.2, 0.4)
HALF_LIVES = (60.0, 300.0, 1800.0, 1e9)  # s


class Run(NamedTuple):
    """A run's config, held-out streams [S, T], and the temperature of retrieval from whole ones."""

    config: ConfigDict
    validation: EncodedStream
    test: EncodedStream
    temperature: float


class Records(NamedTuple):
    """What a policy's memories [S streams] gave to Q questions each; NumPy arrays."""

    mass: np.ndarray  # [S, Q] probability that retrieval lands on the evidence
    found: np.ndarray  # [S, Q] chance that the clips read hold evidence
    action: np.ndarray  # [S, T]
    slots: np.ndarray  # [S]
    tokens: np.ndarray  # [S] of the episodic stream


def load_run(workdir: Path) -> Run:
    """The config of a workdir and its held-out streams.

    Raises:
      UserError: if it is no workdir, or the streams cannot be made.
    """
    config = ConfigDict(checkpoints.read_config(workdir))
    validation, test = (lite_job.make_streams(config, split) for split in ("validation", "test"))
    temperature = text_job.calibrate_temperature(validation, visuals=True)
    return Run(config, validation, test, temperature)


@functools.partial(jax.jit, static_argnames="num_read")
def _ask(states: MemoryState, node_of_clip, batch: EncodedStream, temperature, *, num_read: int):
    """Evidence mass [S, Q], and the chance that a clip of the evidence is read [S, Q].

    For the chance nodes are read best first, until `num_read` clips are; of the last one, some at
    random.
    """

    def one(state, taken_by, query, evidence):
        stream = state.episodic
        held = (stream.node_id[:, None] == taken_by) & (taken_by >= 0) & stream.valid[:, None]
        wanted = jnp.any(evidence[..., None] == jnp.arange(len(taken_by)), axis=1)  # [Q, T]
        share = wanted @ held.T.astype(jnp.float32) / jnp.maximum(held.sum(1), 1)  # [Q, N]
        cosine = jnp.where(stream.valid, node_cosines(state, query, visuals=True), -1e9)
        landed = jax.nn.softmax(cosine / temperature) * jnp.minimum(num_read * share, 1.0)
        order = jnp.argsort(-cosine, axis=-1)
        size = held.sum(1)[order]
        read = jnp.clip(num_read - (jnp.cumsum(size, axis=1) - size), 0, size)
        found = jnp.sum(read * jnp.take_along_axis(share, order, axis=1), axis=1)
        return landed.sum(-1), jnp.minimum(found, 1.0)

    query = to_questions(batch).query
    return jax.vmap(one)(states, node_of_clip, query, jnp.asarray(batch.evidence))


def evaluate(run: Run, policy: Policy, streams: EncodedStream) -> Records:
    """Runs a policy over streams [S, T] and asks all their questions."""
    states, out = protocol.build(
        policy.params,
        jax.random.key(0),
        to_items(streams),
        decide_fn=policy.decide_fn,
        config=policy.config,
    )
    tokens = episodic_tokens(states)
    # Rules differ in update constants only, which no answer depends on: one program serves all.
    slots = states.episodic.valid.sum(-1)
    states = states.replace(config=lite_job.memory_config(run.config, policy.config.episodic_slots))
    mass, found = _ask(
        states, out.node_id, streams, run.temperature, num_read=run.config.clips_read
    )
    return Records(*jax.device_get((mass, found, out.action, slots, tokens)))


def summarise(name: str, records: Records, streams: EncodedStream) -> dict:
    """The policy's entry of results.json; errors are clustered by stream."""
    valid = streams.question_valid
    recall = protocol.accuracy_and_error(records.found, valid)
    mass = protocol.accuracy_and_error(records.mass, valid)
    return {
        "name": name,
        "recall": recall["accuracy"],
        "recall_se": recall["se"],
        "mass": mass["accuracy"],
        "mass_se": mass["se"],
        "slots": float(records.slots.mean()),
        "tokens": float(records.tokens.mean()),
        "actions": [float(np.mean(records.action == action)) for action in range(3)],
        "discards_of_unasked": _share(records.action[~streams.relevant] == 2),
        "discards_of_asked": _share(records.action[streams.relevant] == 2),
        "recall_by_family": {
            family: protocol.accuracy_and_error(records.found, valid & (streams.family == i))
            for i, family in enumerate(FAMILIES)
        },
    }


def _share(chosen: np.ndarray) -> float | None:
    return float(chosen.mean()) if chosen.size else None


def tune_rules(run: Run, memory: MemoryConfig) -> dict[str, float]:
    """Constants of the fixed rules under which retrieval does best on validation streams."""

    def score(rule):
        policy = protocol.rule_policy(rule, memory)
        entry = summarise(rule.name, evaluate(run, policy, run.validation), run.validation)
        return (entry["recall"], entry["mass"])

    similarity = max(SIMILARITIES, key=lambda x: score(rules.similarity_merge(x)))
    return {
        "similarity": similarity,
        "surprise_change": max(CHANGES, key=lambda x: score(rules.surprise(x))),
        "half_life": max(HALF_LIVES, key=lambda x: score(rules.forgetting_curve(x, similarity))),
    }


def policies_at(
    run: Run, model: Manager, memory: MemoryConfig, constants: dict[str, float]
) -> list[Policy]:
    """The manager and every fixed rule on one memory."""
    num_clips = run.config.world.num_clips
    fixed = rules.fixed_rules(num_clips, memory.episodic_slots, **constants)
    return [
        protocol.learned_policy(model, memory),
        *(protocol.rule_policy(rule, memory) for rule in fixed),
    ]


def settings(config: ConfigDict) -> dict[str, MemoryConfig]:
    """The budgets that policies are compared at: slots alone, and with so many tokens a slot."""
    out = {}
    for n in config.eval.slots:
        out[f"{n} slots"] = lite_job.memory_config(config, n)
        tokens = n * config.eval.tokens_per_slot
        out[f"{n} slots, {tokens} tokens"] = lite_job.memory_config(config, n, tokens)
    return out


def compare(run: Run, model: Manager) -> tuple[dict, dict]:
    """({budget: entries}, {budget: constants}); rules are tuned at every budget."""
    table, tuned = {}, {}
    for name, memory in settings(run.config).items():
        tuned[name] = tune_rules(run, memory)
        policies = policies_at(run, model, memory, tuned[name])
        table[name] = [summarise(p.name, evaluate(run, p, run.test), run.test) for p in policies]
        LOG.info("%s\n%s", name, format_table(table[name]))
    everything = lite_job.memory_config(run.config, run.config.world.num_clips)
    whole = [
        protocol.learned_policy(model, everything),
        protocol.rule_policy(rules.unlimited(), everything),
    ]
    table["unlimited"] = [summarise(p.name, evaluate(run, p, run.test), run.test) for p in whole]
    return table, tuned


def format_table(entries: Sequence[dict]) -> str:
    """Recall, evidence mass and cost of each policy in aligned ASCII."""
    head = ("recall", "evidence mass", "slots", "tokens", "add/merge/discard")
    lines = ["policy".ljust(18) + "".join(x.rjust(18) for x in head)]
    for e in sorted(entries, key=lambda e: (e["name"] not in NOT_RULES, -(e["recall"] or 0.0))):
        cells = (
            plus_minus(e["recall"], e["recall_se"], "+-"),
            plus_minus(e["mass"], e["mass_se"], "+-"),
            number(e["slots"]),
            number(e["tokens"], 0),
            "/".join(f"{share:.2f}" for share in e["actions"]),
        )
        lines.append(e["name"].ljust(18) + "".join(cell.rjust(18) for cell in cells))
    return "\n".join(lines)


def format_tables(table: dict) -> str:
    """The table of every budget under a line that names it."""
    return "\n".join(f"{name}\n{format_table(entries)}" for name, entries in table.items())


def full_evaluation(run: Run, workdir: Path, step: int, model: Manager) -> dict:
    """Compares all policies at one checkpoint and writes results.json below workdir/eval."""
    started = time.monotonic()
    table, tuned = compare(run, model)
    results = {
        "title": "What the memory of a video learned to keep",
        **provenance.provenance(),
        "seed": run.config.seed,
        "step": step,
        "num_streams": len(run.test.valid),
        "num_questions": int(run.test.question_valid.sum()),
        "clips_read": run.config.clips_read,
        "temperature": run.temperature,
        "table": table,
        "constants": tuned,
        "seconds": time.monotonic() - started,
    }
    provenance.write_json(workdir / "eval" / "results.json", outputs.without_nan(results))
    return results


def follow_run(run: Run, workdir: Path, *, poll_seconds: float, timeout: float) -> None:
    """Evaluates the manager alone at every new checkpoint until the last step is there."""
    memory = lite_job.memory_config(run.config, run.config.slots)

    def evaluate_step(step: int) -> dict:
        model, _ = text_job.load_manager(run.config, workdir, step)
        records = evaluate(run, protocol.learned_policy(model, memory), run.validation)
        entry = summarise("learned", records, run.validation)
        return {k: entry[k] for k in ("recall", "recall_se", "mass", "slots", "tokens")}

    num_steps = run.config.manager.num_steps
    follow.follow(workdir, num_steps, evaluate_step, poll_seconds=poll_seconds, timeout=timeout)


def export(run: Run, workdir: Path, model: Manager, results: dict, folder: Path) -> None:
    """Writes the manager that `policies.shipped` reads, with where it comes from and its scores.

    The rules' constants are those tuned at the first budget.
    """
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if "seconds_update" in row]
    seconds = [row["seconds_update"] + row["seconds_data"] for row in rows]
    budget = next(iter(results["table"]))
    header = {
        key: results[key] for key in ("date", "device", "versions", "command", "seed", "step")
    }
    header |= {
        "trained_by": "python -m mmmem_jax.main --config=configs/lite.py --workdir=RUN",
        "training_seconds": round(float(np.mean(seconds)) * run.config.manager.num_steps, 1),
        "config": run.config.to_dict(),
        "constants": results["constants"][budget],
        "num_streams": results["num_streams"],
        "num_questions": results["num_questions"],
        "held_out": results["table"],
    }
    shipped.write_manager(model, folder, outputs.without_nan(header))
