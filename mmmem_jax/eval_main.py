"""Evaluates a run's checkpoints on held-out streams, beside every fixed rule at the same budget.

    python -m mmmem_jax.eval_main --workdir=runs/sib_grpo
    python -m mmmem_jax.eval_main --workdir=runs/sib_grpo --step=best
    python -m mmmem_jax.eval_main --workdir=runs/sib_grpo --follow

Writes results.json, questions.jsonl, report.html and summary.png to WORKDIR/eval and prints the
results; of a lite or qwen3_vl run results.json alone. --step=best takes the checkpoint whose task
reward was highest in training, as the mean over the steps since the report before. --follow, which
may be started before main, first evaluates every checkpoint as it appears, until training has
ended: the learned manager alone, one line a checkpoint in curve.jsonl.
"""

from collections.abc import Callable
from pathlib import Path

from mmmem_jax import flags, remote
from mmmem_jax.errors import UserError

POLL_SECONDS = 1.0  # between looks at a run that is followed

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, here or gs://BUCKET/NAME; required.", flag_values=FLAGS
)
STEP = flags.DEFINE_string(
    "step",
    None,
    "Checkpoint of the manager to take, its number or 'best'; the newest by default.",
    flag_values=FLAGS,
)
FOLLOW = flags.DEFINE_bool(
    "follow", False, "Evaluate every checkpoint as it appears.", flag_values=FLAGS
)
NUM_STREAMS = flags.DEFINE_integer(
    "num_streams",
    None,
    "Held-out streams of the procedural world; the config's number by default.",
    lower_bound=1,
    flag_values=FLAGS,
)
TIMEOUT = flags.DEFINE_integer(
    "timeout", 3600, "Seconds --follow waits for what main writes next.", flag_values=FLAGS
)
EXPORT = flags.DEFINE_string(
    "export", None, "Folder to write the manager of a lite run to, to ship it.", flag_values=FLAGS
)


def wait_if_following(ready: Callable[[], bool], what: str) -> None:
    """With --follow, waits for what a run that has just been started is still to write."""
    if FOLLOW.value:
        from mmmem_jax.evals import follow

        follow.wait_until(ready, what, poll_seconds=POLL_SECONDS, timeout=TIMEOUT.value)


def wanted_step(workdir: Path) -> int | None:
    """The step that --step names, None for the newest.

    Raises:
      UserError: if it is neither a number nor "best", or no checkpoint has a score to be best by.
    """
    if STEP.value is None or STEP.value.isdecimal():
        return None if STEP.value is None else int(STEP.value)
    if STEP.value != "best":
        raise UserError(f"--step is {STEP.value!r}; it must be a number or best")
    from mmmem_jax.train import checkpoints

    folder = workdir / "checkpoints" / "manager"
    step = checkpoints.best(folder)
    if step is None:
        raise UserError(
            f"{folder} has no checkpoint with a score to be best by, as none of an older run has;"
            f" give a number (steps there: {checkpoints.steps(folder) or 'none'})"
        )
    return step


def evaluate_world(workdir: Path) -> None:
    """Evaluates a run of the procedural world."""
    from mmmem_jax.evals import table, world_eval
    from mmmem_jax.train import checkpoints, world_job

    reader = workdir / "checkpoints" / world_job.CALIBRATED
    wait_if_following(lambda: bool(checkpoints.steps(reader)), f"calibrated reader in {reader}")
    run = world_eval.load_run(workdir, num_streams=NUM_STREAMS.value)
    if FOLLOW.value:
        world_eval.follow_run(run, workdir, poll_seconds=POLL_SECONDS, timeout=TIMEOUT.value)
    learned, step = world_eval.load_learned(run, workdir, wanted_step(workdir))
    results = world_eval.full_evaluation(run, workdir, step, learned)
    print(table.format_table(results))
    print(f"report: {workdir / 'eval' / 'report.html'}")


def _no_num_streams(job: str, source: str) -> None:
    if NUM_STREAMS.value is not None:
        raise UserError(
            f"--num_streams does not apply to a {job} run, whose held-out streams are those of its"
            f" {source}; leave it out"
        )


def _evaluate_manager(evals, workdir: Path):
    """(run, its manager, results) by the module of a job whose managers text_job loads."""
    from mmmem_jax.train import text_job

    run = evals.load_run(workdir)
    if FOLLOW.value:
        evals.follow_run(run, workdir, poll_seconds=POLL_SECONDS, timeout=TIMEOUT.value)
    model, step = text_job.load_manager(run.config, workdir, wanted_step(workdir))
    results = evals.full_evaluation(run, workdir, step, model)
    print(evals.format_tables(results["table"]))
    return run, model, results


def evaluate_text(workdir: Path) -> None:
    """Evaluates a run on timed text."""
    _no_num_streams("text", "data")
    from mmmem_jax.evals import text_eval

    _evaluate_manager(text_eval, workdir)
    print(f"report: {workdir / 'eval' / 'report.html'}")


def evaluate_lite(workdir: Path) -> None:
    """Evaluates a run on made clips, and exports its manager where --export says so."""
    _no_num_streams("lite", "config")
    from mmmem_jax.evals import lite_eval

    run, model, results = _evaluate_manager(lite_eval, workdir)
    if EXPORT.value:
        lite_eval.export(run, workdir, model, results, Path(EXPORT.value))
        print(f"manager: {EXPORT.value}")


def evaluate_qwen3_vl(workdir: Path) -> None:
    """Evaluates a run of Qwen3-VL."""
    _no_num_streams("qwen3_vl", "config")
    if FOLLOW.value:
        raise UserError("--follow does not apply to a qwen3_vl run; leave it out")
    from mmmem_jax.evals import qwen3_vl_eval

    run = qwen3_vl_eval.load_run(workdir)
    results = qwen3_vl_eval.full_evaluation(run, workdir, wanted_step(workdir))
    print(qwen3_vl_eval.format_table(results["policies"]))


JOBS = {
    "world": evaluate_world,
    "text": evaluate_text,
    "lite": evaluate_lite,
    "qwen3_vl": evaluate_qwen3_vl,
}


def main(argv: list[str]) -> None:
    """Evaluates the job that the workdir's config names."""
    del argv
    if not WORKDIR.value:
        raise UserError("--workdir is missing; name the folder of a run of mmmem_jax.main")
    if FOLLOW.value and STEP.value is not None:
        raise UserError("--follow ends with the newest checkpoint; leave out --step or --follow")
    from mmmem_jax.train import checkpoints

    flags.log_plainly()
    workdir = remote.folder(WORKDIR.value)
    wait_if_following((workdir / "config.json").is_file, f"config.json in {workdir}")
    config = checkpoints.read_config(workdir)
    if config.get("job") not in JOBS:
        raise UserError(f"{workdir / 'config.json'} names the unknown job {config.get('job')!r}")
    if EXPORT.value and config["job"] != "lite":
        raise UserError("--export writes managers of real videos, of configs/lite.py; leave it out")
    JOBS[config["job"]](workdir)


if __name__ == "__main__":
    flags.run(main, FLAGS, name="eval_main", usage=__doc__)
