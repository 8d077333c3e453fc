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
    sample,
    shorten,
)
from mmmem_jax.video.report.views import EntityView, EpisodeView, VideoView

MAX_CLIPS, MAX_EPISODES, MAX_ENTITIES = 600, 300, 400  # drawn, all videos together
MAX_ROWS = 30  # entities of one video, which may overlap in time
MAX_LINKS = 12  # from one item to others of a kind
NUM_BINS = 1000  # of a time line, for what is only marked: the clips that are not held
NARROWEST = 0.25  # percent of the time line
TICK_STEPS = (
    *(1, 2, 5, 10, 15, 30),
    *(k * MINUTE for k in (1, 2, 5, 10, 15, 30)),
    *(k * HOUR for k in (1, 2, 3, 6, 12)),
    *(k * DAY for k in (1, 2, 7, 14, 28, 91, 365)),
)
ACTIONS = {ADD_NEW: "opened an episode", MERGE: "merged into an episode"}


def _packed(spans: Iterable[tuple[float, float]]) -> list[int]:
    """The first free row of each span (percent), rows without overlap."""
    ends, rows = [], []
    for x0, x1 in spans:
        row = next((i for i, end in enumerate(ends) if end <= x0 + 1e-6), len(ends))
        ends[row : row + 1] = [x1]
        rows.append(row)
    return rows


def _ticks(duration: float) -> list[dict]:
    """Ticks of the time axis; `zoom` is that from which one has room."""
    ticks, seen = [], set()
    for zoom in (1, 4, 16):
        step = next((s for s in TICK_STEPS if duration / s <= 7 * zoom), TICK_STEPS[-1])
        for i in range(int(min(duration / step, 7 * zoom)) + 1):
            if i * step not in seen:
                seen.add(i * step)
                x = round(100 * i * step / duration, 3)
                ticks.append({"x": x, "zoom": zoom, "label": clock(i * step)})
    return ticks


def _marked(clips: Sequence, duration: float) -> list[dict]:
    """Where clips lie, as the fewest bars: x and width in percent."""
    bins = np.zeros(NUM_BINS + 1, bool)
    for clip in clips:
        x0, x1 = (NUM_BINS * t / duration for t in clip.span)
        bins[int(x0) : max(int(x0) + 1, int(round(x1)))] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[False], bins[:-1], [False]])))
    scale = 100 / NUM_BINS
    return [
        {"x": round(a * scale, 2), "width": round((b - a) * scale, 2)}
        for a, b in edges.reshape(-1, 2).tolist()
    ]


def _boxes(items: Sequence[dict], duration: float) -> list[dict]:
    """The items in order of time, each with its row, x and width in percent."""
    items = sorted(items, key=lambda item: (item["span"], item["id"]))
    xs = []
    for item in items:
        x0, x1 = (min(max(100 * t / duration, 0.0), 100.0) for t in item["span"])
        xs.append((min(x0, 100 - NARROWEST), max(x1, x0 + NARROWEST)))
    return [
        item | {"row": row, "x": round(x0, 3), "width": round(x1 - x0, 3)}
        for item, row, (x0, x1) in zip(items, _packed(xs), xs, strict=True)
    ]


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


def choose(number: int, view: VideoView, share: int) -> Drawn:
    """An even choice of clips and episodes, the most mentioned entities; 1 / share of the room."""
    kept = [clip for clip in view.clips if clip.item is not None and clip.node_id >= 0]
    episodes = sample(view.episodes, max(MAX_EPISODES // share, 1))
    mentioned = sorted(view.entities, key=lambda entity: (-entity.mentions, entity.slot))
    entities = mentioned[: min(max(MAX_ENTITIES // share, 1), MAX_ROWS)]
    return Drawn(
        number,
        view,
        kept,
        sample(kept, max(MAX_CLIPS // share, 1)),
        {episode.node_id: episode for episode in episodes},
        {entity.slot: entity for entity in entities},
    )


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
                "picture": pictures.of(drawn.number, clip),
                "action": ACTIONS.get(clip.action, "kept"),
                "links": [drawn.episode_link(clip.node_id)],
                "entities": [
                    drawn.entity_link(slot if slot in held else -1, name)
                    for slot, name in dict.fromkeys(clip.entities[:MAX_LINKS])
                ],
            }
        )
    return items


def _episodic(drawn: Drawn, pictures: Pictures) -> list[dict]:
    """The episodes: what they hold, with captions and key frames of their clips."""
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
            "captions": [shorten(c.caption, MAX_TEXT // 2) for c in sample(clips[node_id], 3)],
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
        "source": shorten(view.source),
        "duration": duration,
        # A minute is then about as wide as the screen.
        "max_zoom": 2 ** max(3, min(12, math.ceil(math.log2(duration / MINUTE)))),
        "ticks": _ticks(duration),
        "lanes": [
            _lane("schema", "entities", len(view.entities), _schema(drawn), duration),
            _lane("episodic", "episodes", len(view.episodes), episodes, duration),
            _lane("sensory", "clips", len(drawn.kept), clips, duration),
        ],
        "num_discarded": sum(clip.node_id < 0 for clip in gone),
        "num_forgotten": sum(clip.node_id >= 0 for clip in gone),
        "gone": _marked(gone, duration),
        "graph": draw_graph(list(drawn.entities.values()), view.relations, together),
    }
