"""The job of the procedural world: eye, then reader, then manager, each resumable by itself."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmmem_jax.data import encoded, worlds
from mmmem_jax.data.batches import batches
from mmmem_jax.data.encoded import EncodedStream
from mmmem_jax.errors import UserError
from mmmem_jax.memory.types import LEVELS, MemoryConfig
from mmmem_jax.models.frame_encoder import FrameEncoder, frame_loss
from mmmem_jax.models.reader import Reader
from mmmem_jax.perception import world as perception
from mmmem_jax.policies.manager import Manager
from mmmem_jax.retrieval.top_down import RetrievalConfig
from mmmem_jax.sib import update as sib
from mmmem_jax.train import checkpoints, checks, distributed, reader_phase, sharding, state
from mmmem_jax.train.plan import Program
from mmmem_jax.train.profile import OnUpdate
from mmmem_jax.train.trainer import FitConfig, fit

LOG = logging.getLogger("mmmem_jax")
SPLITS = {"perception": 0, "train": 1, "validation": 2, "test": 3}
# Test streams before this one were looked at while the number of updates was chosen.
FIRST_STREAM = {"test": 1000}
PHASES = ("perception", "reader", "manager")
CALIBRATED = "calibrated_reader"  # folder of the reader with its temperature set


class Models(NamedTuple):
    """Structure and freshly initialised parameters of the three networks."""

    eye: FrameEncoder
    reader: Reader
    manager: Manager


def memory_config(config: ConfigDict) -> MemoryConfig:
    """The memory of a run."""
    return MemoryConfig(dim=config.dim, **config.memory)


def retrieval_config(config: ConfigDict) -> RetrievalConfig:
    """The retrieval of a run."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in config.retrieval.items()}
    return RetrievalConfig(**options)


def check_config(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
    """Checks all that the job, and then its evaluation, would stumble over late.

    The mesh is of `devices`, by default of those that are there.

    Raises:
      UserError: naming the key and what it may be.
    """
    checks.at_least(config, 2, "streams.validation")  # one half calibrates, the other measures it
    checks.at_least(config, 1, *(f"streams.{split}" for split in SPLITS))
    checks.at_least(config, 1, "world.num_chunks", "world.questions_per_family")
    with checks.naming("world"):
        worlds.WorldConfig(**config.world)
    checks.at_least(config, 0, "memory.schema_slots", "memory.num_relations")
    with checks.naming("memory"):
        num_prototypes = memory_config(config).num_prototypes
    checks.one_of("memory.num_prototypes", num_prototypes, (1, 2))  # the reader reads two at most
    with checks.naming("retrieval"):
        retrieval = retrieval_config(config)
    if len(retrieval.top_k) != len(LEVELS) or len(retrieval.rounds) != len(LEVELS):
        raise UserError(f"config.retrieval: top_k and rounds need a number for each of {LEVELS}")
    for phase in ("perception", "reader"):
        checks.check_phase(config, phase)
    checks.at_least(config, 0, "reader.num_unlimited")
    if config.reader.num_unlimited >= config.reader.batch_size:
        raise UserError("config.reader.num_unlimited must be less than config.reader.batch_size")
    checks.at_least(config, 1, "reader.questions_per_stream", "manager.questions_per_stream")
    checks.check_manager(config, devices)
    checks.at_least(config, 1, "eval.batch_size")
    if min(config.eval.slots, default=1) < 1:
        raise UserError(f"config.eval.slots is {config.eval.slots}; a memory has a slot at least")


def make_models(config: ConfigDict) -> Models:
    """Networks initialised from the config's seed."""
    keys = nnx.Rngs(eye=config.seed, reader=config.seed + 1, manager=config.seed + 2)
    return Models(
        eye=FrameEncoder(len(worlds.WORDS), config.perception.hidden, rngs=nnx.Rngs(keys.eye())),
        reader=Reader(config.dim, hidden=config.reader.hidden, rngs=nnx.Rngs(keys.reader())),
        manager=Manager(config.dim, config.manager.hidden, rngs=nnx.Rngs(keys.manager())),
    )


def make_streams(
    config: ConfigDict, split: str, size: int, *, num_chunks: int | None = None
) -> list[tuple[worlds.Stream, worlds.Questions]]:
    """The first `size` streams of a split; splits never share a stream.

    In the test split no question is asked twice.
    """
    options = dict(config.world)
    if num_chunks is not None:
        options["num_chunks"] = num_chunks
    world = worlds.WorldConfig(**options)
    seed = config.seed * len(SPLITS) + SPLITS[split]
    first = FIRST_STREAM.get(split, 0)
    made = [worlds.make_stream(seed, first + i, world) for i in range(size)]
    if split == "test":
        made = [(stream, worlds.ask_once(questions)) for stream, questions in made]
    return made


def encode_streams(eye: FrameEncoder, streams, dim: int) -> EncodedStream:
    """Perceived streams of one length, stacked."""
    return encoded.stack([perception.perceive(eye, *s, dim) for s in streams])


def perceived(
    config: ConfigDict, eye: FrameEncoder, split: str, size: int | None = None
) -> EncodedStream:
    """The first `size` streams of a split, all of the config's by default, as `eye` sees them."""
    return encode_streams(
        eye, make_streams(config, split, size or config.streams[split]), config.dim
    )


def _phase_key(config: ConfigDict, phase: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), PHASES.index(phase))


