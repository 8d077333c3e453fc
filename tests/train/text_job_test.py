"""The text job on a small folder: it trains, goes on, and refuses bad input.

Its evaluation is tested in tests/evals/text_eval_test.py.
"""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mmmem_jax import memory
from mmmem_jax.data import text_streams
from mmmem_jax.data.encoded import EncodedStream, to_items
from mmmem_jax.errors import UserError
from mmmem_jax.policies import rules
from mmmem_jax.retrieval.text_search import evidence_mass
from mmmem_jax.train import text_job

REPO = Path(__file__).resolve().parents[2]


def _module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


made_up = _module(REPO / "tests/data/text_streams_test.py")


def small_config(tmp_path: Path) -> ConfigDict:
    """The smoke config on a folder of four made-up videos, with a toy encoder."""
    folder = tmp_path / "data"
    folder.mkdir()
    # The same life four times: budgets are equal, so fewer programs are compiled.
    lives = [made_up.life(f"v{i}", 0, num_rows=250) for i in range(4)]
    events = [vars(event) for life in lives for event in life.events]
    asked = [vars(question) for life in lives for question in life.questions]
    for name, rows in (("events", events), ("qa", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = _module(REPO / "configs/timed_text.py").get_config("smoke")
    config.data_dir, config.cache_dir = str(folder), str(tmp_path / "cache")
    config.encoder_dir = str(REPO / "tests/models/tiny_bert")
    config.dim = 16
    return config


@pytest.fixture
def config(tmp_path) -> ConfigDict:
    return small_config(tmp_path)


def test_a_folder_is_trained_on_once(config, tmp_path):
    workdir = tmp_path / "run"
    text_job.run(config, workdir)
    trained, step = text_job.load_manager(config, workdir, None)
    assert step == config.manager.num_steps
    start = text_job.make_manager(config)
    assert not np.array_equal(trained.out.kernel[...], start.out.kernel[...])

    before = (workdir / "metrics.jsonl").read_text()
    text_job.run(config, workdir)  # finished: nothing more to do
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_plan_is_of_the_batches_trained_on(config, tmp_path, monkeypatch):
    def first_batch(phase, state, update, loader, **options):
        batches.append(next(loader))
        return state

    batches = []
    monkeypatch.setattr(text_job, "fit", first_batch)
    text_job.run(config, tmp_path / "run")
    planned = text_job.plan_manager(config, jax.devices()).batch
    assert [(x.shape, x.dtype) for x in batches[0]] == [(x.shape, x.dtype) for x in planned]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data_dir", "", "config.data_dir is empty"),
        ("source", "tapes", "must be egolife or timed_text"),
        ("questions", "both", "config.questions is 'both'; it must be made or labelled"),
        ("eval.splits", ("tset",), "config.eval.splits has 'tset'; a split is train or"),
        ("eval.splits", (), "config.eval.splits is empty"),
        ("eval.shares", (0.25, 0.0), "config.eval.shares has 0.0; a share is above 0"),
        ("eval.shares", (1.5,), "config.eval.shares has 1.5"),
        ("eval.shares", (float("nan"),), "config.eval.shares has nan"),
        ("eval.shares", (), "config.eval.shares is empty"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_anything_is_done(
    config, tmp_path, key, value, message
):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        text_job.load_streams(config, with_options=False)
    with pytest.raises(UserError, match=message):
        text_job.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labelled_questions_can_be_trained_on(config):
    config.questions = "labelled"
    streams = text_job.load_streams(config, with_options=False)
    space = text_job.fit_space(config, streams)
    encoded = text_job.training_streams(config, streams, space)
    assert [x.question_valid.tolist() for x in encoded] == [[True], [True]]
    unlabelled = [s._replace(labelled=s.labelled._replace(questions=())) for s in streams]
    with pytest.raises(UserError, match="no labelled question of the training split"):
        text_job.training_streams(config, unlabelled, space)


def test_older_runs_learned_from_made_questions(config):
    del config["questions"]
    streams = text_job.load_streams(config, with_options=False)
    encoded = text_job.training_streams(config, streams, text_job.fit_space(config, streams))
    made = [s for s in streams if s.split == "train"]
    assert [len(x.answer) for x in encoded] == [len(s.made.questions) for s in made]


def test_the_wearer_of_egolife_is_the_person_the_files_are_named_after(config):
    parts = [("A2_ALICE day 1", "A2_ALICE", "train", None)]
    assert text_job.wearer_of(config, parts) is None
    config.wearer = "Mo"
    assert text_job.wearer_of(config, parts) == "Mo"
    config.source = "egolife"
    assert text_job.wearer_of(config, parts) == "Alice"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_dir", ""),
        ("data_dir", "/nowhere"),
        ("dim", 4),
        ("seed", -1),
        ("questions_per_stream", 0),
        ("rows_per_stream", -1),
        ("manager.num_rows", 0),
        ("manager.log_every", 3),
        ("manager.batch_size", 0),
        ("mesh.data", 99),
        ("sib.ratio", "token"),
        ("eval.top_k", 0),
    ],
)
def test_a_refused_run_leaves_no_workdir(config, tmp_path, key, value):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"config.{key}|log_every = 3|/nowhere|config.mesh"):
        text_job.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_checkpoints_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        text_job.load_manager(config, tmp_path, None)


