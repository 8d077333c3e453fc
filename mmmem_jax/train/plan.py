"""What an update would need of devices that need not be there: memory, and what they exchange.

XLA compiles for a TPU topology by its name alone, on any machine that has libtpu; nothing runs.
"""

import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmmem_jax.data.encoded import EncodedStream
from mmmem_jax.data.token_streams import TokenStream
from mmmem_jax.errors import UserError
from mmmem_jax.sib.update import ManagerState
from mmmem_jax.train import sharding
from mmmem_jax.train.state import TrainState

# Gigabytes of HBM on a chip: https://docs.cloud.google.com/tpu/docs/v5p and its neighbours v4,
# v5e, v6e; each of their devices is a chip.
HBM_GB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
EXAMPLES = ("v5e:4x8", "v5e:16x16", "v5p:2x2x1", "v5p:8x8x4", "v6e:2x4", "v6e:16x16")
# What libtpu would else ask of a metadata server or complain of: no machine, no other process.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
    "ragged-all-to-all", "reduce-scatter",
)  # fmt: skip


class Program(NamedTuple):
    """An update to compile; the state, the batch and what is frozen may be shapes alone."""

    mesh: Mesh
    state: ManagerState | TrainState
    update: Callable
    batch: EncodedStream | TokenStream
    frozen: tuple = ()  # trees that the update takes after the batch
    rules: sharding.Rules = sharding.RULES  # where state and frozen arrays lie


class Collective(NamedTuple):
    """One exchange among devices in a compiled program."""

    kind: str  # of COLLECTIVES
    shapes: tuple[str, ...]  # of the arrays that a device gets, such as "f32[16,8]"
    sizes: tuple[int, ...]  # numbers in each
    num_bytes: int  # of these, each time
    times: int  # in a run of the program; a loop of unknown length counts once


class Memory(NamedTuple):
    """Bytes that a program takes on each device."""

    arguments: int
    outputs: int  # beyond those that take the place of arguments
    temporaries: int
    code: int


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology such as "v5p:8x8x4", none of which need be there.

    Raises:
      UserError: if libtpu is not installed, or knows no such topology.
    """
    if name.partition(":")[0] not in HBM_GB:
        raise UserError(f"unknown topology {name!r}; some that are known: {', '.join(EXAMPLES)}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, which compiles for TPUs, is missing: pip install 'mmmem_jax[aot]'")
    jax.config.update("jax_platforms", "cpu")  # a TPU that is here is not looked for, nor taken
    for key, value in ALONE.items():
        os.environ.setdefault(key, value)
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"unknown topology {name!r} ({reason}); some that are known: {', '.join(EXAMPLES)}"
        ) from error


def memory_of_device(topology: str | None, device: jax.Device) -> int:
    """Bytes that a device has: a chip's HBM; on a CPU, its share of the machine's memory."""
    if topology is not None:
        return int(HBM_GB[topology.partition(":")[0]] * 1e9)
    if stats := device.memory_stats():
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def compile_program(program: Program) -> jax.stages.Compiled:
    """The compiled update of a program, its state donated as in training."""
    mesh = program.mesh

    def on_mesh(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state, frozen = jax.tree.map(
        on_mesh,
        (program.state, program.frozen),
        sharding.by_rules(mesh, (program.state, program.frozen), program.rules),
    )
    batch = jax.tree.map(lambda x: on_mesh(x, sharding.batch_sharding(mesh)), program.batch)
    return jax.jit(program.update, donate_argnums=0).lower(state, batch, *frozen).compile()


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """What a device must hold to run the program, as XLA has planned it."""
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


_COMPUTATION = re.compile(r"(?:ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_COLLECTIVE = re.compile(rf" = (?P<type>.+?) (?P<kind>{'|'.join(COLLECTIVES)})(?P<start>-start)?\(")
_SHAPE = re.compile(r"(?P<dtype>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<dims>[\d,]*)\]")
_CALLED = re.compile(r"\b\w+=\{?(%[\w.-]+(?:, ?%[\w.-]+)*)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r" while\(.* condition=%(?P<name>[\w.-]+)")
_LIMIT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")


def collectives_of(hlo: str) -> list[Collective]:
    """The exchanges in the text of a compiled program (`Compiled.as_text`)."""
    computations = _computations(hlo)
    times = dict.fromkeys(computations, 0)
    times[next(reversed(computations))] = 1  # the entry is the last, all are after what they call
    for name in reversed(computations):
        for line in computations[name]:
            for called in _CALLED.findall(line):
                for other in called.replace("%", "").replace(" ", "").split(","):
                    if other in times:
                        times[other] += times[name] * _trips(line, computations)
    return [
        _collective(match, times[name])
        for name, lines in computations.items()
        for line in lines
        if (match := _COLLECTIVE.search(line))
    ]


def _computations(hlo: str) -> dict[str, list[str]]:
    """The lines of every computation of a program."""
    found, lines = {}, []
    for line in hlo.splitlines():
        if line[:1].strip() and (match := _COMPUTATION.match(line)):
            lines = found[match["name"]] = []
        lines.append(line)
    return found


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often an instruction runs what it calls: once, but for loops over a counter from 0."""
    if match := _TRIPS.search(line):
        return int(match[1])
    if not (match := _CONDITION.search(line)):
        return 1
    condition = "\n".join(computations[match["name"]])
    limits = _LIMIT.findall(condition)
    counts = len(limits) == 1 and re.search(r"ROOT .* compare\(.* direction=LT", condition)
    return int(limits[0]) if counts else 1


