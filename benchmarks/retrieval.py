"""Top-down retrieval against flat retrieval, on the learned memories of held-out streams.

Claim: searching schema, episodes and sensory items in this order, and stopping once the answer is
certain, is at least as accurate as reading the best slots of all levels at once, at no more than
half the evidence tokens; questions for the gist stop at the schema, and questions about what was
seen once reach the sensory level.

    python benchmarks/retrieval.py [--full] [--workdir=RUN]

--full trains the default config if RUN holds no run, then takes a minute or two.
Keys: top_down, flat (accuracies), token_ratio (top-down's over flat's), gist_stops_at_schema (gist
and habit questions), seen_once_reaches_sensory (shares of those questions), se (standard errors).
`difference` is top_down - flat over the same questions with its own error; whole is the accuracy
from the whole memory. flat_same_tokens has the accuracy of flat retrieval of as many slots as cost
no more tokens than top-down read, their number and their tokens.

The run's reader has learned from parts of memories as the search reads them, never as flat
retrieval does. `control` has the same keys for a reader trained for both, half of the parts each
(kept in WORKDIR/retrieval_control; about five minutes with --full).
"""

import dataclasses
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np
from ml_collections import ConfigDict

from benchmarks import common
from mmmem_jax.data.worlds import FAMILIES
from mmmem_jax.evals import protocol, world_eval
from mmmem_jax.memory.types import LEVELS
from mmmem_jax.models.reader import Reader
from mmmem_jax.train import checkpoints, world_job

FLAT_SHARE = 0.5  # of the parts of memories that the control's reader learns from


def compare(records: protocol.Records, streams) -> dict:
    """The result's keys from the records of one policy."""
    valid = streams.question_valid
    # A policy reads no relevance and no family: the shares below only describe what it did.
    family = {name: valid & (streams.family == i) for i, name in enumerate(FAMILIES)}
    right = {
        "whole": records.log_probs.argmax(-1) == streams.answer,
        "top_down": records.top_down_log_probs.argmax(-1) == streams.answer,
        "flat": records.flat_log_probs.argmax(-1) == streams.answer,
    }
    right["difference"] = right["top_down"].astype(float) - right["flat"]
    scores = {name: protocol.accuracy_and_error(x, valid) for name, x in right.items()}
    at_schema = records.stop_level == LEVELS.index("schema")
    at_sensory = records.stop_level == LEVELS.index("sensory")
    shares = {
        "gist_stops_at_schema": (at_schema, family["gist"] | family["habit"]),
        "seen_once_reaches_sensory": (at_sensory, family["seen_once"]),
    }
    scores |= {name: protocol.accuracy_and_error(*x) for name, x in shares.items()}
    return {
        **{name: score["accuracy"] for name, score in scores.items()},
        "token_ratio": float(
            records.tokens_read[valid].sum() / max(records.flat_tokens_read[valid].sum(), 1)
        ),
        "stop_levels": {
            name: np.bincount(records.stop_level[here], minlength=len(LEVELS)).tolist()
            for name, here in family.items()
        },
        "num_questions": int(valid.sum()),
        "se": {name: score["se"] for name, score in scores.items()},
    }


def train_control(run: world_eval.Run, workdir: Path) -> Reader:
    """A reader that learned from flat evidence too, trained in `workdir` where it is not yet."""
    config = ConfigDict(run.config.to_dict())
    config.reader.flat_share = FLAT_SHARE
    checkpoints.claim_workdir(workdir, config.to_dict())
    train, held_out = (
        world_job.perceived(config, run.eye, split) for split in ("train", "validation")
    )
    reader = world_job.make_models(config).reader
    return world_job.train_reader(config, workdir, reader, train, held_out)


def flat_of_same_tokens(run: world_eval.Run, learned: protocol.Policy, tokens: float) -> dict:
    """Flat retrieval of the most slots that cost at most `tokens` a question on average."""
    retrieval, valid = world_job.retrieval_config(run.config), run.streams.question_valid
    for number in range(retrieval.max_slots, 0, -1):
        fewer = dataclasses.replace(retrieval, top_k=(1, 1, 1), rounds=(number, 0, 0))
        records = protocol.evaluate(
            learned, run.reader, run.streams, retrieval=fewer, batch_size=run.config.eval.batch_size
        )
        mean = float(records.flat_tokens_read[valid].mean())
        if mean <= tokens or number == 1:
            break
    right = records.flat_log_probs.argmax(-1) == run.streams.answer
    score = protocol.accuracy_and_error(right, valid)
    return {"accuracy": score["accuracy"], "se": score["se"], "slots": number, "tokens": mean}


def measure(full: bool, workdir: Path) -> dict:
    """The learned manager's memories of the test streams, searched both ways."""
    config = common.trained_config(full, workdir)
    run = world_eval.load_run(workdir, num_streams=96 if full else 4)
    learned, step = world_eval.load_learned(run, workdir, None)
    records = world_eval.evaluate(run, learned)
    result = compare(records, run.streams)
    tokens = result["tokens_read"] = float(records.tokens_read[run.streams.question_valid].mean())
    result["flat_same_tokens"] = flat_of_same_tokens(run, learned, tokens)
    run = run._replace(reader=train_control(run, workdir / "retrieval_control"))
    result["control"] = compare(world_eval.evaluate(run, learned), run.streams)
    retrieval = world_job.retrieval_config(config)
    return result | {"retrieval": vars(retrieval), "step": step, "seeds": [config.seed]}


if __name__ == "__main__":
    common.run("retrieval", __doc__, measure, default_seeds=[0])
