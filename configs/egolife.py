"""A manager learns what to keep of a person's days, without labels.

    python -m mmmem_jax.main --config=configs/egolife.py --config.data_dir=DIR --workdir=RUN
    python -m mmmem_jax.eval_main --workdir=RUN

DIR holds EgoLife in its official layout (data/README.md). Trains on days 1-2, tunes on day 2,
reports day 3 and day 4. `--config.questions=labelled` trains on the labelled questions of days 1-2
in place of those made from the stream. Cost and the score to reach are those of
benchmarks/results/egolife.json. `:smoke` goes the whole way on the first rows of each day, to see
that everything runs; its scores mean nothing.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The default configuration, or its toy version for `arg` = "smoke"."""
    if arg not in ("", "smoke"):
        raise ValueError(f"argument must be empty or 'smoke', got {arg!r}")
    config = ml_collections.ConfigDict()
    config.job = "text"
    config.source = "egolife"
    config.data_dir = ""
    config.skip_bad_rows = True
    config.encoder_dir = ""  # empty: all-MiniLM-L6-v2, fetched once
    config.cache_dir = ""  # empty: the user's cache folder
    config.seed = 0
    config.dim = 64
    config.max_node_tokens = 64
    config.rows_per_stream = 0  # 0: all
    config.questions_per_stream = 100_000
    config.questions = "made"  # what the manager learns from: "made" from the streams, "labelled"
    config.question_seed = 0
    config.mesh = ml_collections.ConfigDict({"data": 1, "group": 1, "model": 1})

    config.manager = ml_collections.ConfigDict(
        {"num_steps": 300, "batch_size": 16, "num_rows": 128, "num_questions": 24,
         "learning_rate": 2e-3, "hidden": 64, "log_every": 10, "save_every": 50}
    )  # fmt: skip
    # A price for tokens in place of a budget, and credit for the four decisions that earned it.
    config.sib = ml_collections.ConfigDict(
        {"num_generations": 8, "block_size": 4, "credit": "step", "discount": 0.0,
         "beta1": 4e-4, "beta2": 1e-4, "std": "batch", "ratio": "length_normalised",
         "clip_low": 0.2, "clip_high": 0.2, "inner_epochs": 4, "entropy_bonus": 0.05}
    )  # fmt: skip
    config.eval = ml_collections.ConfigDict(
        {"shares": (0.0625, 0.25, 0.015625), "splits": ("validation", "test"), "top_k": 5,
         "tokens_per_slot": 4, "tokens_per_cluster": 24}
    )  # fmt: skip

    if arg == "smoke":
        config.rows_per_stream = 600
        config.questions_per_stream = 40
        config.manager.update(
            {"num_steps": 4, "batch_size": 4, "num_rows": 32, "num_questions": 8,
             "log_every": 2, "save_every": 2}
        )  # fmt: skip
        config.sib.num_generations = 4
        config.eval.shares = (0.0625,)
    return config
