"""Subtitles: what is written comes back, sorted; broken files are refused in one line."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mmmem_jax.errors import UserError
from mmmem_jax.perception.subtitles import Cue, find_subtitles, overlapping, read_subtitles
from mmmem_jax.testing.videos import srt

same_folder = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
words = st.text("abcdefghij ,.äß世", min_size=1, max_size=20).filter(lambda t: t.strip())
# Starts differ and texts do not repeat, so that the order is known and nothing rolls.
captions = st.lists(
    st.tuples(st.integers(0, 10**8), st.integers(1, 10**5), words),
    min_size=1, max_size=8, unique_by=(lambda c: c[0], lambda c: " ".join(c[2].split())),
)  # fmt: skip


def cues_of(rows):
    return [Cue(t / 1000, (t + d) / 1000, " ".join(text.split())) for t, d, text in rows]


@same_folder
@given(rows=captions, encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_reads_back_what_was_written_sorted_by_start(tmp_path, rows, encoding):
    path = tmp_path / "a.srt"
    path.write_text(srt([(t / 1000, (t + d) / 1000, text) for t, d, text in rows]), encoding)
    assert read_subtitles(path) == tuple(sorted(cues_of(rows)))


def test_falls_back_to_windows_1252(tmp_path):
    path = tmp_path / "a.srt"
    path.write_bytes(srt([(0, 1, "Café – naïve")]).encode("cp1252"))
    assert read_subtitles(path) == (Cue(0.0, 1.0, "Café – naïve"),)


def test_vtt_with_notes_settings_tags_and_escapes(tmp_path):
    path = tmp_path / "a.vtt"
    path.write_text(
        "WEBVTT - title\n\nNOTE nothing\nto see\n\nSTYLE\n::cue { color: red }\n\n"
        "intro\n00:01.000 --> 00:02.500 align:start position:0%\n"
        "<v Ann>Fish &amp; <c.loud>chips</c><00:01.500>\n{\\an8}today\n\n"
        "01:00:00.000 --> 01:00:01.000\n<i></i>\n"
    )
    assert read_subtitles(path) == (Cue(1.0, 2.5, "Fish & chips today"),)


def test_tells_rolling_captions_once(tmp_path):
    path = tmp_path / "a.srt"
    rows = [(0, 2, "one"), (2, 2.01, "one"), (2.01, 4, "one\ntwo"), (4, 6, "two\nthree"),
            (9, 10, "three")]  # fmt: skip
    path.write_text(srt(rows))
    assert read_subtitles(path) == (
        Cue(0.0, 2.01, "one"), Cue(2.01, 4.0, "two"), Cue(4.0, 6.0, "three"),
        Cue(9.0, 10.0, "three"),  # said again, after a silence
    )  # fmt: skip


def test_takes_numbers_for_no_text_where_the_gap_is_missing(tmp_path):
    path = tmp_path / "a.srt"
    path.write_text("1\n00:00:00,000 --> 00:00:01,000\none\n2\n00:00:01,000 --> 00:00:02,000\ntwo")
    assert [cue.text for cue in read_subtitles(path)] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.srt", b"", "holds no captions"),
        ("a.srt", b"\xff\xfe\x00", "holds no captions"),
        ("a.srt", b"00:00:01,000 --> 00:00:02,000\n\x00\n", "NUL"),
        ("a.srt", b"1\n00:00:01,000 --> soon\nHello\n", "a.srt:2: "),
        ("a.srt", b"1\n-00:00:01,000 --> 00:00:02,000\nHello\n", "a.srt:2: "),
        ("a.srt", b"1\n00:00:03,000 --> 00:00:02,000\nHello\n", "from 3 s to 2 s cannot be"),
        ("a.srt", b"1\n00:00:03,000 --> 999999:00:02,000\nHello\n", "cannot be"),
        ("a.vtt", b"1\n00:00:01.000 --> 00:00:02.000\nHello\n", "WEBVTT"),
        ("a.txt", b"00:00:01,000 --> 00:00:02,000\nHello\n", ".srt or .vtt"),
    ],
)
def test_refuses_broken_files_in_one_line(tmp_path, name, text, reason):
    path = tmp_path / name
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        read_subtitles(path)
    assert reason in str(error.value)
    assert name in str(error.value)


def test_refuses_what_cannot_be_opened(tmp_path):
    (tmp_path / "folder.srt").mkdir()
    for name in ("absent.srt", "folder.srt"):
        with pytest.raises(UserError, match=name):
            read_subtitles(tmp_path / name)


GOOD = srt([(0, 1, "one"), (0.5, 2, "<b>two</b>"), (3, 4, "two\nthree")]).encode()


@same_folder
@given(
    st.sampled_from([".srt", ".vtt"]),
    st.one_of(
        st.binary(max_size=200),
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, len(GOOD)), st.binary(max_size=9)).map(
            lambda cut: GOOD[: cut[0]] + cut[2] + GOOD[cut[1] :]
        ),
    ),
)
@example(".vtt", b"WEBVTT\n-->")
def test_any_bytes_are_cues_or_a_user_error(tmp_path, suffix, data):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    try:
        cues = read_subtitles(path)
    except UserError:
        return
    assert list(cues) == sorted(cues, key=lambda cue: cue.t0)
    assert all(0 <= cue.t0 < cue.t1 and cue.text.strip() for cue in cues)


def test_finds_subtitles_beside_the_video(tmp_path):
    video = tmp_path / "my [1] film.mp4"
    assert find_subtitles(tmp_path / "nowhere" / "film.mp4") is None
    for name in ("other.srt", "my [1] film 2.srt", "my [1] film.txt", "my 1 film.en.srt"):
        (tmp_path / name).touch()
    assert find_subtitles(video) is None
    # Each of these comes before the one made before it.
    for name in ("my [1] film.en.vtt", "my [1] film.de.srt", "my [1] film.vtt", "my [1] film.srt"):
        (tmp_path / name).touch()
        assert find_subtitles(video) == tmp_path / name


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), max_size=10),
    st.integers(0, 60), st.integers(1, 20),
)  # fmt: skip
def test_overlapping_is_sharing_a_moment(rows, begin, length):
    cues = sorted(Cue(t, t + d, "x") for t, d in rows)
    shared = [
        cue
        for cue in cues
        if set(range(int(cue.t0), int(cue.t1))) & set(range(begin, begin + length))
    ]
    assert list(overlapping(cues, (begin, begin + length))) == shared
