"""The job of Qwen3-VL on a tiny model: it learns, goes on, is evaluated, refuses bad input."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import qwen3_vl
from mmmem_jax import main, prompts
from mmmem_jax.data import token_streams
from mmmem_jax.errors import UserError
from mmmem_jax.evals import qwen3_vl_eval
from mmmem_jax.models.qwen3_vl import lora
from mmmem_jax.models.qwen3_vl.params import load_model
from mmmem_jax.testing.perception import toy_perception
from mmmem_jax.testing.qwen3_vl import TINY, write_checkpoint
from mmmem_jax.testing.videos import write_video
from mmmem_jax.train import qwen3_vl_job as job
from mmmem_jax.train import sharding
from mmmem_jax.train.metrics import TIMINGS, read_metrics
from mmmem_jax.video import build

SHORT = "{node}\n{frame}{caption}\n"  # a prompt that takes little time
SHALLOW = dataclasses.replace(  # what is tested here does not hang on depth, but time does
    TINY,
    text=dataclasses.replace(TINY.text, num_layers=1),
    vision=dataclasses.replace(TINY.vision, depth=1, deepstack_layers=(0,)),
)


def short_prompts(name: str) -> str:
    return SHORT if "decide" in name else "{memory}{question}"


def toy_config(**changes) -> ConfigDict:
    """As small as a run can be that has every part."""
    config = qwen3_vl.get_config("smoke")
    config.update_from_flattened_dict(
        {
            "widths.caption": 12, "widths.question": 40, "widths.subject": 4, "widths.option": 4,
            "memory.num_nodes": 3, "memory.max_tokens": 14, "manager.log_every": 1,
        } | changes
    )  # fmt: skip
    return config


@pytest.fixture(scope="module", autouse=True)
def small_programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "read", short_prompts)
        patch.setattr(job, "TINY_MODEL", SHALLOW)
        patch.setattr(job, "write_checkpoint", partial(write_checkpoint, config=SHALLOW))
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A whole run, warm start included."""
    workdir = tmp_path_factory.mktemp("qwen3_vl") / "run"
    job.run(toy_config(), workdir)
    return workdir


def rows_of(workdir, phase):
    rows = [r for r in read_metrics(workdir / "metrics.jsonl") if r["phase"] == phase]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def test_main_knows_the_job():
    assert main.JOBS[qwen3_vl.get_config().job] == job.__name__


def test_a_run_trains_the_adapter_alone_and_writes_it_as_peft_reads_it(workdir):
    config = toy_config()
    assert [row["step"] for row in rows_of(workdir, "sft")] == [1, 2]
    rows = rows_of(workdir, "manager")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["ratio_first"] == pytest.approx(1.0, abs=1e-4) for row in rows)
    mesh = sharding.make_mesh(1)
    setup = job.load_setup(config, mesh, workdir / "checkpoint")
    adapter, step = job.load_adapter(config, workdir, mesh, setup, None)
    assert step == 4
    saved = lora.load_adapter(workdir / "adapter", setup.adapter, **config.lora)
    jax.tree.map(np.testing.assert_array_equal, saved, adapter)
    changed = jax.tree.map(lambda a, b: np.any(a != b), adapter, setup.adapter)
    assert all(jax.tree.leaves(changed))
    sizes = sum(f.stat().st_size for f in (workdir / "checkpoints").rglob("*") if f.is_file())
    base = sum(f.stat().st_size for f in (workdir / "checkpoint").glob("*.safetensors"))
    assert sizes < 6 * base  # of six checkpoints, none has the base


def test_a_run_cut_off_goes_on_to_the_same_end(workdir, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "manager" / "4")
    shutil.rmtree(again / "adapter")
    job.run(toy_config(), again)
    assert rows_of(again, "manager") == rows_of(workdir, "manager")
    for name in (lora.WEIGHTS_FILE, lora.CONFIG_FILE):
        ours, theirs = ((folder / "adapter" / name) for folder in (again, workdir))
        if name == lora.WEIGHTS_FILE:
            assert ours.read_bytes() == theirs.read_bytes()


def test_a_plan_is_of_the_batches_trained_on(workdir):
    config = toy_config()
    program = job.plan_manager(config, jax.devices())
    streams = job.make_streams(config, "train", workdir / "checkpoint")
    batch = next(token_streams.make_loader(streams, seed=0, batch_size=2, questions_per_stream=4))
    found = jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    assert found == jax.tree.map(lambda x: (x.shape, x.dtype), program.batch)
    setup = job.load_setup(config, sharding.make_mesh(1), workdir / "checkpoint")
    real = jax.tree.map(lambda x: (x.shape, x.dtype), (setup.base,))
    assert real == jax.tree.map(lambda x: (x.shape, x.dtype), program.frozen)


