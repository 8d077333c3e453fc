"""Orbax checkpoints: state, Grain position and config of a step, saved together or not at all."""

import json
from pathlib import Path

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from mmmem_jax import provenance, remote
from mmmem_jax.errors import UserError
from mmmem_jax.train import distributed

Json = dict
SCORE = "score"  # what the best checkpoint is best by, higher is better; in its metrics


def open_checkpoints(folder: Path, *, keep: int = 2) -> ocp.training.Checkpointer:
    """The checkpoints of a phase, for the one run that writes; what a kill left is removed.

    Kept are the newest, and the one of the highest score. Orbax renames a save when it is whole, so
    one cut short never counts. Every process must call.
    """
    folder = remote.absolute(folder)
    if distributed.is_first() and folder.is_dir():
        for unfinished in set(_step_folders(folder)) - set(_finished(folder)):
            epath.Path(unfinished).rmtree()
    distributed.wait_for_all("unfinished checkpoints are removed")
    policies = ocp.training.preservation_policies
    best = policies.BestN(
        get_metric_fn=lambda metrics: metrics[SCORE], n=1, keep_checkpoints_without_metrics=False
    )
    return ocp.training.Checkpointer(
        folder,
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        cleanup_tmp_directories=True,
    )


def save(
    checkpoints, step: int, state, data_state: Json, config: Json, score: float | None = None
) -> None:
    """Starts to save a step; it is whole on disk by the next save, or when `close` returns.

    What is saved is copied first, so `state` may be given away when this returns. Every process
    must call.
    """
    checkpoints.save_checkpointables_async(
        step,
        {"state": state, "data": data_state},
        force=True,  # also while the last one is still being written, which is waited for
        metrics=None if score is None else {SCORE: score},
        custom_metadata={"config": config},
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
    path = remote.absolute(folder) / str(step)
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


def newest(folder: Path) -> int | None:
    """The newest finished step as process 0 finds it, None for none; every process must call.

    Raises:
      UserError: if this process does not find it.
    """
    found = steps(folder)
    step = distributed.from_first(found[-1] if found else -1)
    if step != -1 and step not in found:
        raise UserError(
            f"process {jax.process_index()} does not find step {step} of process 0 in {folder}; "
            "the processes of a run need a --workdir that they share"
        )
    return None if step == -1 else step


def best(folder: Path) -> int | None:
    """The finished step of the highest score, the newer of equals; None if no step has a score."""
    scores = {step: _score(folder / str(step)) for step in steps(folder)}
    scored = [step for step, score in scores.items() if score is not None]
    return max(scored, key=lambda step: (scores[step], step), default=None)


def _score(path: Path) -> float | None:
    try:
        return json.loads((path / "metrics" / "metrics").read_text())[SCORE]
    except FileNotFoundError:
        return None


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
    if distributed.is_first() and not path.exists():
        provenance.write_json(path, config)
    distributed.wait_for_all("workdir is claimed")


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
