"""Timed-text folders: what is read, what is refused and how, and how a folder is split."""

import json
import logging

import pytest

from mmmem_jax.data.timed_text import (
    SPLITS,
    Event,
    Question,
    TimedText,
    read_timed_text,
    split_by_video_or_time,
)
from mmmem_jax.errors import UserError

EVENT = {"video": "v", "t0": 1.0, "t1": 2.0, "kind": "caption", "text": "A cup falls."}
QUESTION = {
    "qid": "q1",
    "video": "v",
    "question": "What falls?",
    "options": ["cup", "plate", "fork", "knife"],
    "answer": 0,
    "query_time": 5,
    "evidence": [[1, 2]],
    "type": "what",
}


def write(folder, events, questions=()):
    for name, rows in (("events.jsonl", events), ("qa.jsonl", questions)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder


class TestRead:
    def test_reads_rows_and_sorts_events_by_their_end(self, tmp_path):
        later = EVENT | {"t0": 0.0, "t1": 3.0}
        other = EVENT | {"video": "a", "t0": 9.0, "t1": 9.0}
        data = read_timed_text(write(tmp_path, [later, "", EVENT, other], [QUESTION]))
        assert [(e.video, e.t1) for e in data.events] == [("a", 9.0), ("v", 2.0), ("v", 3.0)]
        (question,) = data.questions
        assert question.options == ("cup", "plate", "fork", "knife")
        assert question.evidence == ((1.0, 2.0),)
        assert question.query_time == 5.0

    def test_nullable_fields(self, tmp_path):
        row = QUESTION | {"answer": None, "query_time": None, "evidence": None}
        (question,) = read_timed_text(write(tmp_path, [EVENT], [row])).questions
        assert (question.answer, question.query_time, question.evidence) == (None, None, ())

    def test_byte_order_mark_and_windows_line_ends(self, tmp_path):
        write(tmp_path, [])
        row = json.dumps(EVENT).encode()
        (tmp_path / "events.jsonl").write_bytes(b"\xef\xbb\xbf" + row + b"\r\n" + row + b"\r\n")
        assert len(read_timed_text(tmp_path).events) == 2

    @pytest.mark.parametrize("name", ["events.jsonl", "qa.jsonl"])
    def test_missing_file_is_named(self, tmp_path, name):
        (write(tmp_path, [EVENT]) / name).unlink()
        with pytest.raises(UserError, match=f"has no {name}"):
            read_timed_text(tmp_path)

    def test_no_events(self, tmp_path):
        with pytest.raises(UserError, match="holds no events"):
            read_timed_text(write(tmp_path, ["", ""]))


class TestBadRows:
    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            (EVENT | {"t0": 3}, "ends at 2 before it starts at 3"),
            (EVENT | {"t1": float("nan")}, "not a finite number"),
            (EVENT | {"t1": float("inf")}, "not a finite number"),
            (EVENT | {"t1": 10**400}, "not a finite number"),
            (EVENT | {"t0": "1"}, "not a number of seconds"),
            (EVENT | {"t0": True}, "not a number of seconds"),
            (EVENT | {"text": " "}, '"text" is missing, empty'),
            (EVENT | {"text": "\ud800"}, "surrogate"),
            ({"video": "v"}, "not a number of seconds"),
            ("[1, 2]", "not a JSON object"),
            ("{", "not JSON"),
            ("[" * 100_000, "recursion|not JSON"),
        ],
    )
    def test_event(self, tmp_path, row, reason):
        with pytest.raises(UserError, match=rf"^events\.jsonl:2: .*({reason})"):
            read_timed_text(write(tmp_path, [EVENT, row]))

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"answer": 4}, "answer 4 is out of range for 4 options"),
            ({"answer": -1}, "out of range"),
            ({"answer": "A"}, "not the index"),
            ({"answer": True}, "not the index"),
            ({"options": ["cup"]}, "not a list of two or more"),
            ({"options": ["cup", 3]}, '"options" is missing, empty or not text'),
            ({"evidence": [[2, 1]]}, "evidence ends at 1 before it starts at 2"),
            ({"evidence": [1, 2]}, r"not \[t0, t1\]"),
            ({"evidence": {}}, "not a list"),
            ({"query_time": "now"}, "query_time 'now'"),
            ({"video": "w"}, 'video "w" has no events'),
            ({"qid": "q0"}, 'qid "q0" is used twice'),
        ],
    )
    def test_question(self, tmp_path, change, reason):
        rows = [QUESTION | {"qid": "q0"}, QUESTION | change]
        with pytest.raises(UserError, match=rf"^qa\.jsonl:2: .*{reason}"):
            read_timed_text(write(tmp_path, [EVENT], rows))

    def test_a_misspelt_query_time_does_not_open_the_future(self, tmp_path):
        row = {("queryTime" if key == "query_time" else key): v for key, v in QUESTION.items()}
        with pytest.raises(UserError, match='has no "query_time"'):
            read_timed_text(write(tmp_path, [EVENT], [row]))

    def test_not_utf8_names_the_line(self, tmp_path):
        write(tmp_path, [EVENT])
        (tmp_path / "events.jsonl").write_bytes(json.dumps(EVENT).encode() + b"\n\xff\xfe\n")
        with pytest.raises(UserError, match=r"^events\.jsonl:2: is not UTF-8"):
            read_timed_text(tmp_path)

    def test_all_are_counted_in_one_line(self, tmp_path):
        rows = [QUESTION | {"qid": str(n), "answer": 9} for n in range(6)]
        with pytest.raises(UserError) as caught:
            read_timed_text(write(tmp_path, [EVENT], rows))
        message = str(caught.value)
        assert message.startswith("qa.jsonl:1: answer 9")
        assert "and 5 more bad rows" in message
        assert "\n" not in message

    def test_skipping_logs_each_and_keeps_the_rest(self, tmp_path, caplog):
        rows = [QUESTION, QUESTION | {"qid": "q2", "answer": 9}]
        with caplog.at_level(logging.WARNING):
            data = read_timed_text(write(tmp_path, [EVENT, "{"], rows), skip_bad_rows=True)
        assert len(data.events) == len(data.questions) == 1
        assert "events.jsonl:2" in caplog.text
        assert "qa.jsonl:2" in caplog.text


