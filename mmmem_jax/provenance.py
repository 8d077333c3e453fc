"""Where a number comes from: date, machine, versions, command."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import jax

import mmmem_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on, Python first."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out | {"mmmem_jax": mmmem_jax.__version__}


def device() -> str:
    """The accelerator, or the processor with its number of cores."""
    found = jax.devices()
    if found[0].platform != "cpu":
        return f"{len(found)} x {found[0].device_kind}"
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


def command() -> str:
    """The command line that is running."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {module.name}" if module else sys.argv[0]
    return " ".join(["python", program, *map(_without_machine, sys.argv[1:])])


def _without_machine(argument: str) -> str:
    """`--flag=/some/where/name` as `--flag=name`: where a folder lies says nothing of a result."""
    flag, equals, value = argument.rpartition("=")
    return flag + equals + (Path(value).name if Path(value).is_absolute() else value)


def provenance() -> dict:
    """Keys date, device, versions and command of a result."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device(),
        "versions": versions(),
        "command": command(),
    }


def write_json(path: Path, value) -> None:
    """Writes JSON at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)
