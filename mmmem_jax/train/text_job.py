"""The text job: a manager learns by SIB-GRPO which rows of a stream of timed text to keep.

No label is read unless `config.questions` is "labelled". A batch holds segments of the training
streams and questions made from them; what a memory is worth is the probability that retrieval by
similarity lands on the evidence, at a price for every token held (eq. 10). Training has no budget:
the price ranks the rows, and at evaluation any budget keeps the best of them.
"""

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from mmmem_jax.data import egolife, encoded, text_streams
from mmmem_jax.data.encoded import EncodedStream, to_items, to_questions
from mmmem_jax.data.text_streams import TextSpace, TextStream
from mmmem_jax.data.timed_text import SPLITS
from mmmem_jax.errors import UserError
from mmmem_jax.memory.types import MemoryConfig, MemoryState
from mmmem_jax.models.text_encoder import cached_embeddings
from mmmem_jax.models.weights import default_cache_dir, fetch_minilm
from mmmem_jax.policies.manager import Manager
from mmmem_jax.retrieval.text_search import evidence_mass
from mmmem_jax.sib import update as sib
from mmmem_jax.train import checkpoints, checks, distributed, sharding
from mmmem_jax.train.plan import Program
from mmmem_jax.train.profile import OnUpdate
from mmmem_jax.train.trainer import FitConfig, fit
from mmmem_jax.train.world_job import manager_optimizer

LOG = logging.getLogger("mmmem_jax")
TEMPERATURES = (0.02, 0.03, 0.05, 0.08, 0.12, 0.2)
READERS = {
    "egolife": text_streams.read_egolife_parts,
    "timed_text": text_streams.read_timed_text_parts,
}
QUESTIONS = ("made", "labelled")


def check_config(config: ConfigDict) -> None:
    """Checks what neither reading nor training would stumble over, or only late.

    Raises:
      UserError: naming the key and what it may be.
    """
    if not config.data_dir:
        raise UserError("config.data_dir is empty; give --config.data_dir=FOLDER")
    checks.one_of("source", config.source, READERS)
    checks.one_of("questions", training_questions(config), QUESTIONS)
    for key in ("shares", "splits"):
        if not config.eval[key]:
            raise UserError(f"config.eval.{key} is empty; name one at least")
    for split in config.eval.splits:
        if split not in SPLITS:
            raise UserError(f"config.eval.splits has {split!r}; a split is {' or '.join(SPLITS)}")
    for share in config.eval.shares:
        if not 0.0 < share <= 1.0:
            raise UserError(f"config.eval.shares has {share}; a share is above 0, and at most 1")


def training_questions(config: ConfigDict) -> str:
    """Those the manager learns from, a field of TextStream; older runs know the made ones only."""
    return config.get("questions", "made")


def read_parts(config: ConfigDict) -> list[tuple]:
    """The parts of `config.data_dir` as `text_streams.make_streams` takes them.

    Raises:
      UserError: if the config cannot be, or its data_dir cannot be read.
    """
    check_config(config)
    return READERS[config.source](config.data_dir, skip_bad_rows=config.skip_bad_rows)


def wearer_of(config: ConfigDict, parts: Sequence[tuple]) -> str | None:
    """Who wears the camera: the person that EgoLife's files are named after, else as configured."""
    if config.source == "egolife":
        return next((egolife.wearer_of(video) for _, video, *_ in parts), None)
    return config.wearer or None


def load_streams(config: ConfigDict, *, with_options: bool) -> list[TextStream]:
    """The streams of `config.data_dir`, embedded; training can do without the options.

    Raises:
      UserError: if there is no data_dir, or it cannot be read.
    """
    parts = read_parts(config)
    encoder = Path(config.encoder_dir) if config.encoder_dir else fetch_minilm()
    cache = Path(config.cache_dir) if config.cache_dir else default_cache_dir() / "embeddings"
    return text_streams.make_streams(
        parts,
        functools.partial(
            cached_embeddings, folder=encoder, cache_dir=cache, progress=sys.stderr.isatty()
        ),
        wearer=wearer_of(config, parts),
        num_questions=config.questions_per_stream,
        rng_seed=config.question_seed,
        max_rows=config.rows_per_stream or None,
        with_options=with_options,
    )


