"""Trains what a config describes.

    python -m mmmem_jax.main --config=configs/sib_grpo.py --workdir=runs/sib_grpo
    python -m mmmem_jax.main --config=configs/sib_grpo.py:smoke --workdir=/tmp/smoke
    python -m mmmem_jax.main --config=configs/sib_grpo.py --config.sib.credit=state --workdir=...

Checkpoints, metrics.jsonl and TensorBoard files go to the workdir. The same command run again
resumes where the run was stopped; a workdir of another config is refused. Then see eval_main.
"""

import importlib
from pathlib import Path

from mmmem_jax import flags
from mmmem_jax.errors import UserError

FLAGS = flags.FlagValues()
CONFIG = flags.define_config("configs/sib_grpo.py", FLAGS)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of checkpoints and metrics; required.", flag_values=FLAGS
)

JOBS = {
    "world": "mmmem_jax.train.world_job",
    "text": "mmmem_jax.train.text_job",
    "lite": "mmmem_jax.train.lite_job",
}


def main(argv: list[str]) -> None:
    """Runs the job that `config.job` names."""
    del argv
    if not WORKDIR.value:
        raise UserError("--workdir is missing; name a folder for the run, such as runs/sib_grpo")
    config = CONFIG.value
    if config.job not in JOBS:
        raise UserError(f"config.job is {config.job!r}; it must be one of {', '.join(JOBS)}")
    flags.log_plainly()
    importlib.import_module(JOBS[config.job]).run(config, Path(WORKDIR.value))


if __name__ == "__main__":
    flags.run(main, FLAGS, name="main", usage=__doc__)
