"""What holds for all launch scripts: help, and one line for whatever is missing."""

import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPO = Path(__file__).resolve().parents[2]
SOURCED = {"common.sh", "venv.sh"}
SCRIPTS = sorted(path.name for path in (REPO / "launch").glob("*.sh") if path.name not in SOURCED)

# The most that a command needs, and what it is told to be missing without.
TPU = {
    "--project": "PROJECT_ID",
    "--zone": "ZONE",
    "--name": "TPU_NAME",
    "--accelerator-type": "ACCELERATOR_TYPE",
    "--workdir": "MMMEM_WORKDIR",
}
GKE = {
    "--name": "JOBSET_NAME",
    "--image": "IMAGE",
    "--accelerator": "TPU_ACCELERATOR",
    "--topology": "TPU_TOPOLOGY",
    "--workdir": "MMMEM_WORKDIR",
}
VALUES = {
    "--project": "p",
    "--zone": "z",
    "--name": "n",
    "--accelerator-type": "v5p-8",
    "--workdir": "gs://b/r",
    "--image": "r/i",
    "--accelerator": "tpu-v5p-slice",
    "--topology": "2x2x1",
}
CODE = ["--repo=https://example.com/r.git", "--ref=main"]
NEEDS = [
    *(("tpu.sh", "create", CODE, TPU, flag) for flag in TPU),
    *(("gke.sh", "apply", [], GKE, flag) for flag in GKE),
    ("slurm.sh", "submit", [], {"--name": "MMMEM_JOB"}, "--name"),
]


def _flags(names):
    return [f"{name}={VALUES[name]}" for name in names]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_purpose(machine, script):
    done = machine.launch(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ")
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    shebang, purpose, *_ = (REPO / "launch" / script).read_text().splitlines()
    assert shebang == "#!/usr/bin/env bash"
    assert purpose.startswith("# ")
    assert script in (REPO / "launch/README.md").read_text() or script == "slurm_job.sh"


@pytest.mark.parametrize(("script", "command", "given", "needed", "missing"), NEEDS)
def test_names_the_flag_and_the_variable_that_is_missing(
    machine, script, command, given, needed, missing
):
    rest = [*given, *_flags(needed.keys() - {missing}), "--dry-run"]
    done = machine.launch(script, command, *rest)
    assert done.returncode == 2
    assert done.stdout in ("", f"cd '{machine.clone}'\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: {missing} is missing")
    assert needed[missing] in line
    with_variable = machine.launch(script, command, *rest, **{needed[missing]: VALUES[missing]})
    assert with_variable.returncode == 0, with_variable.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["tpu.sh", "fly"], "unknown command fly"),
        (["tpu.sh", "create", "--colour=red"], "unknown flag --colour"),
        (["tpu.sh", "create", "--spot=yes"], "unknown flag --spot"),
        (["tpu.sh", "create", "--zone"], "--zone needs a value"),
        (["tpu.sh", "create", "--zone="], "--zone needs a value"),
        (["tpu.sh", "create", "extra"], "unknown flag extra"),
        (["tpu.sh", "create", "--", "--workdir=x"], "--workdir before --"),
        (["tpu.sh", "create", "--", "--config", "x"], "--config before --"),
        (["tpu.sh", "create", "--", "a\nb"], "line break"),
        (["tpu.sh", "status", "--project=p", "--zone=z", "--name=-n"], "--name=-n"),
        (["tpu.sh", "status", "--project=p", "--zone=z", "--name=A b"], "--name=A b"),
        (["tpu.sh", "keep", "--poll=soon"], "--poll=soon"),
        (["gke.sh", "apply", "--name=n;m"], "--name=n;m"),
        (["slurm.sh", "submit", "--name=n", "--nodes=two"], "not two"),
        (["slurm.sh", "submit", "--name=n", "--nodes=x[$(touch pwned)]"], "not x["),
        (["slurm.sh", "setup", "--jax=rocm"], "--jax=rocm"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(machine, args, said):
    split = args.index("--") if "--" in args else len(args)
    done = machine.launch(*args[:split], "--dry-run", *args[split:])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{args[0]}: ")
    assert said in line
    assert not (machine.clone / "pwned").exists()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--workdir=/tmp/run", "must be a folder in a bucket"),
        ("--workdir=gs://bucket", "must be a folder in a bucket"),
        ("--workdir=gs://b/run*", "patterns"),
        ("--workdir=gs://b/r||s", "||"),
        ("--repo=git@example.com:r.git", "https://"),
        ("--repo=https://me:secret@example.com/r.git", "credentials"),
        ("--ref=--upload-pack=x", "--ref="),
        ("--accelerator-type=h100", "--runtime-version"),
    ],
)
def test_a_tpu_gets_no_setting_that_cannot_work(machine, flag, said):
    done = machine.launch("tpu.sh", "create", *CODE, *_flags(TPU), flag, "--dry-run")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("args", "tool"),
    [
        (["tpu.sh", "create", *CODE, *_flags(TPU)], "gcloud"),
        (["tpu.sh", "delete", *_flags(["--project", "--zone", "--name"])], "gcloud"),
        (["gke.sh", "apply", *_flags(GKE)], "kubectl"),
        (["gke.sh", "image", "--image=r/i"], "docker"),
        (["slurm.sh", "submit", "--name=n"], "sbatch"),
    ],
)
def test_names_the_tool_that_is_missing(machine, args, tool):
    for name in ("bash", "basename", "cat", "dirname", "git"):
        (machine.state / "bin" / name).symlink_to(shutil.which(name))
    done = machine.launch(*args, PATH=str(machine.state / "bin"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{args[0]}: {tool} is not on PATH: ")


@pytest.mark.parametrize("extra", ["tpu", "cuda12", "cuda13"])
def test_what_the_scripts_install_suits_the_pins(extra):
    """`pip install -c requirements.txt jax[EXTRA]` finds versions that go together."""
    python = {"python_version": "{}.{}".format(*sys.version_info)}
    lines = (REPO / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = {pin.name: pin for pin in pins if pin.marker is None or pin.marker.evaluate(python)}
    if pins["jax"].specifier != Requirement(f"jax=={metadata.version('jax')}").specifier:
        pytest.skip("another jax than the pinned one is installed")
    asked = [Requirement(line) for line in metadata.requires("jax")]
    asked = [need for need in asked if need.marker and need.marker.evaluate({"extra": extra})]
    assert {"jaxlib"} <= {need.name for need in asked}
    for need in asked:
        if need.name in pins:
            (pin,) = pins[need.name].specifier
            assert need.specifier.contains(pin.version), (str(need), str(pins[need.name]))
