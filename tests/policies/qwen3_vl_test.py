"""The manager decides on what it would see if it read every prompt anew, and reads little."""

from typing import NamedTuple

import numpy as np
import pytest

from mmmem_jax.errors import UserError
from mmmem_jax.memory import ADD_NEW, DISCARD, MERGE
from mmmem_jax.models.qwen3_vl import conversation
from mmmem_jax.models.qwen3_vl.buckets import bucket_length
from mmmem_jax.models.qwen3_vl.chat import load_chat
from mmmem_jax.models.qwen3_vl.conversation import Said, load_speaker
from mmmem_jax.perception.decode import Frame
from mmmem_jax.perception.qwen3_vl import look
from mmmem_jax.perception.types import Percept, Work
from mmmem_jax.policies import qwen3_vl as manager
from mmmem_jax.testing.qwen3_vl import SHALLOW, write_checkpoint
from mmmem_jax.testing.videos import scene_image

CONTEXT = 1536


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), SHALLOW)


@pytest.fixture(scope="module")
def speaker(folder):
    return load_speaker(folder)


@pytest.fixture(scope="module")
def percepts(speaker):
    """Clips of 4 frames."""

    def percept(index: int) -> Percept:
        frames = [Frame(2.0 * index + i / 2, scene_image(index, i)) for i in range(4)]
        return Percept(
            index, (2.0 * index, 2.0 * index + 2), f"clip number {index} yes", "", (), (), None,
            seen=look(speaker, frames), work=Work(frames=4),
        )  # fmt: skip

    return [percept(index) for index in range(6)]


class Heard(NamedTuple):
    """What the model was asked, and what it made of it."""

    offered: tuple[int, ...]
    log_probs: np.ndarray  # of the offered tokens
    in_view: int


@pytest.fixture
def script(speaker, monkeypatch):
    """The model answers the words given it, in order; what it was asked is kept."""
    heard, answers = [], []

    def say_each(speaker, talk, *, max_new_tokens, rng_keys, temperature, first_ids, active):
        log_probs = conversation.choose(speaker, talk, first_ids)
        heard.append(Heard(first_ids, log_probs, conversation.in_view(talk)[0]))
        text = answers.pop(0)
        first = speaker.chat.tokenizer.encode(text).ids[0]
        chosen = float(log_probs[first_ids.index(first)])
        return [Said(text, (first,), (chosen,), True)], talk

    monkeypatch.setattr(conversation, "say_each", say_each)
    return answers, heard


def _run(speaker, percepts, answers, texts):
    answers.extend(texts)
    ids = manager.action_ids(speaker.chat)
    episode, decisions = manager._open(speaker, CONTEXT), []
    for percept in percepts[: len(texts)]:
        decision, episode = manager.step(speaker, ids, episode, percept)
        decisions.append(decision)
    return decisions, episode


def _anew(speaker, clips, offered):
    """Log-probabilities of the actions after a prompt read from its start, and its tokens."""
    talk = manager._open(speaker, CONTEXT).talk
    for clip in clips:
        talk, _ = manager.read_clip(speaker, talk, clip.seen, clip.caption)
    talk = conversation.tell(speaker, talk, manager.QUESTION)
    return conversation.choose(speaker, talk, offered), talk.tokens_read


def test_decisions_are_those_of_prompts_read_anew(speaker, percepts, script):
    answers, heard = script
    texts = ["add: a", "merge: b", "discard", "merge: c", "add: d", "merge: e"]
    decisions, _ = _run(speaker, percepts, answers, texts)
    in_view_of = [(0,), (0, 1), (0, 1, 2), (0, 1, 3), (0, 1, 3, 4), (4, 5)]
    read = {}
    for clips, asked, decision in zip(in_view_of, heard, decisions, strict=True):
        log_probs, tokens = _anew(speaker, [percepts[i] for i in clips], asked.offered)
        read[clips] = tokens
        np.testing.assert_allclose(asked.log_probs, log_probs, atol=1e-4)
        assert asked.in_view == tokens == decision.work.tokens_anew
        assert decision.work.frames_anew == 4 * len(clips)
    clip_tokens = read[0, 1] - read[(0,)]
    question = len(speaker.chat.tokenizer.encode(manager.QUESTION).ids)
    assert decisions[0].work.tokens == read[(0,)]
    assert decisions[1].work.tokens == clip_tokens + question
    # ADD_NEW after an episode reads the clip once more.
    assert decisions[4].work.tokens == 2 * clip_tokens + question
    assert all(d.work.frames == 0 for d in decisions)
    assert [d.action for d in decisions] == [
        ADD_NEW, MERGE, DISCARD, MERGE, ADD_NEW, MERGE,
    ]  # fmt: skip
    assert [d.trace for d in decisions] == ["a", "b", "", "c", "d", "e"]
    assert not any(d.failed for d in decisions)


