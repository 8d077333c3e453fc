"""The lite job: a manager learns by SIB-GRPO which clips of a video to keep, and which to merge.

Streams are made (`data.lite_streams`) in the embeddings that the `lite` backbone gives real videos,
so no video is needed. A memory is worth the probability that retrieval, by what was told or seen,
lands on the evidence of a question. By the default config tokens cost nothing (beta1 of eq. 10 is
0): what is scarce is slots, fewer than clips. `policies.shipped` exports what was learned.

Training reads one clip of a node, evaluation up to `clips_read`: a node of n clips is worth about
1/n in training, so the manager hardly ever merges. Trained with `clips_read`, it merges and drops
even where there is room: validation recall was 0.73 instead of 0.64 in 32 slots for 128 clips, but
0.80 instead of 0.90 in 128, and a short video has fewer clips than slots.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmmem_jax.data import encoded, lite_streams
from mmmem_jax.data.encoded import EncodedStream
from mmmem_jax.data.lite_streams import SPLITS, LiteConfig
from mmmem_jax.errors import UserError
from mmmem_jax.memory.types import MemoryConfig
from mmmem_jax.models.text_encoder import cached_embeddings
from mmmem_jax.models.weights import default_cache_dir, fetch_imagenet_classes, fetch_minilm
from mmmem_jax.policies.manager import SCHEMA_CONTEXT, Manager
from mmmem_jax.train import checkpoints, checks, sharding, text_job
from mmmem_jax.train.plan import Program
from mmmem_jax.train.profile import OnUpdate

LOG = logging.getLogger("mmmem_jax")
# Test streams before this one were looked at while the config was chosen; those from 3000 to 3039
# when it was tried to train with `clips_read` clips of a node read.
FIRST_STREAM = {"test": 2000}


def check_config(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
    """Checks all that the job, and then its evaluation, would stumble over late.

    The mesh is of `devices`, by default of those that are there.

    Raises:
      UserError: naming the key and what it may be.
    """
    checks.check_manager(config, devices)
    with checks.naming("world"):
        LiteConfig(**config.world)
    checks.at_least(config, 1, *(f"streams.{split}" for split in SPLITS))
    checks.at_least(config, 1, "dim", "slots", "max_node_tokens", "manager.num_questions")
    checks.at_least(config, 1, "clips_read", "eval.tokens_per_slot")
    if min(config.eval.slots, default=1) < 1:
        raise UserError(f"config.eval.slots is {config.eval.slots}; a memory has a slot at least")


def make_streams(config: ConfigDict, split: str) -> EncodedStream:
    """The streams of a split, [S, T, ...]; no split shares a class, a name or a place with another.

    Raises:
      UserError: if the class names or the text encoder cannot be had.
    """
    encoder = Path(config.encoder_dir) if config.encoder_dir else fetch_minilm()
    classes = Path(config.classes_dir) if config.classes_dir else fetch_imagenet_classes()
    cache = Path(config.cache_dir) if config.cache_dir else default_cache_dir() / "embeddings"
    embed_fn = functools.partial(
        cached_embeddings, folder=encoder, cache_dir=cache, progress=sys.stderr.isatty()
    )
    labels = lite_streams.make_labels(lite_streams.read_label_names(classes), embed_fn)
    options = LiteConfig(**config.world)
    first = FIRST_STREAM.get(split, 0)
    streams = [
        lite_streams.make_stream(config.seed, first + i, split, labels, options)
        for i in range(config.streams[split])
    ]
    return lite_streams.encode(streams, options, embed_fn)


def memory_config(config: ConfigDict, slots: int, token_budget: int | None = None) -> MemoryConfig:
    """The memory of a video without its entities, which no question of training is about."""
    text = text_job.memory_config(config, slots, token_budget)
    return dataclasses.replace(text, num_prototypes=2)


def make_manager(config: ConfigDict) -> Manager:
    """A manager initialised from the config's seed.

    Training knows no entities: what the manager reads of them weighs 0, and learns nothing.
    """
    model = text_job.make_manager(config)
    weights = model.context.kernel[...]
    model.context.kernel[...] = weights.at[jnp.array(SCHEMA_CONTEXT)].set(0.0)
    return model


def plan_manager(config: ConfigDict, devices: Sequence[jax.Device]) -> Program:
    """The update of the manager for devices that need not be there; no stream is made.

    Raises:
      UserError: if the config cannot be.
    """
    check_config(config, devices)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    batch = encoded.shapes(
        config.manager.batch_size,
        num_chunks=config.world.num_clips,
        num_questions=config.manager.num_questions,
        num_evidence=lite_streams.MAX_EVIDENCE,
        dim=config.dim,
    )
    task = text_job.text_task(text_job.TEMPERATURES[0], visuals=True)
    model, memory = make_manager(config), memory_config(config, config.slots)
    program = text_job.manager_program(config, mesh, model, memory, task)
    return Program(mesh, *program, batch)


def train(config: ConfigDict, workdir: Path, on_update: OnUpdate | None = None) -> Manager:
    """Trains in `workdir`, or goes on where it was stopped; `on_update` sees every update.

    Raises:
      UserError: if the workdir is another config's, or the streams cannot be made.
    """
    checkpoints.check_workdir(workdir, config.to_dict())
    streams = make_streams(config, "train")

    def make_loader(rows=None):
        return encoded.make_loader(
            streams,
            seed=config.seed,
            batch_size=config.manager.batch_size,
            questions_per_stream=config.manager.num_questions,
            rows=rows,
        )

    model, memory = make_manager(config), memory_config(config, config.slots)
    return text_job.learn(
        config, workdir, model, make_loader, memory, visuals=True, on_update=on_update
    )


def run(config: ConfigDict, workdir: Path, on_update: OnUpdate | None = None) -> None:
    """The whole job; what is refused leaves no workdir behind.

    `on_update` sees every update.

    Raises:
      UserError: if the config cannot be, or the workdir is another config's.
    """
    check_config(config)
    train(config, workdir, on_update)
    LOG.info("done; next: python -m mmmem_jax.eval_main --workdir=%s", workdir)
