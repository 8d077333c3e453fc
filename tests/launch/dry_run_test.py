"""What --dry-run prints is what is stored, and is what is run.

    MMMEM_REGENERATE=1 python -m pytest tests/launch/dry_run_test.py

writes tests/launch/expected/ anew; read the difference before committing it.
"""

import os
from pathlib import Path

import pytest

EXPECTED = Path(__file__).parent / "expected"

HOSTILE = ['--config.note=it\'s "$(touch pwned)" `x` ; & \\ *', "--profile_steps=3"]
TPU = ["--project=my-project", "--zone=my-zone", "--name=my-tpu"]
CODE = ["--repo=https://example.com/mmmem.git", "--ref=0123abc"]
PROGRAM = ["--workdir=gs://my-bucket/run 1", *CODE]
SPOT = ["--accelerator-type=v5p-128", "--spot", "--autocheckpoint", "--service-account=a@b.c"]
GKE = ["--name=my-job"]
GKE_JOB = [*GKE, "--image=my-registry/mmmem:1", "--accelerator=tpu-v5p-slice", "--topology=4x4x8"]
GKE_QUEUE = ["--queue=my-queue", "--spot", "--service-account=my-ksa", "--context=c"]
SLURM = ["--name=my-job"]
SLURM_JOB = ["--nodes=2", "--gpus-per-node=8", "--cpus-per-task=12", "--time=1-00:00:00"]

DRY_RUNS = {
    "tpu_create": ["tpu.sh", "create", *TPU, *PROGRAM, "--accelerator-type=v5litepod-16"],
    "tpu_create_spot": ["tpu.sh", "create", *TPU, *PROGRAM, *SPOT, "--", *HOSTILE],
    "tpu_keep": ["tpu.sh", "keep", *TPU, *PROGRAM, "--accelerator-type=v6e-8", "--spot"],
    "tpu_setup": ["tpu.sh", "setup", *TPU, *PROGRAM],
    "tpu_run": ["tpu.sh", "run", *TPU, *PROGRAM, "--config=configs/x.py:y", "--", *HOSTILE],
    "tpu_tail": ["tpu.sh", "tail", *TPU, "--worker=3"],
    "tpu_status": ["tpu.sh", "status", *TPU],
    "tpu_delete": ["tpu.sh", "delete", *TPU],
    "gke_image": ["gke.sh", "image", "--image=my-registry/mmmem:1"],
    "gke_apply": ["gke.sh", "apply", *GKE_JOB, "--workdir=gs://my-bucket/run"],
    "gke_apply_spot": [
        *["gke.sh", "apply", *GKE_JOB, *GKE_QUEUE, "--workdir=gs://my-bucket/run"],
        *["--", *HOSTILE],
    ],
    "gke_tail": ["gke.sh", "tail", *GKE],
    "gke_status": ["gke.sh", "status", *GKE, "--namespace=ns"],
    "gke_delete": ["gke.sh", "delete", *GKE],
    "slurm_setup": ["slurm.sh", "setup", *SLURM, "--jax=cuda13"],
    "slurm_submit": ["slurm.sh", "submit", *SLURM],
    "slurm_submit_nodes": ["slurm.sh", "submit", *SLURM, *SLURM_JOB, "--", *HOSTILE],
    "slurm_tail": ["slurm.sh", "tail", *SLURM],
    "slurm_status": ["slurm.sh", "status", *SLURM],
    "slurm_cancel": ["slurm.sh", "cancel", *SLURM],
}  # fmt: skip


def _dry(command):
    """A command line with --dry-run, which is a flag of the script: before any --."""
    end = command.index("--") if "--" in command else len(command)
    return [*command[:end], "--dry-run", *command[end:]]


@pytest.mark.parametrize("name", DRY_RUNS)
def test_prints_what_is_stored(machine, name):
    done = machine.launch(*_dry(DRY_RUNS[name]))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = done.stdout.replace(str(machine.clone), "CLONE")
    path = EXPECTED / f"{name}.txt"
    if os.environ.get("MMMEM_REGENERATE"):
        path.write_text(printed)
    assert printed == path.read_text()


def test_nothing_is_stored_that_is_not_tested():
    assert {path.stem for path in EXPECTED.iterdir()} == DRY_RUNS.keys()


# What a real run calls where there is nothing yet, and the lines of the dry run that say when.
REAL = {
    "tpu_create_spot": {"gcloud": "case $* in *describe*) echo NOT_FOUND >&2; exit 1 ;; esac"},
    "tpu_run": {"gcloud": "case $* in *describe*) echo ACTIVE ;; esac"},
    "tpu_tail": {"gcloud": "case $* in *describe*) echo ACTIVE ;; esac"},
    "gke_apply_spot": {"kubectl": 'case $* in *apply*) cat >> "$CALLS.in" ;; esac'},
    "gke_delete": {"kubectl": ""},
    "slurm_submit_nodes": {"squeue": "", "sbatch": ""},
    "slurm_cancel": {"scancel": ""},
}


@pytest.mark.parametrize("name", REAL)
def test_what_it_prints_is_what_it_runs(machine, name):
    """The printed text, fed to bash, makes every call of the real run, to the letter."""
    for command, body in REAL[name].items():
        machine.command(command, body)
    python = machine.clone / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/bin/true")
    received = machine.state / "calls.in"

    printed = machine.launch(*_dry(DRY_RUNS[name])).stdout
    assert machine.calls() == []
    copied = machine.run("bash", stdin=printed)
    assert copied.returncode == 0, copied.stderr
    copies = machine.calls()
    received_copy = received.read_text() if received.exists() else None
    received.unlink(missing_ok=True)

    done = machine.launch(*DRY_RUNS[name])
    assert done.returncode == 0, done.stderr
    calls = machine.calls()
    assert calls
    assert [call for call in calls if call not in copies] == []
    assert received_copy == (received.read_text() if received.exists() else None)
    assert not (machine.clone / "pwned").exists()
