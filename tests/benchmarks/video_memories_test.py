"""Tests of benchmarks/video_memories.py, and of the two benchmarks made of it in quick mode."""

import itertools
import json

import numpy as np
import pytest

from benchmarks import video_baselines, video_memories, video_queries, video_retrieval
from benchmarks.video_queries import Choice, Moment
from mmmem_jax.errors import UserError
from mmmem_jax.memory.types import LEVELS
from mmmem_jax.models.text_encoder import encode_texts
from mmmem_jax.perception import lite
from mmmem_jax.testing.perception import toy_perception
from mmmem_jax.testing.videos import write_video
from mmmem_jax.video import ask

SCENES = (3.0, 4.0, 3.0, 5.0, 3.0)  # red, green, blue, yellow, purple
SECONDS = {"long": sum(SCENES), "short": 4.0}


def moment(video, windows, query="green field"):
    return Moment(f"{video}-{query}", video, query, windows, "validation", "it is there")


QUERIES = [
    moment("long", ((3.0, 7.0),)),
    moment("long", ((10.0, 15.0),), "yellow taxi"),
    moment("short", ((0.0, 2.0),), "red wall"),
]
CHOICES = [
    Choice("c", "long", "where", ("yellow taxi", "elephant", "submarine", "cheese"), 0,
           ((10.0, 15.0),), "validation"),
]  # fmt: skip


class TestHits:
    @pytest.mark.parametrize(
        ("span", "hit"),
        [
            ((0.0, 10.0), False), ((0.0, 10.3), False), ((0.0, 10.5), True), ((14.5, 20.0), True),
            ((14.6, 20.0), False), ((12.0, 12.1), True), ((30.0, 30.2), True),
            ((20.0, 30.1), False), ((20.0, 40.0), True),
        ],
    )  # fmt: skip
    def test_half_a_second_or_all_of_the_shorter_is_shared(self, span, hit):
        assert video_memories.is_hit(span, ((10.0, 15.0), (30.0, 30.2))) == hit

    @pytest.mark.parametrize("seed", range(8))
    def test_chance_is_the_share_of_places_that_hit(self, seed):
        rng = np.random.default_rng(seed)
        times = np.sort(rng.uniform(0, 60, 6))
        windows = tuple(itertools.pairwise(times))[::2]
        length = float(rng.choice([0.2, 1.0, 7.0, 25.0]))
        starts = np.linspace(0, 60 - length, 20_001)
        enumerated = np.mean([video_memories.is_hit((s, s + length), windows) for s in starts])
        assert video_memories.chance(length, windows, 60.0) == pytest.approx(enumerated, abs=1e-3)

    @pytest.mark.parametrize("length", [60.0, 70.0])
    def test_all_of_a_video_hits_anything(self, length):
        assert video_memories.chance(length, ((3.0, 4.0),), 60.0) == 1.0

    def test_moments_are_scored_beside_as_many_random_ones(self):
        query = moment("long", ((0.0, 9.0),))
        found = [("short", (0.0, 2.0)), ("long", (8.0, 10.0))]
        score = video_memories.score_moments(query, found, {"long": 18.0, "short": 2.0})
        assert (score["hit1"], score["hit5"], score["seconds"]) == (0.0, 1.0, 2.0)
        one = 0.9 * 8.5 / 16.0  # starts from 0 to 8.5 s of 16 s, in nine tenths of all time
        assert score["chance1"] == pytest.approx(one)
        assert score["chance5"] == pytest.approx(1 - (1 - one) ** 2)

    def test_nothing_found_is_no_hit_and_has_no_chance(self):
        score = video_memories.score_moments(QUERIES[0], [], SECONDS)
        assert set(score.values()) == {0.0}

    def test_the_sixth_moment_counts_for_nothing(self):
        found = [("short", (0.0, 1.0))] * 5 + [("long", (3.0, 7.0))]
        assert video_memories.score_moments(QUERIES[0], found, SECONDS)["hit5"] == 0.0

    def test_errors_are_those_of_means(self):
        scores = [{"hit1": float(i % 2), "chance1": 0.5} for i in range(100)]
        found = video_memories.summary(scores)
        assert (found["hit1"], found["n"]) == (0.5, 100)
        assert found["se"] == pytest.approx({"hit1": 0.05, "hit1 - chance1": 0.05})


