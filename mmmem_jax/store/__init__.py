"""What lives on disk: one folder per video (traces, state, key frames) and the questions asked.

with store.open_store("memory", "holiday", writable=True) as video:
    state = store.load_state(video)
    item = store.rounded(item)  # what is on disk is what the memory read
    state = store.advance(state, item, action, strength)
    store.append(video, record, state)
    store.finish(video, state)
"""

from mmmem_jax.store.arrays import rounded
from mmmem_jax.store.layout import list_videos, video_id_of
from mmmem_jax.store.questions import append_question, read_questions
from mmmem_jax.store.reading import (
    Counts,
    Entity,
    Progress,
    counts,
    entities,
    failures,
    load_state,
    node_clips,
    progress,
    read_clips,
    read_frame,
    read_image,
    state_at,
)
from mmmem_jax.store.replay import advance, node_of
from mmmem_jax.store.traces import ClipRecord
from mmmem_jax.store.video_store import VideoStore, create, open_store, remove
from mmmem_jax.store.writing import SNAPSHOT_EVERY, append, finish, prune

__all__ = (
    "SNAPSHOT_EVERY",
    "ClipRecord",
    "Counts",
    "Entity",
    "Progress",
    "VideoStore",
    "advance",
    "append",
    "append_question",
    "counts",
    "create",
    "entities",
    "failures",
    "finish",
    "list_videos",
    "load_state",
    "node_clips",
    "node_of",
    "open_store",
    "progress",
    "prune",
    "read_clips",
    "read_frame",
    "read_image",
    "read_questions",
    "remove",
    "rounded",
    "state_at",
    "video_id_of",
)