def test_rows_without_questions_are_refused(config, tmp_path):
    life = made_up.life("v", 0, num_rows=40)
    parts = [("v", "v", split, life) for split in ("train", "validation", "test")]
    streams = text_streams.make_streams(
        parts, made_up.embed, wearer=None, num_questions=0, rng_seed=0
    )
    space = text_streams.fit_space(streams[0].embedding, 16)
    with pytest.raises(UserError, match="no question can be made"):
        text_job.train_manager(config, tmp_path / "run", [text_streams.encode(space, streams[0])])
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def batch() -> EncodedStream:
    life = made_up.life("v", 0)
    parts = [("v", "v", split, life) for split in ("train", "validation", "test")]
    streams = text_streams.make_streams(
        parts, made_up.embed, wearer=None, num_questions=60, rng_seed=0
    )
    space = text_streams.fit_space(streams[0].embedding, 16)
    loader = text_streams.make_loader(
        [text_streams.encode(space, streams[0])],
        seed=0, batch_size=2, num_rows=64, num_questions=8,
    )  # fmt: skip
    return next(loader)


def memories(config, batch, rule):
    """Memories [B, 1] of a rule that hold whole segments."""
    settings = rule.configure(text_job.memory_config(config, 64, None))
    key, items = jax.random.key(0), to_items(batch)

    def one(stream):
        start = memory.init(settings)
        return memory.scan(rule.params, key, start, stream, decide_fn=rule.decide_fn)[0]

    return jax.tree.map(lambda x: x[:, None], jax.vmap(one)(items))


def test_the_reward_is_the_mean_evidence_mass(config, batch):
    states = memories(config, batch, rules.unlimited())
    task = text_job.text_task(0.1)(batch)
    reward = task.reward(states)
    assert reward.shape == (2, 1)
    for b in range(2):
        state = jax.tree.map(lambda x, i=b: x[i, 0], states)
        query = jnp.asarray(batch.query[b], jnp.float32)
        mass = evidence_mass(state, query, jnp.asarray(batch.evidence[b]), 0.1)
        valid = batch.question_valid[b]
        np.testing.assert_allclose(reward[b, 0], np.asarray(mass)[valid].mean(), rtol=1e-5)
    assert task.final(states)["log_prob"].shape == (2, 1)
    assert (task.final(states)["log_prob"] < 0).all()
    asked = batch.question_valid.sum(1, keepdims=True)
    assert np.all((task.entropy > 0) & (task.entropy <= np.log(asked) + 1e-6))


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        ([[3, -1], [4, -1], [7, 8], [9, -1]], np.log(4)),  # all different
        ([[3, -1], [3, -1], [7, 8], [8, 7]], np.log(2)),  # two, each asked about twice
        ([[3, -1], [3, 4], [3, 5], [9, -1]], np.log(4) - 0.75 * np.log(3)),
        ([[3, -1], [3, -1], [3, -1], [3, -1]], 0.0),
    ],
)
def test_what_is_asked_has_the_entropy_of_its_evidence(batch, evidence, expected):
    # The last question is padding: it counts for nothing.
    asked = batch._replace(
        evidence=np.array([[*evidence, evidence[0]]]), question_valid=np.arange(5)[None] < 4
    )
    task = text_job.text_task(0.1)
    np.testing.assert_allclose(task(asked).entropy, [[expected]], atol=1e-6)
    nothing = task(asked._replace(question_valid=np.zeros((1, 5), bool)))
    np.testing.assert_array_equal(nothing.entropy, [[0.0]])


def test_an_empty_memory_earns_nothing(config, batch):
    states = memories(config, batch, rules.random_actions([1e-30, 1e-30, 1.0]))
    np.testing.assert_array_equal(text_job.text_task(0.1)(batch).reward(states), 0.0)


def test_the_temperature_fits_how_sharp_the_questions_are(batch):
    found = batch.evidence.max(-1)
    exact = np.take_along_axis(batch.text, found[..., None], axis=1)
    sharp = text_job.calibrate_temperature(batch._replace(query=exact))
    blunt = text_job.calibrate_temperature(batch._replace(query=np.zeros_like(exact)))
    assert sharp < 0.2
    assert blunt == text_job.TEMPERATURES[0]
