"""What the benchmarks share: arguments, a trained run to measure, the JSON line they end with."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from mmmem_jax import flags, provenance
from mmmem_jax.errors import UserError
from mmmem_jax.train import checkpoints, world_job

RESULTS = Path(__file__).resolve().parent / "results"


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser of --full and --workdir; add a benchmark's own flags."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="what the committed result needs")
    parser.add_argument(
        "--workdir",
        type=Path,
        help="folder of trained runs, trained there if absent (default: runs/benchmarks/NAME)",
    )
    return parser


def workdir(args: argparse.Namespace, name: str) -> Path:
    """The folder of the benchmark's runs; by default quick and full ones do not share it."""
    return args.workdir or Path("runs/benchmarks") / (name if args.full else f"{name}_quick")


def emit(name: str, result: dict, *, full: bool, seeds: list[int] | None = None) -> None:
    """Prints the result with its provenance as one JSON line; a full one is also saved."""
    result = result | ({} if seeds is None else {"seeds": seeds}) | provenance.provenance()
    if full:
        provenance.write_json(RESULTS / f"{name}.json", result)
    print(json.dumps(result), flush=True)


def run(name: str, doc: str, measure: Callable[[bool, Path], dict]) -> None:
    """The whole of a simple benchmark: `measure(full, workdir)` gives the keys of the result."""
    args = make_parser(doc).parse_args()
    flags.log_plainly()
    try:
        result = measure(args.full, workdir(args, name))
    except UserError as error:
        sys.exit(f"{name}: {error}")
    emit(name, result, full=args.full)


def load_config(name: str, arg: str = "") -> ConfigDict:
    """The config of configs/NAME.py for an argument."""
    return importlib.import_module(f"configs.{name}").get_config(arg)


def make_config(full: bool) -> ConfigDict:
    """The main job's config, its toy version if not `full`."""
    return load_config("sib_grpo", "" if full else "smoke")


def train(config: ConfigDict, folder: Path) -> None:
    """Trains a run of `config` in `folder`, or does nothing if it is finished."""
    checkpoints.claim_workdir(folder, config.to_dict())
    last = max(checkpoints.steps(folder / "checkpoints" / "manager"), default=-1)
    if last < config.manager.num_steps:
        world_job.run(config, folder)


def trained_config(full: bool, folder: Path) -> ConfigDict:
    """The config of the run in `folder`, trained to its end; a new run takes `make_config`."""
    if (folder / "config.json").exists():
        config = ConfigDict(checkpoints.read_config(folder))
    else:
        config = make_config(full)
    train(config, folder)
    return config
