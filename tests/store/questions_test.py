"""questions.jsonl: only whole lines count, and none that was reported is lost."""

import errno
import multiprocessing
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmmem_jax.errors import UserError
from mmmem_jax.store import append_question, questions, read_questions


def test_questions_come_back_in_order(tmp_path):
    assert read_questions(tmp_path) == []
    rows = [{"question": "Où?\n«x»", "spans": [[0.5, 2.0]]}, {"question": ""}, {}]
    for row in rows:
        append_question(tmp_path, row)
    assert read_questions(tmp_path) == rows


@pytest.mark.parametrize("half", [b'{"question": "wh', b"\xff" * 9000, b"{}"])
def test_half_a_line_is_left_out_and_then_replaced(half, tmp_path):
    append_question(tmp_path, {"n": 1})
    path = tmp_path / "questions.jsonl"
    path.write_bytes(path.read_bytes() + half)
    assert read_questions(tmp_path) == [{"n": 1}]
    append_question(tmp_path, {"n": 2})
    assert read_questions(tmp_path) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("line", [b"", b"[1]", b"{", b"\xff", b"7", b"[" * 10**5])
def test_bad_lines_are_named(line, tmp_path):
    append_question(tmp_path, {"n": 1})
    path = tmp_path / "questions.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    append_question(tmp_path, {"n": 3})
    with pytest.raises(UserError, match="questions.jsonl line 2 is no JSON object"):
        read_questions(tmp_path)


@given(data=st.binary())
def test_any_bytes_are_rows_or_an_error(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("q")
    (folder / "questions.jsonl").write_bytes(data)
    try:
        found = read_questions(folder)
    except UserError as error:
        found = str(error)
    if isinstance(found, str):
        assert "line" in found
    else:
        assert all(isinstance(row, dict) for row in found)


def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    append_question(tmp_path, {"n": 1})

    def half(file, data):
        file.write(data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(questions, "_write_all", half)
        with pytest.raises(UserError, match="No space left.*make room"):
            append_question(tmp_path, {"n": 2})
    assert (tmp_path / "questions.jsonl").read_text() == '{"n": 1}\n'


def test_link_out_of_the_folder_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/questions.jsonl").symlink_to(outside)
    for use in (lambda: append_question(tmp_path / "memory", {}),
                lambda: read_questions(tmp_path / "memory")):  # fmt: skip
        with pytest.raises(UserError, match="outside"):
            use()
    assert outside.read_text() == "precious"


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        append_question(tmp_path / "nowhere", {})


def _ask(folder, who):
    for number in range(20):
        append_question(folder, {"who": who, "number": number, "text": "x" * 5000})


def test_processes_do_not_mix_their_lines(tmp_path):
    context = multiprocessing.get_context("spawn")
    asking = [context.Process(target=_ask, args=(tmp_path, who)) for who in range(2)]
    for process in asking:
        process.start()
    for process in asking:
        process.join()
    rows = read_questions(tmp_path)
    assert sorted((row["who"], row["number"]) for row in rows) == [
        (who, number) for who in range(2) for number in range(20)
    ]
