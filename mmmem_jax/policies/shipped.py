"""Policies for real videos by name: the shipped manager, a fixed rule, or the manager of a run.

The shipped manager lies in `lite/`: manager.safetensors, and manager.json with the config, date,
versions and held-out scores it comes from, and the constants that the rules were tuned to. Made by

    python -m mmmem_jax.main --config=configs/lite.py --workdir=RUN
    python -m mmmem_jax.eval_main --workdir=RUN --export=mmmem_jax/policies/lite
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.flax
from flax import nnx

from mmmem_jax import provenance
from mmmem_jax.errors import UserError
from mmmem_jax.memory.types import MemoryConfig
from mmmem_jax.policies import manager, rules

FORMAT, VERSION = "mmmem_manager", 1
LITE = Path(__file__).with_name("lite")


class Policy(NamedTuple):
    """A policy under its name, and what it changes in the configuration of the memory."""

    name: str
    decide_fn: Callable  # (params, noise, state, item) -> ManagerOutput
    params: object
    changes: dict

    def configure(self, config: MemoryConfig) -> MemoryConfig:
        """The configuration with the policy's changes; capacities never change."""
        return dataclasses.replace(config, **self.changes)


# From tuned constants. Rules that must know how long the stream will be are for evaluation only: a
# video is remembered as it comes.
_STREAMING: dict[str, Callable[[dict], rules.Rule]] = {
    "keep_recent": lambda _: rules.keep_recent(),
    "reservoir": lambda _: rules.reservoir(),
    "similarity_merge": lambda c: rules.similarity_merge(c["similarity"]),
    "surprise": lambda c: rules.surprise(c["surprise_change"]),
    "kmeans": lambda _: rules.kmeans(),
    "forgetting_curve": lambda c: rules.forgetting_curve(c["half_life"], c["similarity"]),
}
NAMES = ("lite", *_STREAMING)


def load_policy(name_or_path: str | Path = "lite") -> Policy:
    """A policy over items of the `lite` backbone.

    Args:
      name_or_path: one of NAMES, the workdir of a run of configs/lite.py (its newest checkpoint),
        or a folder that `write_manager` wrote.

    Raises:
      UserError: if there is no such policy, or its files cannot be read.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name == "lite":
        return _learned(name, read_manager(LITE)[0])
    if name in _STREAMING:
        return _fixed(_STREAMING[name](read_header(LITE)["constants"]))
    if (path / "manager.json").is_file():
        return _learned(path.resolve().name, read_manager(path)[0])
    if (path / "config.json").is_file():
        return _learned(path.resolve().name, _manager_of_run(path))
    raise UserError(
        f"no policy {name!r}; give {', '.join(NAMES)}, or the workdir of a run of configs/lite.py"
    )


def _learned(name: str, model: manager.Manager) -> Policy:
    """The manager, taking its likeliest action."""
    graphdef, params = nnx.split(model)
    return Policy(name, manager.make_decide_fn(graphdef, temperature=0.0), params, {})


def _fixed(rule: rules.Rule) -> Policy:
    return Policy(rule.name, rule.decide_fn, rule.params, rule.changes)


def _manager_of_run(workdir: Path) -> manager.Manager:
    """The newest manager of a run of the lite job."""
    from ml_collections import ConfigDict

    from mmmem_jax.train import checkpoints, text_job

    config = checkpoints.read_config(workdir)
    if config.get("job") != "lite":
        raise UserError(
            f"{workdir} is a run of job {config.get('job')!r}; only runs of configs/lite.py read"
            " real videos"
        )
    return text_job.load_manager(ConfigDict(config), workdir, None)[0]


def write_manager(model: manager.Manager, folder: Path, header: dict) -> None:
    """Writes manager.safetensors and manager.json; `header` is kept in the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        ".".join(map(str, path)): leaf[...]
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    partial = folder / "manager.safetensors.tmp"
    partial.write_bytes(safetensors.flax.save(tensors))
    partial.replace(folder / "manager.safetensors")
    provenance.write_json(folder / "manager.json", {"format": FORMAT, "version": VERSION, **header})


def read_header(folder: Path) -> dict:
    """manager.json of a folder that `write_manager` wrote.

    Raises:
      UserError: if it is not there, or of another format or version.
    """
    path = folder / "manager.json"
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); export the manager again") from error
    found = (header.get("format"), header.get("version")) if isinstance(header, dict) else None
    if found != (FORMAT, VERSION):
        raise UserError(
            f"{path} is not version {VERSION} of a {FORMAT} file; export the manager again"
        )
    return header


def read_manager(folder: Path) -> tuple[manager.Manager, dict]:
    """The manager and the header that `write_manager` wrote.

    Raises:
      UserError: if a file is missing, damaged, or holds other tensors than a manager's.
    """
    header, path = read_header(folder), folder / "manager.safetensors"
    try:
        tensors = safetensors.flax.load_file(path)
        hidden = tensors["context.kernel"].shape[1]
        dim = (tensors["item.kernel"].shape[0] - manager.NUM_ITEM_SCALARS) // 2
    except (OSError, safetensors.SafetensorError, KeyError, IndexError) as error:
        raise UserError(f"{path} is no manager ({error}); export it again") from error
    model = manager.Manager(dim, hidden, rngs=nnx.Rngs(0))
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    names = {".".join(map(str, key)): key for key in flat}
    shapes = {name: flat[key].shape for name, key in names.items()}
    if {name: x.shape for name, x in tensors.items()} != shapes:
        raise UserError(f"{path} holds other tensors than a manager's; export it again")
    nnx.update(
        model,
        nnx.from_flat_state(
            [(key, flat[key].replace(tensors[name])) for name, key in names.items()]
        ),
    )
    return model, header