def stream(videos, events_each=50):
    events = [
        Event(v, float(t), t + 1.0, "caption", f"{v} {t}")
        for v in videos
        for t in range(events_each)
    ]
    questions = [
        Question(f"{v}{t}", v, "?", ("a", "b"), 0, None if t == 0 else float(t), (), "x")
        for v in videos
        for t in range(events_each)
    ]
    return TimedText(tuple(events), tuple(questions))


class TestSplit:
    @pytest.mark.parametrize("videos", [["a"], ["a", "b"], list("abc"), list("abcdefghij")])
    def test_every_row_is_in_one_split_and_no_split_is_empty(self, videos):
        data = stream(videos)
        parts = split_by_video_or_time(data)
        assert tuple(parts) == SPLITS
        assert all(part.events for part in parts.values())
        assert sorted(e.text for p in parts.values() for e in p.events) == sorted(
            e.text for e in data.events
        )
        assert sorted(q.qid for p in parts.values() for q in p.questions) == sorted(
            q.qid for q in data.questions
        )

    def test_by_video_shares_no_video_and_ignores_the_order_of_rows(self):
        data = stream([f"video{n}" for n in range(10)])
        parts = split_by_video_or_time(data)
        videos = [{e.video for e in parts[split].events} for split in SPLITS]
        assert [len(v) for v in videos] == [6, 2, 2]
        assert len(set.union(*videos)) == 10
        again = split_by_video_or_time(TimedText(data.events[::-1], data.questions))
        assert [{e.video for e in again[split].events} for split in SPLITS] == videos

    def test_by_time_goes_forward(self):
        parts = split_by_video_or_time(stream(["a"], events_each=100))
        ends = [[e.t1 for e in parts[split].events] for split in SPLITS]
        assert [len(e) for e in ends] == [60, 20, 20]
        assert max(ends[0]) < min(ends[1])
        assert max(ends[1]) < min(ends[2])
        for before, split in zip(ends, SPLITS[1:], strict=False):
            asked = [q.query_time for q in parts[split].questions if q.query_time is not None]
            assert min(asked) > max(before)  # the whole earlier split is a question's past
        assert [q.qid for q in parts["test"].questions if q.query_time is None] == ["a0"]