def test_frames_are_looked_at_once():
    toy, calls = toy_perception(), []
    counted = toy._replace(see=lambda images: calls.append(1) or toy.see(images))
    known = video_memories.remembering(counted)
    for colour in (10, 200, 10):
        images = np.full((2, 8, 8, 3), colour, np.uint8)
        np.testing.assert_array_equal(known.see(images)[0], toy.see(images)[0])
    assert len(calls) == 2


def test_missing_videos_are_named(tmp_path):
    (tmp_path / "vtest.avi").touch()
    with pytest.raises(UserError, match=r"lacks bbb\.mp4; run data/videos\.py"):
        video_memories.find_videos(tmp_path, ["bbb", "vtest"])


def test_a_budget_is_kept_but_for_the_first_piece():
    pieces = [video_baselines.Piece("text", np.ones(2), tokens, (0, 1)) for tokens in (9, 4, 5)]
    assert video_baselines.within_budget([1, 2, 0], pieces, 9) == [1, 2]
    assert video_baselines.within_budget([1, 2, 0], pieces, 18) == [1, 2, 0]
    assert video_baselines.within_budget([0, 1, 2], pieces, 5) == [0]


@pytest.fixture
def toy_world(tmp_path, monkeypatch):
    """Two synthetic videos with queries, seen by the toy backbone; a folder of them."""
    toy = toy_perception()

    def embed(texts):
        found, _ = encode_texts(toy.encoder, toy.tokenizer, texts)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    monkeypatch.setattr(lite, "load_perception", lambda: toy)
    monkeypatch.setattr(ask, "load_space", lambda: ask.Space(embed, toy.labels.embeddings))
    monkeypatch.setattr(video_queries, "read_moments", lambda split: QUERIES)
    monkeypatch.setattr(video_queries, "read_choices", lambda split: CHOICES)
    monkeypatch.setattr(video_queries, "read_seconds", lambda: SECONDS)
    files = {name: f"{name}.mp4" for name in SECONDS}
    monkeypatch.setattr(video_queries, "read_files", lambda: files)
    for module in (video_retrieval, video_baselines):
        monkeypatch.setattr(module, "DEFAULT", "keep_recent")
        monkeypatch.setattr(module, "AMPLE", 32)
        monkeypatch.setattr(module, "LONGEST", "long")
    write_video(tmp_path / "long.mp4", scenes=SCENES)
    write_video(tmp_path / "short.mp4", scenes=(2.0, 2.0))
    return tmp_path


def test_moments_of_a_synthetic_video_are_found(toy_world):
    result = video_retrieval.measure(False, toy_world / "memories", toy_world)
    assert result.keys() >= {"hit1", "hit5", "chance1", "chance5", "n", "seconds", "se", "rows"}
    assert (result["hit5"], result["n"]) == (1.0, 3)
    assert result["chance1"] < result["chance5"] < 1
    for key, names in (("stopped_by", ("gate", "patience", "end")), ("stopped_at", LEVELS)):
        assert sum(result[key].values()) == pytest.approx(1.0)
        assert set(result[key]) <= set(names)
    (row,) = result["rows"]
    assert (row["policy"], row["slots"], row["within"]["n"]) == ("keep_recent", 32, 2)
    assert row["within"]["hit1"] == 1.0
    assert row["within"]["chance1"] > row["chance1"]
    again = video_retrieval.measure(False, toy_world / "memories", toy_world)  # built before
    assert json.dumps(again) == json.dumps(result)


def test_baselines_read_no_more_than_the_memory(toy_world):
    result = video_baselines.measure(False, toy_world / "memories", toy_world)
    assert result["memory"]["accuracy"] == result["text_only"]["accuracy"] == 1.0
    assert result["memory"]["hit1"] == result["vision_only"]["hit1"] == 1.0
    for name in ("uniform", "text_only", "vision_only"):
        for kind in ("moments", "choices"):
            assert 0 < result[name]["tokens"][kind] <= result["memory"]["tokens"][kind]
    assert result["quarter"]["n"] == result["memory"]["n"]
    assert 0 < result["quarter_slots"] < 32
    assert result["quarter"]["tokens"]["moments"] <= result["memory"]["tokens"]["moments"]
    assert result["recent"]["tokens"] == {"moments": 64.0, "choices": 64.0}
    assert result["memory"]["longest"]["n"] == 2
    json.dumps(result, allow_nan=False)
