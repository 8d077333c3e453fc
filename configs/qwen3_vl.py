"""SIB-GRPO of Qwen3-VL with LoRA: the paper's own backbone learns what to keep.

    python -m mmmem_jax.main --config=configs/qwen3_vl.py --config.checkpoint=FOLDER --workdir=RUN
    python -m mmmem_jax.eval_main --workdir=RUN
    python -m mmmem_jax.main --compile_only --topology=v5e:4x4 --config=configs/qwen3_vl.py

The streams are those of the world, or with `:videos` your own, as `mmmem build` keeps them:

    mmmem build A.mp4 --memory MEM --backbone qwen3_vl --policy keep_recent --slots 4096 ...
    python -m mmmem_jax.main --config=configs/qwen3_vl.py:videos --config.videos.memory_dir=MEM \
        --config.videos.questions=qa.jsonl --config.checkpoint=FOLDER --workdir=RUN

qa.jsonl is that of mmmem_jax/data/timed_text.py; a fifth of the videos is held out.

FOLDER is an official one, or Qwen/Qwen3-VL-8B-Instruct or another repo id; RUN/adapter is then what
PEFT reads. Cost: unmeasured with real weights, as is the score; it has to beat its own untrained
policy and both fixed rules of eval_main on the same held-out streams. Compiled for a v5e:4x4 with
--config.mesh.data=2 --config.mesh.model=8 it takes 4.9 GB of each chip (with --config.fsdp=False,
which exchanges far less, 6.5), for a v5p:2x2x2 with --config.mesh.data=2 --config.mesh.model=4 it
takes 8.8 GB (11.9).

`:tiny` trains a tiny random model, written into RUN, for minutes on 2 cores: its reward must rise.
`:smoke` goes the whole way in seconds, to see that everything runs; its scores mean nothing.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The default configuration, that for videos, or a toy one for `arg` = "tiny" or "smoke"."""
    if arg not in ("", "videos", "tiny", "smoke"):
        raise ValueError(f"argument must be empty, 'videos', 'tiny' or 'smoke', got {arg!r}")
    config = ml_collections.ConfigDict()
    config.job = "qwen3_vl"
    config.seed = 0
    config.checkpoint = ""  # folder or repo id
    config.model_size = "8b"  # of plans without a checkpoint; "tiny" writes a random one
    config.dtype = "bfloat16"
    config.attention = "xla"

    config.source = "world"  # of the streams
    config.world = ml_collections.ConfigDict({"num_chunks": 64, "questions_per_family": 2})
    config.streams = ml_collections.ConfigDict({"train": 512, "test": 48})
    config.image_size = 64  # pixels along the edge of a clip's frame
    config.widths = ml_collections.ConfigDict(  # most tokens of each text
        {"caption": 32, "question": 64, "subject": 16, "option": 8}
    )
    config.memory = ml_collections.ConfigDict({"num_nodes": 16, "max_tokens": 64})
    config.mesh = ml_collections.ConfigDict({"data": 1, "group": 1, "model": 1})
    # Splits parameters over mesh.data too, and gathers them layer by layer, clip by clip; False
    # where a device has room for what mesh.model alone leaves of them.
    config.fsdp = True
    config.lora = ml_collections.ConfigDict({"rank": 64, "alpha": 128.0})

    # decide_v1 is what `mmmem build` decides by. With max_new_tokens = 1 the model decides and
    # nodes hold captions; with more it also writes their text.
    config.decide = ml_collections.ConfigDict(
        {"prompt": "decide_v1", "max_new_tokens": 1, "temperature": 0.7}
    )
    # Who answers for the reward: "likelihood", the model without its adapter, or "overlap", words
    # that nodes and options share, for models too small to read.
    config.reader = ml_collections.ConfigDict(
        {"kind": "likelihood", "prompt": "train_read_v1", "max_memory_tokens": 512}
    )
    config.sft = ml_collections.ConfigDict(  # supervised warm start; 0 steps: none
        {"num_steps": 0, "learning_rate": 1e-5, "log_every": 10, "save_every": 50}
    )
    config.manager = ml_collections.ConfigDict(
        {"num_steps": 200, "batch_size": 8, "questions_per_stream": 4, "learning_rate": 1e-5,
         "log_every": 5, "save_every": 20}
    )  # fmt: skip
    # The paper's betas (0.1 and, in its Table 5, 0.1) are for one reward of a whole stream and for
    # texts measured against 200 characters. A reward here is what one decision of 64 changed, and a
    # length is in tokens, of which 50 are 200 characters: 0.1 / 64 / 50 and 0.1 / 64.
    config.sib = ml_collections.ConfigDict(
        {"num_generations": 8, "credit": "state", "discount": 0.7, "task": "probability",
         "beta1": 3e-5, "beta2": 1.5e-3, "std": "group", "ratio": "sequence", "clip_low": 0.2,
         "clip_high": 0.2, "inner_epochs": 1, "entropy_bonus": 0.0, "clips_at_once": 4}
    )  # fmt: skip

    if arg == "videos":
        del config.world, config.streams
        config.source = "videos"
        config.videos = ml_collections.ConfigDict(
            {"memory_dir": "", "questions": "", "num_clips": 64, "num_options": 4}
        )
        config.image_size = 128  # a stream of 64 clips then takes 13 MB
        config.widths.update({"caption": 64, "question": 192, "subject": 1, "option": 1})
        config.memory.max_tokens = 128
    elif arg:
        config.model_size, config.dtype = "tiny", "float32"
        config.world.update({"num_chunks": 12, "questions_per_family": 4})
        config.world.facts = 16
        config.streams.update({"train": 32, "test": 16})
        config.image_size = 32
        config.widths.update({"caption": 12, "question": 40, "subject": 4, "option": 4})
        config.memory.update({"num_nodes": 4, "max_tokens": 16})
        config.lora.update({"rank": 8, "alpha": 16.0})
        config.decide.prompt = "train_decide_v1"  # short; train_write_v1 where text is written too
        config.reader.kind = "overlap"
        config.sft.update({"learning_rate": 1e-2, "log_every": 1, "save_every": 2})
        config.manager.update(
            {"num_steps": 60, "batch_size": 4, "questions_per_stream": 24, "learning_rate": 3e-3,
             "log_every": 2, "save_every": 10}
        )  # fmt: skip
        config.sib.update({"beta1": 1e-4, "std": "batch", "clips_at_once": 12})
    if arg == "smoke":
        config.world.update({"num_chunks": 4, "questions_per_family": 1})
        config.streams.update({"train": 4, "test": 2})
        config.sft.num_steps = 2
        config.manager.update(
            {"num_steps": 4, "batch_size": 2, "questions_per_stream": 4, "save_every": 2}
        )
        config.sib.update({"num_generations": 4, "clips_at_once": 4})
    return config
