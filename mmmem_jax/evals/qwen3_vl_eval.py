"""Evaluation of a Qwen3-VL run: the adapter, the untrained policy and fixed rules on test streams.

Every policy starts from an empty memory and is judged by the reader of the run at the stream's end,
by accuracy and by the terms of eq. 10 that it was trained on. The rules know nothing of a clip: one
keeps all, so that the newest are left in a full memory, and one drops all, which tells what can be
guessed. The teacher of the warm start knows which clips questions can need, where that is given.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmmem_jax import provenance
from mmmem_jax.data.token_streams import TokenStream
from mmmem_jax.evals import outputs, protocol
from mmmem_jax.evals.table import number, plus_minus
from mmmem_jax.memory import traces
from mmmem_jax.memory.traces import Traces
from mmmem_jax.memory.types import ADD_NEW, DISCARD, NUM_ACTIONS
from mmmem_jax.models.qwen3_vl import lora
from mmmem_jax.models.qwen3_vl.config import Qwen3VLConfig, read_config
from mmmem_jax.models.qwen3_vl.conversation import mesh_over_heads
from mmmem_jax.sib.token_rollout import encode_frames, held, rollout
from mmmem_jax.sib.token_update import decisions_of, log_probs_of
from mmmem_jax.train import checkpoints, distributed, qwen3_vl_job, sft, sharding
from mmmem_jax.train.qwen3_vl_job import Setup


class Run(NamedTuple):
    """A run's config, its model, and held-out streams [S, T]."""

    config: ConfigDict
    mesh: Mesh
    setup: Setup
    test: TokenStream


class Records(NamedTuple):
    """What the memories of S streams (means over generations) were worth; NumPy arrays."""

    right: np.ndarray  # [S, Q] share of memories from which the likeliest option is the right one
    probability: np.ndarray  # [S, Q] of the right option
    length: np.ndarray  # [S] tokens held
    log_ratio: np.ndarray  # [S] of all decisions, to the untrained policy, nats
    shares: np.ndarray  # [S, 3] of the actions


def load_run(workdir: Path) -> Run:
    """The config of a workdir, its model with a new adapter, and the test streams.

    Raises:
      UserError: if it is no workdir, or its model cannot be loaded.
    """
    config = ConfigDict(checkpoints.read_config(workdir))
    folder = qwen3_vl_job.find_folder(config, workdir)
    mesh = make_mesh(config, read_config(folder))
    setup = qwen3_vl_job.load_setup(config, mesh, folder)
    return Run(config, mesh, setup, qwen3_vl_job.make_streams(config, "test", folder))


def make_mesh(config: ConfigDict, model_config: Qwen3VLConfig) -> Mesh:
    """The mesh of training; on fewer devices, all that the model's heads can be split over."""
    mesh = config.mesh
    if max(mesh.data, 1) * mesh.group * mesh.model <= len(jax.devices()):
        return sharding.make_mesh(**mesh)
    return mesh_over_heads(model_config, jax.devices())


def _records(read_fn: Callable, base, batch: TokenStream, memories: Traces, log_ratio, action):
    """Records of memories [B, G] of a batch, still on the devices."""
    log_probs = read_fn(base, memories, batch)
    answer = jnp.broadcast_to(batch.answer[:, None, :, None], (*log_probs.shape[:3], 1))
    right = jnp.argmax(log_probs, -1) == answer[..., 0]
    probability = jnp.exp(jnp.take_along_axis(log_probs, answer, axis=-1)[..., 0])
    taken = (action[..., None] == jnp.arange(NUM_ACTIONS)) & batch.valid[:, None, :, None]
    shares = taken.sum((1, 2)) / jnp.maximum(taken.sum((1, 2, 3))[:, None], 1)
    whole = (right.astype(jnp.float32), probability, held(memories), log_ratio)
    return Records(*(x.mean(1) for x in whole), shares)


def make_model_fn(run: Run) -> Callable:
    """(adapter, base, batch) -> Records of the policy of an adapter, sampled as in training."""
    config, setup = run.config, run.setup

    @jax.jit
    def evaluate(adapter: nnx.State, base: nnx.State, batch: TokenStream) -> Records:
        params = lora.join(adapter, base)
        ref_params = lora.join(lora.without_lora(adapter), base)
        visual = encode_frames(
            setup.decider, nnx.merge(setup.decider.graphdef, params), batch.patches
        )
        traj = rollout(
            setup.decider,
            params,
            jax.random.key(config.seed),
            batch,
            visual,
            init_traces=traces.init(**config.memory),
            read_fn=lambda memories: jnp.zeros(memories.count.shape),
            num_generations=config.sib.num_generations,
            credit="trajectory",
            shard=sharding.make_shard(run.mesh),
        )
        decisions = decisions_of(
            batch, visual, traj.nodes, traj.ids, traj.token_valid, config.sib.clips_at_once
        )
        ref_log_prob, _ = log_probs_of(setup.decider, ref_params, decisions)
        log_ratio = jnp.where(traj.valid, traj.log_prob - ref_log_prob, 0.0).sum(-1)
        return _records(setup.reader_fn, ref_params, batch, traj.traces, log_ratio, traj.action)

    return evaluate


