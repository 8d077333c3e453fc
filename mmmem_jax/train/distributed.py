"""A run of many processes: started by the same command, of one mind, and ending together.

Every process runs the same program on the devices of all. What a process of many must not do by
itself, such as write to the workdir, is done by process 0 alone (`is_first`); what all must agree
on is told by process 0 (`from_first`).
"""

import contextlib
import functools
import glob
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmmem_jax.errors import UserError

LOG = logging.getLogger("mmmem_jax")
HEARTBEAT_SECONDS = 60  # after which a process that is silent is lost, and the others end
CONNECT_SECONDS = 300  # for all processes to be there
EXPLICIT = {
    "coordinator_address": ("--coordinator", "JAX_COORDINATOR_ADDRESS"),
    "num_processes": ("--num_processes", "JAX_NUM_PROCESSES"),
    "process_id": ("--process_id", "JAX_PROCESS_ID"),
}
# Prints the last line that it was sent, if after it comes the number of SIGABRT.
SPEAKER = """
import sys
*lines, signals = sys.stdin.buffer.read().split(b"\\n")
if 6 in signals:
    print(lines[-1].decode(), file=sys.stderr)
"""


def arguments(given: Mapping[str, str | int | None], environ: Mapping[str, str]) -> dict | None:
    """What to call `jax.distributed.initialize` with; None for a process that is by itself.

    1. Flags, else the variables of `EXPLICIT`, say who takes part. All three or none are needed.
    2. Without them, JAX finds out where a cluster has started more than one process: srun (Slurm),
       mpirun (Open MPI), an indexed Kubernetes Job, or workers of a Cloud TPU.
    3. Everything else is one process by itself, which starts nothing.

    Args:
      given: values of the flags by the names of the arguments, None where not given.
      environ: environment variables.

    Raises:
      UserError: if one of the three is missing, is no number, or cannot be.
    """
    known = {}
    for name, (flag, variable) in EXPLICIT.items():
        value = given.get(name)
        value = environ.get(variable) if value is None else value
        if value not in (None, ""):
            known[name] = value if name == "coordinator_address" else _number(value, flag, variable)
    if known.get("num_processes") == 1:
        return None
    if known:
        missing = [" or ".join(EXPLICIT[name]) for name in EXPLICIT if name not in known]
        if missing:
            raise UserError(f"a run of many processes needs {' and '.join(missing)} too")
        if not 0 <= known["process_id"] < known["num_processes"]:
            raise UserError(
                f"--process_id is {known['process_id']}; of {known['num_processes']} processes it"
                " is 0 at least, and smaller than --num_processes"
            )
        if not known["coordinator_address"].rpartition(":")[2].isdigit():
            raise UserError(
                f"--coordinator is {known['coordinator_address']!r}; it must be HOST:PORT, a port"
                " that is free on the host of process 0"
            )
        return known | {"cluster_detection_method": "deactivate"}
    return {} if _cluster_size(environ) > 1 else None


