"""Tests of the page that `mmmem report` writes: its text, and how it works in a browser."""

import base64
import functools
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mmmem_jax import memory, store
from mmmem_jax.errors import UserError
from mmmem_jax.memory import ADD_NEW, DISCARD, MERGE
from mmmem_jax.store import ClipRecord
from mmmem_jax.video import report
from mmmem_jax.video.report import EntityView, EpisodeView, RelationView, VideoView
from mmmem_jax.video.report.graph import spring_layout
from mmmem_jax.video.report.page import MAX_PAGE_BYTES, MAX_PICTURES
from mmmem_jax.video.report.pictures import small_jpeg
from mmmem_jax.video.report.text import fair

HOSTILE = "</script></title>'\"><img src=x onerror=alert(1)>&amp;{{ 7*7 }}<!-- \udcff"
NAMES = "person dog bicycle car bench tree ball umbrella bird handbag".split()


def _item(index, dim=8):
    rng = np.random.default_rng(index)
    unit = np.eye(dim, dtype=np.float32)
    return store.rounded(
        memory.Item(
            visual=rng.normal(size=dim).astype(np.float32),
            coarse=rng.normal(size=dim).astype(np.float32),
            text=rng.normal(size=dim).astype(np.float32),
            span=np.array([10 * index, 10 * index + 10], np.float32),
            tokens=np.int32(7),
            mention=unit[[index % dim, (index + 1) % dim]],
            mention_valid=np.ones(2, bool),
            change=np.float32(0.5),
            relation=np.int32(0),
            trace_id=np.int32(index),
            valid=np.bool_(True),
        )
    )


ITEM = _item(0)  # what the page has no use for, but that it is there


