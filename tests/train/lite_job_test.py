"""The lite job at toy size: it trains, goes on, is evaluated and exported, refuses bad input."""

import json

import jax
import numpy as np
import pytest

from configs import lite
from mmmem_jax.errors import UserError
from mmmem_jax.evals import lite_eval
from mmmem_jax.memory.types import DISCARD
from mmmem_jax.models.text_encoder import read_bert_config
from mmmem_jax.policies import shipped
from mmmem_jax.policies.manager import SCHEMA_CONTEXT
from mmmem_jax.train import lite_job, text_job
from tests.conftest import REPO

ENCODER = REPO / "tests/models/tiny_bert"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The smoke config with a toy encoder and made-up class names."""
    folder = tmp_path_factory.mktemp("lite")
    names = [f"{a}{b}{c}" for a in "bcdfghjklm" for b in "aeiouwxyzq" for c in "bcdfghjklm"]
    (folder / "imagenet1k_clean_names.json").write_text(json.dumps(names))
    config = lite.get_config("smoke")
    config.encoder_dir, config.classes_dir = str(ENCODER), str(folder)
    config.cache_dir = str(folder / "cache")
    config.dim = read_bert_config(ENCODER).hidden_size
    config.streams.update({"train": 4, "validation": 2, "test": 2})
    config.manager.update({"num_steps": 2, "save_every": 2})
    return config


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lite_run") / "run"
    lite_job.run(config, workdir)
    return workdir


def test_a_manager_learns_and_ignores_the_entities_it_never_saw(config, workdir):
    trained, step = text_job.load_manager(config, workdir, None)
    assert step == config.manager.num_steps
    start = lite_job.make_manager(config)
    assert not np.array_equal(trained.out.kernel[...], start.out.kernel[...])
    weights = np.asarray(trained.context.kernel[...])
    np.testing.assert_array_equal(weights[list(SCHEMA_CONTEXT)], 0.0)
    before = (workdir / "metrics.jsonl").read_text()
    lite_job.run(config, workdir)  # finished: nothing more to do
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_plan_is_of_the_batches_trained_on(config, tmp_path, monkeypatch):
    def first_batch(phase, state, update, loader, **options):
        batches.append(next(loader))
        return state

    batches = []
    monkeypatch.setattr(text_job, "fit", first_batch)
    lite_job.run(config, tmp_path / "run")
    planned = lite_job.plan_manager(config, jax.devices()).batch
    assert [(x.shape, x.dtype) for x in batches[0]] == [(x.shape, x.dtype) for x in planned]


def test_a_run_is_evaluated_and_exported(config, workdir, tmp_path):
    run = lite_eval.load_run(workdir)
    model, step = text_job.load_manager(run.config, workdir, None)
    results = lite_eval.full_evaluation(run, workdir, step, model)
    assert list(results["table"]) == ["8 slots", "8 slots, 96 tokens", "unlimited"]
    for budget, entries in results["table"].items():
        for entry in entries:
            assert 0.0 <= entry["recall"] <= 1.0
            assert 0.0 <= entry["mass"] <= 1.0
            assert sum(entry["actions"]) == pytest.approx(1.0)
            assert entry["slots"] <= (32 if budget == "unlimited" else 8)
    assert "learned" in lite_eval.format_tables(results["table"])
    lite_eval.export(run, workdir, model, results, tmp_path / "out")
    assert shipped.load_policy(tmp_path / "out").name == "out"
    assert shipped.read_header(tmp_path / "out")["held_out"].keys() == results["table"].keys()
    assert shipped.load_policy(workdir).name == "run"


def test_an_empty_memory_finds_nothing_and_a_whole_one_most(config, workdir):
    run = lite_eval.load_run(workdir)
    memory = lite_job.memory_config(run.config, run.config.world.num_clips)
    keep, drop = (
        lite_eval.protocol.rule_policy(rule, memory)
        for rule in (
            lite_eval.rules.unlimited(),
            lite_eval.rules.random_actions([1e-30, 1e-30, 1.0]),
        )
    )
    whole, nothing = (lite_eval.evaluate(run, p, run.validation) for p in (keep, drop))
    assert (nothing.action == DISCARD).all()
    assert not nothing.mass.any()
    assert not nothing.found.any()
    valid = run.validation.question_valid
    assert whole.found[valid].mean() > 0.1


@pytest.mark.parametrize(
    ("key", "value"),
    [("slots", 0), ("clips_read", 0), ("streams.test", 0), ("eval.slots", (0,)), ("dim", 0)],
)
def test_what_cannot_be_is_refused_before_anything_is_written(config, tmp_path, key, value):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"config.{key}"):
        lite_job.run(changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_world_that_cannot_be_is_refused(config, tmp_path):
    changed = config.copy_and_resolve_references()
    changed.world.num_clips = 0
    with pytest.raises(UserError, match="config.world"):
        lite_job.run(changed, tmp_path / "run")
