"""Tests of answering from memories on disk."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmmem_jax import memory, store
from mmmem_jax.errors import UserError
from mmmem_jax.memory import ADD_NEW, DISCARD, MERGE, MemoryConfig
from mmmem_jax.memory.types import LEVELS
from mmmem_jax.retrieval import video_search
from mmmem_jax.retrieval.top_down import confidence_to_gamma
from mmmem_jax.retrieval.video_search import Calibration
from mmmem_jax.testing import toys
from mmmem_jax.video import ask as asking

D, NUM_CLIPS = 16, 24
CONFIG = MemoryConfig(
    sensory_slots=16, episodic_slots=12, schema_slots=8, num_relations=8, dim=D, merge_keep=1.0
)
# With SPACE a score is 5 times the cosine. At this temperature the gate waits for the clips.
PLAIN = Calibration(text=(0.0, 0.8), visual=(0.0, 0.8), entity=(0.0, 0.8), temperature=1.0)
ORTHOGONAL = "What does the elephant say?"


def jpeg() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(data, "JPEG")
    return data.getvalue()


@functools.cache
def stream(seed: int):
    return jax.device_get(toys.random_items(seed, NUM_CLIPS, dim=D))


def item_of(seed: int, index: int):
    """Clip `index` of video `seed`; its last coordinate is 0, which leaves room for a stranger."""
    item = jax.tree.map(lambda x: np.array(x[index]), stream(seed))
    for name in ("visual", "coarse", "text", "mention"):
        getattr(item, name)[..., -1] = 0
    return store.rounded(item)


def embed(texts):
    """'VIDEO INDEX' asks with the text of that clip; `ORTHOGONAL` with what no clip has."""
    rows = np.zeros((len(texts), D), np.float32)
    for row, text in zip(rows, texts, strict=True):
        if ORTHOGONAL in text:
            row[-1] = 1
        else:
            seed, index = map(int, text.split()[-2:])
            found = item_of(seed, index)
            row[:] = found.text if found.text.any() else found.visual
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


# Every direction and its opposite: mean 0, deviation 1 / sqrt(D) for every question.
SPACE = asking.Space(embed, np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32))


def mentioned(item, state, name: str) -> tuple[tuple[int, str], ...]:
    """The entities that a clip mentions, all by one name."""
    near = item.mention @ np.asarray(state.schema.embedding).T
    near = np.where(state.schema.valid, near, -np.inf).argmax(1)
    return tuple((int(slot), name) for slot in near[item.mention_valid])


def write(folder, seed: int, num_clips: int = NUM_CLIPS):
    """A video whose clips open, join or skip episodes by turns; yields the state after each."""
    rng = np.random.default_rng(seed)
    with store.create(folder, f"video-{seed}", {"source": f"{seed}.mp4"}, CONFIG) as video:
        state = memory.init(CONFIG)
        for index in range(num_clips):
            item = item_of(seed, index)
            action = int(rng.choice([ADD_NEW, MERGE, DISCARD], p=[0.5, 0.35, 0.15]))
            strength = np.float32(item.span[1])
            state = store.advance(state, item, action, strength)
            record = store.ClipRecord(
                index=index,
                span=tuple(map(float, item.span)),
                caption=f"Clip {index} of {seed}.",
                subtitles="",
                labels=(),
                frames=((float(item.span[0]), jpeg()),),
                action=action,
                strength=strength,
                node_id=store.node_of(state, index),
                item=item,
                entities=mentioned(item, state, f"seen {float(item.span[1])}"),
            )
            store.append(video, record, state)
        store.finish(video, state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory")
    for seed in (1, 2):
        write(path, seed)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    with asking.load(folder, space=SPACE) as opened:
        yield opened


def answer(loaded, question, options=(), **kwargs):
    return asking.answer(loaded, question, options, calibration=PLAIN, **kwargs)


def told(loaded, number: int) -> list[int]:
    """Clips of a video that the sensory buffer holds, with words."""
    buffer = loaded.states[number].sensory
    return sorted(buffer.trace_id[buffer.valid & buffer.text.any(1)].tolist())


class TestAnswer:
    @pytest.mark.parametrize("number", [0, 1])
    def test_finds_the_clip_in_its_video(self, loaded, number):
        """Asked with what a clip held verbatim says, it answers with that clip's place."""
        for clip in told(loaded, number):
            found = answer(loaded, f"{number + 1} {clip}")
            assert found.found
            assert found.score == pytest.approx(5.0, abs=0.1)
            moment = found.moments[0]
            assert moment.video == f"video-{number + 1}"
            (record,) = store.read_clips(loaded.stores[number], [clip])
            assert moment.span[0] <= record.span[0] < record.span[1] <= moment.span[1]
            if moment.level == "sensory":
                assert moment.clip == clip
                assert moment.text == record.caption
            assert moment.text in found.text
            assert moment.video in found.text

    def test_key_frames_are_there(self, loaded):
        found = answer(loaded, f"1 {told(loaded, 0)[0]}")
        for moment in found.moments:
            assert moment.frames
            assert all((loaded.memory_dir / name).read_bytes() == jpeg() for name in moment.frames)

    @pytest.mark.parametrize("options", [(), ("a", "b")])
    def test_what_is_not_there_is_not_found(self, loaded, options):
        found = answer(loaded, ORTHOGONAL, options)
        assert not found.found
        assert found.score == pytest.approx(0, abs=1e-3)
        assert found.moments == ()
        assert found.trace
        assert found.text == ("a" if options else asking.NOT_FOUND)

    def test_options_are_weighed_and_their_order_permutes_the_probabilities(self, loaded):
        clip = told(loaded, 0)[0]
        options = [f"{ORTHOGONAL} a", f"1 {clip}", f"{ORTHOGONAL} b"]
        first = answer(loaded, "which?", options)
        second = answer(loaded, "which?", options[::-1])
        assert sum(first.probabilities) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(second.probabilities[::-1], first.probabilities, atol=1e-5)
        assert first.text == second.text == options[1]
        assert [first.stopped_by, first.stop_level] == [second.stopped_by, second.stop_level]
        assert np.argmax(first.probabilities) == 1
        assert first.gamma == pytest.approx(confidence_to_gamma(0.8, 3))

    @pytest.mark.parametrize("number", [0, 1])
    def test_the_order_of_options_does_not_change_what_is_shown(self, loaded, number):
        """The clips of an episode are told apart by the option that was chosen."""
        for clip in range(0, NUM_CLIPS, 2):
            options = [f"{ORTHOGONAL} a", f"{number + 1} {clip}"]
            first = answer(loaded, "which?", options, found_at=-99)
            second = answer(loaded, "which?", options[::-1], found_at=-99)
            if first.probabilities[1] < 0.51:
                continue  # nothing tells the options apart
            assert first.text == second.text == options[1]
            places = [
                sorted((m.video, m.span, m.text, m.frames, m.clip) for m in found.moments)
                for found in (first, second)
            ]
            assert places[0] == places[1]

    @pytest.mark.parametrize("patience", [1, 99])
    def test_says_what_stopped_the_search(self, loaded, patience):
        config = dataclasses.replace(video_search.RETRIEVAL, patience=patience)
        for clip in range(0, NUM_CLIPS, 4):
            found = answer(loaded, f"1 {clip}", config=config)
            sure = found.trace[-1]["answer_entropy"] <= found.gamma
            expected = "patience" if patience == 1 else "end"
            assert found.stopped_by == ("gate" if sure else expected)

    def test_the_trace_is_that_of_the_search(self, loaded):
        found = answer(loaded, f"2 {told(loaded, 1)[-1]}")
        assert [step["level"] for step in found.trace] == sorted(
            (step["level"] for step in found.trace), key=LEVELS.index
        )
        assert found.trace[-1]["level"] == found.stop_level
        assert all(step["slots"] for step in found.trace)
        assert found.tokens_read == sum(step["tokens"] for step in found.trace)
        assert [len(step["slots"]) for step in found.trace[:3]] == [5, 2, 2][: len(found.trace)]
        seen = [(s["video"], s["level"], s["slot"]) for x in found.trace for s in x["slots"]]
        assert len(set(seen)) == len(seen)
        assert set(found.retrieval_entropy) == set(LEVELS)

    def test_is_plain_json_and_deterministic(self, loaded):
        first, second = (asking.as_json(answer(loaded, "1 3")) for _ in range(2))
        del first["seconds"], second["seconds"]
        assert json.loads(json.dumps(first, allow_nan=False)) == second

    def test_is_told_with_its_places(self, loaded):
        found = answer(loaded, f"1 {told(loaded, 0)[0]}")
        lines = asking.told(found).splitlines()
        assert lines[0] == found.text
        for moment in found.moments:
            assert any(moment.video in line and moment.text in line for line in lines[1:])
            assert any(line.strip() in moment.frames for line in lines)
        guess = asking.told(answer(loaded, ORTHOGONAL, ("a", "b"))).splitlines()
        assert guess[0] == "a"
        assert [line.split() for line in guess[1:3]] == [["50.0%", "a"], ["50.0%", "b"]]
        assert asking.NOT_FOUND in guess[3]

    def test_words_come_from_the_evidence(self, loaded):
        heard = []

        def word(question, evidence):
            heard.append((question, tuple(evidence)))
            return "in words"

        found = answer(loaded, "1 3", word_fn=word, found_at=-99)
        assert found.text == "in words"
        assert heard == [("1 3", tuple(m.text for m in found.moments))]
        assert "word" in found.seconds
        assert answer(loaded, ORTHOGONAL, word_fn=word).text == asking.NOT_FOUND
        assert len(heard) == 1

    @pytest.mark.parametrize(
        ("question", "options"), [("  ", ()), ("q", ("a",)), ("q", ("a", " ")), ("", ("a", "b"))]
    )
    def test_nonsense_is_refused(self, loaded, question, options):
        with pytest.raises(UserError, match="empty|two or more"):
            answer(loaded, question, options)