def _number(value: str | int, flag: str, variable: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{flag} (or {variable}) is {value!r}; it must be a number") from None


def _cluster_size(environ: Mapping[str, str]) -> int:
    """How many processes JAX would find in the cluster that started this one; 1 for no cluster."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environ for name in slurm):  # a step of srun; sbatch itself has no step
        return int(environ.get("SLURM_NTASKS", 1))
    if "OMPI_MCA_orte_hnp_uri" in environ:
        return int(environ.get("OMPI_COMM_WORLD_SIZE", 1))
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if workers:  # GKE
        return len(workers.split(",")) * int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this is a pod of an indexed Job, and how many there are is not known: set "
                "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (JAX_NUM_PROCESSES=1"
                " for a single one), or install jax[k8s]"
            )
        return 2  # or one: JAX asks Kubernetes
    has_tpu = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    if has_tpu and importlib.util.find_spec("libtpu") and "TPU_SKIP_MDS_QUERY" not in environ:
        return 2  # or one: JAX asks the TPU VM's metadata server
    return 1


def initialize(given: Mapping[str, str | int | None]) -> None:
    """Joins the run that flags, environment or cluster say this process is part of.

    To be called once, before JAX has looked for its devices.

    Raises:
      UserError: if they contradict each other.
    """
    options = arguments(given, os.environ)
    if options is None:
        return
    say_if_aborted = make_speaker()
    say_if_aborted(
        f"main: no connection to the other processes within {CONNECT_SECONDS} s; start all of them"
        " at about the same time, with one address of process 0"
    )
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        if options or "coordinator_address" not in str(error):
            raise
        say_if_aborted("main: aborted")
        LOG.warning("no other process is found: this one is a run by itself")
        return
    say_if_aborted(f"main: {lost_line()}")
    if not is_first():
        LOG.setLevel(logging.WARNING)  # what all would say, process 0 says


def lost_line() -> str:
    """What is said where another process of the run is lost."""
    return (
        f"process {jax.process_index()} of {jax.process_count()} ends, as another process of the"
        " run was lost: see its log; start all again by the same command to go on"
    )


def make_speaker() -> Callable[[str], None]:
    """(line) -> None: what is printed last should JAX abort this process from now on.

    JAX does so where it cannot reach another process, from a thread of its own, and raises nothing.
    But Python's own handler of signals still writes their numbers to a pipe, and the process that
    reads there lives on.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    command = [sys.executable, "-I", "-S", "-c", SPEAKER]
    subprocess.Popen(command, stdin=reader, start_new_session=True)
    os.close(reader)
    signal.signal(signal.SIGABRT, signal.default_int_handler)  # any: it is never come to
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def say_if_aborted(line: str) -> None:
        os.write(writer, line.encode() + b"\n")

    return say_if_aborted


@contextlib.contextmanager
def ending_together(name: str) -> Iterator[None]:
    """Ends a process of many at once where it fails, for the others to notice; says why.

    Without it, a process that fails would wait for the others, and they for it.

    Args:
      name: of the program, which error lines start with.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        _end(f"{name}: interrupted", 130)
    except UserError as error:
        _end(f"{name}: {' '.join(str(error).split())}", 2)
    except Exception as error:
        if _is_lost(error):
            _end(f"{name}: {lost_line()} ({str(error).splitlines()[0]})", 1)
        traceback.print_exc()
        _end(f"{name}: stopped by this error", 1)


def _is_lost(error: Exception) -> bool:
    """Whether what failed is the communication with another process."""
    signs = ("Gloo", "gloo", "NCCL", "coordination service", "DEADLINE_EXCEEDED", "UNAVAILABLE")
    return any(sign in str(error) for sign in signs)


def _end(line: str, code: int) -> None:
    print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # JAX would wait for the others at exit


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def from_first(value: int) -> int:
    """The number that process 0 has; every process must call."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait_for_all(name: str) -> None:
    """Returns when every process has come to the point of this name."""
    multihost_utils.sync_global_devices(name)


def check_mesh(mesh: Mesh) -> None:
    """Raises UserError unless every process has devices of the mesh."""
    taking_part = {device.process_index for device in mesh.devices.flat}
    if len(taking_part) < jax.process_count():
        raise UserError(
            f"config.mesh takes devices of {len(taking_part)} of the {jax.process_count()} "
            f"processes; make it one of all {len(jax.devices())} devices, as config.mesh.data=-1 is"
        )


def split_batch(mesh: Mesh, batch_size: int) -> NamedSharding:
    """Splits B over 'data'; where that does not divide B, every device has the whole batch."""
    divides = batch_size % mesh.shape["data"] == 0
    return NamedSharding(mesh, PartitionSpec("data") if divides else PartitionSpec())


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a batch [B, ...] that the devices of this process hold, in order."""
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in held]))


def put_batch(sharding: NamedSharding) -> Callable:
    """(the local rows of a batch, on the host) -> the batch of all processes, on the devices."""
    return functools.partial(jax.make_array_from_process_local_data, sharding)


def to_host(tree):
    """A tree of arrays, wherever they lie, as NumPy arrays; every process must call."""

    def whole(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def to_local(tree):
    """A tree of arrays, wherever they lie, on one device of this process; all must call."""
    return jax.tree.map(jnp.asarray, to_host(tree))
