"""Trains what a config describes.

    python -m mmmem_jax.main --config=configs/sib_grpo.py --workdir=runs/sib_grpo
    python -m mmmem_jax.main --config=configs/sib_grpo.py:smoke --workdir=/tmp/smoke
    python -m mmmem_jax.main --config=configs/sib_grpo.py --config.sib.credit=state --workdir=...

    python -m mmmem_jax.main --compile_only --topology=v5p:8x8x4 --config=configs/sib_grpo.py
    python -m mmmem_jax.main ... --coordinator=HOST:PORT --num_processes=2 --process_id=0

Checkpoints, metrics.jsonl and TensorBoard files go to the workdir. The same command run again
resumes where the run was stopped; a workdir of another config is refused. Then see eval_main.

--compile_only trains nothing and writes nothing: it compiles the manager's update, for a TPU
topology without any TPU or for the devices that are here, prints what it needs of each device, and
exits with 0 if that fits and with 1 if it does not.

SIGTERM saves the step that is reached, writes preempted.json to the workdir, and exits with 0.

The same command on several machines, which share the workdir, is one run on all of their devices:
under Slurm (srun), on the workers of a Cloud TPU, in GKE and under mpirun as it stands; elsewhere
with the three flags above or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Where a
process is lost, the others end within a minute; then start all of them again.
"""

import importlib

from mmmem_jax import flags, remote
from mmmem_jax.errors import UserError
from mmmem_jax.models.weights import default_cache_dir

FLAGS = flags.FlagValues()
CONFIG = flags.define_config("configs/sib_grpo.py", FLAGS)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of checkpoints and metrics, here or gs://BUCKET/NAME; required.",
    flag_values=FLAGS,
)

COMPILE_ONLY = flags.DEFINE_bool(
    "compile_only", False, "Compile the manager's update and say if it fits.", flag_values=FLAGS
)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "With --compile_only: TPUs such as v5p:8x8x4.", flag_values=FLAGS
)
PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps",
    None,
    "Updates of the manager to trace for xprof in WORKDIR/profile: FIRST:LAST, or how many.",
    flag_values=FLAGS,
)
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder or gs:// address of compiled programs, kept between runs; otherwise that of "
    "JAX_COMPILATION_CACHE_DIR, or xla in the user's cache folder of mmmem_jax.",
    flag_values=FLAGS,
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Of many processes: HOST:PORT of process 0.", flag_values=FLAGS
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes the run has.", lower_bound=1, flag_values=FLAGS
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0.", lower_bound=0, flag_values=FLAGS
)

JOBS = {
    "world": "mmmem_jax.train.world_job",
    "text": "mmmem_jax.train.text_job",
    "lite": "mmmem_jax.train.lite_job",
    "qwen3_vl": "mmmem_jax.train.qwen3_vl_job",
}


def set_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder`, else where JAX was told, else in the user's cache."""
    import jax  # here, so that --help and mistakes need not wait for it

    if folder is None and jax.config.jax_compilation_cache_dir is None:
        folder = str(default_cache_dir() / "xla")
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder)


def main(argv: list[str]) -> int | None:
    """Runs the job that `config.job` names, or with --compile_only plans it."""
    del argv
    if not WORKDIR.value and not COMPILE_ONLY.value:
        raise UserError("--workdir is missing; name a folder for the run, such as runs/sib_grpo")
    if TOPOLOGY.value and not COMPILE_ONLY.value:
        raise UserError("--topology is of machines that are not here; add --compile_only")
    config = CONFIG.value
    if config.job not in JOBS:
        raise UserError(f"config.job is {config.job!r}; it must be one of {', '.join(JOBS)}")
    flags.log_plainly()
    set_compilation_cache(COMPILATION_CACHE.value)
    if COMPILE_ONLY.value:
        job = importlib.import_module(JOBS[config.job])
        plan = importlib.import_module("mmmem_jax.train.plan")
        return 0 if plan.report(job.plan_manager, config, TOPOLOGY.value) else 1
    profile = importlib.import_module("mmmem_jax.train.profile")
    steps = profile.parse_steps(PROFILE_STEPS.value) if PROFILE_STEPS.value is not None else None
    distributed = importlib.import_module("mmmem_jax.train.distributed")
    distributed.initialize(
        {
            "coordinator_address": COORDINATOR.value,
            "num_processes": NUM_PROCESSES.value,
            "process_id": PROCESS_ID.value,
        }
    )
    workdir = remote.folder(WORKDIR.value)
    with distributed.ending_together("main"), profile.tracing(steps, workdir / "profile") as traced:
        importlib.import_module(JOBS[config.job]).run(config, workdir, traced)
    return 0


if __name__ == "__main__":
    flags.run(main, FLAGS, name="main", usage=__doc__)
