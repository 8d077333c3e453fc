"""The job of the paper's own backbone: SIB-GRPO of Qwen3-VL with LoRA, on the world or on videos.

The base model is loaded onto the mesh and stays as it is; what is trained and saved is the adapter.
A supervised warm start may come first. At the end the adapter is written as PEFT reads it.
"""

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmmem_jax import prompts
from mmmem_jax.data import token_streams, video_streams, worlds
from mmmem_jax.data.token_streams import LETTERS, TokenStream, Widths
from mmmem_jax.errors import UserError
from mmmem_jax.memory import traces
from mmmem_jax.memory.types import DISCARD
from mmmem_jax.models.qwen3_vl import lora
from mmmem_jax.models.qwen3_vl.attention import IMPLEMENTATIONS
from mmmem_jax.models.qwen3_vl.chat import load_chat
from mmmem_jax.models.qwen3_vl.config import SIZES, Qwen3VLConfig, read_config
from mmmem_jax.models.qwen3_vl.images import read_image_config
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL
from mmmem_jax.models.qwen3_vl.params import load_model, resolve
from mmmem_jax.models.qwen3_vl.rules import RULES, without_fsdp
from mmmem_jax.sib import token_prompts, token_readers
from mmmem_jax.sib.advantages import STDS
from mmmem_jax.sib.losses import RATIOS
from mmmem_jax.sib.rewards import TASKS
from mmmem_jax.sib.rollout import CREDITS
from mmmem_jax.sib.token_prompts import Reading, Wording
from mmmem_jax.sib.token_rollout import Decider
from mmmem_jax.sib.token_update import ReaderFn, TokenSibConfig, make_optimizer, make_update
from mmmem_jax.testing.qwen3_vl import TINY as TINY_MODEL
from mmmem_jax.testing.qwen3_vl import write_checkpoint
from mmmem_jax.train import checkpoints, checks, distributed, sft, sharding, world_job
from mmmem_jax.train.plan import Program
from mmmem_jax.train.profile import OnUpdate
from mmmem_jax.train.state import TrainState, init_state
from mmmem_jax.train.trainer import FitConfig, fit

LOG = logging.getLogger("mmmem_jax")
SPLITS = ("train", "test")
SOURCES = ("world", "videos")  # of streams; each has a section of its own
READERS = ("overlap", "likelihood")
DTYPES = ("float32", "bfloat16")
FRAME_UNIT = 32  # pixels along the edge of a token of a frame
TINY = "tiny"  # model_size of a random model that the run writes itself


class Setup(NamedTuple):
    """A model and what surrounds it; of a plan, its arrays are shapes alone."""

    decider: Decider
    reader_fn: ReaderFn
    adapter: nnx.State
    base: nnx.State


