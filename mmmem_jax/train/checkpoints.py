"""Orbax checkpoints: state, Grain position and config of a step, saved together or not at all."""

import json
import shutil
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from mmmem_jax import provenance
from mmmem_jax.errors import UserError

Json = dict


def open_checkpoints(folder: Path, *, keep: int = 2) -> ocp.training.Checkpointer:
    """The checkpoints of a phase, for the one process that writes; what a kill left is removed.

    Orbax renames a save when it is whole, so one cut short never counts.
    """
    folder = folder.resolve()
    if folder.is_dir():
        for unfinished in set(_step_folders(folder)) - set(_finished(folder)):
            shutil.rmtree(unfinished)
    return ocp.training.Checkpointer(
        folder,
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


def save(checkpoints, step: int, state, data_state: Json, config: Json) -> None:
    """Saves one step and waits until it is whole on disk."""
    checkpoints.save_checkpointables(
        step, {"state": state, "data": data_state}, custom_metadata={"config": config}
    )


def load(folder: Path, state, step: int | None = None):
    """(state, data_state, step) of a checkpoint, the newest by default; None if there is none.

    `state` gives shapes, dtypes and shardings. Only reads, so a run may be writing meanwhile.
    """
    found = steps(folder)
    if not found:
        return None
    step = found[-1] if step is None else step
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    path = folder.resolve() / str(step)
    loaded = ocp.load_checkpointables(path, {"state": abstract, "data": None})
    return loaded["state"], loaded["data"], step


def load_phase(workdir: Path, phase: str, state, step: int | None = None):
    """(state, step) of a phase's checkpoint in a workdir, the newest by default.

    Raises:
      UserError: if there is no such checkpoint.
    """
    folder = workdir / "checkpoints" / phase
    found = steps(folder)
    if not found or (step is not None and step not in found):
        wanted = "checkpoint" if step is None else f"step {step}"
        raise UserError(
            f"{folder} has no {wanted} (steps there: {found or 'none'}); "
            f"run mmmem_jax.main with --workdir={workdir} first"
        )
    state, _, step = load(folder, state, step)
    return state, step


def _step_folders(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.name.isdigit() and p.is_dir()]


def _finished(folder: Path) -> list[Path]:
    return [p for p in _step_folders(folder) if (p / "commit_success.txt").is_file()]


def steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder, in order; none if there is no folder."""
    return sorted(int(p.name) for p in _finished(folder)) if folder.is_dir() else []


def flatten(config: Json, prefix: str = "") -> dict[str, object]:
    """A nested dict as {'a.b': value}."""
    out = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def plain(config: Json) -> Json:
    """A config as its JSON reads: tuples are lists."""
    return json.loads(json.dumps(config))


def differences(old: Json, new: Json) -> dict[str, tuple]:
    """{key: (its value in `old`, its value in `new`)} where two configs differ, keys in order."""
    a, b = flatten(plain(old)), flatten(plain(new))
    pairs = {key: (a.get(key, "unset"), b.get(key, "unset")) for key in sorted(a.keys() | b.keys())}
    return {key: (x, y) for key, (x, y) in pairs.items() if x != y}


def check_workdir(workdir: Path, config: Json) -> None:
    """Refuses a workdir that was made by another config; a new one is fine, and stays unmade.

    Raises:
      UserError: naming the keys that differ.
    """
    if not (workdir / "config.json").exists():
        return
    found = differences(read_config(workdir), config)
    if found:
        different = [f"{key}: {there} there, {here} here" for key, (there, here) in found.items()]
        raise UserError(
            f"{workdir} belongs to another config ({'; '.join(different)}); "
            "take the same config or another --workdir"
        )


def claim_workdir(workdir: Path, config: Json) -> None:
    """Writes `config.json` into a new workdir, or refuses one as `check_workdir` does.

    Raises:
      UserError: naming the keys that differ.
    """
    check_workdir(workdir, config)
    path = workdir / "config.json"
    if not path.exists():
        provenance.write_json(path, config)


def read_config(workdir: Path) -> Json:
    """The config a workdir was made by; raises UserError if it is no workdir.

    Meshes had no axis 'model' at first: there it is 1.
    """
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} has no config.json; run mmmem_jax.main there first") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON ({error}); restore it or start a new workdir"
        ) from None
    if "mesh" in config:
        config["mesh"].setdefault("model", 1)
    return config
