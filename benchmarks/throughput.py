"""Decisions a second: the in-graph rollout against the released code's way of stepping a policy.

Claim: with the same manager network and the same memory, all streams of a batch rolled out in one
jitted program take at least 100 times as many decisions a second as an eager PyTorch policy that
goes one step at a time through one stream at a time (`torch_stepper.py`), on this machine. Both
first have to take the same actions on the same streams with the same noise.

    python benchmarks/throughput.py [--full]

Needs PyTorch: pip install 'mmmem_jax[benchmark]'. One minute, or three with --full.
Keys: jax, torch, ratio (decisions/s): each at its best, of 1, 2 and 4 times the streams of the main
job, and of 1 and 2 threads (`median` has all). jax_training counts the whole SIB-GRPO update
(rollout, reader, gradient steps) of the main job; same_actions is the share of actions that agree.
scheduler and load (1 minute's average at the start) tell whether the machine was another's too.
"""

import os
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import common
from mmmem_jax import memory
from mmmem_jax.data import encoded
from mmmem_jax.errors import UserError
from mmmem_jax.policies import manager
from mmmem_jax.sib.rollout import group_keys
from mmmem_jax.train import sharding, world_job

SEED = 0


def sharp_manager(config) -> manager.Manager:
    """The untrained manager with a random last layer in place of zeros, so that actions vary."""
    model = world_job.make_models(config).manager
    kernel = model.out.kernel
    kernel[...] = 0.5 * jax.random.normal(jax.random.key(SEED), kernel.shape)
    return model


def jax_rollout(config, model, mesh, num_generations: int):
    """(rng_key, items [B, T]) -> (states, outputs) of B x G streams that sample their actions."""
    shard = sharding.make_shard(mesh)
    graphdef, params = nnx.split(model)
    decide_fn = manager.make_decide_fn(graphdef)
    start = memory.init(world_job.memory_config(config))

    @jax.jit
    def rollout(rng_key, items):
        keys = group_keys(rng_key, len(items.valid), num_generations)

        def one(key, stream):
            return memory.scan(params, key, start, stream, decide_fn=decide_fn)

        return shard(jax.vmap(jax.vmap(one, in_axes=(0, None)))(shard(keys), items))

    return rollout


def draws(rng_key, num_chunks: int) -> np.ndarray:
    """Noise [T] by which `memory.scan` samples with this key from an empty memory."""
    return np.asarray(memory.pyramid.draw_noise(rng_key, jnp.arange(num_chunks))[:, 0])


def torch_weights(torch, model) -> dict:
    """The manager's parameters as PyTorch stores them, kernels transposed."""
    return {
        f"{layer}.{name}": torch.tensor(np.asarray(getattr(getattr(model, layer), name)[...]).T)
        for layer in ("item", "context", "mid", "out")
        for name in ("kernel", "bias")
        if getattr(getattr(model, layer), name, None) is not None
    }


def same_actions(torch, stepper, weights, memory_config, items, rollout, rng_key) -> float:
    """Share of actions of generation 0 that both take; the memories must then be equal too."""
    states, outputs = jax.device_get(rollout(rng_key, items))
    keys = group_keys(rng_key, len(items.valid), 1)[:, 0]
    shares = []
    for b in range(len(items.valid)):
        chunks = stepper.make_chunks(jax.tree.map(lambda x, b=b: np.asarray(x[b]), items))
        other = stepper.TorchMemory(weights, memory_config)
        noise = draws(keys[b], len(chunks)).tolist()
        actions, logits = zip(
            *(other.step(*x) for x in zip(chunks, noise, strict=True)), strict=True
        )
        shares.append(np.mean(np.array(actions) == outputs.action[b, 0]))
        if shares[-1] == 1.0:
            ours = jax.tree.map(lambda x, b=b: x[b, 0], states)
            pairs = (
                (torch.stack(logits), outputs.logits[b, 0]),
                (other.text, ours.episodic.text),
                (other.prototypes, ours.episodic.prototypes),
                (other.told, ours.sensory.text),
                (other.gloss, ours.schema.gloss),
                (other.grounding, ours.schema.grounding),
            )
            for theirs, mine in pairs:
                np.testing.assert_allclose(theirs.numpy(), mine, atol=1e-3)
    return float(np.mean(shares))


def time_torch(torch, stepper, weights, memory_config, chunks, num_threads: int) -> float:
    """Decisions a second through one stream."""
    torch.set_num_threads(num_threads)
    noise = (1.0 - torch.rand(len(chunks))).tolist()
    for _ in range(2):  # once to bring it back into the caches
        started = time.perf_counter()
        state = stepper.TorchMemory(weights, memory_config)
        for chunk, draw in zip(chunks, noise, strict=True):
            state.step(chunk, draw)
    return len(chunks) / (time.perf_counter() - started)