def fit_space(config: ConfigDict, streams: list[TextStream]) -> TextSpace:
    """The memory's space, from the training rows."""
    train = [stream.embedding for stream in streams if stream.split == "train"]
    return text_streams.fit_space(np.concatenate(train), config.dim)


def check_training(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
    """Checks what training, and then the evaluation, would stumble over late.

    The mesh is of `devices`, by default of those that are there.

    Raises:
      UserError: naming the key and what it may be.
    """
    checks.check_manager(config, devices)
    checks.at_least(config, len(text_streams.FEATURES), "dim")
    checks.at_least(config, 1, "manager.num_rows", "manager.num_questions", "max_node_tokens")
    checks.at_least(config, 1, "questions_per_stream")
    checks.at_least(config, 0, "rows_per_stream", "question_seed")
    checks.at_least(config, 1, "eval.top_k", "eval.tokens_per_slot", "eval.tokens_per_cluster")


def make_manager(config: ConfigDict) -> Manager:
    """A manager initialised from the config's seed."""
    return Manager(config.dim, config.manager.hidden, rngs=nnx.Rngs(config.seed))


def memory_config(config: ConfigDict, slots: int, token_budget: int | None) -> MemoryConfig:
    """A memory of verbatim text: what a node holds is what was said, never a summary."""
    return MemoryConfig(
        sensory_slots=1,
        episodic_slots=slots,
        schema_slots=0,
        num_prototypes=1,
        num_relations=1,
        dim=config.dim,
        token_budget=token_budget,
        merge_keep=1.0,
        max_node_tokens=config.max_node_tokens,
    )


def _question_entropy(
    evidence: Int[Array, "Q S"], valid: Bool[Array, "Q"], num_rows: int
) -> Float[Array, ""]:
    """Mean over the Q valid questions of log(Q / how many of them share a row with this), nats.

    It is the entropy of what is asked where questions share all of their evidence or none.
    """
    rows = jax.nn.one_hot(evidence, num_rows).sum(1)
    alike = jnp.sum((rows @ rows.T > 0) & valid, axis=1)
    count = jnp.maximum(valid.sum(), 1)
    return jnp.sum(jnp.where(valid, jnp.log(count / jnp.maximum(alike, 1)), 0.0)) / count


def text_task(
    temperature: float | jax.Array, *, visuals: bool = False
) -> Callable[[EncodedStream], sib.TaskFns]:
    """What a batch's questions make of a memory: evidence mass, and its log for the bound.

    For the bound Y is the evidence of one of a segment's questions, each as likely to be asked; q
    mixes retrieval over the T rows with 5% of chance.
    """

    mass_fn = functools.partial(evidence_mass, visuals=visuals)

    def make(batch: EncodedStream) -> sib.TaskFns:
        questions, evidence = to_questions(batch), jnp.asarray(batch.evidence)
        num_rows = batch.valid.shape[-1]
        entropy = jax.vmap(functools.partial(_question_entropy, num_rows=num_rows))(
            evidence, questions.valid
        )

        def scored(value):
            def one(state: MemoryState, query, found, valid):
                score = value(mass_fn(state, query, found, temperature))
                return jnp.sum(jnp.where(valid, score, 0.0)) / jnp.maximum(valid.sum(), 1)

            over_group = jax.vmap(one, in_axes=(0, None, None, None))
            return lambda states: jax.vmap(over_group)(
                states, questions.query, evidence, questions.valid
            )

        log_prob = scored(lambda mass: jnp.log(0.95 * mass + 0.05 / num_rows))
        return sib.TaskFns(
            scored(lambda mass: mass),
            lambda states: {"log_prob": log_prob(states)},
            entropy[:, None],
        )

    return make


def calibrate_temperature(batch: EncodedStream, *, visuals: bool = False) -> float:
    """The temperature under which softmax retrieval from all rows of a batch is likeliest right.

    With `visuals`, a row counts by its text or by its view, whichever fits the question better.
    """
    items, questions = to_items(batch), to_questions(batch)

    @jax.jit
    def log_prob(temperature, args, valid):
        def one(text, view, valid, query, evidence, asked):
            cosine = query @ text.T
            if visuals:
                cosine = jnp.maximum(cosine, query @ view.T)
            logits = jnp.where(valid, cosine / temperature, -1e9)
            found = jnp.any(evidence[..., None] == jnp.arange(len(text)), axis=1)
            mass = jnp.sum(jax.nn.softmax(logits) * found, axis=-1)
            return jnp.sum(jnp.where(asked, jnp.log(mass + 1e-6), 0.0)), asked.sum()

        total, count = jax.vmap(one)(*args, valid)
        return total.sum() / jnp.maximum(count.sum(), 1)

    args = (items.text, items.coarse, items.valid, questions.query, jnp.asarray(batch.evidence))
    return max(TEMPERATURES, key=lambda t: float(log_prob(t, args, questions.valid)))


def train_manager(
    config: ConfigDict,
    workdir: Path,
    train_streams: list[EncodedStream],
    on_update: OnUpdate | None = None,
) -> Manager:
    """SIB-GRPO on segments of the training streams, in a workdir that is claimed now.

    Raises:
      UserError: if no question could be made from them.
    """
    section = config.manager
    if not any(stream.question_valid.any() for stream in train_streams):
        raise UserError(
            f"{config.data_dir}: no question can be made from the training rows; they need 4 to 40 "
            "words, and among them a word few other rows have (mmmem_jax/data/stream_questions.py)"
        )

    def make_loader(rows=None):
        return text_streams.make_loader(
            train_streams,
            seed=config.seed,
            batch_size=section.batch_size,
            num_rows=section.num_rows,
            num_questions=section.num_questions,
            rows=rows,
        )

    memory = memory_config(config, section.num_rows, None)
    return learn(config, workdir, make_manager(config), make_loader, memory, on_update=on_update)


def manager_program(
    config: ConfigDict, mesh: Mesh, model: Manager, memory: MemoryConfig, task: Callable
) -> tuple[sib.ManagerState, Callable]:
    """The state before the first update, and the update on a mesh; see `learn`."""
    optimizer, options = manager_optimizer(config), sib.SibConfig(**config.sib)
    shard = sharding.make_shard(mesh)
    update = sib.make_update(nnx.graphdef(model), task, optimizer, memory, options, shard=shard)
    start = sib.init_state(model, optimizer, jax.random.key(config.seed))
    return start, sharding.keep_placed(mesh, update)


def plan_manager(config: ConfigDict, devices: Sequence[jax.Device]) -> Program:
    """The update of the manager for devices that need not be there; no data is read.

    Raises:
      UserError: if the config cannot be.
    """
    check_training(config, devices)
    mesh, section = sharding.make_mesh(**config.mesh, devices=devices), config.manager
    memory = memory_config(config, section.num_rows, None)
    batch = encoded.shapes(
        section.batch_size,
        num_chunks=section.num_rows,
        num_questions=section.num_questions,
        num_evidence=text_streams.MAX_EVIDENCE,
        dim=config.dim,
    )
    task = text_task(TEMPERATURES[0])
    return Program(mesh, *manager_program(config, mesh, make_manager(config), memory, task), batch)


def learn(
    config: ConfigDict,
    workdir: Path,
    model: Manager,
    make_loader: Callable[..., grain.DatasetIterator],
    memory: MemoryConfig,
    *,
    visuals: bool = False,
    on_update: OnUpdate | None = None,
) -> Manager:
    """SIB-GRPO on a loader's batches by `text_task`, in a workdir that is claimed now.

    Args:
      config: with sections `manager`, `sib` and `mesh`.
      workdir: folder of the run.
      model: the manager before its first update.
      make_loader: gives an endless iterator of EncodedStream batches [B, T, ...], from its start;
        given rows, of these alone.
      memory: the memory that the manager fills.
      visuals: whether views are retrieved by text, as `retrieval.text_search` has it.
      on_update: sees every update, see `trainer.fit`.

    Raises:
      UserError: if the mesh cannot be, or the workdir is another config's.
    """
    section, mesh = config.manager, sharding.make_mesh(**config.mesh)
    batch = next(make_loader())
    temperature = calibrate_temperature(batch, visuals=visuals)
    LOG.info("retrieval temperature %.2f", temperature)
    start, update = manager_program(
        config, mesh, model, memory, text_task(temperature, visuals=visuals)
    )
    checkpoints.claim_workdir(workdir, config.to_dict())
    split = distributed.split_batch(mesh, section.batch_size)
    final = fit(
        "manager",
        sharding.place(mesh, start),
        update,
        make_loader(distributed.local_rows(split, section.batch_size)),
        workdir=workdir,
        config=config.to_dict(),
        fit_config=FitConfig(
            section.num_steps,
            section.log_every,
            section.save_every,
            shown=("task_reward", "reward", "compression", "share_add", "policy_entropy"),
            decisions_per_step=config.sib.num_generations * batch.valid.size,
            best="task_reward",
        ),
        put_batch=distributed.put_batch(split),
        on_update=on_update,
    )
    return nnx.merge(nnx.graphdef(model), final.params)


def load_manager(config: ConfigDict, workdir: Path, step: int | None) -> tuple[Manager, int]:
    """The manager of a checkpoint, the newest for None, and its step.

    Raises:
      UserError: if there is no such checkpoint.
    """
    model = make_manager(config)
    start = sib.init_state(model, manager_optimizer(config), jax.random.key(config.seed))
    state, step = checkpoints.load_phase(workdir, "manager", start, step)
    nnx.update(model, state.params)
    return model, step


def train(
    config: ConfigDict,
    workdir: Path,
    streams: Sequence[TextStream],
    space: TextSpace,
    on_update: OnUpdate | None = None,
) -> Manager:
    """Trains in `workdir`, or goes on where it was stopped; a finished run is only loaded."""
    checkpoints.check_workdir(workdir, config.to_dict())
    if checkpoints.newest(workdir / "checkpoints" / "manager") == config.manager.num_steps:
        return load_manager(config, workdir, None)[0]
    return train_manager(config, workdir, training_streams(config, streams, space), on_update)


def training_streams(
    config: ConfigDict, streams: Sequence[TextStream], space: TextSpace
) -> list[EncodedStream]:
    """The streams of the training split, with the questions that `config.questions` names.

    Raises:
      UserError: if these are the labelled ones, and none has evidence in its stream.
    """
    kind = training_questions(config)
    encoded = [text_streams.encode(space, s, questions=kind) for s in streams if s.split == "train"]
    if kind == "labelled" and not any(x.question_valid.any() for x in encoded):
        raise UserError(
            f"{config.data_dir}: no labelled question of the training split has evidence in the"
            " stream it is asked of; train with --config.questions=made"
        )
    return encoded


def run(config: ConfigDict, workdir: Path, on_update: OnUpdate | None = None) -> None:
    """The whole job; what is refused, the config or the data, leaves no workdir behind.

    `on_update` sees every update of the manager.

    Raises:
      UserError: if the config or the data cannot be, or the workdir is another config's.
    """
    check_config(config)
    check_training(config)
    checkpoints.check_workdir(workdir, config.to_dict())
    streams = load_streams(config, with_options=False)
    train(config, workdir, streams, fit_space(config, streams), on_update)
    LOG.info("done; next: python -m mmmem_jax.eval_main --workdir=%s", workdir)