def test_the_newest_are_the_strongest(speaker, percepts, script):
    decisions, _ = _run(speaker, percepts, script[0], ["add: a", "merge: b"])
    assert decisions[1].strength > decisions[0].strength


def test_without_an_episode_there_is_no_merging(speaker, percepts, script):
    answers, heard = script
    _run(speaker, percepts, answers, ["discard", "add: a", "merge: b"])
    add, merge, discard = manager.action_ids(speaker.chat)
    assert [h.offered for h in heard] == [(add, discard), (add, discard), (add, merge, discard)]


def test_a_full_episode_is_closed(speaker, percepts, script, monkeypatch):
    monkeypatch.setattr(manager, "MAX_EPISODE_FRAMES", 8)
    answers, heard = script
    decisions, episode = _run(speaker, percepts, answers, ["add: a", "merge: b", "add: c"])
    assert [len(h.offered) for h in heard] == [2, 3, 2]
    assert [d.work.frames_anew for d in decisions] == [4, 8, 4]
    assert episode.frames == 4


def test_an_episode_that_fills_the_context_is_closed(speaker, percepts, script, monkeypatch):
    answers, heard = script
    _, episode = _run(speaker, percepts, answers, ["add: a", "merge: b"])
    question = len(speaker.chat.tokenizer.encode(manager.QUESTION).ids)
    room = (
        CONTEXT - episode.end.length - bucket_length(question)
    )  # after two clips, not after three
    monkeypatch.setattr(manager, "DECISION_TOKENS", room)
    _run(speaker, percepts, answers, ["add: a", "merge: b", "add: c"])
    assert [len(h.offered) for h in heard[2:]] == [2, 3, 2]


def test_what_the_model_says_is_sampled_among_the_actions(speaker, percepts, monkeypatch):
    monkeypatch.setattr(manager, "DECISION_TOKENS", 4)
    ids = manager.action_ids(speaker.chat)
    episode = manager._open(speaker, CONTEXT)
    decision, _ = manager.step(speaker, ids, episode, percepts[0])
    assert decision.action in (ADD_NEW, DISCARD)
    assert np.log(0.5) - 1e-6 <= decision.log_prob <= 0  # the likelier of two
    assert bool(decision.failed) == (decision.action == ADD_NEW and not decision.trace)


@pytest.mark.parametrize(
    ("text", "trace"),
    [
        ("add: A cat.", "A cat."),
        ("add:A cat\n sleeps.", "A cat sleeps."),
        ("add: A <|im_end|> cat.", "A < |im_end|> cat."),
        ("add", ""),
        ("add:  ", ""),
        ("address: A cat.", ""),
        ("I would add: A cat.", ""),
    ],
)
def test_a_trace_is_what_follows_the_word(text, trace):
    assert manager.trace_of(text, "add") == trace


def test_words_that_begin_alike_are_refused(folder):
    chat = load_chat(folder, SHALLOW)
    assert len(set(manager.action_ids(chat))) == 3
    with pytest.raises(UserError, match="'merge' and 'mend' begin with the same token"):
        manager.action_ids(chat, ("add", "merge", "mend"))


@pytest.mark.parametrize(
    ("texts", "trace", "failed"),
    [
        (["add", "add: A cat."], "A cat.", ()),
        (["add: A very ~", "add", "add: A cat."], "A cat.", ()),
        (["add: A very ~", "add: A cat ~", "add"], "A very", ("trace",)),
        (["add"] * conversation.ATTEMPTS, "", ("trace",)),
    ],
)
def test_a_trace_is_asked_for_again_and_its_failure_kept(
    speaker, percepts, monkeypatch, texts, trace, failed
):
    """What was decided stays, as likely as it was; "~" is where an answer is cut off."""
    add, merge, discard = ids = manager.action_ids(speaker.chat)
    asked, answers = [], list(texts)

    def say_each(speaker, talk, **how):
        asked.append(how)
        text, ended = answers.pop(0), True
        if text.endswith("~"):
            text, ended = text.removesuffix("~"), False
        return [Said(text, (add,), (0.0 if len(asked) > 1 else -0.5,), ended)], talk

    monkeypatch.setattr(conversation, "say_each", say_each)
    decision, episode = manager.step(speaker, ids, manager._open(speaker, CONTEXT), percepts[0])
    assert (decision.action, decision.log_prob) == (ADD_NEW, -0.5)
    assert (decision.trace, decision.failed) == (trace, failed)
    assert not answers
    assert [how["first_ids"] for how in asked] == [(add, discard)] + [(add,)] * (len(texts) - 1)
    assert [how["temperature"] > 0 for how in asked] == [False] + [True] * (len(texts) - 1)
    assert decision.work.frames_anew == 4 * len(texts)
    assert episode.frames == 4
