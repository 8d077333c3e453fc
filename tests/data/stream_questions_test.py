"""Questions made from a stream: what is askable, and that every question can be checked."""

import random
from collections import Counter
from pathlib import Path

import pytest

from mmmem_jax.data.egolife import DAY_SPLITS, cut_days, read_egolife, wearer_of
from mmmem_jax.data.stream_questions import (
    TYPES,
    askable,
    make_questions,
    score,
    stream_statistics,
)
from mmmem_jax.data.timed_text import Event

REAL = Path(__file__).parents[3] / "shared" / "data" / "egolife"
NAMES = ("Mo", "Ann", "Bea", "Cas", "Dov")
VERBS = ("painted", "repaired", "borrowed", "polished", "unpacked", "measured")
# Fifty, so that each is in few enough rows to be distinctive.
THINGS = [
    a + b
    for a in "lan bi tea car mir".split()
    for b in "tern pot pet dle ror vo ka mi su ne".split()
]
PLACES = "cellar garden attic kitchen corridor balcony".split()
FILLER = ("I looked at the phone.", "Ann: Mm-hmm.", "Walking.", "I am here again now.")


def stream(video="v", rows=1500, seed=0):
    """A day of rows 20 s apart: three of four are filler, the others say who did what."""
    rng = random.Random(seed)
    events = []
    for number in range(rows):
        text = rng.choice(FILLER)
        if number % 4 == 0:
            name, verb, thing, place = map(rng.choice, (NAMES, VERBS, THINGS, PLACES))
            text = f"{name} {verb} the {thing} beside box {number} in the {place}."
            if rng.random() < 0.3:
                text = f"{name}: Somebody {verb} my {thing}, number {number}, in the {place}"
        events.append(Event(video, 20.0 * number, 20.0 * number + 2, "caption", text))
    bases = " ".join(verb.removesuffix("ed") for verb in VERBS)
    return [*events, Event(video, 0.0, 0.0, "caption", bases)]


@pytest.fixture(scope="module")
def made():
    events = stream()
    statistics = stream_statistics(events, wearer="Jo")
    return events, statistics, make_questions(events, statistics, num_questions=400, rng_seed=0)


class TestStatistics:
    def test_names_are_those_who_speak_or_act(self, made):
        assert made[1].names == set(NAMES)

    def test_the_wearer_is_not_among_them(self):
        statistics = stream_statistics(stream(), wearer="Mo")
        assert statistics.names == set(NAMES) - {"Mo"}
        assert statistics.wearer == "Mo"

    def test_frequency_counts_rows(self):
        rows = ["a cup and a cup", "Cup!", "a mug's lid"]
        statistics = stream_statistics(Event("v", 0, 0, "x", text) for text in rows)
        assert statistics.num_rows == 3
        assert statistics.frequency["cup"] == 2
        assert statistics.frequency["mug"] == 1


class TestAskable:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("Mo polished the lantern in the attic.", True),
            ("Mo: The lantern is in the attic.", True),
            ("I handed Mo the lantern in the attic.", True),
            ("Jo: Mo, bring me the lantern from the attic", True),
            ("I polished the lantern in the attic.", False),  # nobody but the wearer
            ("Jo: The lantern is in the attic.", False),
            ("Mo is looking at me right now.", False),  # no content
            ("Mo: Mm-hmm.", False),
            ("Mo xylographed the zeugma, quixotically.", False),  # nothing seen before
            ("", False),
        ],
    )
    def test_rule(self, text, expected):
        thing, place = ("lantern", "attic")
        texts = [f"the {word}" for word in (thing, place) for _ in range(9)]
        texts += ["Mo sleeps"] * 2000
        statistics = stream_statistics(
            (Event("v", 0, 0, "caption", line) for line in texts), wearer="Jo"
        )
        event = Event("v", 0, 0, "caption", text)
        assert askable(event, statistics) is expected
        assert (score(event, statistics) > 0) is expected

    def test_a_stream_without_names_needs_none(self):
        texts = ["a man repairs the lantern in the attic"] * 3 + ["nothing happens"] * 1000
        statistics = stream_statistics(Event("v", 0, 0, "caption", line) for line in texts)
        assert not statistics.names
        assert askable(Event("v", 0, 0, "caption", texts[0]), statistics)


