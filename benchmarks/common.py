"""What the benchmarks share: arguments, a trained run to measure, the JSON line they end with."""

import argparse
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from mmmem_jax import flags, provenance
from mmmem_jax.errors import UserError
from mmmem_jax.train import checkpoints, world_job

RESULTS = Path(__file__).resolve().parent / "results"
SHARED = ("perception", "reader", world_job.CALIBRATED)  # phases that come before the manager
# What may differ from the default config with --full.
FREE = ("seed", "mesh.data", "mesh.group", "mesh.model")


def make_parser(doc: str, *, needs_run: bool = False) -> argparse.ArgumentParser:
    """A parser of --full and --workdir, a folder that must be given if it `needs_run`; add a
    benchmark's own flags."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="what the committed result needs")
    parser.add_argument(
        "--workdir",
        type=Path,
        required=needs_run,
        help="folder of a finished run of configs/sib_grpo.py"
        if needs_run
        else "folder of trained runs, trained there if absent (default: runs/benchmarks/NAME)",
    )
    return parser


def workdir(args: argparse.Namespace, name: str) -> Path:
    """The folder of the benchmark's runs; by default quick and full ones do not share it."""
    return args.workdir or Path("runs/benchmarks") / (name if args.full else f"{name}_quick")


def emit(name: str, result: dict, *, full: bool, default_seeds: list[int] | None = None) -> None:
    """Prints the result with its provenance as one JSON line; a full one is also saved, unless its
    `seeds` are others than the default ones, where these are given."""
    result = result | provenance.provenance()
    path = RESULTS / f"{name}.json"
    if full and default_seeds not in (None, result["seeds"]):
        seeds = f"of the seeds {result['seeds']}, the record is of {default_seeds}"
        print(f"{name}: not saved to {path.name}: this run is {seeds}", file=sys.stderr)
    elif full:
        provenance.write_json(path, result)
    print(json.dumps(result), flush=True)


def report(
    name: str,
    args: argparse.Namespace,
    measure: Callable[[], dict],
    *,
    default_seeds: list[int] | None = None,
) -> None:
    """Ends with what `measure()` gives (see `emit`), or with one line where the user erred."""
    flags.log_plainly()
    try:
        result = measure()
    except UserError as error:
        sys.exit(f"{name}: {error}")
    emit(name, result, full=args.full, default_seeds=default_seeds)


def run(
    name: str,
    doc: str,
    measure: Callable[[bool, Path], dict],
    *,
    default_seeds: list[int] | None = None,
) -> None:
    """The whole of a simple benchmark: `measure(full, workdir)` gives the keys of the result."""
    args = make_parser(doc).parse_args()
    folder = workdir(args, name)
    report(name, args, lambda: measure(args.full, folder), default_seeds=default_seeds)


def load_config(name: str, arg: str = "") -> ConfigDict:
    """The config of configs/NAME.py for an argument."""
    return importlib.import_module(f"configs.{name}").get_config(arg)


def make_config(full: bool) -> ConfigDict:
    """The main job's config, its toy version if not `full`."""
    return load_config("sib_grpo", "" if full else "smoke")


def run_config(full: bool, folder: Path) -> ConfigDict:
    """The config of the run in `folder`.

    Raises:
      UserError: if there is none or of another job, or with `full` if its config is not the default
        one but for seed and mesh.
    """
    config = checkpoints.read_config(folder)
    if config.get("job") != "world":
        raise UserError(f"{folder} is no run of configs/sib_grpo.py; give another --workdir")
    if full:
        found = checkpoints.differences(config, make_config(full=True).to_dict())
        key = next((key for key in found if key not in FREE), None)
        if key is not None:
            there, wanted = found[key]
            raise UserError(
                f"--full is of the default config, but {folder} has {key} = {there} in place of "
                f"{wanted}; give another --workdir, or leave --full out"
            )
    return ConfigDict(config)


def copy_phases(base: Path, workdir: Path) -> None:
    """Gives `workdir` the eye and the reader of the run in `base`, where it has none yet."""
    for phase in SHARED:
        target = workdir / "checkpoints" / phase
        if not target.exists():
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(base / "checkpoints" / phase, partial)
            partial.rename(target)


def train(config: ConfigDict, folder: Path) -> None:
    """Trains a run of `config` in `folder`, or does nothing if it is finished."""
    checkpoints.claim_workdir(folder, config.to_dict())
    last = max(checkpoints.steps(folder / "checkpoints" / "manager"), default=-1)
    if last < config.manager.num_steps:
        world_job.run(config, folder)


def trained_config(full: bool, folder: Path) -> ConfigDict:
    """The config of the run in `folder`, trained to its end; a new run takes `make_config`."""
    found = (folder / "config.json").exists()
    config = run_config(full, folder) if found else make_config(full)
    train(config, folder)
    return config
