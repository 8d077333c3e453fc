"""Streams of one's own videos: which clips a question is asked after, texts, frames, refusals."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax import store
from mmmem_jax.data import token_streams, video_streams
from mmmem_jax.data.timed_text import Question
from mmmem_jax.data.token_streams import Widths
from mmmem_jax.data.video_streams import Shape, ask_after, from_memory, split_videos, teach
from mmmem_jax.errors import UserError
from mmmem_jax.memory import ADD_NEW, DISCARD, MERGE
from mmmem_jax.models.qwen3_vl.images import PixelConfig
from mmmem_jax.testing.perception import toy_perception
from mmmem_jax.testing.qwen3_vl import toy_tokenizer
from mmmem_jax.testing.videos import write_video
from mmmem_jax.video import build

SPANS = [(2.0 * n, 2.0 * n + 2.0) for n in range(5)]
SHAPE = Shape(num_clips=3, num_options=2, image_size=32, widths=Widths(12, 64, 1, 1))
PIXELS = PixelConfig(min_pixels=1024, max_pixels=65536)


def ask(qid="q", time=None, evidence=(), answer=0, video="a"):
    return Question(qid, video, f"What is {qid}?", ("red", "blue"), answer, time, evidence, "any")


def asked(videos):
    """Of each, two questions after the first clip and one after the last."""
    return [
        ask(f"{video}{number}", time, evidence, video=video)
        for video in videos
        for number, time, evidence in ((0, 3.0, ()), (1, 2.5, ()), (2, 8.0, ((4.0, 5.0),)))
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three videos of four clips."""
    folder = tmp_path_factory.mktemp("memory")
    builder = build.make_builder(build.Settings("keep_recent", slots=8), toy_perception())
    first = write_video(folder / "a.mp4", scenes=(2.0,) * 4)
    for name in "bc":
        shutil.copy(first, folder / f"{name}.mp4")
    for name in "abc":
        build.build(builder, str(folder / f"{name}.mp4"), folder / "memory")
    return folder / "memory"


def write_questions(path, *questions):
    fields = ("qid", "video", "question", "options", "answer", "query_time", "evidence", "type")
    rows = [{name: getattr(question, name) for name in fields} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def read(whole, tmp_path):
    """The streams of a split, for these questions."""

    def read(*questions, split="train", shape=SHAPE, memory=whole):
        path = write_questions(tmp_path / "qa.jsonl", *questions)
        return from_memory(memory, path, split, toy_tokenizer(), PIXELS, shape)

    return read


class TestAskAfter:
    def test_the_last_clips_that_have_ended(self):
        found = ask_after(SPANS, [ask("x", 6.0, ((2.5, 3.0),)), ask("y", 7.9), ask("z", 1.9)], 3)
        (only,) = found
        assert (only.first, only.end) == (0, 3)
        assert [question.qid for question in only.questions] == ["x", "y"]  # at z none has ended

    def test_only_what_can_be_known_from_them(self):
        known, unknown = ask("x", None, ((4.0, 5.0),)), ask("y", None, ((3.9, 5.0),))
        assert ask_after(SPANS, [known, unknown, ask("z"), ask("w", 5.0, (), None)], 3) == [
            (2, 5, (known,))
        ]
        assert ask_after(SPANS, [unknown, ask("z")], 5) == [(0, 5, (unknown, ask("z")))]

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(0, 12), max_size=8), st.integers(1, 6))
    def test_no_question_sees_the_future(self, times, num_clips):
        asked = [ask(str(n), time) for n, time in enumerate(times)]
        for group in ask_after(SPANS, asked, num_clips):
            assert 0 < group.end - group.first <= num_clips
            for question in group.questions:
                assert SPANS[group.end - 1][1] <= question.query_time
                assert group.end == len(SPANS) or SPANS[group.end][1] > question.query_time


class TestTeach:
    def test_golden(self):
        asked = [ask(evidence=((1.0, 5.0),)), ask(evidence=((8.0, 8.0),))]
        assert teach(SPANS, asked).tolist() == [ADD_NEW, MERGE, MERGE, DISCARD, ADD_NEW]

    def test_other_evidence_begins_anew(self):
        asked = [ask(evidence=((0.0, 2.0), (2.0, 3.0)))]
        assert teach(SPANS, asked).tolist() == [ADD_NEW, ADD_NEW, DISCARD, DISCARD, DISCARD]

    def test_without_evidence_nothing_is_kept(self):
        assert teach(SPANS, [ask()]).tolist() == [DISCARD] * 5