class TestMakeQuestions:
    def test_every_type_is_made_in_like_numbers(self, made):
        count = Counter(question.type for question in made[2])
        assert set(count) == set(TYPES)
        assert min(count.values()) > 0.7 * max(count.values())
        assert len({question.qid for question in made[2]}) == len(made[2])

    def test_options_differ_and_their_order_tells_nothing(self, made):
        for question in made[2]:
            assert len(set(question.options)) == 4
        answers = Counter(question.answer for question in made[2])
        assert all(0.15 < answers[place] / len(made[2]) < 0.35 for place in range(4))

    def test_evidence_is_an_askable_row_that_ended_before_the_question(self, made):
        events, statistics, questions = made
        rows = {(event.t0 - 1, event.t1 + 1): event for event in events[:-1]}
        for question in questions:
            assert len(question.evidence) == (4 if question.type == "order" else 1)
            for window in question.evidence:
                assert askable(rows[window], statistics)
                assert rows[window].t1 <= question.query_time <= events[-2].t1
                assert rows[window].text.strip(".") not in question.question

    def test_the_right_option_is_right(self, made):
        events, _, questions = made
        rows = {(event.t0 - 1, event.t1 + 1): event for event in events[:-1]}
        for question in questions:
            row, right = rows[question.evidence[0]], question.options[question.answer]
            if question.type == "who":
                assert right in row.text
                assert right not in question.question
            elif question.type == "cloze":
                gapped = question.question.removeprefix("Fill the gap: ")
                assert gapped.replace("____", right) == row.text
            elif question.type == "when":
                start, end = right.removeprefix("between ").split(" and ")
                assert seconds(start) - 1 < row.t0 < seconds(end) + 1
            else:  # the earliest window is first
                assert right.split()[0] in row.text
                assert all(word in row.text for word in right.split()[-1:])

    def test_one_question_a_window_and_as_many_as_asked(self, made):
        events, statistics, _ = made
        few = make_questions(events, statistics, num_questions=10, rng_seed=0)
        assert len(few) == 10
        sparse = make_questions(
            events,
            statistics,
            num_questions=10_000,
            rng_seed=0,
            window_seconds=600,
            types=["cloze"],
        )
        windows = [(question.evidence[0][1] - 1) // 600 for question in sparse]
        assert len(set(windows)) == len(windows) > 30

    def test_same_seed_same_questions(self, made):
        events, statistics, questions = made
        again = make_questions(events[::-1], statistics, num_questions=400, rng_seed=0)
        assert again == questions
        assert make_questions(events, statistics, num_questions=400, rng_seed=1) != questions

    def test_videos_do_not_mix(self, made):
        _, statistics, _ = made
        both = [*stream("a", seed=1), *stream("b", seed=2)]
        texts = {video: {e.text for e in both if e.video == video} for video in "ab"}
        questions = make_questions(both, statistics, num_questions=300, rng_seed=0, types=["cloze"])
        assert {question.video for question in questions} == {"a", "b"}
        for question in questions:
            gapped = question.question.removeprefix("Fill the gap: ")
            right = question.options[question.answer]
            assert gapped.replace("____", right) in texts[question.video]

    @pytest.mark.parametrize("events", [[], [Event("v", 0, 1, "caption", "Mo painted a violin.")]])
    def test_streams_with_nothing_to_ask(self, made, events):
        assert make_questions(events, made[1], num_questions=5, rng_seed=0, types=["order"]) == []


def seconds(clock):
    hours, minutes, rest = map(int, clock.split(":"))
    return hours * 3600 + minutes * 60 + rest


@pytest.mark.skipif(not REAL.is_dir(), reason="the EgoLife files are not here")
def test_the_held_out_day_gives_two_thousand_questions():
    data = read_egolife(REAL)
    parts = {split: cut_days(data, days) for split, days in DAY_SPLITS.items()}
    statistics = stream_statistics(parts["train"].events, wearer=wearer_of("A1_JAKE"))
    events = parts["test"].events
    share = sum(askable(event, statistics) for event in events) / len(events)
    assert 0.1 < share < 0.25
    questions = make_questions(events, statistics, num_questions=2000, rng_seed=0)
    assert len(questions) == 2000
