"""A manager learns what to keep of a video, on made streams in the `lite` backbone's embeddings.

    python -m mmmem_jax.main --config=configs/lite.py --workdir=RUN
    python -m mmmem_jax.eval_main --workdir=RUN --export=mmmem_jax/policies/lite

Fetches class names and all-MiniLM-L6-v2 once. The second command writes the manager that ships with
the project; its manager.json has the cost of the run (minutes on 2 cores) and the score to reach.
`:smoke` goes the whole way at toy size, to see that everything runs; its scores mean nothing.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The default configuration, or its toy version for `arg` = "smoke"."""
    if arg not in ("", "smoke"):
        raise ValueError(f"argument must be empty or 'smoke', got {arg!r}")
    config = ml_collections.ConfigDict()
    config.job = "lite"
    config.encoder_dir = ""  # empty: all-MiniLM-L6-v2, fetched once
    config.classes_dir = ""  # empty: the names of ImageNet's classes, fetched once
    config.cache_dir = ""  # empty: the user's cache folder
    config.seed = 0
    config.dim = 384  # of the encoder
    config.slots = 16  # of the memory in training
    config.max_node_tokens = 256
    config.clips_read = 5  # of a node, at most, in evaluation; training reads one

    config.world = ml_collections.ConfigDict({"num_clips": 128, "num_questions": 48})
    config.streams = ml_collections.ConfigDict({"train": 128, "validation": 16, "test": 40})
    config.mesh = ml_collections.ConfigDict({"data": 1, "group": 1, "model": 1})
    config.manager = ml_collections.ConfigDict(
        {"num_steps": 500, "batch_size": 8, "num_questions": 24, "learning_rate": 1e-3,
         "hidden": 64, "log_every": 10, "save_every": 50}
    )  # fmt: skip
    # beta1 is 0: a token held costs nothing, slots alone are scarce.
    config.sib = ml_collections.ConfigDict(
        {"num_generations": 8, "block_size": 8, "credit": "step", "discount": 0.9,
         "beta1": 0.0, "beta2": 1e-4, "std": "batch", "ratio": "length_normalised",
         "clip_low": 0.2, "clip_high": 0.2, "inner_epochs": 4, "entropy_bonus": 0.05}
    )  # fmt: skip
    config.eval = ml_collections.ConfigDict({"slots": (32, 64), "tokens_per_slot": 12})

    if arg == "smoke":
        config.world.update({"num_clips": 32, "num_questions": 16})
        config.streams.update({"train": 8, "validation": 4, "test": 4})
        config.slots = 8
        config.manager.update(
            {"num_steps": 4, "batch_size": 4, "num_questions": 8, "log_every": 2, "save_every": 2}
        )
        config.sib.num_generations = 4
        config.eval.update({"slots": (8,)})
    return config
