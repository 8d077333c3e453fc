"""One program on any mesh: the same manager from 1 to 8 devices, and a plan for 256 TPU chips.

Claim: 20 updates of the manager end in the same parameters within float tolerance on any mesh of
streams x generations x hidden units, groups split over devices included; and compiled ahead of time
for v5p:8x8x4 and v6e:16x16 no device gathers the trajectories of others.

    python benchmarks/scaling.py [--full]

Needs libtpu (pip install 'mmmem_jax[aot]'), and no TPU. The devices of the first part are
processors that XLA makes up of this one. In the second part batch and group grow with the mesh, so
that each device has what the default config gives one: 16 streams x 8 generations of 256 chunks.
Keys: max_abs_diff of any parameter from those of one device, over the meshes (`diffs` has each, and
moved how far training took any parameter); trajectory_all_gathers of all topologies; per_device_gb
of each topology; topologies: mesh, chips, batch and group, memory, and the collectives: how many
the program has, how often they run in an update, and the bytes that each device then gets.
"""

import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from benchmarks import common
from mmmem_jax.data import encoded
from mmmem_jax.train import plan, sharding, world_job

# data x group x model; of the topologies all devices.
MESHES = ((1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 4, 1), (4, 2, 1), (2, 2, 2))
NUM_UPDATES = 20
TOPOLOGIES = {"v5p:8x8x4": (64, 4, 1), "v6e:16x16": (32, 4, 2)}


def train(config, streams, mesh):
    """The manager's parameters on the host, before any update and after the last."""
    models = world_job.make_models(config)
    start, update = world_job.manager_program(config, mesh, models.manager, models.reader)
    before = jax.device_get(start.params)
    state, update = sharding.place(mesh, start), jax.jit(update, donate_argnums=0)
    loader = encoded.make_loader(
        streams,
        seed=config.seed,
        batch_size=config.manager.batch_size,
        questions_per_stream=config.manager.questions_per_stream,
    )
    for _ in range(config.manager.num_steps):
        state, _ = update(state, sharding.put_batch(mesh, next(loader)))
    return before, jax.device_get(state.params)


def farthest(a, b) -> float:
    """The largest absolute difference of two trees."""
    return max(
        float(np.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def agreement(config, meshes) -> dict:
    """How far the parameters of each mesh are from those of the first one."""
    made = world_job.make_streams(config, "train", config.streams.train)
    streams = world_job.encode_streams(world_job.make_models(config).eye, made, config.dim)
    trained = {}
    for shape in meshes:
        trained[shape] = train(config, streams, sharding.make_mesh(*shape))
    start, first = trained[meshes[0]]
    diffs = {
        " x ".join(map(str, shape)): farthest(params, first)
        for shape, (_, params) in trained.items()
    }
    return {
        "max_abs_diff": max(diffs.values()),
        "diffs": diffs,
        "moved": farthest(start, first),
        "num_updates": config.manager.num_steps,
    }


def scaled(config, shape):
    """The config on a mesh of this shape, each device with what one device has by `config`."""
    config = config.copy_and_resolve_references()
    config.mesh.update(dict(zip(sharding.AXES, shape, strict=True)))
    config.manager.batch_size *= config.mesh.data
    config.sib.num_generations *= config.mesh.group
    return config


def gathers_trajectories(found: plan.Collective, config) -> bool:
    """Whether the exchange brings trajectories [B, G, T, ...] of several devices together.

    A device's own part has B/data x G/group x T numbers a decision, and a gathered one twice that.
    """
    own = config.manager.batch_size // config.mesh.data
    own *= config.sib.num_generations // config.mesh.group * config.world.num_chunks
    return found.kind == "all-gather" and any(size >= 2 * own for size in found.sizes)


def compile_for(config, topology: str) -> dict:
    """What the update of a config needs of a topology."""
    devices = plan.topology_devices(topology)
    program = world_job.plan_manager(config, devices)
    started = time.monotonic()
    compiled = plan.compile_program(program)
    seconds = time.monotonic() - started
    memory, found = plan.memory_of(compiled), plan.collectives_of(compiled.as_text())
    kinds = defaultdict(list)
    for collective in found:
        kinds[collective.kind].append(collective)
    return {
        "mesh": dict(program.mesh.shape),
        "chips": program.mesh.size,
        "batch_size": config.manager.batch_size,
        "num_generations": config.sib.num_generations,
        "per_device_gb": sum(memory) / 1e9,
        "hbm_gb": plan.memory_of_device(topology, devices[0]) / 1e9,
        "memory": memory._asdict(),
        "collectives": {
            kind: {
                "count": len(alike),
                "times": sum(c.times for c in alike),
                "bytes": sum(c.times * c.num_bytes for c in alike),
                "largest": max(alike, key=lambda c: c.num_bytes).shapes,
            }
            for kind, alike in sorted(kinds.items())
        },
        "trajectory_all_gathers": sum(gathers_trajectories(c, config) for c in found),
        "seconds_to_compile": round(seconds, 1),
    }


def measure(full: bool, workdir: Path) -> dict:
    """Both parts; without `full` a few updates on two meshes, and one topology."""
    del workdir
    config, toy = common.make_config(full=True), common.make_config(full=False)
    meshes, topologies = MESHES, TOPOLOGIES
    if not full:
        meshes, topologies = (MESHES[0], MESHES[-1]), {"v5p:2x2x2": (2, 2, 2)}
    plan.topology_devices(next(iter(topologies)))  # says at once if libtpu is missing
    jax.config.update("jax_num_cpu_devices", 8)
    toy.manager.update({"batch_size": 8, "num_steps": NUM_UPDATES if full else 2})
    toy.sib.num_generations = 8
    agreed = agreement(toy, meshes)
    compiled = {name: compile_for(scaled(config, topologies[name]), name) for name in topologies}
    return {
        **agreed,
        "trajectory_all_gathers": sum(x["trajectory_all_gathers"] for x in compiled.values()),
        "per_device_gb": {name: x["per_device_gb"] for name, x in compiled.items()},
        "topologies": compiled,
        "seeds": [config.seed],
    }


if __name__ == "__main__":
    common.run("scaling", __doc__, measure)
