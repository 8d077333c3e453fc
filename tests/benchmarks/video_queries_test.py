"""Tests of benchmarks/video_queries.py and of the files it reads."""

import json
from collections import Counter

import pytest

from benchmarks import video_queries
from mmmem_jax.errors import UserError

MOMENT = {
    "qid": "a", "video": "vtest", "query": "a van", "windows": [[1, 2], [3, 4]],
    "split": "test", "checked": "it is there",
}  # fmt: skip
CHOICE = {
    "qid": "a", "video": "vtest", "question": "which?", "options": ["a", "b", "c", "d"],
    "answer": 0, "windows": [[1, 2]], "split": "test",
}  # fmt: skip
ABSENT = {"qid": "a", "query": "a yeti", "absent": True, "split": "test"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_there_are_enough_queries_of_each_kind():
    sizes = {
        read.__name__: [len(read(split)) for split in ("test", "validation")]
        for read in (
            video_queries.read_moments,
            video_queries.read_choices,
            video_queries.read_absent,
        )
    }
    least = {"read_moments": (40, 15), "read_choices": (24, 8), "read_absent": (12, 8)}
    for name, (test, validation) in least.items():
        assert sizes[name][0] >= test, name
        assert sizes[name][1] >= validation, name


def test_no_video_and_no_query_is_in_both_splits():
    rows = [*video_queries.read_moments(), *video_queries.read_choices()]
    splits = {(row.video, row.split) for row in rows}
    assert len(splits) == len({video for video, _ in splits})
    queries = [row.query for row in video_queries.read_moments() + video_queries.read_absent()]
    assert len(queries) == len({query.lower() for query in queries})


def test_every_video_of_the_table_is_asked_about():
    asked = {row.video for row in video_queries.read_moments()}
    assert asked == video_queries.read_seconds().keys() == video_queries.read_files().keys()


def test_no_place_of_the_right_option_pays():
    for split in video_queries.SPLITS:
        rows = video_queries.read_choices(split)
        places = Counter(row.answer for row in rows)
        assert max(places.values()) - min(places.values()) <= 1
        assert len(places) == video_queries.NUM_OPTIONS


def test_a_split_is_its_rows_in_their_order(tmp_path):
    rows = [MOMENT | {"qid": str(i), "split": video_queries.SPLITS[i % 2]} for i in range(4)]
    path = write(tmp_path / "moments.jsonl", *rows)
    assert [row.qid for row in video_queries.read_moments(path=path)] == ["0", "1", "2", "3"]
    assert [row.qid for row in video_queries.read_moments("test", path)] == ["1", "3"]
    assert video_queries.read_moments("test", path)[0].windows == ((1.0, 2.0), (3.0, 4.0))
    with pytest.raises(UserError, match="no split 'train'"):
        video_queries.read_moments("train", path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"windows": []}, "windows must be"),
        ({"windows": [[2, 1]]}, "windows must be"),
        ({"windows": [[1, 1]]}, "windows must be"),
        ({"windows": [[3, 4], [1, 2]]}, "windows must be"),
        ({"windows": [[1, 3], [2, 4]]}, "windows must be"),
        ({"windows": [[-1, 2]]}, "windows must be"),
        ({"windows": [[1, 1e6]]}, "windows must be"),
        ({"windows": [[1]]}, "unpack"),
        ({"windows": 3}, "iterable"),
        ({"video": "nope"}, "no video 'nope'"),
        ({"split": "train"}, "split must be"),
        ({"query": " "}, "a text is empty"),
        ({"more": 1}, "the fields must be"),
    ],
)
def test_bad_moments_are_refused_with_their_line(tmp_path, change, reason):
    path = write(tmp_path / "moments.jsonl", MOMENT, MOMENT | {"qid": "b"} | change)
    with pytest.raises(UserError, match=rf"moments.jsonl:2: .*{reason}"):
        video_queries.read_moments(path=path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"options": ["a", "b", "c"]}, "4 different options"),
        ({"options": ["a", "b", "c", "c"]}, "4 different options"),
        ({"answer": 4}, "answer must be"),
        ({"answer": "a"}, "answer must be"),
    ],
)
def test_bad_choices_are_refused(tmp_path, change, reason):
    path = write(tmp_path / "choices.jsonl", CHOICE | change)
    with pytest.raises(UserError, match=rf"choices.jsonl:1: .*{reason}"):
        video_queries.read_choices(path=path)


def test_a_qid_is_used_once(tmp_path):
    path = write(tmp_path / "absent.jsonl", ABSENT, ABSENT)
    with pytest.raises(UserError, match=r"absent.jsonl:2: qid a is there twice"):
        video_queries.read_absent(path=path)


@pytest.mark.parametrize("line", ["[]", "{", "3", json.dumps(ABSENT | {"absent": False})])
def test_other_json_is_refused(tmp_path, line):
    path = tmp_path / "absent.jsonl"
    path.write_text(line + "\n", "utf-8")
    with pytest.raises(UserError, match=r"absent.jsonl:1: "):
        video_queries.read_absent(path=path)


def test_coverage_is_a_share_of_the_video():
    assert video_queries.coverage(((0.0, 10.0),), 10.0) == 1.0
    assert video_queries.coverage(((0.0, 1.0), (5.0, 6.5)), 10.0) == 0.25
