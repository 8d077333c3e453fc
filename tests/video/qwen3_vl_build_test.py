"""The paper's model builds a memory from video, end to end, on a tiny random checkpoint."""

import itertools
import json
import re
import shutil
from pathlib import Path

import jax
import pytest

from mmmem_jax import cli, memory, store
from mmmem_jax.errors import UserError
from mmmem_jax.memory import ADD_NEW, DISCARD, MERGE
from mmmem_jax.models.qwen3_vl import conversation
from mmmem_jax.models.qwen3_vl.chat import IMAGE, VIDEO
from mmmem_jax.perception import qwen3_vl, types
from mmmem_jax.policies import qwen3_vl as manager
from mmmem_jax.testing.qwen3_vl import SHALLOW, write_checkpoint
from mmmem_jax.testing.videos import write_video
from mmmem_jax.video import build, watch

TINY_BERT = str(Path(__file__).parents[1] / "models/tiny_bert")


@pytest.fixture(scope="module", autouse=True)
def brief():
    """The model writes little: it has nothing to say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen3_vl, "CAPTION_TOKENS", 6)
        patch.setattr(qwen3_vl, "EXTRACTION_TOKENS", 6)
        patch.setattr(manager, "DECISION_TOKENS", 6)
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), SHALLOW)
    return build.Settings(
        "qwen3_vl", 64, "qwen3_vl", checkpoint=str(folder), text_encoder=TINY_BERT, context=1536
    )


@pytest.fixture(scope="module")
def builder(settings):
    return build.make_builder(settings)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Four clips of 2 s."""
    return write_video(tmp_path_factory.mktemp("video") / "four.mp4", scenes=(2.0,) * 4)


def _read(memory):
    with store.open_store(memory, "four") as found:
        return store.read_clips(found, range(store.progress(found).clips)), store.progress(found)


def _acting(monkeypatch, actions):
    """The model decides so, whatever it sees."""
    say_each, left = conversation.say_each, iter(actions)

    def decided(speaker, talk, *, first_ids=(), **how):
        said, talk = say_each(speaker, talk, first_ids=first_ids, **how)
        if len(first_ids) > 1:  # else the trace alone is asked for again
            wanted = manager.action_ids(speaker.chat)[next(left)]
            assert wanted in first_ids
            said = [said[0]._replace(ids=(wanted, *said[0].ids[1:]))]
        return said, talk

    monkeypatch.setattr(conversation, "say_each", decided)


def test_a_memory_is_built_and_told_of(builder, video, tmp_path):
    built = build.build(builder, str(video), tmp_path)
    clips, progress = _read(tmp_path)
    assert (progress.clips, progress.finished) == (4, True)
    for before, after in itertools.pairwise(clips):
        assert before.span[1] == after.span[0]
    for clip in clips:
        kept = clip.action != DISCARD
        assert (clip.node_id >= 0) == kept
        assert bool(clip.caption) == bool(clip.frames) == kept
        assert clip.log_prob <= 0
        assert "extraction" in clip.failed  # of random weights nothing else is to be had
        assert ("trace" in clip.failed) >= (kept and not clip.trace)
        assert ("trace" in clip.failed) <= kept
    with store.open_store(tmp_path, "four") as found:
        assert store.failures(found)["extraction"] == 4
        header = found.header
    assert header["perception"] == header["policy"] == "qwen3_vl"
    assert header["prompts"] == ["caption_v1", "extract_v1", "decide_v1"]
    assert {"checkpoint", "adapter", "text_encoder", "context"} < header.keys()
    work = built.work
    assert work.frames == 16  # each once
    # A caption and three tries of the entities for each clip, and a decision at the least.
    assert work.frames_anew >= 16 * 5
    assert work.tokens < work.tokens_anew
    first, reuse, *failures = build.told(built).splitlines()
    assert "4 clips" in first
    assert all(str(number) in reuse for number in work)
    assert "  extraction failed for 4 of 4 clips" in failures


def test_decisions_make_the_episodes(builder, video, tmp_path, monkeypatch):
    _acting(monkeypatch, [ADD_NEW, MERGE, DISCARD, ADD_NEW])
    built = build.build(builder, str(video), tmp_path)
    clips, _ = _read(tmp_path)
    assert [clip.action for clip in clips] == [ADD_NEW, MERGE, DISCARD, ADD_NEW]
    assert [clip.node_id for clip in clips] == [0, 0, -1, 1]
    assert (built.counts.kept, built.counts.merged, built.counts.discarded) == (2, 1, 1)


