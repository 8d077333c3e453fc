"""The main job: a manager learns by SIB-GRPO what to keep of a procedural life.

    python -m mmmem_jax.main --config=configs/sib_grpo.py --workdir=runs/sib_grpo
    python -m mmmem_jax.eval_main --workdir=runs/sib_grpo

Cost and the score to reach are those of benchmarks/results/learning.json.
`:smoke` goes the whole way at toy size, to see that everything runs; its scores mean nothing.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The default configuration, or its toy version for `arg` = "smoke"."""
    if arg not in ("", "smoke"):
        raise ValueError(f"argument must be empty or 'smoke', got {arg!r}")
    config = ml_collections.ConfigDict()
    config.job = "world"
    config.seed = 0
    config.dim = 64

    config.world = ml_collections.ConfigDict({"num_chunks": 256, "questions_per_family": 8})
    config.memory = ml_collections.ConfigDict(
        {"sensory_slots": 32, "episodic_slots": 32, "schema_slots": 32, "num_prototypes": 2}
    )
    config.streams = ml_collections.ConfigDict(
        {"perception": 48, "train": 512, "validation": 48, "test": 48}
    )
    config.mesh = ml_collections.ConfigDict({"data": 1, "group": 1, "model": 1})

    config.perception = ml_collections.ConfigDict(
        {"num_steps": 600, "batch_size": 512, "learning_rate": 2e-3, "hidden": 128,
         "log_every": 100, "save_every": 300}
    )  # fmt: skip
    config.reader = ml_collections.ConfigDict(
        {"num_steps": 3000, "batch_size": 32, "num_unlimited": 2, "flat_share": 0.0,
         "questions_per_stream": 16,
         "learning_rate": 4e-3, "hidden": 64, "log_every": 100, "save_every": 500}
    )  # fmt: skip
    config.manager = ml_collections.ConfigDict(
        {"num_steps": 1000, "batch_size": 16, "questions_per_stream": 8, "learning_rate": 2e-3,
         "hidden": 64, "log_every": 20, "save_every": 100}
    )  # fmt: skip
    config.sib = ml_collections.ConfigDict(
        {"num_generations": 8, "block_size": 8, "credit": "step", "discount": 0.7,
         "task": "probability", "beta1": 5e-4, "beta2": 1e-4, "std": "batch",
         "ratio": "length_normalised", "clip_low": 0.2, "clip_high": 0.2, "inner_epochs": 4,
         "entropy_bonus": 0.003}
    )  # fmt: skip
    config.retrieval = ml_collections.ConfigDict(
        {"top_k": (5, 2, 1), "rounds": (1, 1, 6), "confidence": 0.7, "epsilon": 0.2,
         "patience": 3, "link_bonus": 0.02}
    )  # fmt: skip
    config.eval = ml_collections.ConfigDict({"batch_size": 16, "slots": (8, 16, 64)})

    if arg == "smoke":
        config.world.num_chunks = 64
        config.streams.update({"perception": 8, "train": 32, "validation": 8, "test": 8})
        config.perception.update(
            {"num_steps": 40, "batch_size": 64, "log_every": 20, "save_every": 20}
        )
        config.reader.update({"num_steps": 20, "batch_size": 8, "log_every": 10, "save_every": 10})
        config.manager.update({"num_steps": 8, "batch_size": 4, "log_every": 2, "save_every": 4})
        config.sib.num_generations = 4
        config.eval.update({"batch_size": 8, "slots": ()})
    return config