def _collective(match: re.Match, times: int) -> Collective:
    shapes = list(_SHAPE.finditer(match["type"]))
    if match["start"] and match["kind"] != "all-reduce":  # (what is sent, what is got, handles)
        shapes = [shape for shape in shapes if shape["dims"]]
        shapes = shapes[len(shapes) // 2 :]
    sizes = [math.prod(map(int, filter(None, shape["dims"].split(",")))) for shape in shapes]
    widths = [int(shape["bits"] or 8) for shape in shapes]
    return Collective(
        match["kind"],
        tuple(f"{shape['dtype']}[{shape['dims']}]" for shape in shapes),
        tuple(sizes),
        sum(size * width // 8 for size, width in zip(sizes, widths, strict=True)),
        times,
    )


def report(
    plan_fn: Callable[[ConfigDict, list[jax.Device]], Program],
    config: ConfigDict,
    topology: str | None,
) -> bool:
    """Prints what the update of a config needs on each device; returns whether it fits.

    Args:
      plan_fn: `plan_manager` of the config's job.
      config: of the run.
      topology: name of a TPU topology, None for the devices of this machine.

    Raises:
      UserError: if there is no such topology, or the config cannot be on it.
    """
    devices = jax.devices() if topology is None else topology_devices(topology)
    program = plan_fn(config, devices)
    shape = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    print(f"{program.mesh.size} of {len(devices)} {devices[0].device_kind}: mesh {shape}")
    available = memory_of_device(topology, devices[0])
    try:
        compiled = compile_program(program)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"does not fit in {_size(available)} a device: {str(error).splitlines()[0]}")
        return False
    memory = memory_of(compiled)
    print("a device: " + ", ".join(f"{n} {_size(x)}" for n, x in memory._asdict().items()))
    fits = sum(memory) <= available
    verdict = "fits" if fits else "does not fit"
    print(f"total {_size(sum(memory))} of {_size(available)}: {verdict}")
    found = collectives_of(compiled.as_text())
    print(f"collectives of an update: {len(found) or 'none'}")
    for kind, count in sorted(Counter(c.kind for c in found).items()):
        alike = [c for c in found if c.kind == kind]
        total = _size(sum(c.times * c.num_bytes for c in alike))
        largest = _size(max(c.num_bytes for c in alike))
        times = sum(c.times for c in alike)
        print(f"  {count} {kind}, run {times} times: {total} a device, {largest} at most at a time")
    return fits


def _size(num_bytes: int) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