def test_it_is_evaluated_beside_fixed_rules(workdir, capsys):
    run = qwen3_vl_eval.load_run(workdir)
    results = qwen3_vl_eval.full_evaluation(run, workdir, None)
    assert json.loads((workdir / "eval" / "results.json").read_text())["step"] == 4
    entries = {entry["name"]: entry for entry in results["policies"]}
    assert list(entries) == ["learned", "untrained", "teacher", "add all", "discard all"]
    assert entries["untrained"]["log_ratio"] == pytest.approx(0.0, abs=1e-4)
    assert abs(entries["learned"]["log_ratio"]) > 1e-3
    assert entries["discard all"]["length"] == 0.0
    assert entries["discard all"]["task"] == pytest.approx(0.25)
    assert entries["add all"]["actions"] == [1.0, 0.0, 0.0]
    table = qwen3_vl_eval.format_table(results["policies"]).splitlines()
    assert len(table) == 6
    assert "null" not in table[1]


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        ((2, 1, 2), (2, 1, 2)),
        ((2, 1, 8), (1, 1, 2)),
        ((-1, 1, 2), (4, 1, 2)),
        ((-1, 2, 8), (1, 1, 2)),
    ],
)
def test_a_run_of_more_devices_is_evaluated_on_those_that_are_there(mesh, shape):
    config = toy_config(**dict(zip(("mesh.data", "mesh.group", "mesh.model"), mesh, strict=True)))
    assert len(jax.devices()) == 8
    assert tuple(qwen3_vl_eval.make_mesh(config, TINY).shape.values()) == shape


def test_a_mesh_of_four_devices_makes_the_same_update(workdir):
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    config = toy_config()
    streams = job.make_streams(config, "train", workdir / "checkpoint")
    batch = next(token_streams.make_loader(streams, seed=0, batch_size=2, questions_per_stream=4))
    results = []
    for shape in ((1, 1, 1), (2, 2, 1)):
        mesh = sharding.make_mesh(*shape)
        setup = job.load_setup(config, mesh, workdir / "checkpoint")
        # As `fit` does it, so that for one device the program is compiled already.
        update = jax.jit(job.manager_program(config, mesh, setup), donate_argnums=0)
        state = sharding.place(mesh, job._init(config, config.manager, setup.adapter), job.RULES)
        state, metrics = update(state, sharding.put_batch(mesh, batch), setup.base)
        results.append(jax.device_get((state.params, metrics)))
    (params, metrics), (split_params, split_metrics) = results
    for name, value in metrics.items():
        np.testing.assert_allclose(value, split_metrics[name], atol=1e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), params, split_params)


