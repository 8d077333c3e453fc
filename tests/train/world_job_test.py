"""Tests of mmmem_jax/train/world_job.py: splits, loading, and what has nothing in it."""

import jax
import ml_collections
import numpy as np
import pytest
from flax import nnx

from configs import sib_grpo
from mmmem_jax.data.encoded import QUESTION_FIELDS, EncodedStream
from mmmem_jax.errors import UserError
from mmmem_jax.sib import update as sib
from mmmem_jax.train import checkpoints, world_job

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


@pytest.mark.parametrize("case", ["no questions", "one chunk", "no chunks", "identical frames"])
def test_the_update_takes_what_has_nothing_in_it(config, case):
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
    memory_config = world_job.memory_config(config)
    optimizer = world_job.manager_optimizer(config)
    task = sib.reader_task(
        *nnx.split(models.reader), "probability", memory_config, world_job.retrieval_config(config)
    )
    graphdef, _ = nnx.split(models.manager)
    update = sib.make_update(graphdef, task, optimizer, memory_config, sib.SibConfig(**config.sib))
    start = sib.init_state(models.manager, optimizer, jax.random.key(0))
    state, metrics = jax.jit(update)(start, batch)
    assert [name for name, value in metrics.items() if not np.all(np.isfinite(value))] == []
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))