def _fit_config(section: ConfigDict, **kwargs) -> FitConfig:
    return FitConfig(section.num_steps, section.log_every, section.save_every, **kwargs)


def _stream_loader(
    config: ConfigDict, section: ConfigDict, streams: EncodedStream, rows: np.ndarray
) -> grain.DatasetIterator:
    """Rows of batches of streams for a phase, shuffled and endless."""
    return encoded.make_loader(
        streams,
        seed=config.seed,
        batch_size=section.batch_size,
        questions_per_stream=section.questions_per_stream,
        rows=rows,
    )


def _frame_loader(config: ConfigDict, rows: np.ndarray) -> grain.DatasetIterator:
    """Rows of batches (frames, shown words) of the perception split, shuffled and endless."""
    streams = make_streams(config, "perception", config.streams.perception)
    frames = np.concatenate([worlds.render(s) for s, _ in streams])
    shown = np.concatenate([perception.shown_words(s) for s, _ in streams])
    elements = (
        grain.MapDataset.range(len(frames))
        .seed(config.seed)
        .shuffle()
        .repeat()
        .map(lambda index: (frames[index], shown[index]))
    )
    return batches(elements, config.perception.batch_size, rows)


def load_eye(config: ConfigDict, workdir: Path, model: FrameEncoder) -> FrameEncoder:
    """The trained frame encoder of a workdir."""
    graphdef, params = nnx.split(model)
    start = state.init_state(params, _eye_optimizer(config), _phase_key(config, "perception"))
    return nnx.merge(graphdef, checkpoints.load_phase(workdir, "perception", start)[0].params)


def load_reader(workdir: Path, model: Reader) -> Reader:
    """The calibrated reader of a workdir."""
    graphdef, params = nnx.split(model)
    return nnx.merge(
        graphdef, checkpoints.load_phase(workdir, CALIBRATED, {"params": params})[0]["params"]
    )


def load_manager(
    config: ConfigDict, workdir: Path, model: Manager, step: int | None
) -> tuple[Manager, int]:
    """The manager of a checkpoint, the newest by default, and its step."""
    graphdef, _ = nnx.split(model)
    start = sib.init_state(model, manager_optimizer(config), _phase_key(config, "manager"))
    found, step = checkpoints.load_phase(workdir, "manager", start, step)
    return nnx.merge(graphdef, found.params), step


def _eye_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    return optax.adam(config.perception.learning_rate)


def train_eye(config: ConfigDict, workdir: Path, model: FrameEncoder) -> FrameEncoder:
    """Trains the frame encoder; a finished run only loads it."""
    graphdef, params = nnx.split(model)
    optimizer = _eye_optimizer(config)

    def loss_fn(params, rng_key, batch):
        return frame_loss(nnx.merge(graphdef, params), *batch)

    mesh, batch_size = sharding.make_mesh(**config.mesh), config.perception.batch_size
    split = distributed.split_batch(mesh, batch_size)
    start = state.init_state(params, optimizer, _phase_key(config, "perception"))
    final = fit(
        "perception",
        sharding.replicate(mesh, start),
        state.make_update(loss_fn, optimizer),
        _frame_loader(config, distributed.local_rows(split, batch_size)),
        workdir=workdir,
        config=config.to_dict(),
        fit_config=_fit_config(config.perception, shown=("loss", "recall_fine", "recall_coarse")),
        put_batch=distributed.put_batch(split),
    )
    return nnx.merge(graphdef, distributed.to_local(final.params))


