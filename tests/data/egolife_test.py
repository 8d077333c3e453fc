"""EgoLife's official layout, on a made-up fixture in its exact shape, and on the real files."""

import json
import logging
from pathlib import Path

import pytest

from mmmem_jax.data.egolife import (
    DAY,
    DAY_SPLITS,
    cut_days,
    day_of,
    read_egolife,
    seconds_of,
)
from mmmem_jax.errors import UserError

REAL = Path(__file__).parents[3] / "shared" / "data" / "egolife"


def question(number, time="11000000", date="DAY2", **changes):
    row = {
        "ID": str(number),
        "query_time": {"date": date, "time": time},
        "type": "EventRecall",
        "question": "Who spilled the paint?",
        "answer": "B",
        "target_time": {"date": "DAY1", "time": "10000010"},
    }
    return row | {f"choice_{letter}": f"choice {letter}" for letter in "abcd"} | changes


def write(folder, questions, rows=None):
    rows = rows or [{"start": 100000, "end": 100002, "text": "Mo spills it.", "type": "caption"}]
    captions, qa = folder / "EgoLifeCap" / "Sync", folder / "EgoLifeQA"
    captions.mkdir(parents=True), qa.mkdir()
    for day in range(1, 5):
        clip = {"video_file": f"DAY{day}_A1_JAKE_10000000.mp4", "data": rows}
        (captions / f"A1_JAKE_DAY{day}_10000000.json").write_text(json.dumps([clip]))
    (qa / "EgoLifeQA_A1_JAKE.json").write_text(json.dumps(questions))
    return folder


class TestTimes:
    @pytest.mark.parametrize(
        ("day", "clock", "seconds"),
        [
            (1, "000000", 0.0),
            (1, 93005, 9.5 * 3600 + 5),
            (2, "11210210", DAY + 11 * 3600 + 21 * 60 + 2.5),
            (1, 9300510, 9.5 * 3600 + 5.5),
            (1, "00000092", 0.95),
        ],
    )
    def test_seconds_of(self, day, clock, seconds):
        assert seconds_of(day, clock) == pytest.approx(seconds)
        assert day_of(seconds_of(day, clock)) == day

    @pytest.mark.parametrize("clock", ["", "noon", "246000", "106000", "100060", "123456789", -5])
    def test_not_a_clock(self, clock):
        with pytest.raises(ValueError, match="time"):
            seconds_of(1, clock)


class TestRead:
    def test_events_and_repeated_rows(self, tmp_path):
        row = {"start": 100000, "end": 100002, "text": "Mo spills it.", "type": "caption"}
        data = read_egolife(write(tmp_path, [question(1)], [row, row]))
        assert len(data.events) == 4
        event = data.events[1]
        assert (event.video, event.kind, event.t0, event.t1) == (
            "A1_JAKE",
            "caption",
            DAY + 36000,
            DAY + 36002,
        )

    @pytest.mark.parametrize(
        ("target", "moments"),
        [
            ({"date": "DAY1", "time": "10000010"}, [36000.5]),
            ({"date": "Day1", "time": "10000010"}, [36000.5]),
            ({"date": "DAY1", "time_list": ["10000010", "10000000"]}, [36000.0, 36000.5]),
            ({"date": "DAY1", "time_list": ["10000010", "10000010"]}, [36000.5]),
            ({"date": "DAY1", "time": "10000010DAY2_10000000"}, [36000.5, DAY + 36000]),
            ({"date": "", "time": ""}, []),
            ({"date": "DAY1", "time": "99000000"}, []),
            (None, []),
        ],
    )
    def test_evidence_windows(self, tmp_path, target, moments):
        folder = write(tmp_path, [question(1, target_time=target)])
        (asked,) = read_egolife(folder, evidence_seconds=10.0).questions
        assert asked.evidence == tuple((moment - 5, moment + 5) for moment in moments)
        assert (asked.qid, asked.answer, asked.options[1]) == ("A1_JAKE_1", 1, "choice b")

    def test_bad_rows_are_named_or_left_out(self, tmp_path, caplog):
        rows = [
            {"start": 100000, "end": 100002, "text": "Mo spills it.", "type": "caption"},
            {"start": 100002, "end": 100000, "text": "Back in time.", "type": "caption"},
        ]
        folder = write(tmp_path, [question(1), question(1), question(2, answer="E")], rows)
        with pytest.raises(UserError, match=r"DAY1_10000000\.json: row 1 data: row 2: ends at"):
            read_egolife(folder, skip_bad_rows=False)
        with caplog.at_level(logging.WARNING):
            data = read_egolife(folder)
        assert len(data.events) == 4
        assert len(data.questions) == 1
        assert "used twice" in caplog.text
        assert "answer 'E'" in caplog.text

    @pytest.mark.parametrize("number", [None, "", " "])
    def test_a_question_without_its_id_is_a_bad_row(self, tmp_path, number):
        folder = write(tmp_path, [question(1, ID=number)])
        with pytest.raises(UserError, match=r"JAKE\.json: row 1: ID is missing"):
            read_egolife(folder, skip_bad_rows=False)

    @pytest.mark.parametrize("gone", ["EgoLifeCap", "EgoLifeQA"])
    def test_wrong_folder(self, tmp_path, gone):
        (write(tmp_path, []) / gone).rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=f"no file like {gone}/"):
            read_egolife(tmp_path)

    def test_cut_days(self, tmp_path):
        asked = [question(day, date=f"DAY{day}") for day in range(1, 5)]
        data = read_egolife(write(tmp_path, asked))
        for days in DAY_SPLITS.values():
            part = cut_days(data, days)
            assert tuple(day_of(event.t1) for event in part.events) == days
            assert tuple(day_of(q.query_time) for q in part.questions) == days
        assert cut_days(data, ()).events == ()


@pytest.mark.skipif(not REAL.is_dir(), reason="the EgoLife files are not here")
def test_the_real_files_are_read_whole(caplog):
    data = read_egolife(REAL, skip_bad_rows=False)
    assert not caplog.records
    assert len(data.questions) == 330
    assert len(data.events) > 68_000
    assert {event.kind for event in data.events} == {"caption", "transcript"}
    first, last = data.events[0].t0, data.events[-1].t1
    for asked in data.questions:
        assert asked.evidence
        assert all(first - 60 < t0 < t1 < last + 60 for t0, t1 in asked.evidence)
        assert min(t0 for t0, _ in asked.evidence) < asked.query_time