def check_config(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
    """Checks all that the job, and then its evaluation, would stumble over late.

    The mesh is of `devices`, by default of those that are there.

    Raises:
      UserError: naming the key and what it may be.
    """
    checks.check_phase(config, "manager")
    checks.at_least(config, 0, "seed", "sft.num_steps")
    if config.sft.num_steps:
        with checks.naming("sft"):
            _fit_config(config.sft)
    with checks.naming("sib"):
        TokenSibConfig(**config.sib)
    checks.one_of("source", config.source, SOURCES)
    (_check_world if config.source == "world" else _check_videos)(config)
    sizes = ("widths", "memory")
    checks.at_least(config, 1, *(f"{s}.{key}" for s in sizes for key in config[s]))
    checks.at_least(
        config, 1, "image_size", "lora.rank", "decide.max_new_tokens", "reader.max_memory_tokens"
    )
    checks.at_least(config, 1, "manager.questions_per_stream", "sib.inner_epochs")
    checks.at_least(config, 1, "sib.clips_at_once")
    checks.at_least(config, 2, "sib.num_generations")  # one alone has nothing to be compared with
    for key, known in (
        ("model_size", (TINY, *SIZES)),
        ("dtype", DTYPES),
        ("attention", IMPLEMENTATIONS),
        ("reader.kind", READERS),
        ("sib.credit", CREDITS),
        ("sib.task", [task for task in TASKS if task != "log_gain"]),
        ("sib.std", STDS),
        ("sib.ratio", RATIOS),
    ):
        section, _, name = key.rpartition(".")
        checks.one_of(key, (config[section] if section else config)[name], known)
    if config.image_size % FRAME_UNIT:
        raise UserError(
            f"config.image_size is {config.image_size}; it must be a multiple of {FRAME_UNIT}"
        )
    if not config.decide.temperature > 0:
        raise UserError(
            f"config.decide.temperature is {config.decide.temperature}; it must be over 0"
        )
    _check_mesh(config, devices)


def _check_world(config: ConfigDict) -> None:
    with checks.naming("world"):
        worlds.WorldConfig(**config.world)
    checks.at_least(config, 1, *(f"streams.{split}" for split in config.streams))
    checks.at_least(config, 1, "world.num_chunks", "world.questions_per_family")


def _check_videos(config: ConfigDict) -> None:
    checks.at_least(config, 1, "videos.num_clips")
    checks.one_of("videos.num_options", config.videos.num_options, range(2, len(LETTERS) + 1))
    if config.reader.kind != "likelihood":
        raise UserError(
            f"config.reader.kind is {config.reader.kind!r}; of videos only 'likelihood' can answer"
        )


def _check_questions(config: ConfigDict) -> None:
    """Raises UserError if there are videos to ask about and what is asked of them cannot be."""
    if config.source != "videos":
        return
    section = config.videos
    if not section.memory_dir or not section.questions:
        raise UserError(
            "config.videos.memory_dir or config.videos.questions is empty; give a memory that kept"
            " every clip and a qa.jsonl about its videos (mmmem_jax/data/video_streams.py)"
        )
    for split in SPLITS:
        video_streams.questions_by_video(
            section.memory_dir, section.questions, split, section.num_options
        )


def num_clips(config: ConfigDict) -> int:
    """T, the clips of a stream."""
    return config.videos.num_clips if config.source == "videos" else config.world.num_chunks


def _check_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None) -> None:
    """Raises UserError unless the mesh divides the streams, the generations and rows of clips."""
    mesh, sib = sharding.make_mesh(**config.mesh, devices=devices), config.sib
    if devices is None:
        distributed.check_mesh(mesh)
    batch_size = config.manager.batch_size
    sharding.check_divides(
        mesh, batch_size=batch_size, num_generations=sib.num_generations, hidden=0
    )
    if num_clips(config) % sib.clips_at_once:
        raise UserError(
            f"config.sib.clips_at_once is {sib.clips_at_once}; it must divide the"
            f" {num_clips(config)} clips of a stream"
        )
    # Where a group shares its states, the rows over data and group are those of streams and clips.
    if batch_size * sib.clips_at_once % (mesh.shape["data"] * mesh.shape["group"]):
        raise UserError(
            f"config.sib.clips_at_once = {sib.clips_at_once} does not divide over the"
            f" {mesh.shape['group']} devices of mesh axis 'group'; make it a multiple"
        )


def make_streams(config: ConfigDict, split: str, folder: Path) -> TokenStream:
    """The streams of a split, [S, T, ...], in the tokens of a model folder.

    Raises:
      UserError: if a text is longer than `config.widths`, or videos or questions cannot be used.
    """
    tokenizer, pixels = load_chat(folder, read_config(folder)).tokenizer, read_image_config(folder)
    widths, dtype = Widths(**config.widths), jnp.dtype(config.dtype)
    if config.source == "videos":
        section = config.videos
        shape = video_streams.Shape(
            section.num_clips, section.num_options, config.image_size, widths
        )
        return video_streams.from_memory(
            section.memory_dir, section.questions, split, tokenizer, pixels, shape, dtype
        )
    with checks.naming("widths"):
        return token_streams.from_worlds(
            world_job.make_streams(config, split, config.streams[split]),
            tokenizer,
            pixels,
            image_size=config.image_size,
            dtype=dtype,
            widths=widths,
        )


def knows_evidence(streams: TokenStream) -> bool:
    """Whether the teacher of the warm start would keep any clip."""
    return bool((streams.teacher != DISCARD).any())


def find_folder(config: ConfigDict, workdir: Path) -> Path:
    """The folder of the base model; a tiny random one is written into the workdir.

    Raises:
      UserError: if there is none.
    """
    if config.checkpoint:
        return resolve(config.checkpoint)
    if config.model_size != TINY:
        raise UserError(
            "config.checkpoint is empty; give the folder or the repo id of a Qwen3-VL, such as"
            " Qwen/Qwen3-VL-8B-Instruct"
        )
    if not isinstance(workdir, Path):
        raise UserError(
            "config.model_size = tiny writes its model into --workdir, which must then be a folder"
            " of this machine"
        )
    folder = workdir / "checkpoint"
    if distributed.is_first() and not folder.exists():
        partial_folder = workdir / "checkpoint.partial"
        write_checkpoint(partial_folder, seed=config.seed, words=_known_words(config))
        partial_folder.rename(folder)
    distributed.wait_for_all("checkpoint is written")
    return folder


def _known_words(config: ConfigDict) -> list[str]:
    """What a tiny model is told in single tokens, so that prompts are short."""
    told = re.findall(r"[a-z]+", prompts.read(config.decide.prompt))
    return sorted({*worlds.WORDS[1:], "seen", *told} - {""})


