"""Tests of mmmem_jax/train/world_job.py: splits, loading, and what has nothing in it."""

import jax
import ml_collections
import numpy as np
import pytest
from flax import nnx

from configs import sib_grpo
from mmmem_jax.data import worlds
from mmmem_jax.data.encoded import QUESTION_FIELDS, EncodedStream
from mmmem_jax.errors import UserError
from mmmem_jax.sib import update as sib
from mmmem_jax.train import checkpoints, world_job
from mmmem_jax.train.metrics import read_metrics
from tests.conftest import TINY

CHUNK_FIELDS = set(EncodedStream._fields) - set(QUESTION_FIELDS)


@pytest.fixture(scope="module")
def config() -> ml_collections.ConfigDict:
    return sib_grpo.get_config("smoke")


def test_splits_share_no_stream(config):
    made = {s: world_job.make_streams(config, s, 3, num_chunks=64) for s in world_job.SPLITS}
    other = config.copy_and_resolve_references()
    other.seed = 1
    made |= {f"{s} 1": world_job.make_streams(other, s, 3, num_chunks=64) for s in made}
    words = [stream.words.tobytes() for streams in made.values() for stream, _ in streams]
    assert len(set(words)) == len(words) == 24


def test_streams_are_made_the_same_again(config):
    first, again = (world_job.make_streams(config, "test", n, num_chunks=64) for n in (2, 3))
    for (a, asked), (b, asked_again) in zip(first, again, strict=False):
        np.testing.assert_array_equal(a.words, b.words)
        np.testing.assert_array_equal(asked.answer, asked_again.answer)


def test_only_held_out_streams_ask_once(config):
    def repeats(split):
        made = world_job.make_streams(config, split, 4, num_chunks=64)
        return sum(np.sum(q.valid & ~worlds.ask_once(q).valid) for _, q in made)

    assert repeats("train") > repeats("test") == 0