def make_rule_fn(run: Run) -> Callable:
    """(actions [B, T], base, batch) -> Records of given actions; they have no log-ratio."""
    config, setup = run.config, run.setup

    @jax.jit
    def evaluate(action, base: nnx.State, batch: TokenStream) -> Records:
        followed = sft.follow(setup.decider, batch, action, traces.init(**config.memory))
        params = lora.join(lora.without_lora(setup.adapter), base)
        no_ratio = jnp.full(followed.traces.count.shape, jnp.nan)
        return _records(setup.reader_fn, params, batch, followed.traces, no_ratio, action[:, None])

    return evaluate


def over_streams(run: Run, evaluate_fn: Callable[[TokenStream], Records]) -> Records:
    """Records of all test streams, a batch of training's size at a time.

    The last batch is filled up with the first streams again.
    """
    size, count = run.config.manager.batch_size, len(run.test.valid)
    split = distributed.split_batch(run.mesh, size)
    parts = []
    for start in range(0, count, size):
        rows = np.arange(start, start + size) % count
        batch = jax.tree.map(lambda x, rows=rows: x[rows], run.test)
        parts.append(jax.device_get(evaluate_fn(jax.device_put(batch, split))))
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)


def summarise(name: str, records: Records, run: Run) -> dict:
    """The policy's entry of results.json; errors are clustered by stream."""
    asked, sib = run.test.asked, run.config.sib
    accuracy = protocol.accuracy_and_error(records.right, asked)
    task = protocol.accuracy_and_error(records.probability, asked)
    length, log_ratio = float(records.length.mean()), float(records.log_ratio.mean())
    weighted = sib.beta1 * length + sib.beta2 * float(np.nan_to_num(log_ratio))
    return {
        "name": name,
        "accuracy": accuracy["accuracy"],
        "accuracy_se": accuracy["se"],
        "task": task["accuracy"],
        "task_se": task["se"],
        "length": length,
        "log_ratio": log_ratio,
        "reward": None if task["accuracy"] is None else task["accuracy"] - weighted,
        "actions": records.shares.mean(0).tolist(),
    }


def compare(run: Run, adapter: nnx.State) -> list[dict]:
    """The entries of all policies."""
    model_fn, rule_fn = make_model_fn(run), make_rule_fn(run)
    entries = []
    for name, one in (("learned", adapter), ("untrained", lora.without_lora(adapter))):
        records = over_streams(run, partial(model_fn, one, run.setup.base))
        entries.append(summarise(name, records, run))
    rules = {
        "teacher": lambda batch: batch.teacher,
        "add all": lambda batch: jnp.full(batch.valid.shape, ADD_NEW),
        "discard all": lambda batch: jnp.full(batch.valid.shape, DISCARD),
    }
    if not qwen3_vl_job.knows_evidence(run.test):
        del rules["teacher"]
    for name, action_fn in rules.items():
        records = over_streams(
            run, lambda batch, fn=action_fn: rule_fn(fn(batch), run.setup.base, batch)
        )
        entries.append(summarise(name, records, run))
    return entries


def format_table(entries: Sequence[dict]) -> str:
    """Accuracy and the reward of eq. 10 with its terms before weighting, in aligned ASCII."""
    head = ("accuracy", "task", "length", "log ratio", "reward", "add/merge/discard")
    lines = ["policy".ljust(12) + "".join(x.rjust(18) for x in head)]
    for e in entries:
        cells = (
            plus_minus(e["accuracy"], e["accuracy_se"], "+-"),
            plus_minus(e["task"], e["task_se"], "+-"),
            number(e["length"], 1),
            number(e["log_ratio"], 2),
            number(e["reward"], 3),
            "/".join(f"{share:.2f}" for share in e["actions"]),
        )
        lines.append(e["name"].ljust(12) + "".join(x.rjust(18) for x in cells))
    return "\n".join(lines)


def full_evaluation(run: Run, workdir: Path, step: int | None) -> dict:
    """Evaluates a checkpoint, the newest for None, and writes WORKDIR/eval/results.json.

    Raises:
      UserError: if there is no such checkpoint.
    """
    started = time.monotonic()
    adapter, step = qwen3_vl_job.load_adapter(run.config, workdir, run.mesh, run.setup, step)
    results = {
        "title": "What Qwen3-VL learned to keep",
        **provenance.provenance(),
        "seed": run.config.seed,
        "step": step,
        "num_streams": len(run.test.valid),
        "num_questions": int(run.test.asked.sum()),
        "policies": compare(run, adapter),
        "seconds": time.monotonic() - started,
    }
    provenance.write_json(workdir / "eval" / "results.json", outputs.without_nan(results))
    return results