@functools.cache
def _jpeg(index, size=(256, 144)):
    """A picture of its own for each index: a gradient with a disc."""
    y, x = np.mgrid[: size[1], : size[0]]
    image = np.stack([(x + 37 * index) % 256, (2 * y + 11 * index) % 256, (x + y) // 2], -1)
    image[(x - 30 - 12 * (index % 16)) ** 2 + (y - 70) ** 2 < 900] = (240, 235, 200)
    out = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


def _clip(index, node_id=0, text="", **changes):
    t = 10.0 * index
    named = [index % 8, (index + 1) % 8]
    record = ClipRecord(
        index=index,
        span=(t, t + 10),
        caption=text or f"A {NAMES[named[0]]} and a {NAMES[named[1]]}; much moves.",
        subtitles=text,
        labels=((text or NAMES[named[0]], 0.61), (NAMES[named[1]], 0.2)),
        frames=((t + 1, _jpeg(index % 40)), (t + 8, _jpeg(index % 40 + 1))),
        action=MERGE if index % 4 else ADD_NEW,
        strength=1.0,
        node_id=node_id,
        item=ITEM,
        entities=tuple((slot, text or NAMES[slot]) for slot in named),
    )
    return record._replace(**changes)


def _lost(index, node_id=-1):
    empty = {"caption": "", "subtitles": "", "labels": (), "frames": (), "entities": ()}
    return _clip(index, node_id, item=None, action=DISCARD, **empty)


def _view(video_id="walk", num_clips=24, text=""):
    clips = [_lost(i) if i % 7 == 3 else _clip(i, i // 4, text) for i in range(num_clips)]
    nodes = range((num_clips + 3) // 4)
    return VideoView(
        video_id=video_id,
        source=text or f"{video_id}.mp4",
        clips=clips,
        episodes=[EpisodeView(n, (40.0 * n, 40.0 * n + 40), 4, 30 + 7 * n) for n in nodes],
        entities=[
            EntityView(
                slot=slot,
                name=text or NAMES[slot],
                span=(
                    10.0 * (slot - 1) if slot else 0.0,
                    10.0 * max(num_clips - 3 * slot, slot + 1),
                ),
                mentions=20 - 2 * slot,
                episodes=tuple(nodes)[: 1 + slot % 4],
            )
            for slot in range(8)
        ],
        relations=[RelationView(slot, "seen with", (slot + 1) % 8) for slot in range(8)],
        sensory=frozenset(range(4, num_clips)),
    )


def _question(text="", video="walk"):
    def evidence(level, t0, t1, score):
        told = text or f"A {NAMES[int(t0) % 7]} on the path."
        return {"level": level, "video": video, "span": [t0, t1], "text": told, "score": score}

    steps = [
        {"level": "schema", "tokens": 12, "answer_entropy": 1.31,
         "slots": [evidence("schema", 0, 200, 0.41), evidence("schema", 10, 120, 0.38)]},
        {"level": "episodic", "tokens": 61, "answer_entropy": 0.92,
         "slots": [evidence("episodic", 40, 80, 0.52)]},
        {"level": "sensory", "tokens": 90, "answer_entropy": 0.51,
         "slots": [evidence("sensory", 50, 60, 0.58)]},
    ]  # fmt: skip
    return {
        "question": text or "Who walks the dog past the bench?",
        "options": [text or "a child", "a woman in red", "two men", "nobody"],
        "probabilities": [0.08, 0.81, 0.06, 0.05],
        "at": 230.0,
        "text": text or "a woman in red",
        "found": True,
        "gamma": 0.72,
        "stop_level": "sensory",
        "trace": steps,
        "moments": [evidence("sensory", 50, 60, 0.58)],
    }


UNKNOWN = {"question": "What does the elephant say?", "found": False, "text": ""}


class _Page(HTMLParser):
    """Every tag with its attributes, and the text of the page outside style and script."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self._inside = [], "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "use":  # a picture in an item of the time line marks that
            last = next((a for _, a in reversed(self.tags) if a.get("class") == "item"), {})
            last["pictured"] = True
        if tag in ("style", "script"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.text += data

    def named(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]

    def classed(self, name):
        return [a for _, a in self.tags if name in (a.get("class") or "").split()]


@pytest.fixture(scope="module")
def two_videos():
    """A page of two videos and two questions, as text."""
    return report.page([_view(), _view("park", 9)], [_question(), UNKNOWN])


class TestPage:
    def test_shows_what_the_memory_holds(self, two_videos):
        page = _Page(two_videos)
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids))
        kept = [c.index for c in _view().clips if c.item is not None]
        expected = {f"v0-c{i}" for i in kept} | {f"v0-e{n}" for n in range(6)}
        expected |= {f"v0-n{s}" for s in range(8)}
        assert {i for i in ids if re.fullmatch("v0-[cen][0-9]+", i)} == expected
        assert len(page.classed("item")) == len(expected) + 8 + 8 + 3 + 8 + 8  # and of the other
        for text in ("walk.mp4", "park.mp4", "30 tokens", "Who walks the dog", "Not found in"):
            assert text in page.text
        assert "Not held: 3 clips discarded, 0 clips forgotten" in page.text

    def test_an_episode_tells_what_was_written_of_it_last_and_a_clip_what_failed(self):
        traces = [f"{HOSTILE} until clip {i}" for i in range(4)]
        clips = [_clip(i, trace=trace) for i, trace in enumerate(traces)]
        clips[2] = clips[2]._replace(failed=("caption", "trace"))
        page = _Page(report.page([_view()._replace(clips=clips)], []))
        shown = [trace.replace("\udcff", "?") in page.text for trace in traces]
        assert shown == [False, False, False, True]
        assert page.text.count("(failed: caption, trace)") == 1

    def test_every_link_and_picture_is_on_the_page(self, two_videos):
        page = _Page(two_videos)
        ids = {a["id"] for _, a in page.tags if "id" in a}
        links = [a["href"] for tag, a in page.tags if tag in ("a", "use")]
        assert links
        assert {link.removeprefix("#") for link in links} <= ids

    def test_needs_nothing_else(self, two_videos):
        page = _Page(two_videos)
        for tag, attrs in page.tags:
            for name in {"src", "href", "srcset", "action", "data"} & attrs.keys():
                assert attrs[name].startswith(("#", "data:")), (tag, attrs)
        assert not re.search(r"https?:|@import|url\(", two_videos)

    def test_the_policy_lets_only_its_own_sheet_and_script_work(self, two_videos):
        page = _Page(two_videos)
        (policy,) = [a["content"] for a in page.named("meta") if "http-equiv" in a]
        assert policy.startswith("default-src 'none'; img-src data:;")
        assert "unsafe" not in policy
        for tag in ("style", "script"):
            (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", two_videos, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
        assert not any(n == "style" or n.startswith("on") for _, a in page.tags for n in a)

    def test_headings_do_not_skip_a_level(self, two_videos):
        levels = [int(tag[1]) for tag, _ in _Page(two_videos).tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))

    def test_whatever_can_be_selected_has_a_name_and_a_row(self, two_videos):
        page = _Page(two_videos)
        rows = {a.get("id") for a in page.named("tr")}
        names = re.findall(r'<g class="item"[^>]*><title>([^<]+)</title>', two_videos)
        assert len(names) == len(page.classed("item"))
        for item in page.classed("item"):
            assert (item["tabindex"], item["role"]) == ("0", "button")
            assert item.get("data-row", f"{item.get('id')}-row") in rows

    def test_text_of_a_video_is_text_of_the_page(self):
        plain = _Page(report.page([_view()], [_question()]))
        page = _Page(report.page([_view(text=HOSTILE)], [_question(HOSTILE)]))
        assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
        assert [set(a) for _, a in page.tags] == [set(a) for _, a in plain.tags]
        shown = HOSTILE.replace("\udcff", "?")
        assert page.text.count(shown) > 60

    @pytest.mark.parametrize(
        "row",
        [
            {},
            {"trace": 3, "options": "ab", "probabilities": [None, "x"], "moments": [1, {}]},
            {"question": ["q"], "text": {"a": 1}, "gamma": True, "at": "now", "stop_level": [1]},
            {"trace": [{"level": 7, "slots": [{"span": [1], "video": {}}], "answer_entropy": "h"}]},
            {"options": ["a"], "probabilities": [float("nan")], "gamma": 10**400},
            {"trace": [{"answer_entropy": 1}], "gamma": 0, "stopped_by": ["end"]},
        ],
    )
    def test_a_question_of_another_form_is_no_error(self, row):
        assert "<article" in report.page([_view()], [row])

    def test_says_where_the_search_stopped_and_why(self):
        page = _Page(report.page([_view()], [_question()])).text
        assert "after step 3, at the sensory level: the answer entropy 0.510 is at most" in page
        page = _Page(report.page([_view()], [_question() | {"gamma": 0.5}])).text
        assert "which is still over gamma, 0.500" in page
        page = _Page(report.page([_view()], [_question() | {"gamma": 0.5, "stopped_by": "end"}]))
        assert "after step 3, at the sensory level: there was nothing more to read; " in page.text
        page = _Page(report.page([_view()], [_question() | {"gamma": -1, "stopped_by": "end"}]))
        assert "nothing more to read; there was one moment at most" in page.text
        assert "at most gamma" not in page.text
        assert "over gamma" not in page.text
        assert "upright mark" not in page.text

    def test_an_empty_memory(self):
        page = _Page(report.page([]))
        assert "holds no video" in page.text
        assert "Nothing was asked" in page.text
        page = _Page(report.page([VideoView("new", "new.mp4", [])]))
        assert "Nothing is remembered of it yet." in page.text
        assert not page.classed("item")
        page = _Page(report.page([_view()._replace(episodes=(), entities=(), relations=())]))
        assert "no episodes" in page.text
        assert "No entity is held." in page.text

    def test_a_video_without_questions_or_frames(self):
        clips = [c._replace(frames=()) for c in _view().clips]
        page = _Page(report.page([_view()._replace(clips=clips)]))
        assert page.classed("item")
        assert not page.named("use")
        assert not page.named("image")

    @pytest.mark.parametrize("num_videos", [1, 30])
    def test_a_page_is_bounded(self, num_videos):
        """However long and many videos are, and whatever a picture weighs."""
        rng = np.random.default_rng(0)
        noise = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (240, 320, 3), np.uint8)).save(noise, "JPEG")
        noise, long, num = noise.getvalue(), "&" * 5000, 3000 // num_videos
        clips = [
            _clip(i, i, long)._replace(frames=((10.0 * i, noise),), entities=((i % 64, long),) * 9)
            for i in range(num)
        ]
        view = VideoView(
            "long",
            long,
            clips,
            [EpisodeView(i, (10.0 * i, 10.0 * i + 10), 1, 5) for i in range(num)],
            [
                EntityView(i, long, (0.0, 10.0 * num), 9, tuple(range(num)))
                for i in range(min(num, 512))
            ],
            [RelationView(i % 64, "seen with", (i * 7) % 64) for i in range(512)],
            frozenset(range(num)),
        )
        text = report.page([view] * num_videos, [_question(long, "long")] * 60)
        assert len(text.encode()) <= MAX_PAGE_BYTES
        page = _Page(text)
        assert 10 < len(page.named("image")) <= MAX_PICTURES
        assert "evenly chosen" in page.text
        assert re.search(r"The newest \d+ of 60\.", page.text)
        assert re.search(rf"{num:,} clips, \d+ drawn", page.text)

    def test_pictures_are_chosen_evenly_and_those_of_answers_first(self):
        view = _view(num_clips=900)
        page = _Page(report.page([view], [_question() | {"trace": []}]))
        assert "Key frame at 0:51" in [a["aria-label"] for a in page.classed("frame")]
        assert MAX_PICTURES - 2 <= len(page.named("image")) <= MAX_PICTURES
        pictured = [
            float(item["data-time"])
            for item in page.classed("item")
            if item.get("id", "").startswith("v0-c") and item.get("pictured")
        ]
        assert pictured[0] == 0
        assert pictured[-1] > 8900
        assert max(np.diff(pictured)) < 100

    def test_a_picture_that_cannot_be_read_is_counted(self):
        clips = [c._replace(frames=((c.span[0], b"no jpeg"),) * 2) for c in _view().clips[:2]]
        page = _Page(report.page([_view()._replace(clips=clips)]))
        assert not page.named("image")
        assert "4 could not be read" in page.text


def test_small_jpeg_bounds_size_and_bytes(tmp_path):
    data, width, height = small_jpeg(_jpeg(0, (1280, 720)))
    assert (width, height) == (160, 90)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (160, 90)
    path = tmp_path / "frame.jpg"
    path.write_bytes(_jpeg(0, (20, 400)))
    assert small_jpeg(path)[2] == 120
    assert small_jpeg(tmp_path / "gone.jpg") is None
    assert small_jpeg(path.read_bytes()[:300]) is None


@pytest.mark.parametrize("num_nodes", [0, 1, 2, 30])
def test_the_layout_keeps_nodes_apart_and_friends_together(num_nodes):
    half = num_nodes // 2
    ring = [(i, (i + 1) % half) for i in range(half)] if half > 1 else []
    edges = np.array(ring + [(a + half, b + half) for a, b in ring], int).reshape(-1, 2)
    at = spring_layout(num_nodes, edges)
    assert at.shape == (num_nodes, 2)
    np.testing.assert_array_equal(at, spring_layout(num_nodes, edges))
    assert ((at >= 0) & (at <= 1)).all()
    apart = np.linalg.norm(at[:, None] - at[None], axis=-1)
    assert (apart[~np.eye(num_nodes, dtype=bool)] > 0.02).all()
    if num_nodes > 2:
        joined = apart[edges[:, 0], edges[:, 1]]
        assert joined.mean() < 0.6 * apart[~np.eye(num_nodes, dtype=bool)].mean()


@pytest.fixture(scope="module")
def memory_dir(tmp_path_factory):
    """A memory folder with one video of six clips, of which one is discarded."""
    folder = tmp_path_factory.mktemp("memory")
    config = memory.MemoryConfig(
        sensory_slots=4, episodic_slots=4, schema_slots=8, num_relations=8, dim=8
    )
    header = {"source": "a <walk>.mp4"}
    with store.create(folder, "walk", header, config) as video:
        state = store.load_state(video)
        for i in range(6):
            action = DISCARD if i == 3 else MERGE if i % 2 else ADD_NEW
            item = _item(i)
            state = store.advance(state, item, action, 1.0 + i)
            node = store.node_of(state, i)
            kept = _clip(i, node, action=action, item=item, strength=1.0 + i)
            lost = _lost(i)._replace(strength=1.0 + i)
            store.append(video, lost if action == DISCARD else kept, state)
        store.finish(video, state)
    store.append_question(folder, {"question": "Where is the <dog>?", "found": False})
    return folder


class TestWriteReport:
    def test_shows_what_is_stored(self, memory_dir, tmp_path):
        out = report.write_report(memory_dir, tmp_path / "page.html")
        page = _Page(out.read_text())
        items = {a["id"] for a in page.classed("item") if "id" in a}
        assert {f"v0-c{i}" for i in (0, 1, 2, 4, 5)} <= items
        assert "v0-c3" not in items
        assert {"v0-e0", "v0-e1", "v0-e2"} <= items
        for text in ("a <walk>.mp4", "Where is the <dog>?", "person", "1 clip discarded"):
            assert text in page.text
        assert len(page.named("image")) == 10
        assert page.text.count("held verbatim") == 4  # of five: the buffer has four slots
        names = {name for name in NAMES if f"<title>Entity {name}," in out.read_text()}
        assert names == set(NAMES[:7])

    def test_a_folder_without_videos(self, tmp_path):
        out = report.write_report(tmp_path, tmp_path / "page.html")
        assert "holds no video" in out.read_text()

    def test_what_cannot_be_read_or_written_is_one_line(self, memory_dir, tmp_path):
        with pytest.raises(UserError, match="is no memory folder"):
            report.write_report(tmp_path / "gone", tmp_path / "page.html")
        with pytest.raises(UserError, match="cannot write"):
            report.write_report(memory_dir, tmp_path / "gone" / "page.html")


@pytest.mark.parametrize("counts", [(), (5,), (1, 2, 90), (0, 50, 50), (7,) * 13])
@pytest.mark.parametrize("most", [13, 40, 150])
def test_videos_share_the_room_fairly(counts, most):
    share = fair(counts, most)
    drawn = [min(count, share) for count in counts]
    assert sum(drawn) <= most
    assert drawn == list(counts) or most - sum(drawn) < len(counts)