def test_the_threshold_rises_with_what_is_held():
    assert asking.threshold(asking.FOUND_SLOTS) == asking.FOUND_AT
    rises = np.diff([asking.threshold(n, 2.0) for n in (1, 2, 4, 1024, 2048)])
    assert rises[[0, 1, 3]] == pytest.approx([asking.FOUND_RISE] * 3)
    assert asking.threshold(0, -np.inf) == -np.inf


class TestLoad:
    @pytest.mark.parametrize("at", [0.0, 9.0, 12.0, 17.0, 1e9])
    def test_at_shows_nothing_later(self, folder, at):
        named = set()
        with asking.load(folder, at=at, space=SPACE) as then:
            for seed in (1, 2):
                for clip in range(0, NUM_CLIPS, 5):
                    found = answer(then, f"{seed} {clip}", found_at=-99)
                    spans = [m.span for m in found.moments]
                    spans += [s["span"] for step in found.trace for s in step["slots"]]
                    assert all(end <= at for _, end in spans)
                    assert found.at == at
                    named |= set(found.entities)
        assert all(float(name.removeprefix("seen ")) <= at for name in named)
        assert bool(named) == (at > 0)

    def test_at_the_start_nothing_is_known(self, folder):
        with asking.load(folder, at=0.0, space=SPACE) as then:
            for options in ((), ("1 2", "1 3", "1 4")):
                found = answer(then, "1 2", options)
                assert not found.found
                assert found.stop_level is None
                assert found.trace == found.moments == ()
                json.dumps(asking.as_json(found), allow_nan=False)
            assert found.probabilities == pytest.approx((1 / 3,) * 3)

    def test_steps_that_read_nothing_are_left_out(self, folder):
        with asking.load(folder, at=12.0, videos=["video-1"], space=SPACE) as then:
            found = answer(then, "1 0", found_at=-99)
        held = sum(int(getattr(then.states[0], level).valid.sum()) for level in LEVELS)
        assert 0 < sum(len(step["slots"]) for step in found.trace) <= held
        assert all(step["slots"] for step in found.trace)

    def test_only_the_videos_asked_for(self, folder):
        with asking.load(folder, videos=["video-2"], space=SPACE) as one:
            found = answer(one, "1 3", found_at=-99)
            assert found.videos == ("video-2",)
            assert {m.video for m in found.moments} == {"video-2"}
            assert "video-2" not in found.text  # there is no other

    def test_several_videos_are_searched_together(self, folder, loaded):
        """The best score is the best of each alone."""
        for clip in range(0, NUM_CLIPS, 6):
            together = answer(loaded, f"1 {clip}").score
            alone = []
            for name in ("video-1", "video-2"):
                with asking.load(folder, videos=[name], space=SPACE) as one:
                    alone.append(answer(one, f"1 {clip}").score)
            assert together == pytest.approx(max(alone), abs=1e-4)

    def test_bad_input_is_refused(self, folder, tmp_path):
        with pytest.raises(UserError, match="holds no video 'video-9'"):
            asking.load(folder, videos=["video-9"], space=SPACE)
        with pytest.raises(UserError, match="no memory folder"):
            asking.load(tmp_path / "none", space=SPACE)
        with pytest.raises(UserError, match="holds no video"):
            asking.load(tmp_path, space=SPACE)
        for at in (-1.0, float("nan")):
            with pytest.raises(UserError, match="--at"):
                asking.load(folder, at=at, space=SPACE)


def test_ask_writes_down_what_was_asked(tmp_path):
    write(tmp_path, 1, num_clips=6)
    found = asking.ask(tmp_path, "1 2", space=SPACE)
    asking.ask(tmp_path, "which?", options=["1 2", "1 3"], at=2.0, space=SPACE)
    with pytest.raises(UserError):
        asking.ask(tmp_path, "", space=SPACE)
    rows = store.read_questions(tmp_path)
    assert [row["question"] for row in rows] == ["1 2", "which?"]
    assert rows[0] == json.loads(json.dumps({"asked": rows[0]["asked"]} | asking.as_json(found)))
    assert rows[1]["at"] == 2.0
    assert len(rows[1]["probabilities"]) == 2


def test_a_forgotten_clip_is_passed_over(tmp_path):
    """A writer may have evicted since what the loaded memory still holds."""
    write(tmp_path, 1, num_clips=8)
    with asking.load(tmp_path, space=SPACE) as then:
        with store.open_store(tmp_path, "video-1", writable=True) as video:
            empty = memory.init(CONFIG)
            store.prune(video, empty.replace(num_items=jnp.asarray(8, jnp.int32)))
        assert answer(then, "1 2", found_at=-99).moments == ()
