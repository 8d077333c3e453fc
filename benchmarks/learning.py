"""The learned manager beside every fixed rule at the same budget, and credit per step beside one
outcome per trajectory after equal updates.

    python benchmarks/learning.py           # one seed of the smoke configuration
    python benchmarks/learning.py --full    # three seeds of the default one, an hour

For each seed: the main job of configs/sib_grpo.py, the same with sib.credit = trajectory (and
others of --credits) on the same eye and reader, and all policies on held-out streams. Keys of the
last line: learned, best_rule, best_rule_name, unlimited, trajectory_credit, gap_closed, se, and ece
(the reader's expected calibration error on the memories of each policy, mean over seeds).
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from benchmarks import common
from mmmem_jax import provenance
from mmmem_jax.evals import protocol, table, world_eval
from mmmem_jax.sib.rollout import CREDITS
from mmmem_jax.train import checkpoints, world_job

SEEDS = [0, 1, 2]  # of the committed result


def make_config(seed: int, credit: str, full: bool):
    """The default configuration (smoke where quick) with a seed and a credit, on all devices."""
    config = common.make_config(full)
    config.seed = seed
    config.sib.credit = credit
    config.mesh.data = jax.device_count()
    return config


def train(root: Path, seed: int, credit: str, full: bool, base: Path | None) -> Path:
    """A finished run in root/seed<n>/<credit>; eye and reader come from `base` where given."""
    workdir = root / f"seed{seed}" / credit
    if base is not None:
        common.copy_phases(base, workdir)
    world_job.run(make_config(seed, credit, full), workdir)
    return workdir


def measure(root: Path, seed: int, credits: list[str], full: bool) -> dict:
    """{policy or credit: accuracy, se, ece, tokens, slots} of one seed on held-out streams.

    Kept in the seed's folder, so that a benchmark cut short goes on with the next seed; measured
    anew where config or versions are others than those of what is kept.
    """
    kept = root / f"seed{seed}" / f"measured_{'_'.join(credits)}.json"
    config = checkpoints.plain(make_config(seed, "step", full).to_dict())
    made_by = {"config": config, "versions": provenance.versions()}
    if kept.exists() and (old := json.loads(kept.read_text())).items() >= made_by.items():
        return old["found"]
    base = train(root, seed, "step", full, None)
    run = world_eval.load_run(base)
    learned, _ = world_eval.load_learned(run, base, None)
    entries, _ = world_eval.compare(run, base, learned)
    keys = ("accuracy", "se", "ece", "tokens", "tokens_all_levels", "slots")
    found = {entry["name"]: {key: entry[key] for key in keys} for entry in entries}
    for credit in credits:
        workdir = train(root, seed, credit, full, base)
        policy, _ = world_eval.load_learned(run, workdir, None)
        entry = protocol.summarise(credit, world_eval.evaluate(run, policy), run.streams)
        found[f"{credit}_credit"] = {key: entry[key] for key in keys}
    found["num_questions"] = int(run.streams.question_valid.sum())
    provenance.write_json(kept, made_by | {"found": found})
    return found


def combine(seeds: list[dict]) -> dict:
    """Means over seeds, and their errors: the larger of what the errors within the seeds (sampling
    of questions) and the spread between the seeds (which holds that sampling too) make of it."""
    out = {"per_seed": seeds, "num_questions": [s["num_questions"] for s in seeds]}
    means, errors, ece = {}, {}, {}
    for name in seeds[0]:
        if name == "num_questions":
            continue
        accuracy = np.array([s[name]["accuracy"] for s in seeds])
        within = np.mean([s[name]["se"] ** 2 for s in seeds]) / len(seeds)
        between = np.var(accuracy, ddof=1) / len(seeds) if len(seeds) > 1 else 0.0
        means[name], errors[name] = float(accuracy.mean()), float(np.sqrt(max(within, between)))
        ece[name] = float(np.mean([s[name]["ece"] for s in seeds]))
    credits = {name for name in means if name.endswith("_credit")}
    rules = [{"name": n, "accuracy": a} for n, a in means.items() if n not in credits]
    best = table.best_rule({"policies": rules})
    gap = means["unlimited"] - best["accuracy"]
    return {
        "learned": means["learned"],
        "best_rule": best["accuracy"],
        "best_rule_name": best["name"],
        "unlimited": means["unlimited"],
        **{name: means[name] for name in sorted(credits)},
        "gap_closed": (means["learned"] - best["accuracy"]) / gap if gap else None,
        "se": {
            "learned": errors["learned"],
            "best_rule": errors[best["name"]],
            "unlimited": errors["unlimited"],
            **{name: errors[name] for name in sorted(credits)},
        },
        "ece": ece,
        "rules": {r["name"]: r["accuracy"] for r in rules if r["name"] != "learned"},
        **out,
    }


def seed_list(text: str) -> list[int]:
    """0,1,2 as a list."""
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len({*map(int, seeds)}) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different seeds such as 0,1,2")
    return [int(seed) for seed in seeds]


def credit_list(text: str) -> list[str]:
    """trajectory,state as a list."""
    credits = text.split(",")
    if not set(credits) <= set(CREDITS):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of some of {', '.join(CREDITS)}")
    return credits


def main() -> None:
    """Trains, evaluates, prints."""
    parser = common.make_parser(__doc__)
    parser.add_argument(
        "--credits", type=credit_list, default=["trajectory"], help="other credits, comma-separated"
    )
    parser.add_argument(
        "--seeds", type=seed_list, help="comma-separated; default 0,1,2 with --full, else 0"
    )
    parser.add_argument("--cpu_devices", type=int, default=1, help="devices to see in the CPU")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    seeds = args.seeds or (SEEDS if args.full else SEEDS[:1])
    root = common.workdir(args, "learning")

    def measure_all() -> dict:
        found = [measure(root, seed, args.credits, args.full) for seed in seeds]
        return combine(found) | {"seeds": seeds}

    common.report("learning", args, measure_all, default_seeds=SEEDS)


if __name__ == "__main__":
    main()