def rules_of(config: ConfigDict) -> sharding.Rules:
    """How parameters are split over the mesh."""
    return RULES if config.fsdp else without_fsdp()


def load_setup(config: ConfigDict, mesh: Mesh, folder: Path) -> Setup:
    """The model of a folder on the mesh, its adapter new.

    Raises:
      UserError: if the folder is not that of a Qwen3-VL.
    """
    model_config = read_config(folder)
    chat = load_chat(folder, model_config)
    model = load_model(
        folder,
        dtype=jnp.dtype(config.dtype),
        mesh=mesh,
        attention=config.attention,
        remat=True,
        rules=rules_of(config),
    )
    split = lora.split_lora(_with_lora(config, model))
    wording = token_prompts.load_wording(chat, config.decide.prompt)
    reading = token_prompts.load_reading(chat, config.reader.prompt)
    return _set_up(config, model_config, wording, reading, split)


def plan_setup(config: ConfigDict, mesh: Mesh) -> Setup:
    """As `load_setup`, of shapes alone; without a checkpoint, of the model that the size names."""
    if config.checkpoint:
        folder = resolve(config.checkpoint)
        model_config, chat = read_config(folder), load_chat(folder, read_config(folder))
        wording = token_prompts.load_wording(chat, config.decide.prompt)
        reading = token_prompts.load_reading(chat, config.reader.prompt)
    else:
        model_config = TINY_MODEL if config.model_size == TINY else SIZES[config.model_size]
        wording = token_prompts.sized_wording(config.decide.prompt)
        reading = token_prompts.sized_reading(config.reader.prompt)

    def make():
        model = Qwen3VL(
            model_config,
            dtype=jnp.dtype(config.dtype),
            attention=config.attention,
            remat=True,
            mesh=mesh,
            rngs=nnx.Rngs(0),
        )
        return _with_lora(config, model)

    graphdef, adapter, base = nnx.split(nnx.eval_shape(make), nnx.LoRAParam, ...)
    adapter = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), adapter)
    split = lora.LoraSplit(graphdef, adapter, base)
    return _set_up(config, model_config, wording, reading, split)


def _with_lora(config: ConfigDict, model: Qwen3VL) -> Qwen3VL:
    return lora.add_lora(model, **config.lora, rngs=nnx.Rngs(config.seed))


def _set_up(
    config: ConfigDict,
    model_config: Qwen3VLConfig,
    wording: Wording,
    reading: Reading,
    split: lora.LoraSplit,
) -> Setup:
    side = config.image_size // model_config.vision.patch_size
    decider = Decider(
        split.graphdef,
        wording,
        patch_grid=(side, side),
        max_new_tokens=config.decide.max_new_tokens,
        temperature=config.decide.temperature,
    )
    return Setup(decider, _make_reader(config, split.graphdef, reading), split.lora, split.base)


def _make_reader(config: ConfigDict, graphdef: nnx.GraphDef, reading: Reading) -> ReaderFn:
    if config.reader.kind == "overlap":
        return lambda params, memories, batch: token_readers.overlap_reader(memories, batch)
    return token_readers.make_likelihood_reader(
        graphdef, **reading._asdict(), max_memory_tokens=config.reader.max_memory_tokens
    )


def _optimizer(section: ConfigDict) -> optax.GradientTransformation:
    return make_optimizer(section.learning_rate)


def _init(config: ConfigDict, section: ConfigDict, adapter: nnx.State) -> TrainState:
    return init_state(adapter, _optimizer(section), jax.random.key(config.seed))


def _fit_config(section: ConfigDict, **kwargs) -> FitConfig:
    return FitConfig(section.num_steps, section.log_every, section.save_every, **kwargs)


def manager_program(config: ConfigDict, mesh: Mesh, setup: Setup) -> Callable:
    """The update of SIB-GRPO on a mesh."""
    update = make_update(
        setup.decider,
        setup.reader_fn,
        traces.init(**config.memory),
        _optimizer(config.manager),
        TokenSibConfig(**config.sib),
        shard=sharding.make_shard(mesh),
    )
    return sharding.keep_placed(mesh, update, rules_of(config))


def plan_manager(config: ConfigDict, devices: Sequence[jax.Device]) -> Program:
    """The update of SIB-GRPO for devices that need not be there; no weight and no stream is made.

    Raises:
      UserError: if the config cannot be.
    """
    check_config(config, devices)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    setup = plan_setup(config, mesh)
    state = jax.eval_shape(partial(_init, config, config.manager), setup.adapter)
    vision = nnx.merge(setup.decider.graphdef, setup.adapter, setup.base).config.vision
    rows, columns = setup.decider.patch_grid
    on_videos = config.source == "videos"
    num_options = config.videos.num_options if on_videos else worlds.NUM_OPTIONS
    batch = token_streams.shapes(
        config.manager.batch_size,
        num_chunks=num_clips(config),
        num_questions=config.manager.questions_per_stream,
        widths=Widths(**config.widths),
        num_patches=rows * columns,
        patch_dim=vision.patch_dim,
        num_options=num_options,
        dtype=jnp.dtype(config.dtype),
    )
    update = manager_program(config, mesh, setup)
    return Program(mesh, state, update, batch, frozen=(setup.base,), rules=rules_of(config))