def time_jax(run, *args, decisions: int) -> float:
    """Decisions a second of a compiled call, after one that brings it back into the caches."""
    jax.block_until_ready(run(*args))
    started = time.perf_counter()
    jax.block_until_ready(run(*args))
    return decisions / (time.perf_counter() - started)


def training(config, model, streams, mesh):
    """A compiled SIB-GRPO update of the main job on these streams, and its arguments."""
    size, questions = config.manager.batch_size, config.manager.questions_per_stream
    loader = encoded.make_loader(
        streams, seed=SEED, batch_size=size, questions_per_stream=questions
    )
    batch = sharding.put_batch(mesh, next(loader))
    reader = world_job.make_models(config).reader
    state, update = world_job.manager_program(config, mesh, model, reader)
    return jax.jit(update), (sharding.place(mesh, state), batch)


def scheduling() -> dict:
    """The kernel's policy for this process, such as SCHED_OTHER, and the load as it starts."""
    if not hasattr(os, "sched_getscheduler"):  # macOS
        return {"scheduler": None, "load": os.getloadavg()[0]}
    policy = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
    names = ("SCHED_OTHER", "SCHED_BATCH", "SCHED_IDLE", "SCHED_FIFO", "SCHED_RR")
    named = {getattr(os, name): name for name in names}
    return {"scheduler": named.get(policy, str(policy)), "load": os.getloadavg()[0]}


def measure(full: bool, workdir: Path) -> dict:
    """Both rates from rounds that take turns, so that a busy moment of the machine meets both."""
    del workdir
    scheduled = scheduling()
    jax.config.update("jax_num_cpu_devices", os.cpu_count())  # streams are split over the cores
    try:
        import torch

        from benchmarks import torch_stepper
    except ImportError as error:
        raise UserError(f"{error}; pip install 'mmmem_jax[benchmark]' first") from None
    config = common.make_config(full)
    memory_config, model = world_job.memory_config(config), sharp_manager(config)
    eye = world_job.make_models(config).eye
    made = world_job.make_streams(config, "test", config.manager.batch_size)
    mesh = sharding.make_mesh(data=-1)
    streams = world_job.encode_streams(eye, made, config.dim)
    items = encoded.to_items(sharding.put_batch(mesh, streams))
    rng_key, num_streams = jax.random.key(SEED), len(items.valid)
    rollouts = {
        f"jax_{num_streams * g}": (jax_rollout(config, model, mesh, g), items.valid.size * g)
        for g in (config.sib.num_generations * k for k in (1, 2, 4))
    }
    update, arguments = training(config, model, streams, mesh)
    stepper, names = torch_stepper, (*rollouts, "torch_1", "torch_2", "jax_training")
    rates = {name: [] for name in names}
    with torch.inference_mode():
        weights = torch_weights(torch, model)
        common_args = (torch, stepper, weights, memory_config)
        agree = same_actions(*common_args, items, next(iter(rollouts.values()))[0], rng_key)
        for i in range(30 if full else 3):
            for name, (rollout, decisions) in rollouts.items():
                rates[name].append(time_jax(rollout, rng_key, items, decisions=decisions))
            stream = jax.tree.map(lambda x, i=i: np.asarray(x[i % len(x)]), items)
            chunks = stepper.make_chunks(stream)
            for n in (1, 2):
                rates[f"torch_{n}"].append(time_torch(*common_args, chunks, n))
    decisions = items.valid.size * config.sib.num_generations
    for _ in range(5 if full else 1):
        rates["jax_training"].append(time_jax(update, *arguments, decisions=decisions))
    median = {name: statistics.median(values) for name, values in rates.items()}
    ours = max(rollouts, key=median.get)
    best = max(median["torch_1"], median["torch_2"])
    return {
        "jax": median[ours],
        "torch": best,
        "ratio": median[ours] / best,
        "jax_training": median["jax_training"],
        "same_actions": agree,
        "torch_threads": 1 if best == median["torch_1"] else 2,
        "streams_at_once": int(ours.removeprefix("jax_")),
        "median": median,
        "devices": mesh.size,
        "quartiles": {k: np.quantile(v, (0.25, 0.75)).tolist() for k, v in rates.items()},
        "torch_version": torch.__version__,
        **scheduled,
        "seeds": [SEED, config.seed],
    }


if __name__ == "__main__":
    common.run("throughput", __doc__, measure)
