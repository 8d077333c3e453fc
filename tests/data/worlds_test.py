"""The procedural world: the same everywhere, fair to ask about, and hard in the intended places."""

import dataclasses
import hashlib

import numpy as np
import pytest

from mmmem_jax.data import worlds
from mmmem_jax.data.worlds import FAMILIES, KIND, WORD_ID, WORDS, WorldConfig
from mmmem_jax.memory.types import LEVELS

CONFIG = WorldConfig()
# Of stream 1 of world 7; changes whenever the world does.
GOLDEN_STREAM = "2cca5b0c8b7720113609c0baa0a12826da6518ce4dcbbfbd63826bd6b188f2bd"
GOLDEN_FRAMES = "9f22325f49b532ff343e5f92a6bc761c02b68fe4c85df1e6b2ffac0ea8533eb7"
LENGTHS = (0, 1, 2, 255, 256, 4096)


def digest(*trees) -> str:
    sha = hashlib.sha256()
    for tree in trees:
        for x in tree:
            array = np.ascontiguousarray(x)
            sha.update(f"{array.dtype.str}{array.shape}".encode())
            sha.update(array.tobytes())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def many():
    """Streams and questions of 48 lives."""
    return [worlds.make_stream(3, index, CONFIG) for index in range(48)]


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length(length):
    config = WorldConfig(num_chunks=length)
    stream, questions = worlds.make_stream(0, 0, config)
    for name in set(stream._fields) - {"noise_seed"}:
        assert len(getattr(stream, name)) == length
    assert worlds.render(stream).shape == (length, 16, 16, 3)
    assert len(questions.answer) == len(FAMILIES) * config.questions_per_family
    if length < 4:
        assert not np.any(questions.valid & (questions.family == FAMILIES.index("order")))
    if length >= 255:
        assert questions.valid.mean() > 0.9
    if length:
        assert stream.span[0, 0] == 0
        assert np.array_equal(stream.span[1:, 0], stream.span[:-1, 1])
        assert np.all(stream.span[:, 0] < stream.span[:, 1])


def test_a_life_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="num_chunks >= 0"):
        WorldConfig(num_chunks=-1)
    with pytest.raises(ValueError, match="chunks_per_day >= 4"):
        WorldConfig(chunks_per_day=3)


class TestDeterminism:
    def test_golden(self):
        stream, questions = worlds.make_stream(7, 1, WorldConfig(num_chunks=128))
        assert digest(stream, questions) == GOLDEN_STREAM
        assert digest([worlds.render(stream)]) == GOLDEN_FRAMES

    def test_the_same_again(self):
        first, again = (worlds.make_stream(3, 5, CONFIG) for _ in range(2))
        assert digest(*first) == digest(*again)

    @pytest.mark.parametrize("other", [(3, 6), (4, 5)])
    def test_another_index_or_seed_is_another_life(self, other):
        stream, questions = worlds.make_stream(3, 5, CONFIG)
        stream2, questions2 = worlds.make_stream(*other, CONFIG)
        assert np.mean(stream.kind == stream2.kind) < 0.5
        assert np.mean(np.all(stream.words == stream2.words, axis=1)) < 0.5
        assert not np.array_equal(questions.options, questions2.options)


def words_of(stream, t) -> set[str]:
    """Everything a chunk tells or shows."""
    ids = np.concatenate([stream.words[t], stream.visible[t]])
    return {WORDS[i] for i in ids if i}


def facts(stream, kind):
    """Chunks of a kind, lingering repeats left out."""
    return np.flatnonzero((stream.kind == KIND[kind]) & stream.relevant)


def mentioning(stream, chunks, *words):
    return [t for t in chunks if set(words) <= words_of(stream, t)]


def value_in(stream, t, pool):
    """The one word of `pool` a chunk tells or shows."""
    (value,) = words_of(stream, t) & set(pool)
    return value


def most(values):
    names, counts = np.unique(values, return_counts=True)
    assert np.sum(counts == counts.max()) == 1
    return names[np.argmax(counts)]


