"""What the page shows of a video, as plain values, and how it is read from a memory folder."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from mmmem_jax import store
from mmmem_jax.memory import MemoryState
from mmmem_jax.perception.types import RELATIONS
from mmmem_jax.store import ClipRecord


class EpisodeView(NamedTuple):
    """An episode held: times in seconds, `count` clips read, `tokens` of text held."""

    node_id: int
    span: tuple[float, float]
    count: int
    tokens: int


class EntityView(NamedTuple):
    """An entity held: its schema slot, name, mentions, and the episodes it is grounded in."""

    slot: int
    name: str
    span: tuple[float, float]
    mentions: int
    episodes: tuple[int, ...]  # node ids


class RelationView(NamedTuple):
    """An edge of the schema between two of its slots."""

    subject: int
    name: str
    target: int


class VideoView(NamedTuple):
    """What the page shows of one video: all its clips in order of time, also those whose item is
    None, and what the state holds; `sensory` are the indices of the clips held verbatim."""

    video_id: str
    source: str
    clips: Sequence[ClipRecord]
    episodes: Sequence[EpisodeView] = ()
    entities: Sequence[EntityView] = ()
    relations: Sequence[RelationView] = ()
    sensory: frozenset[int] = frozenset()


def video_view(
    video_id: str,
    source: str,
    clips: Sequence[ClipRecord],
    entities: Sequence[store.Entity],
    state: MemoryState,
) -> VideoView:
    """The three levels of a state, with the clips and names that the store has of them."""
    stream, schema, buffer = jax.tree.map(np.asarray, (state.episodic, state.schema, state.sensory))
    return VideoView(
        video_id=video_id,
        source=source,
        clips=clips,
        episodes=[
            EpisodeView(
                node_id=int(stream.node_id[i]),
                span=tuple(stream.span[i].tolist()),
                count=int(stream.count[i]),
                tokens=int(stream.tokens[i]),
            )
            for i in np.flatnonzero(stream.valid)
        ],
        entities=[
            EntityView(
                slot=entity.slot,
                name=entity.name or f"entity {entity.slot}",
                span=entity.span,
                mentions=entity.mentions,
                episodes=tuple(
                    stream.node_id[schema.grounding[entity.slot] & stream.valid].tolist()
                ),
            )
            for entity in entities
        ],
        relations=[
            RelationView(int(subject), _relation(int(relation)), int(target))
            for subject, relation, target in schema.relations[schema.relation_valid]
        ],
        sensory=frozenset(buffer.trace_id[buffer.valid].tolist()),
    )


def _relation(number: int) -> str:
    """What a relation is called; memories may have others than perception makes."""
    return RELATIONS[number] if 0 <= number < len(RELATIONS) else "related to"


def read_video(memory_dir: str | os.PathLike, video_id: str) -> VideoView:
    """A video of a memory folder as it is now.

    Raises:
      UserError: if it is damaged or of another version.
    """
    with store.open_store(memory_dir, video_id) as video:
        state = store.load_state(video)
        clips = store.read_clips(video, range(int(state.num_items)))
        source = str(video.header.get("source", video_id))
        return video_view(video_id, source, clips, store.entities(video, state), state)
