"""Timed text as streams: causal order, evidence, segments and the loader, on a made-up life."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from mmmem_jax.data import stream_questions, text_streams
from mmmem_jax.data.encoded import QUESTION_FIELDS
from mmmem_jax.data.text_streams import FEATURES
from mmmem_jax.data.timed_text import Event, Question, TimedText
from mmmem_jax.errors import UserError

WIDTH, DIM = 24, 16
PEOPLE = ("Tasha", "Shure", "Lucia", "Alice")
THINGS = [f"{a}{b}ool" for a in "bcdfghjklm" for b in "aeiouyrl"]


def embed(texts):
    """Deterministic unit vectors of texts, and their words as tokens."""
    seeds = [int.from_bytes(hashlib.sha256(t.encode()).digest()[:4], "little") for t in texts]
    rows = np.array([np.random.default_rng(s).normal(size=WIDTH) for s in seeds], np.float32)
    rows = rows.reshape(-1, WIDTH)
    rows /= np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-6)
    return rows, np.array([len(t.split()) for t in texts], np.int32)


def life(video: str, seed: int, num_rows: int = 400) -> TimedText:
    rng = np.random.default_rng(seed)
    events = []
    for t in range(num_rows):
        person, thing = PEOPLE[rng.integers(4)], THINGS[rng.integers(len(THINGS))]
        told = f"{person} carried the {thing} past the {THINGS[t % 80]} quickly."
        text = told if rng.random() < 0.4 else f"{person} walked on."
        kind = "transcript" if rng.random() < 0.5 else "caption"
        events.append(Event(video, 5.0 * t, 5.0 * t + 4.0, kind, text))
    asked = Question(
        f"{video}_q", video, "Who?", ("a", "b", "c"), 1, 1000.0, ((500.0, 530.0),), "who"
    )
    return TimedText(tuple(events), (asked,))


@pytest.fixture(scope="module")
def streams():
    splits = ("train", "validation", "test")
    parts = [(f"v{i} {s}", f"v{i}", s, life(f"v{i}", i)) for i, s in enumerate(splits)]
    return text_streams.make_streams(parts, embed, wearer=None, num_questions=60, rng_seed=0)


def test_streams_hold_their_rows_and_questions(streams):
    for stream in streams:
        assert stream.embedding.shape == (400, WIDTH)
        assert stream.features.shape == (400, len(FEATURES))
        assert stream.made.questions
        assert stream.made.query.shape == (len(stream.made.questions), WIDTH)
        times = [q.query_time for q in stream.made.questions]
        assert times == sorted(times)
        assert len(stream.labelled.questions) == 1


def test_training_reads_no_option(streams):
    assert streams[0].made.options == ()
    assert [o.shape for o in streams[2].labelled.options] == [(3, WIDTH)]
    for question, options in zip(streams[1].made.questions, streams[1].made.options, strict=True):
        expected, _ = embed([f"{question.question} {o}" for o in question.options])
        np.testing.assert_array_equal(options, expected)


def test_evidence_rows_have_their_middle_in_a_window(streams):
    question = streams[0].labelled.questions[0]
    rows = text_streams.evidence_rows(streams[0].span, question)
    np.testing.assert_array_equal(rows, np.arange(100, 106))


def test_made_questions_rest_on_rows_that_ended_before(streams):
    encoded = text_streams.encode(text_streams.fit_space(streams[0].embedding, DIM), streams[0])
    for query_time, rows in zip(encoded.query_time, encoded.evidence, strict=True):
        assert (rows >= 0).any()
        assert encoded.span[rows[rows >= 0], 1].max() <= query_time


def test_labelled_questions_are_encoded_in_place_of_the_made_ones(streams):
    space = text_streams.fit_space(streams[0].embedding, DIM)
    (question,) = streams[0].labelled.questions
    encoded = text_streams.encode(space, streams[0], questions="labelled")
    np.testing.assert_array_equal(encoded.evidence, [[100, 101, 102, 103, 104, 105, -1, -1]])
    assert encoded.query_time.tolist() == [question.query_time]
    query = text_streams.project(space, streams[0].labelled.query)
    np.testing.assert_array_equal(encoded.query, query.astype(np.float16))
    made = text_streams.encode(space, streams[0])
    for name, ours in encoded._asdict().items():
        if name not in QUESTION_FIELDS:
            np.testing.assert_array_equal(ours, getattr(made, name))


@pytest.mark.parametrize(
    ("query_time", "rows", "asked_at"),
    [(None, 6, 1999.0), (514.0, 3, 514.0), (100.0, 0, 100.0)],  # row t ends at 5 t + 4
)
def test_evidence_of_a_labelled_question_had_ended(streams, query_time, rows, asked_at):
    asked = streams[0].labelled
    changed = replace(asked.questions[0], query_time=query_time)
    stream = streams[0]._replace(labelled=asked._replace(questions=(changed,)))
    space = text_streams.fit_space(stream.embedding, DIM)
    encoded = text_streams.encode(space, stream, questions="labelled")
    assert (encoded.evidence >= 0).sum() == rows
    assert encoded.question_valid.tolist() == [rows > 0]
    assert encoded.query_time.tolist() == [asked_at]


def test_space_keeps_most_variance_and_is_reproducible(streams):
    x = streams[0].embedding
    space = text_streams.fit_space(x, DIM)
    np.testing.assert_allclose(space.basis.T @ space.basis, np.eye(DIM), atol=1e-5)
    np.testing.assert_array_equal(space.basis, text_streams.fit_space(x.copy(), DIM).basis)
    projected = text_streams.project(space, x)
    np.testing.assert_allclose(np.linalg.norm(projected, axis=-1), 1.0, atol=1e-5)
    kept = np.var((x - space.mean) @ space.basis, axis=0).sum()
    best = np.linalg.svd(x - x.mean(0), compute_uv=False)[:DIM] ** 2 / len(x)
    np.testing.assert_allclose(kept, best.sum(), rtol=1e-4)


@pytest.mark.parametrize("dim", [len(FEATURES) - 1, WIDTH + 1])
def test_a_dim_that_cannot_be_is_refused(streams, dim):
    with pytest.raises(UserError, match=f"config.dim = {dim}"):
        text_streams.fit_space(streams[0].embedding, dim)


def test_an_empty_split_is_refused():
    parts = [("v", "v", "train", life("v", 0, 20))]
    with pytest.raises(UserError, match="validation split has no rows"):
        text_streams.make_streams(parts, embed, wearer=None, num_questions=1, rng_seed=0)


@pytest.mark.parametrize("start", [0, 137, 380])
def test_a_segment_keeps_rows_and_evidence_together(streams, start):
    encoded = text_streams.encode(text_streams.fit_space(streams[0].embedding, DIM), streams[0])
    rng = np.random.default_rng(0)
    cut = text_streams.cut_segment(encoded, start, 64, 200, rng)
    held = min(64, 400 - start)
    assert cut.valid.sum() == held
    assert cut.span[0, 0] == 0.0
    np.testing.assert_array_equal(cut.text[:held], encoded.text[start : start + held])
    assert not cut.text[held:].any()
    rows = (encoded.evidence >= start) & (encoded.evidence < start + 64)
    assert cut.question_valid.sum() == rows.any(1).sum()
    expected = sorted(
        tuple(r[m] - start) for r, m in zip(encoded.evidence, rows, strict=True) if m.any()
    )
    got = sorted(tuple(r[r >= 0]) for r in cut.evidence[cut.question_valid])
    assert got == expected


def test_the_loader_resumes_where_it_was(streams):
    encoded = [text_streams.encode(text_streams.fit_space(streams[0].embedding, DIM), streams[0])]
    options = {"seed": 3, "batch_size": 2, "num_rows": 32, "num_questions": 5}
    loader = text_streams.make_loader(encoded, **options)
    next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    expected = [next(loader) for _ in range(3)]
    again = text_streams.make_loader(encoded, **options)
    again.set_state(state)
    for batch in expected:
        for ours, theirs in zip(next(again), batch, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert expected[0].text.shape == (2, 32, DIM)


def test_a_video_shorter_than_a_segment_is_padded(streams):
    short = text_streams.encode(text_streams.fit_space(streams[0].embedding, DIM), streams[0])
    cut = text_streams.cut_segment(short, 390, 64, 4, np.random.default_rng(0))
    loader = text_streams.make_loader([cut], seed=0, batch_size=1, num_rows=128, num_questions=4)
    assert next(loader).valid.sum() == 10


def test_real_days_become_streams(egolife_dir):
    parts = text_streams.read_egolife_parts(egolife_dir)
    assert [(name, split) for name, _, split, _ in parts] == [
        ("A1_JAKE day 1", "train"),
        ("A1_JAKE day 2", "train"),
        ("A1_JAKE day 3", "validation"),
        ("A1_JAKE day 4", "test"),
    ]
    assert sum(len(data.questions) for *_, data in parts) == 330


def write_egolife(folder, persons):
    for person in persons:
        for day in range(1, 5):
            path = folder / f"EgoLifeCap/Sync/{person}_DAY{day}_10000000.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"start": 100000, "end": 100002, "text": "Mo sat.", "type": "caption"}]
            path.write_text(json.dumps([{"video_file": "x.mp4", "data": rows}]))
    (folder / "EgoLifeQA").mkdir()
    (folder / "EgoLifeQA" / f"EgoLifeQA_{persons[0]}.json").write_text("[]")
    return folder


def test_days_of_several_persons_are_refused(tmp_path):
    assert len(text_streams.read_egolife_parts(write_egolife(tmp_path / "1", ["A2_ALICE"]))) == 4
    with pytest.raises(UserError, match="holds A1_JAKE, A2_ALICE; keep one person's files"):
        text_streams.read_egolife_parts(write_egolife(tmp_path / "2", ["A1_JAKE", "A2_ALICE"]))


def test_a_question_of_a_video_that_is_silent_is_told_of(tmp_path, caplog):
    times = {"loud": [*range(0, 100, 5)], "gap": [*range(0, 55, 5), *range(85, 100, 5)]}
    events = [{"video": v, "t0": t, "t1": t + 1, "kind": "caption", "text": "Mo sat."}
              for v, starts in times.items() for t in starts]  # fmt: skip
    asked = [{"qid": f"{v} {t}", "video": v, "question": "?", "options": ["a", "b"], "answer": 0,
              "query_time": t, "evidence": None, "type": "x"}
             for v in times for t in (50, 70, 72, 90)]  # fmt: skip
    for name, rows in (("events", events), ("qa", asked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = text_streams.read_timed_text_parts(tmp_path)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["left out 2 question(s) of gap, without rows in the validation split"]
    assert sum(len(data.questions) for *_, data in parts) == len(asked) - 2


def test_features_are_plain_counts_of_the_row():
    events = [
        *life("v", 0).events,
        Event("v", 2e3, 2e3 + 1, "transcript", "Tasha: bool met Shure."),
    ]
    statistics = stream_questions.stream_statistics(events)
    raw = text_streams.row_features(events[-1:], statistics)[0]
    raw = dict(
        zip(FEATURES, raw * text_streams.FEATURE_SCALE + text_streams.FEATURE_CENTRE, strict=True)
    )
    idf = np.log(len(events) / 2)  # a word never met counts as one met twice
    assert raw["idf_max"] == pytest.approx(idf, rel=1e-5)
    assert raw["idf_sum"] == pytest.approx(2 * idf, rel=1e-5)
    counts = {"words": 3, "content_words": 2, "names": 1, "known_speaker": 1}
    assert {name: raw[name] for name in counts} == pytest.approx(counts, abs=1e-5)
    assert raw["speaker"] == pytest.approx(1)
    assert raw["spoken"] == pytest.approx(1)


def test_a_stream_can_be_cut_to_its_first_rows():
    parts = [(f"v {s}", "v", s, life("v", 0)) for s in ("train", "validation", "test")]
    options = {"wearer": None, "num_questions": 30, "rng_seed": 0}
    stream = text_streams.make_streams(parts, embed, max_rows=200, **options)[0]
    np.testing.assert_array_equal(stream.span[:, 0], 5.0 * np.arange(200))
    assert max(q.query_time for q in stream.made.questions) <= stream.span[-1, 1]