def recompute(stream, family, question, options, config) -> str | int:
    """The answer from the words of the stream: what a reader with perfect memory would say."""
    match FAMILIES[family], question:
        case "state", [ask, thing]:
            kind, pool = {"state": ("state", worlds.STATES), "where": ("place", worlds.ROOMS)}[ask]
            last = mentioning(stream, facts(stream, kind), thing)[-1]
            if kind == "state":
                return value_in(stream, last, pool)
            told = [WORDS[i] for i in stream.words[last] if WORDS[i] in pool]
            return told[0] if told else WORDS[stream.visible[last, 2]]
        case "seen_once", ["pattern", thing]:
            (t,) = mentioning(stream, facts(stream, "pattern"), thing)
            return WORDS[stream.visible[t, 4]]
        case "who", ["who", did, thing]:
            (t,) = mentioning(stream, facts(stream, "action"), did, thing)
            return value_in(stream, t, worlds.PEOPLE)
        case "when", ["when", did, thing]:
            (t,) = mentioning(stream, facts(stream, "action"), did, thing)
            part = t % config.chunks_per_day * 4 // config.chunks_per_day
            assert stream.span[t, 0] % 86_400 // 21_600 == part
            return worlds.PHASES[part]
        case "order", ["first"]:
            times = [mentioning(stream, facts(stream, "action"), *option) for option in options]
            assert all(len(t) == 1 for t in times)
            return int(np.argmin([t[0] for t in times]))
        case "count", ["many", "did", person]:
            return worlds.NUMBERS[len(mentioning(stream, facts(stream, "action"), person)) - 1]
        case "habit", ["usually", phase]:
            chunks = mentioning(stream, facts(stream, "routine"), phase)
            return most([value_in(stream, t, worlds.HABITS) for t in chunks])
        case "gist", ["mostly", day]:
            chunks = mentioning(stream, facts(stream, "routine"), day)
            return most([value_in(stream, t, worlds.ROOMS) for t in chunks])
    raise AssertionError(question)


class TestQuestions:
    @pytest.mark.parametrize("family", range(len(FAMILIES)), ids=FAMILIES)
    def test_the_right_option_follows_from_what_is_told_and_seen(self, many, family):
        asked = 0
        for stream, questions in many[:16]:
            for row in np.flatnonzero((questions.family == family) & questions.valid):
                question = [WORDS[i] for i in questions.words[row] if i]
                options = [tuple(WORDS[i] for i in o if i) for o in questions.options[row]]
                assert len(set(options)) == 4
                right = recompute(stream, family, question, options, CONFIG)
                right = right if isinstance(right, int) else options.index((right,))
                assert questions.answer[row] == right
                asked += 1
        assert asked >= 64

    def test_evidence_lies_in_the_stream_and_matters(self, many):
        for stream, questions in many:
            for row in np.flatnonzero(questions.valid):
                chunks = questions.evidence[row]
                chunks = chunks[chunks >= 0]
                assert len(chunks)
                assert len(set(chunks)) == len(chunks)
                assert np.all(chunks < len(stream.kind))
                assert np.all(stream.relevant[chunks])
            assert np.all(questions.evidence[~questions.valid] == -1)

    def test_right_options_lie_anywhere(self, many):
        answer = np.stack([q.answer for _, q in many])
        valid = np.stack([q.valid for _, q in many])
        for family in range(len(FAMILIES)):
            here = valid & (many[0][1].family == family)
            share = np.bincount(answer[here], minlength=4) / here.sum()
            assert np.all(np.abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / here.sum()))

    def test_no_option_is_right_too_often(self, many):
        # Blind guessing by the commonest answer of a family must not pay.
        for family, name in enumerate(FAMILIES):
            right = [
                tuple(q.options[row, q.answer[row]])
                for _, q in many
                for row in np.flatnonzero((q.family == family) & q.valid)
            ]
            _, counts = np.unique(right, axis=0, return_counts=True)
            assert counts.max() / len(right) < 0.45, name

    def test_families_have_levels(self):
        assert len(worlds.FAMILY_LEVEL) == len(FAMILIES)
        level = {f: LEVELS[i] for f, i in zip(FAMILIES, worlds.FAMILY_LEVEL, strict=True)}
        assert level["gist"] == level["habit"] == "schema"
        assert level["seen_once"] == "sensory"
        assert {"who", "order", "count", "when"} == {f for f in level if level[f] == "episodic"}


