"""Claim: on real days of one person, the manager trained without labels on days 1-2 keeps more of
what is asked on day 4 than any fixed rule within the same tokens.

    python benchmarks/egolife.py --data_dir=DIR          # one seed, 1/16 kept, day 4
    python benchmarks/egolife.py --data_dir=DIR --full   # three seeds, three shares, days 3 and 4

DIR holds EgoLife in its official layout; without --data_dir, $MMMEM_EGOLIFE_DIR. Keys of the last
line, at 1/16 of the tokens: recall_learned, recall_best_rule, best_rule_name, recall_unlimited, n,
se (of each, and of the gap), official_* for the same on the labelled questions, acc_learned,
acc_best_rule, acc_unlimited on the questions made from the day. `table` has every policy, share and
day, with recall by type of question. Unlimited memory is no upper bound: what is dropped cannot
distract.

What the numbers mean:
- The budget is a share of the whole day's tokens, open from its first row. So when a question is
  asked it is more than that share of what was seen until then: `share_of_seen` of each entry is the
  mean of budget / tokens seen, at most 1. `uniform` keeps rows evenly spaced over the whole day, so
  it gets nothing from this.
- Evidence recall@5 is the share of questions with a node that counts as evidence among the five
  nearest. Where a question has several evidence windows, finding any one of them is a hit; an
  `order` question has four, one for each row that it compares.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from configs import egolife
from mmmem_jax import flags
from mmmem_jax.errors import UserError
from mmmem_jax.evals import text_eval, text_protocol
from mmmem_jax.train import text_job

SHARE = 0.0625
NUM_SEEDS, QUICK_STEPS = 3, 100


def make_config(data_dir: str, seed: int, *, full: bool):
    """The default configuration with a seed; a third of the updates where quick."""
    config = egolife.get_config()
    config.data_dir, config.seed = data_dir, seed
    if not full:
        config.manager.num_steps = QUICK_STEPS
    return config


def headline(entries: list[dict]) -> dict:
    """The keys of the last line from the entries of one split and share."""
    named = {entry["name"]: entry for entry in entries}
    learned, unlimited = named["learned"], named["unlimited"]
    out = {}
    for prefix in ("", "official_"):
        best = text_eval.best_rule(entries, f"{prefix}recall")
        keys = {"recall_learned": learned, "recall_best_rule": best, "recall_unlimited": unlimited}
        out |= {prefix + key: entry[f"{prefix}recall"] for key, entry in keys.items()}
        errors = {key: entry[f"{prefix}recall_se"] for key, entry in keys.items()}
        errors["gap"] = (errors["recall_learned"] ** 2 + errors["recall_best_rule"] ** 2) ** 0.5
        out[f"{prefix}best_rule_name"] = best["name"]
        out[f"{prefix}n"], out[f"{prefix}se"] = learned[f"{prefix}n"], errors
        accuracy = text_eval.best_rule(entries, f"{prefix}accuracy")
        out[f"{prefix}acc_learned"] = learned[f"{prefix}accuracy"]
        out[f"{prefix}acc_best_rule"] = accuracy[f"{prefix}accuracy"]
        out[f"{prefix}acc_unlimited"] = unlimited[f"{prefix}accuracy"]
    return out


def measure(data_dir: str, workdir: Path, *, full: bool) -> dict:
    """Trains the seeds in `workdir` where they are not yet, and compares all policies."""
    seeds = list(range(NUM_SEEDS if full else 1))
    configs = [make_config(data_dir, seed, full=full) for seed in seeds]
    config = configs[0]
    streams = text_job.load_streams(config, with_options=True)
    space = text_job.fit_space(config, streams)
    models = [
        text_job.train(each, workdir / f"seed{seed}", streams, space)
        for seed, each in zip(seeds, configs, strict=True)
    ]
    texts = text_protocol.prepare(space, streams)
    table = text_eval.compare(
        config,
        texts,
        models,
        splits=("validation", "test") if full else ("test",),
        shares=config.eval.shares if full else (SHARE,),
    )
    return {**headline(table["test"][f"{SHARE:.6g}"]), "seeds": seeds, "table": table}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        "egolife", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="what the committed result needs")
    parser.add_argument("--data_dir", default=os.environ.get("MMMEM_EGOLIFE_DIR", ""))
    parser.add_argument(
        "--workdir", type=Path, help="default: runs/benchmarks/egolife_{quick,full}"
    )
    args = parser.parse_args()
    if not args.data_dir:
        sys.exit("egolife: no data; give --data_dir=DIR or set MMMEM_EGOLIFE_DIR")
    kind = "full" if args.full else "quick"
    flags.log_plainly()
    try:
        workdir = args.workdir or Path("runs/benchmarks") / f"egolife_{kind}"
        result = measure(args.data_dir, workdir, full=args.full)
    except UserError as error:
        sys.exit(f"egolife: {error}")
    common.emit("egolife", result, full=args.full)


if __name__ == "__main__":
    main()