def train_reader(
    config: ConfigDict, workdir: Path, model: Reader, train: EncodedStream, held_out: EncodedStream
) -> Reader:
    """Trains the reader on memories of many kinds, then calibrates it on held-out ones."""
    graphdef, params = nnx.split(model)
    section = config.reader
    if checkpoints.newest(workdir / "checkpoints" / CALIBRATED) is not None:
        return load_reader(workdir, model)
    schedule = optax.cosine_decay_schedule(section.learning_rate, section.num_steps, alpha=0.02)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    # Partial evidence comes from a fixed ladder, so that answering can be tuned without retraining.
    loss_fn = reader_phase.make_loss_fn(
        graphdef,
        memory_config(config),
        RetrievalConfig(),
        section.num_unlimited,
        section.flat_share,
    )
    mesh = sharding.make_mesh(**config.mesh)
    split = distributed.split_batch(mesh, section.batch_size)
    start = state.init_state(params, optimizer, _phase_key(config, "reader"))
    shown = ("loss", "accuracy", *["accuracy_unlimited"] * (section.num_unlimited > 0))
    final = fit(
        "reader",
        sharding.replicate(mesh, start),
        state.make_update(loss_fn, optimizer),
        _stream_loader(config, section, train, distributed.local_rows(split, section.batch_size)),
        workdir=workdir,
        config=config.to_dict(),
        fit_config=_fit_config(section, shown=shown, best="-loss"),
        put_batch=distributed.put_batch(split),
    )
    trained = distributed.to_local(final.params)
    params, report = reader_phase.calibrate(
        graphdef, trained, jax.random.key(config.seed), held_out, memory_config(config)
    )
    LOG.info("reader calibrated: %s", {k: round(v, 4) for k, v in report.items()})
    saved = checkpoints.open_checkpoints(workdir / "checkpoints" / CALIBRATED)
    placed = sharding.replicate(mesh, distributed.to_host({"params": params}))
    checkpoints.save(saved, section.num_steps, placed, report, config.to_dict())
    saved.close()
    return nnx.merge(graphdef, params)


def manager_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Adam with a short warm-up and clipped gradients; one schedule step is one inner epoch."""
    steps = config.manager.num_steps * config.sib.inner_epochs
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.manager.learning_rate,
        max(1, steps // 50),
        max(2, steps),
        0.1 * config.manager.learning_rate,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def manager_program(
    config: ConfigDict, mesh: Mesh, model: Manager, reader: Reader
) -> tuple[sib.ManagerState, Callable]:
    """The state before the first update of the manager, and the update on a mesh."""
    options, memory = sib.SibConfig(**config.sib), memory_config(config)
    optimizer = manager_optimizer(config)
    task = sib.reader_task(*nnx.split(reader), options.task, memory, retrieval_config(config))
    shard = sharding.make_shard(mesh)
    update = sib.make_update(nnx.graphdef(model), task, optimizer, memory, options, shard=shard)
    start = sib.init_state(model, optimizer, _phase_key(config, "manager"))
    return start, sharding.keep_placed(mesh, update)


def plan_manager(config: ConfigDict, devices: Sequence[jax.Device]) -> Program:
    """The update of the manager for devices that need not be there; no stream is made.

    Raises:
      UserError: if the config cannot be.
    """
    check_config(config, devices)
    mesh, models = sharding.make_mesh(**config.mesh, devices=devices), make_models(config)
    batch = encoded.shapes(
        config.manager.batch_size,
        num_chunks=config.world.num_chunks,
        num_mentions=worlds.NUM_MENTIONS,
        num_questions=config.manager.questions_per_stream,
        num_options=worlds.NUM_OPTIONS,
        num_evidence=worlds.MAX_EVIDENCE,
        dim=config.dim,
    )
    return Program(mesh, *manager_program(config, mesh, models.manager, models.reader), batch)


def train_manager(
    config: ConfigDict,
    workdir: Path,
    model: Manager,
    reader: Reader,
    train: EncodedStream,
    on_update: OnUpdate | None = None,
) -> Manager:
    """SIB-GRPO with the reader fixed; `on_update` sees every update."""
    section = config.manager
    mesh = sharding.make_mesh(**config.mesh)
    start, update = manager_program(config, mesh, model, reader)
    split = distributed.split_batch(mesh, section.batch_size)
    decisions = section.batch_size * config.sib.num_generations * config.world.num_chunks
    final = fit(
        "manager",
        sharding.place(mesh, start),
        update,
        _stream_loader(config, section, train, distributed.local_rows(split, section.batch_size)),
        workdir=workdir,
        config=config.to_dict(),
        fit_config=dataclasses.replace(
            _fit_config(section, shown=("task_reward", "reward", "share_add", "share_discard")),
            decisions_per_step=decisions,
            best="task_reward",
        ),
        put_batch=distributed.put_batch(split),
        on_update=on_update,
    )
    return nnx.merge(nnx.graphdef(model), final.params)


def run(config: ConfigDict, workdir: Path, on_update: OnUpdate | None = None) -> None:
    """Trains all three phases in `workdir`, or goes on where it was stopped.

    `on_update` sees every update of the manager.

    Raises:
      UserError: if the config cannot be; then nothing was written.
    """
    check_config(config)
    checkpoints.claim_workdir(workdir, config.to_dict())
    models = make_models(config)
    eye = train_eye(config, workdir, models.eye)
    train, held_out = (perceived(config, eye, split) for split in ("train", "validation"))
    reader = train_reader(config, workdir, models.reader, train, held_out)
    train_manager(config, workdir, models.manager, reader, train, on_update)
    LOG.info("done; next: python -m mmmem_jax.eval_main --workdir=%s", workdir)