def _fit(
    phase: str, state: TrainState, update: Callable, fit_config: FitConfig,
    *, config: ConfigDict, workdir: Path, mesh: Mesh, setup: Setup, train: TokenStream,
    on_update: OnUpdate | None = None,
) -> TrainState:  # fmt: skip
    """One phase on the training streams."""
    batch_size = config.manager.batch_size
    split = distributed.split_batch(mesh, batch_size)
    loader = token_streams.make_loader(
        train,
        seed=config.seed,
        batch_size=batch_size,
        questions_per_stream=config.manager.questions_per_stream,
        rows=distributed.local_rows(split, batch_size),
    )
    return fit(
        phase,
        sharding.place(mesh, state, rules_of(config)),
        update,
        loader,
        workdir=workdir,
        config=config.to_dict(),
        fit_config=fit_config,
        put_batch=distributed.put_batch(split),
        on_update=on_update,
        frozen=(setup.base,),
    )


def train(
    config: ConfigDict, workdir: Path, setup: Setup, mesh: Mesh, streams: TokenStream,
    on_update: OnUpdate | None = None,
) -> nnx.State:  # fmt: skip
    """Both phases in `workdir`, or what is left of them; returns the adapter."""
    one_phase = partial(_fit, config=config, workdir=workdir, mesh=mesh, setup=setup, train=streams)
    adapter = setup.adapter
    if config.sft.num_steps:
        update = sft.make_update(
            setup.decider,
            traces.init(**config.memory),
            _optimizer(config.sft),
            clips_at_once=config.sib.clips_at_once,
        )
        shown = _fit_config(config.sft, shown=("loss", "policy_entropy"), best="-loss")
        update = sharding.keep_placed(mesh, update, rules_of(config))
        adapter = one_phase("sft", _init(config, config.sft, adapter), update, shown).params
    shown = _fit_config(
        config.manager,
        shown=("task_reward", "reward", "share_add", "share_discard", "policy_entropy"),
        decisions_per_step=config.sib.num_generations
        * streams.valid[0].size
        * config.manager.batch_size,
        best="task_reward",
    )
    update = manager_program(config, mesh, setup)
    state = _init(config, config.manager, adapter)
    return one_phase("manager", state, update, shown, on_update=on_update).params


def load_adapter(
    config: ConfigDict, workdir: Path, mesh: Mesh, setup: Setup, step: int | None
) -> tuple[nnx.State, int]:
    """The adapter of a checkpoint on the mesh, the newest for None, and its step.

    Raises:
      UserError: if there is no such checkpoint.
    """
    start = _init(config, config.manager, setup.adapter)
    start = sharding.place(mesh, start, rules_of(config))
    state, step = checkpoints.load_phase(workdir, "manager", start, step)
    return state.params, step


def run(config: ConfigDict, workdir: Path, on_update: OnUpdate | None = None) -> None:
    """The whole job in `workdir`, or what is left of it.

    `on_update` sees every update of SIB-GRPO.

    Raises:
      UserError: if the config cannot be, or the workdir is another config's; then nothing was
        written.
    """
    check_config(config)
    _check_questions(config)
    checkpoints.check_workdir(workdir, config.to_dict())
    if config.checkpoint or config.model_size != TINY or not isinstance(workdir, Path):
        find_folder(config, workdir)  # refuses before anything is written
    checkpoints.claim_workdir(workdir, config.to_dict())
    folder, mesh = find_folder(config, workdir), sharding.make_mesh(**config.mesh)
    # The test streams too, so that a text too long for config.widths is found before training.
    streams = {split: make_streams(config, split, folder) for split in SPLITS}["train"]
    if config.sft.num_steps and not knows_evidence(streams):
        raise UserError(
            f"config.sft.num_steps is {config.sft.num_steps}, but no question names its evidence,"
            " so there is nothing to learn from a teacher; set it to 0"
        )
    setup = load_setup(config, mesh, folder)
    adapter = distributed.to_host(train(config, workdir, setup, mesh, streams, on_update))
    if distributed.is_first():
        lora.save_adapter(
            workdir / "adapter", adapter, **config.lora, base=config.checkpoint or str(folder)
        )
    LOG.info("done; next: python -m mmmem_jax.eval_main --workdir=%s", workdir)