def test_networks_follow_from_the_seed(config):
    other = config.copy_and_resolve_references()
    other.seed = 1
    kernels = [world_job.make_models(c).manager.mid.kernel[...] for c in (config, config, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.any(kernels[0] != kernels[2])


def test_a_run_comes_back(tiny_run):
    config = ml_collections.ConfigDict(checkpoints.read_config(tiny_run))
    models = world_job.make_models(config)
    eye = world_job.load_eye(config, tiny_run, models.eye)
    reader = world_job.load_reader(tiny_run, models.reader)
    manager, step = world_job.load_manager(config, tiny_run, models.manager, None)
    earlier, earlier_step = world_job.load_manager(config, tiny_run, models.manager, 14)
    assert (step, earlier_step) == (16, 14)
    for trained, fresh in ((eye, models.eye), (reader, models.reader), (manager, earlier)):
        pairs = zip(*(jax.tree.leaves(nnx.state(m)) for m in (trained, fresh)), strict=True)
        assert any(np.any(a != b) for a, b in pairs)


def test_says_which_checkpoint_is_missing(tiny_run, tmp_path):
    config = ml_collections.ConfigDict(checkpoints.read_config(tiny_run))
    model = world_job.make_models(config).manager
    with pytest.raises(UserError, match=r"no step 3 \(steps there: \[14, 16\]\)"):
        world_job.load_manager(config, tiny_run, model, 3)
    with pytest.raises(UserError, match="no checkpoint .*run mmmem_jax.main"):
        world_job.load_manager(config, tmp_path, model, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("dim", 0),
        ("world.num_chunks", 0),
        ("world.num_chunks", -1),
        ("world.chunks_per_day", 1),
        ("world.questions_per_family", 0),
        ("world.chunks", 8),
        ("memory.episodic_slots", 0),
        ("memory.schema_slots", -1),
        ("memory.num_prototypes", 3),
        ("memory.merge_target", "newest"),
        ("retrieval.confidence", 2.0),
        ("retrieval.rounds", (1, 2)),
        ("streams.perception", 0),
        ("streams.train", 0),
        ("streams.validation", 0),
        ("streams.validation", 1),
        ("perception.batch_size", 0),
        ("perception.num_steps", 0),
        ("reader.hidden", 0),
        ("reader.num_unlimited", 8),
        ("manager.log_every", 30),
        ("manager.save_every", 0),
        ("manager.questions_per_stream", 0),
        ("manager.batch_size", "4"),
        ("mesh.data", 0),
        ("mesh.group", 3),
        ("mesh.model", 3),
        ("sib.num_generations", 1),
        ("sib.credit", "sate"),
        ("sib.std", "on"),
        ("sib.ratio", "token"),
        ("sib.task", "bleu"),
        ("sib.beta3", 1.0),
        ("sib.block_size", 0),
        ("eval.slots", (8, 0)),
    ],
)
def test_a_value_that_cannot_be_is_named_before_anything_is_written(config, tmp_path, key, value):
    config = ml_collections.ConfigDict(config.to_dict(), type_safe=False)
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(UserError) as error:
        world_job.run(config, tmp_path / "run")
    message = str(error.value)
    assert "\n" not in message
    assert "config." in message
    # These name what they do not divide.
    assert name in message or key in ("mesh.group", "mesh.model")
    assert not (tmp_path / "run").exists()


def test_a_plan_is_of_the_batches_trained_on(config, tmp_path, monkeypatch):
    def first_batch(phase, state, update, loader, **options):
        batches.append(next(loader))
        return state

    batches = []
    monkeypatch.setattr(world_job, "fit", first_batch)
    models = world_job.make_models(config)
    made = world_job.make_streams(config, "train", config.manager.batch_size)
    streams = world_job.encode_streams(models.eye, made, config.dim)
    world_job.train_manager(config, tmp_path, models.manager, models.reader, streams)
    planned = world_job.plan_manager(config, jax.devices()).batch
    assert [(x.shape, x.dtype) for x in batches[0]] == [(x.shape, x.dtype) for x in planned]


def test_the_default_configs_pass(config):
    world_job.check_config(config)
    world_job.check_config(sib_grpo.get_config())


def test_lives_of_one_chunk_are_trained_on(config, tmp_path):
    """Nothing can be asked of them, and they fill no credit unit; none is read unlimited."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(TINY)
    config.update_from_flattened_dict({"world.num_chunks": 1, "reader.num_unlimited": 0})
    config.manager.num_steps = 4
    world_job.run(config, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert (rows[-1]["phase"], rows[-1]["step"]) == ("manager", 4)
    assert not any("accuracy_unlimited" in row for row in rows)
    assert all(np.isfinite(value) for row in rows for k, value in row.items() if k != "phase")
    reader = world_job.load_reader(tmp_path, world_job.make_models(config).reader)
    assert np.isfinite(reader.log_temperature[...])


@pytest.fixture(scope="module")
def updated(config):
    """Of a batch: the state and the metrics after the first update of a manager."""
    models, memory_config = world_job.make_models(config), world_job.memory_config(config)
    optimizer = world_job.manager_optimizer(config)
    task = sib.reader_task(
        *nnx.split(models.reader), "probability", memory_config, world_job.retrieval_config(config)
    )
    graphdef, _ = nnx.split(models.manager)
    update = jax.jit(
        sib.make_update(graphdef, task, optimizer, memory_config, sib.SibConfig(**config.sib))
    )
    start = sib.init_state(models.manager, optimizer, jax.random.key(0))
    return lambda batch: update(start, batch)


@pytest.mark.parametrize("case", ["no questions", "one chunk", "no chunks", "identical frames"])
def test_the_update_takes_what_has_nothing_in_it(config, updated, case):
    """All-identical frames are what a camera sees that lies on a table."""
    models = world_job.make_models(config)
    made = world_job.make_streams(config, "train", 2, num_chunks=8)
    batch = world_job.encode_streams(models.eye, made, config.dim)
    size = {"one chunk": 1, "no chunks": 0}.get(case, 8)
    batch = batch._replace(**{f: getattr(batch, f)[:, :size] for f in CHUNK_FIELDS})
    batch = batch._replace(**{f: getattr(batch, f)[:, :4] for f in QUESTION_FIELDS})
    if case == "no questions":
        batch = batch._replace(question_valid=np.zeros_like(batch.question_valid))
    if case == "identical frames":
        same = {f: np.repeat(getattr(batch, f)[:, :1], 8, 1) for f in ("visual", "coarse", "text")}
        batch = batch._replace(**same, change=np.zeros_like(batch.change))
    state, metrics = updated(batch)
    assert [name for name, value in metrics.items() if not np.all(np.isfinite(value))] == []
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))