class TestSplitVideos:
    @settings(max_examples=50, deadline=None)
    @given(st.sets(st.text(min_size=1, max_size=5), min_size=2, max_size=30))
    def test_every_video_is_in_one_and_both_have_some(self, videos):
        split = split_videos(videos)
        assert sorted(split["train"] + split["test"]) == sorted(videos)
        assert split["train"]
        assert len(split["test"]) == max(1, round(0.2 * len(videos)))
        assert split == split_videos(sorted(videos, reverse=True))

    def test_one_is_too_few(self):
        with pytest.raises(UserError, match="about 1 videos; one must be held out"):
            split_videos({"a"})


class TestFromMemory:
    def test_streams_of_both_splits(self, read, whole):
        train, test = (read(*asked("abc"), split=split) for split in ("train", "test"))
        assert train.asked.tolist() == [[True, True], [True, False]] * 2
        assert test.asked.tolist() == [[True, True], [True, False]]
        assert train.valid.tolist() == [[True, False, False], [True, True, True]] * 2
        (video,) = split_videos("abc")["test"]
        with store.open_store(whole, video) as found:
            clips = store.read_clips(found)
        tokenizer = toy_tokenizer()
        for row, first in ((0, 0), (1, 1)):
            for t in np.flatnonzero(test.valid[row]):
                ids = test.caption[row, t][test.caption_valid[row, t]]
                wanted = tokenizer.encode(clips[first + t].caption).ids
                assert ids.tolist() == wanted[:12]
        assert test.patches.shape == (2, 3, 4, 1536)
        assert not test.patches[~test.valid].any()
        text = tokenizer.decode(test.question[0, 1][test.question_valid[0, 1]])
        assert text.endswith("1?\nA. red\nB. blue")
        assert text.startswith("What is ")
        # The scenes are of plain colours that differ, and the frame of a clip shows its own.
        colours = test.patches[1].reshape(3, 4, 3, -1).mean((1, 3))
        assert (np.abs(np.diff(colours, axis=0)).max(1) > 0.2).all()

    def test_a_loader_takes_them(self, read):
        streams = read(*asked("abc"))
        batch = next(
            token_streams.make_loader(streams, seed=0, batch_size=3, questions_per_stream=2)
        )
        wanted = token_streams.shapes(
            3, num_chunks=3, num_questions=2, widths=SHAPE.widths, num_patches=4, patch_dim=1536,
            num_options=2,
        )  # fmt: skip
        assert {k: (x.shape, x.dtype) for k, x in vars(batch).items()} == {
            k: (x.shape, x.dtype) for k, x in vars(wanted).items()
        }
        assert (batch.asked.sum(1) >= 1).all()

    def test_what_is_left_out_or_cut_is_told(self, read, caplog):
        early = [ask(f"{video} early", 0.5, video=video) for video in "abc"]
        late = [ask(f"{video} late", 2.0, video=video) for video in "abc"]
        read(*early, *late, shape=SHAPE._replace(widths=Widths(1, 64, 1, 1)))
        told = [record.getMessage() for record in caplog.records]
        assert sum("1 captions are cut to 1 tokens" in line for line in told) == 2
        assert sum("2 of 4 questions of the train split are left out" in line for line in told) == 1

    def test_refusals(self, read, whole, tmp_path):
        both = [ask(f"q{video}", 2.0, video=video) for video in "abc"]
        with pytest.raises(UserError, match=r"question qa has 2 options, not 4 \(num_options\)"):
            read(*both, shape=SHAPE._replace(num_options=4))
        with pytest.raises(UserError, match=r"a question has .* widths\.question is 3, raise it"):
            read(*both, shape=SHAPE._replace(widths=Widths(12, 3, 1, 1)))
        with pytest.raises(UserError, match="can be used for the train split"):
            read(*(replace(question, answer=None) for question in both))
        with pytest.raises(UserError, match=r'qa\.jsonl:1: video "d" has no memory'):
            read(ask(video="d"))
        with pytest.raises(UserError, match=r"no\.jsonl is not there"):
            from_memory(whole, tmp_path / "no.jsonl", "train", toy_tokenizer(), PIXELS, SHAPE)

    def test_every_clip_must_be_kept(self, read, tmp_path):
        builder = build.make_builder(build.Settings("keep_recent", slots=2), toy_perception())
        for name in "ab":
            video = write_video(tmp_path / f"{name}.mp4", scenes=(2.0,) * 4)
            build.build(builder, str(video), tmp_path / "few")
        with pytest.raises(UserError, match="kept 2 of 4 clips; build it with --policy keep_rec"):
            read(ask("x"), ask("y", video="b"), memory=tmp_path / "few")


def test_the_letters_are_enough_for_the_options():
    assert len(video_streams.LETTERS) == len(set(video_streams.LETTERS)) >= 5