class TestStream:
    def test_rates_are_those_asked_for(self, many):
        kind = np.stack([s.kind for s, _ in many])
        own = np.isin(kind, [KIND[k] for k in ("state", "place", "pattern", "action")])
        background = kind[~own]
        for name, rate in (("routine", CONFIG.routine_rate), ("loud", CONFIG.loud_rate),
                           ("talk", CONFIG.talk_rate), ("glitch", CONFIG.glitch_rate)):  # fmt: skip
            assert np.mean(background == KIND[name]) == pytest.approx(rate, abs=0.03)
        relevant = np.stack([s.relevant for s, _ in many])
        assert (own & relevant).sum(1).tolist() == [CONFIG.facts] * len(many)

    def test_facts_are_told_seen_or_both(self, many):
        told, seen = [], []
        for stream, _ in many:
            own = np.concatenate([facts(stream, k) for k in ("state", "place", "action")])
            told.append(stream.words[own].any(1))
            seen.append(stream.visible[own, 0] > 0)
        told, seen = np.concatenate(told), np.concatenate(seen)
        assert np.all(told | seen)
        assert np.mean(told & ~seen) == pytest.approx(CONFIG.told_only, abs=0.05)
        assert np.mean(seen & ~told) == pytest.approx(CONFIG.seen_only, abs=0.05)

    def test_loud_events_concern_nobody_asked_about(self, many):
        own = [WORD_ID[w] for w in worlds.OWN_OBJECTS]
        other = [WORD_ID[w] for w in worlds.OTHER_OBJECTS]
        for stream, questions in many:
            assert not np.any(np.isin(stream.words[stream.loud], own))
            assert not np.any(np.isin(stream.visible[stream.loud], own))
            assert not np.any(stream.relevant[stream.loud])
            assert not np.any(np.isin(questions.words, other))

    def test_glitches_tell_and_show_nothing(self, many):
        for stream, _ in many:
            assert not np.any(stream.words[stream.glitch])
            assert not np.any(stream.visible[stream.glitch])

    def test_near_duplicates_occur(self, many):
        repeats = [
            np.all(s.words[1:] == s.words[:-1], 1) & np.all(s.visible[1:] == s.visible[:-1], 1)
            for s, _ in many
        ]
        assert 0.05 < np.mean(repeats) < 0.2
        none = dataclasses.replace(CONFIG, duplicate_rate=0.0)
        kept = [worlds.make_stream(3, i, none)[0] for i in range(4)]
        assert all(np.array_equal(s.relevant, s.kind <= KIND["routine"]) for s in kept)

    def test_facts_thin_out_as_streams_grow(self):
        counts = []
        for length in (256, 4096):
            stream, _ = worlds.make_stream(0, 0, WorldConfig(num_chunks=length))
            own = np.isin(stream.kind, [KIND[k] for k in ("state", "place", "pattern", "action")])
            counts.append((own & stream.relevant).sum())
        assert counts == [32, 64]


def showing(pattern: str, thing: str = "mug", copies: int = 1):
    """A stream that shows one thing with one pattern."""
    stream, _ = worlds.make_stream(0, 0, WorldConfig(num_chunks=copies))
    visible = np.array([[WORD_ID[thing], 0, 0, WORD_ID["hall"], WORD_ID[pattern]]], np.uint8)
    off = np.zeros(copies, bool)
    return stream._replace(visible=visible.repeat(copies, 0), loud=off, glitch=off)


class TestFrames:
    def test_the_same_again(self):
        stream = showing("striped", copies=3)
        assert np.array_equal(worlds.render(stream), worlds.render(stream))

    def test_patterns_differ_at_full_resolution_only(self):
        frames = {p: worlds.render(showing(p, copies=64)) for p in worlds.PATTERNS}
        frames = {p: x[:, :8, :8].astype(float) for p, x in frames.items()}
        coarse = {p: x.reshape(64, 4, 2, 4, 2, 3).mean((0, 2, 4)) for p, x in frames.items()}
        for pattern in ("striped", "dotted", "checked"):
            for other in set(worlds.PATTERNS) - {pattern}:
                assert np.abs(frames[pattern] - frames[other]).mean() > 25
                assert np.abs(coarse[pattern] - coarse[other]).mean() < 0.2

    def test_a_quiet_frame_is_never_clipped(self, many):
        for stream, _ in many[:8]:
            frames = worlds.render(stream)[~stream.loud & ~stream.glitch]
            assert 0 < frames.min() < frames.max() < 255

    def test_textures_vanish_in_every_block_of_two_by_two(self):
        textures = worlds._textures().reshape(4, 4, 2, 4, 2, 1)
        assert not np.any(textures.mean((2, 4)))
        assert np.all(np.abs(textures[:3]) == 1)

    def test_things_look_different(self):
        looks = worlds._appearances().reshape(len(WORDS), -1)
        distance = np.linalg.norm(looks[:, None] - looks[None], axis=-1)
        assert distance[~np.eye(len(WORDS), dtype=bool)].min() > 0.6

    def test_loud_frames_are_louder(self, many):
        contrast = {True: [], False: []}
        for stream, _ in many[:8]:
            spread = worlds.render(stream).astype(float).std((1, 2, 3))
            shown = (stream.visible[:, 0] > 0) & ~stream.glitch
            for loud in contrast:
                contrast[loud].extend(spread[shown & (stream.loud == loud)])
        assert np.mean(contrast[True]) > 1.15 * np.mean(contrast[False])


def test_ask_once_leaves_one_of_each_question():
    def asked(questions):
        return [
            (tuple(words), tuple(sorted(map(tuple, options))))
            for words, options, valid in zip(
                questions.words, questions.options, questions.valid, strict=True
            )
            if valid
        ]

    _, questions = worlds.make_stream(0, 0, WorldConfig(num_chunks=64))
    once = worlds.ask_once(questions)
    assert len(asked(once)) == len(set(asked(once))) < len(asked(questions))
    assert set(asked(once)) == set(asked(questions))
    assert not np.any(once.valid & ~questions.valid)
    np.testing.assert_array_equal(worlds.ask_once(once).valid, once.valid)