def test_the_reward_of_a_tiny_model_rises_on_streams_it_never_saw(tmp_path):
    """Also the part that answers give; on the same streams before and after, for two seeds."""
    config, mesh = qwen3_vl.get_config("tiny"), sharding.make_mesh(1)
    config.manager.learning_rate = 5e-3
    folder = job.find_folder(config, tmp_path)
    setup = job.load_setup(config, mesh, folder)
    update = jax.jit(job.manager_program(config, mesh, setup))

    def batches(split, seed, count):
        loader = token_streams.make_loader(
            streams[split], seed=seed, batch_size=4, questions_per_stream=24
        )
        return [sharding.put_batch(mesh, next(loader)) for _ in range(count)]

    def judge(state):  # what an update would log, which is then forgotten
        return [update(state, batch, setup.base)[1] for batch in batches("test", 0, 4)]

    streams = {split: job.make_streams(config, split, folder) for split in job.SPLITS}
    gains = {"task_reward": [], "reward": []}
    for seed in (0, 1):
        config.seed = seed
        model = job._with_lora(config, load_model(folder, dtype=np.float32, mesh=mesh, remat=True))
        adapter = lora.split_lora(model).lora
        state = sharding.place(mesh, job._init(config, config.manager, adapter), job.RULES)
        before = judge(state)
        for batch in batches("train", seed, 15):
            state, _ = update(state, batch, setup.base)
        for name, found in gains.items():
            found += [float(b[name] - a[name]) for a, b in zip(before, judge(state), strict=True)]
    for name, found in gains.items():
        error = np.std(found, ddof=1) / np.sqrt(len(found))
        assert np.mean(found) > 3 * error, (name, found)
    assert np.mean(gains["task_reward"]) > 0.05


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("checkpoint", "no/such/folder", "no/such/folder"),
        ("model_size", "7b", "config.model_size is '7b'"),
        ("model_size", "8b", "config.checkpoint is empty"),
        ("dtype", "float64", "config.dtype is 'float64'"),
        ("attention", "flash", "config.attention is 'flash'"),
        ("reader.kind", "bert", "config.reader.kind is 'bert'"),
        ("sib.credit", "token", "config.sib.credit is 'token'"),
        ("sib.task", "log_gain", "config.sib.task is 'log_gain'"),
        ("sib.beta3", 1.0, "config.sib: .*beta3"),
        ("sib.clips_at_once", 3, "config.sib.clips_at_once is 3; it must divide"),
        ("sib.num_generations", 1, "config.sib.num_generations is 1"),
        ("decide.max_new_tokens", 0, "config.decide.max_new_tokens is 0"),
        ("decide.temperature", 0.0, "config.decide.temperature is 0.0"),
        ("image_size", 48, "config.image_size is 48; it must be a multiple of 32"),
        ("memory.num_nodes", 0, "config.memory.num_nodes is 0"),
        ("lora.rank", 0, "config.lora.rank is 0"),
        ("sft.num_steps", -1, "config.sft.num_steps is -1"),
        ("sft.save_every", 0, "config.sft: save_every"),
        ("streams.test", 0, "config.streams.test is 0"),
        ("mesh.data", 3, "config.manager.batch_size = 2 does not divide"),
        ("mesh.group", 4, "config.sib.clips_at_once = 1 does not divide over the 4"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, key, value, says):
    config = ConfigDict(toy_config().to_dict(), type_safe=False)
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    if key == "mesh.group":
        config.sib.clips_at_once = 1
    with pytest.raises(UserError, match=says) as error:
        job.run(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A memory of two videos of two clips, and a question about each, without evidence."""
    folder = tmp_path_factory.mktemp("videos")
    builder = build.make_builder(build.Settings("keep_recent", slots=4), toy_perception())
    for name in "ab":
        video = write_video(folder / f"{name}.mp4", scenes=(2.0, 2.0))
        build.build(builder, str(video), folder / "memory")
    asked = {"question": "Which?", "options": ["red", "blue", "green"], "answer": 0, "type": "any"}
    rows = [{"qid": v, "video": v, "query_time": None, "evidence": None} | asked for v in "ab"]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def videos_config(folder, **changes) -> ConfigDict:
    config = qwen3_vl.get_config("videos")
    config.update_from_flattened_dict(
        {
            "model_size": "tiny", "dtype": "float32", "image_size": 32,
            "videos.memory_dir": str(folder / "memory"),
            "videos.questions": str(folder / "qa.jsonl"),
            "videos.num_clips": 2, "videos.num_options": 3,
            "widths.caption": 8, "widths.question": 48, "memory.num_nodes": 2,
            "memory.max_tokens": 8, "lora.rank": 2, "decide.prompt": "train_decide_v1",
            "manager.num_steps": 1, "manager.batch_size": 1, "manager.questions_per_stream": 1,
            "sib.num_generations": 2, "sib.clips_at_once": 2,
        } | changes
    )  # fmt: skip
    return config


def test_a_run_on_ones_own_videos(videos, tmp_path):
    job.run(videos_config(videos), tmp_path)
    (row,) = rows_of(tmp_path, "manager")
    assert row["ratio_first"] == pytest.approx(1.0, abs=1e-4)
    assert 0 < row["task_reward"] < 1
    assert (tmp_path / "adapter" / lora.WEIGHTS_FILE).is_file()
    run = qwen3_vl_eval.load_run(tmp_path)
    entries = {entry["name"]: entry for entry in qwen3_vl_eval.compare(run, run.setup.adapter)}
    assert list(entries) == ["learned", "untrained", "add all", "discard all"]  # nothing to teach
    assert entries["add all"]["length"] > entries["discard all"]["length"] == 0


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("source", "films", "config.source is 'films'"),
        ("videos.memory_dir", "", "config.videos.memory_dir or .* is empty"),
        ("videos.memory_dir", "/no/such", "/no/such"),
        ("videos.questions", "/no/qa.jsonl", "/no/qa.jsonl is not there"),
        ("videos.num_options", 9, "config.videos.num_options is 9"),
        ("videos.num_options", 2, "has 3 options, not 2"),
        ("videos.num_clips", 3, "config.sib.clips_at_once is 2; it must divide the 3 clips"),
        ("reader.kind", "overlap", "config.reader.kind is 'overlap'; of videos only"),
    ],
)
def test_what_cannot_be_of_videos_is_refused_likewise(videos, tmp_path, key, value, says):
    with pytest.raises(UserError, match=says) as error:
        job.run(videos_config(videos, **{key: value}), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_without_evidence_there_is_no_warm_start(videos, tmp_path):
    with pytest.raises(UserError, match="no question names its evidence"):
        job.run(videos_config(videos, **{"sft.num_steps": 1}), tmp_path)


def test_a_text_that_is_too_long_is_refused(workdir):
    with pytest.raises(UserError, match="config.widths: a caption has .* raise it"):
        job.make_streams(toy_config(**{"widths.caption": 2}), "train", workdir / "checkpoint")