@pytest.mark.parametrize("clips", [1, 2])
def test_killed_and_resumed_ends_with_a_whole_memory(builder, video, tmp_path, monkeypatch, clips):
    append = store.append

    class Killed(BaseException):
        pass

    def append_and_die(found, record, *args, **kwargs):
        append(found, record, *args, **kwargs)
        if record.index + 1 == clips:
            raise Killed

    with monkeypatch.context() as patch:
        _acting(patch, [ADD_NEW, MERGE])
        patch.setattr(store, "append", append_and_die)
        with pytest.raises(Killed):
            build.build(builder, str(video), tmp_path)
    before, progress = _read(tmp_path)
    assert (progress.clips, progress.finished) == (clips, False)
    with monkeypatch.context() as patch:
        # MERGE is offered: what was the latest episode is so again.
        _acting(patch, [MERGE, ADD_NEW, MERGE][: 4 - clips])
        built = build.build(builder, str(video), tmp_path)
    after, progress = _read(tmp_path)
    assert (progress.clips, progress.finished) == (4, True)
    assert [a._replace(item=None) for a in after[:clips]] == [b._replace(item=None) for b in before]
    assert after[clips].node_id == before[-1].node_id
    key_frames = sum(2 * -(-len(clip.frames) // 2) for clip in before)
    assert built.work.frames == 4 * (4 - clips + 1) + key_frames  # the last clip comes again


def test_another_model_is_another_memory(builder, settings, video, tmp_path):
    build.build(builder, str(video), tmp_path)
    other = builder._replace(header=builder.header | {"checkpoint": "0" * 16})
    with pytest.raises(UserError, match="another checkpoint.*--again"):
        build.build(other, str(video), tmp_path)


def test_a_fixed_rule_decides_as_well(builder, settings, video, tmp_path):
    build.build(builder, str(video), tmp_path)
    clip = next(clip for clip in _read(tmp_path)[0] if clip.item is not None)
    ruled = build.make_builder(settings._replace(policy="keep_recent"))
    assert ruled.header["policy"].startswith("keep_recent-")
    percept = types.Percept(0, clip.span, "", "", (), (), clip.item)
    decision = ruled.begin(None, None)(memory.init(ruled.config), percept)
    assert decision.action == ADD_NEW
    assert decision.strength == pytest.approx(clip.span[1])


def test_a_manager_of_other_features_is_refused(settings):
    with pytest.raises(UserError, match="'lite' does not read backbone qwen3_vl"):
        build.make_builder(settings._replace(policy="lite"))


def test_a_stream_is_watched(builder, video, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "QUEUE_SECONDS", 1000.0)
    done = watch.watch(builder, str(video), tmp_path, speed=1000.0)
    assert done.counts.seen == 4
    assert _read(tmp_path)[1].finished


def _truncated(folder):
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])


def _of_another_architecture(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "qwen2_5_vl"}))


def _of_other_ids(folder):
    path = folder / "tokenizer.json"
    text = path.read_text().replace(IMAGE, "PAD").replace(VIDEO, IMAGE)
    path.write_text(text.replace("PAD", VIDEO))


def _without(name):
    return lambda folder: (folder / name).unlink()


class TestCommandLine:
    """Mistakes are one line."""

    def _said(self, capsys, *flags):
        assert cli.main(["build", "a.mp4", "--memory", "m", *flags]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    @pytest.mark.parametrize("flag", ["--checkpoint", "--adapter", "--text-encoder", "--context"])
    def test_flags_of_the_other_backbone(self, flag, capsys):
        assert f"{flag} is of --backbone=qwen3_vl" in self._said(capsys, flag, "7")

    def test_no_checkpoint(self, capsys):
        assert "needs --checkpoint" in self._said(capsys, "--backbone=qwen3_vl")

    @pytest.mark.parametrize("context", ["0", "many"])
    def test_no_context(self, capsys, context):
        assert context in self._said(capsys, "--backbone=qwen3_vl", "--context", context)

    def test_no_such_checkpoint(self, video, tmp_path, capsys):
        arguments = ["build", str(video), "--memory", str(tmp_path), "--backbone=qwen3_vl"]
        assert cli.main([*arguments, "--checkpoint", str(tmp_path / "none")]) == 2
        assert "neither a folder nor" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("harm", "said"),
        [
            (_truncated, "model-00002-of-00003.safetensors is not a whole safetensors file"),
            (_of_another_architecture, "config.json"),
            (_of_other_ids, "take both from the same folder"),
            (_without("tokenizer.json"), "has no tokenizer.json"),
            (_without("video_preprocessor_config.json"), "video_preprocessor_config.json"),
            (_without("model-00001-of-00003.safetensors"), "00001-of-00003.safetensors is missing"),
        ],
    )
    def test_a_broken_checkpoint(self, settings, video, tmp_path, capsys, harm, said):
        folder, memory_dir = tmp_path / "model", tmp_path / "memory"
        shutil.copytree(settings.checkpoint, folder)
        harm(folder)
        arguments = ["build", str(video), "--memory", str(memory_dir), "--backbone=qwen3_vl"]
        assert cli.main([*arguments, "--checkpoint", str(folder), "--text-encoder", TINY_BERT]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert said in err
        assert str(folder) in err
        assert not memory_dir.exists()

    @pytest.mark.parametrize(
        ("context", "said"),
        [("64", r"\d+ more than the context of 64;"), ("5000", "takes 1 to 4096")],
    )
    def test_a_context_that_cannot_be(self, settings, video, tmp_path, capsys, context, said):
        arguments = ["build", str(video), "--memory", str(tmp_path / "m"), "--backbone=qwen3_vl",
                     "--checkpoint", settings.checkpoint, "--text-encoder", TINY_BERT]  # fmt: skip
        assert cli.main([*arguments, "--context", context]) == 2
        assert re.fullmatch(rf"mmmem: [^\n]*{said}[^\n]*\n", capsys.readouterr().err)
        assert not (tmp_path / "m").exists()

    @pytest.mark.parametrize(
        "error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), MemoryError()]
    )
    def test_no_room(self, video, tmp_path, monkeypatch, capsys, error):
        def full(settings):
            raise error

        monkeypatch.setattr(build, "make_builder", full)
        arguments = ["build", str(video), "--memory", str(tmp_path), "--backbone=qwen3_vl"]
        assert cli.main([*arguments, "--checkpoint", "x"]) == 2
        assert "lower --context" in capsys.readouterr().err

    def test_other_errors_of_the_device_are_no_matter_of_room(self, video, tmp_path, monkeypatch):
        def broken(settings):
            raise jax.errors.JaxRuntimeError("INTERNAL: broken")

        monkeypatch.setattr(build, "make_builder", broken)
        arguments = ["build", str(video), "--memory", str(tmp_path), "--backbone=qwen3_vl"]
        with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
            cli.main([*arguments, "--checkpoint", "x"])
