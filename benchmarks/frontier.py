"""The rate weight beta1 of eq. 10 trades accuracy for tokens held: the rate-accuracy frontier.

    python benchmarks/frontier.py --workdir=RUN          # two short points
    python benchmarks/frontier.py --workdir=RUN --full   # five points of 240 updates

RUN is a finished run of configs/sib_grpo.py, whose eye and reader are used. Keys of the last line:
points (list of beta1, tokens |m| of the episodic stream and of all levels, slots, accuracy, se,
bound_relevance, bound_rate in nats), num_steps.
bound_rate and bound_rate_ref bound what action traces tell of a stream, not I(X; M). The prior of
the first is that of eq. 9, which knows how long chunks are; its log Z is estimated from the N
memories of an update, low on average, and where bound_rate_counts (the share of them that count)
times N is about 1 the number is no bound. The prior of the second is p_ref, nothing is estimated,
and it is often the tighter.
"""

import functools
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import jax
from ml_collections import ConfigDict

from benchmarks import common
from mmmem_jax.evals import protocol, world_eval
from mmmem_jax.train import checkpoints, world_job
from mmmem_jax.train.metrics import read_metrics

BETA1 = (0.0, 2e-4, 5e-4, 2e-3, 8e-3)
BOUNDS = ("bound_relevance", "bound_rate", "bound_rate_ref", "bound_rate_counts")


def measure(run: world_eval.Run, base: Path, workdir: Path, beta1: float, num_steps: int) -> dict:
    """One point of the frontier: a manager trained at `beta1`, on held-out streams."""
    config = ConfigDict(checkpoints.read_config(base))
    config.sib.beta1 = beta1
    config.mesh.data = jax.device_count()  # of this machine, whatever RUN was trained on
    config.manager.num_steps = num_steps
    config.manager.save_every = num_steps
    common.copy_phases(base, workdir)
    world_job.run(config, workdir)
    policy, _ = world_eval.load_learned(run._replace(config=config), workdir, None)
    entry = protocol.summarise("learned", world_eval.evaluate(run, policy), run.streams)
    last = [row for row in read_metrics(workdir / "metrics.jsonl") if row["phase"] == "manager"][-1]
    return (
        {"beta1": beta1}
        | {key: entry[key] for key in ("tokens", "tokens_all_levels", "slots", "accuracy", "se")}
        | {key: last[key] for key in BOUNDS}
    )


def sweep(full: bool, base: Path) -> dict:
    """The points of the frontier, the updates of each and the seed of RUN."""
    config = common.run_config(full, base)
    run = world_eval.load_run(base)
    num_steps = 240 if full else 2 * config.manager.log_every
    points = [
        measure(run, base, base / "frontier" / f"{num_steps}_{beta1:g}", beta1, num_steps)
        for beta1 in (BETA1 if full else BETA1[:2])
    ]
    return {"points": points, "num_steps": num_steps, "seeds": [config.seed]}


def main() -> None:
    """Sweeps beta1 and prints the frontier."""
    args = common.make_parser(__doc__, needs_run=True).parse_args()
    sweep_run = functools.partial(sweep, args.full, args.workdir)
    common.report("frontier", args, sweep_run, default_seeds=[0])


if __name__ == "__main__":
    main()
