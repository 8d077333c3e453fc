"""One video as its pyramid on a time line: what page.html.jinja draws, in percent of the line."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmmem_jax.memory import ADD_NEW, MERGE
from mmmem_jax.store import ClipRecord
from mmmem_jax.video.report.graph import draw_graph
from mmmem_jax.video.report.pictures import Pictures
from mmmem_jax.video.report.text import (
    DAY,
    HOUR,
    MAX_NAME,
    MAX_TEXT,
    MINUTE,
    clock,
    during,
    fair,
    sample,
    shorten,
)
from mmmem_jax.video.report.views import EntityView, EpisodeView, VideoView

MAX_CLIPS, MAX_EPISODES, MAX_ENTITIES = 600, 300, 400  # drawn, all videos together
MAX_ROWS = 30  # entities of one video, which may overlap in time
MAX_LINKS = 12  # from one item to others of a kind
MAX_MARKS = 1000  # of a time line, where clips are not held
NARROWEST = 0.2  # percent of the time line: some 2 pixels
TICK_STEPS = (
    *(1, 2, 5, 10, 15, 30),
    *(k * MINUTE for k in (1, 2, 5, 10, 15, 30)),
    *(k * HOUR for k in (1, 2, 3, 6, 12)),
    *(k * DAY for k in (1, 2, 7, 14, 28, 91, 365)),
)
ACTIONS = {ADD_NEW: "opened an episode", MERGE: "merged into an episode"}


def _packed(spans: Iterable[tuple[float, float]]) -> list[int]:
    """The first free row of each span, so that no two of a row overlap."""
    ends, rows = [], []
    for x0, x1 in spans:
        row = next((i for i, end in enumerate(ends) if end <= x0 + 0.05), len(ends))
        ends[row : row + 1] = [x1]
        rows.append(row)
    return rows


def _ticks(duration: float) -> list[dict]:
    """Ticks of the time axis while it fits the screen; the script draws those of a closer view."""
    step = next((s for s in TICK_STEPS if duration <= 8 * s), TICK_STEPS[-1])
    times = range(0, int(duration) + 1, step)[:9]
    return [{"x": round(100 * t / duration, 3), "label": clock(t)} for t in times]


def _marked(clips: Iterable[ClipRecord], duration: float, gap: float) -> list[dict]:
    """Where clips lie, as bars: x and width in percent. Those no further apart than `gap` join."""
    spans = []
    for t0, t1 in sorted(clip.span for clip in clips):
        if spans and t0 - spans[-1][1] <= gap:
            spans[-1][1] = max(t1, spans[-1][1])
        else:
            spans.append([t0, t1])
    scale = 100 / duration
    return [{"x": round(a * scale, 4), "width": round((b - a) * scale, 4)} for a, b in spans]


def _boxes(items: Sequence[dict], duration: float) -> list[dict]:
    """The items in order of time, each with its row, x and width in percent.

    `width` is at least NARROWEST, and then `true_width` is what the script makes it in a closer
    view.
    """
    items = sorted(items, key=lambda item: (item["span"], item["id"]))
    boxes = []
    for item, row in zip(items, _packed(item["span"] for item in items), strict=True):
        x0, x1 = (min(max(100 * t / duration, 0.0), 100.0) for t in item["span"])
        width = round(max(x1 - x0, 0.0), 5)
        box = {"row": row, "x": round(x0, 4), "width": max(width, NARROWEST)}
        boxes.append(item | box | {"true_width": width if width < NARROWEST else None})
    return boxes


class Drawn(NamedTuple):
    """One video, and the choice of its items that the page draws."""

    number: int
    view: VideoView
    kept: list[ClipRecord]
    clips: list[ClipRecord]  # of those kept
    episodes: dict[int, EpisodeView]
    entities: dict[int, EntityView]

    def clip_link(self, clip: ClipRecord) -> dict:
        return {"href": f"v{self.number}-c{clip.index}", "text": clock(clip.span[0])}

    def episode_link(self, node_id: int) -> dict:
        if node_id not in self.episodes:
            return {"href": None, "text": "not drawn, or no longer held"}
        return {"href": f"v{self.number}-e{node_id}", "text": during(self.episodes[node_id].span)}

    def entity_link(self, slot: int, name: str) -> dict:
        href = f"v{self.number}-n{slot}" if slot in self.entities else None
        return {"href": href, "text": shorten(name, MAX_NAME)}

    def mentions(self, clip: ClipRecord) -> set[int]:
        """Slots of the entities held that a clip mentions, not of an earlier one in its slot."""
        end = np.float32(clip.span[1])  # the precision of the memory's own times
        found = {slot for slot, _ in clip.entities} & self.entities.keys()
        return {slot for slot in found if end > np.float32(self.entities[slot].span[0])}


def choose(views: Sequence[VideoView], part: int) -> list[Drawn]:
    """An even choice of clips and episodes, the most mentioned entities: 1 / part of all room."""
    kept = [[c for c in view.clips if c.item is not None and c.node_id >= 0] for view in views]
    clips = fair([len(clips) for clips in kept], MAX_CLIPS // part)
    episodes = fair([len(view.episodes) for view in views], MAX_EPISODES // part)
    entities = fair([len(view.entities) for view in views], MAX_ENTITIES // part)
    return [
        Drawn(
            number,
            view,
            kept[number],
            sample(kept[number], clips),
            {e.node_id: e for e in sample(view.episodes, episodes)},
            {e.slot: e for e in _most_mentioned(view.entities, min(entities, MAX_ROWS))},
        )
        for number, view in enumerate(views)
    ]


def _most_mentioned(entities: Iterable[EntityView], most: int) -> list[EntityView]:
    return sorted(entities, key=lambda entity: (-entity.mentions, entity.slot))[:most]


def _sensory(drawn: Drawn, pictures: Pictures) -> list[dict]:
    """The clips kept: caption, subtitles, labels, key frame, what was done with them."""
    items = []
    for clip in drawn.clips:
        held = drawn.mentions(clip)
        items.append(
            {
                "id": f"v{drawn.number}-c{clip.index}",
                "title": f"Clip {clip.index}, {during(clip.span)}",
                "span": clip.span,
                "held": clip.index in drawn.view.sensory,
                "caption": shorten(clip.caption),
                "subtitles": shorten(clip.subtitles),
                "labels": [(shorten(name, MAX_NAME), float(p)) for name, p in clip.labels[:4]],
                "pictures": pictures.all(drawn.number, clip),
                "action": ACTIONS.get(clip.action, "kept"),
                "failed": [shorten(name, MAX_NAME) for name in clip.failed],
                "links": [drawn.episode_link(clip.node_id)],
                "entities": [
                    drawn.entity_link(slot if slot in held else -1, name)
                    for slot, name in dict.fromkeys(clip.entities[:MAX_LINKS])
                ],
            }
        )
    return items


def _episodic(drawn: Drawn, pictures: Pictures) -> list[dict]:
    """The episodes: what the manager wrote of them last, captions and key frames of their clips."""
    clips, grounded = defaultdict(list), defaultdict(list)
    for clip in drawn.clips:
        clips[clip.node_id].append(clip)
    for entity in drawn.entities.values():
        for node_id in entity.episodes:
            grounded[node_id].append(entity)
    return [
        {
            "id": f"v{drawn.number}-e{node_id}",
            "title": f"Episode {during(episode.span)}",
            "span": episode.span,
            "count": episode.count,
            "tokens": episode.tokens,
            "pictures": [
                t for c in sample(clips[node_id], 4) if (t := pictures.of(drawn.number, c))
            ],
            "captions": [
                *[shorten(c.trace) for c in clips[node_id] if c.trace][-1:],
                *[shorten(c.caption, MAX_TEXT // 2) for c in sample(clips[node_id], 3)],
            ],
            "links": [drawn.clip_link(c) for c in sample(clips[node_id], MAX_LINKS)],
            "entities": [drawn.entity_link(e.slot, e.name) for e in grounded[node_id][:MAX_LINKS]],
        }
        for node_id, episode in drawn.episodes.items()
    ]


def _schema(drawn: Drawn) -> list[dict]:
    """The entities: where they are grounded, whom they were seen with, what clips mention them."""
    clips, others = defaultdict(list), defaultdict(dict)
    for clip in drawn.clips:
        for slot in drawn.mentions(clip):
            clips[slot].append(clip)
    for relation in drawn.view.relations:
        if {relation.subject, relation.target} <= drawn.entities.keys():
            others[relation.subject][relation.target] = None
            others[relation.target][relation.subject] = None
    return [
        {
            "id": f"v{drawn.number}-n{slot}",
            "title": shorten(entity.name, MAX_NAME),
            "span": entity.span,
            "mentions": entity.mentions,
            "grounded": len(entity.episodes),
            "links": [
                drawn.episode_link(node_id)
                for node_id in sample(entity.episodes, MAX_LINKS)
                if node_id in drawn.episodes
            ],
            "entities": [
                drawn.entity_link(other, drawn.entities[other].name)
                for other in list(others[slot])[:MAX_LINKS]
            ],
            "clips": [drawn.clip_link(c) for c in sample(clips[slot], MAX_LINKS)],
        }
        for slot, entity in drawn.entities.items()
    ]


def _lane(level: str, unit: str, total: int, items: list[dict], duration: float) -> dict:
    return {"level": level, "unit": unit, "total": total, "items": _boxes(items, duration)}


def draw_video(drawn: Drawn, pictures: Pictures) -> dict:
    """One video as the template draws it: its lanes, what is gone, and its graph."""
    view = drawn.view
    ends = [x.span[1] for x in (*view.clips, *view.episodes, *view.entities)]
    duration = max([1.0, *(float(end) for end in ends if math.isfinite(end))])
    together = Counter()
    for clip in drawn.kept:
        together.update(itertools.combinations(sorted(drawn.mentions(clip)), 2))
    gone = [clip for clip in view.clips if clip.item is None or clip.node_id < 0]
    clips = _sensory(drawn, pictures)
    episodes = _episodic(drawn, pictures)
    return {
        "id": f"v{drawn.number}",
        "title": shorten(Path(view.source).name or view.video_id, 120),
        "video_id": view.video_id,
        "empty": not ends,
        "duration": duration,
        # A minute is then about as wide as the screen.
        "max_zoom": 2 ** max(4, min(12, math.ceil(math.log2(duration / MINUTE)))),
        "ticks": _ticks(duration),
        "lanes": [
            _lane("schema", "entities", len(view.entities), _schema(drawn), duration),
            _lane("episodic", "episodes", len(view.episodes), episodes, duration),
            _lane("sensory", "clips", len(drawn.kept), clips, duration),
        ],
        "num_discarded": sum(clip.node_id < 0 for clip in gone),
        "num_forgotten": sum(clip.node_id >= 0 for clip in gone),
        "gone": _marked(gone, duration, max(0.05, duration / MAX_MARKS * (len(gone) > MAX_MARKS))),
        "graph": draw_graph(list(drawn.entities.values()), view.relations, together),
    }
