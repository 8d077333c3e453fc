"""A writer of toy clips for the tests; as a program it appends clips until it is killed."""

import collections
import functools
import sys

import jax
import numpy as np

from mmmem_jax import store
from mmmem_jax.memory import DISCARD, MemoryConfig
from mmmem_jax.testing import toys

# Too small for what it is shown, so that slots are evicted and clips pruned.
SMALL = MemoryConfig(
    sensory_slots=6, episodic_slots=6, schema_slots=4, num_relations=4, dim=8, max_node_tokens=24
)
# Large enough to forget nothing in these tests.
LARGE = MemoryConfig(
    sensory_slots=256, episodic_slots=256, schema_slots=16, num_relations=64, dim=8, merge_keep=1.0
)
HEADER = {"source": "toy.mp4", "fingerprint": "0", "settings": {"fps": 5.0}}
JPEG = b"\xff\xd8 not really a picture \xff\xd9"


@functools.lru_cache
def items(seed: int = 0, num_mentions: int = 2):
    """400 items in NumPy."""
    stream = toys.random_items(seed, 400, num_mentions=num_mentions)
    return [store.rounded(jax.tree.map(lambda x, i=i: x[i], stream)) for i in range(400)]


def decide(seed: int, index: int) -> tuple[int, float]:
    """Action and strength of a clip; the newer is somewhat stronger, so that all slots turn."""
    rng = np.random.default_rng([seed, index])
    action = int(rng.choice(3, p=(0.5, 0.35, 0.15)))
    return action, float(np.float32(index / 50 + rng.random()))


def record(item, index: int, action: int, strength: float, node_id: int, entities=()):
    """What a build would write of this clip."""
    return store.ClipRecord(
        index=index,
        span=(float(item.span[0]), float(item.span[1])),
        caption=f"A clip, number {index}.",
        subtitles="«So it is»" if index % 2 else "",
        labels=(("cat", 0.5), ("sofa", 0.25)),
        frames=((float(item.span[0]), JPEG + b"%d" % index),),
        action=action,
        strength=strength,
        node_id=node_id,
        item=item if node_id >= 0 and action != DISCARD else None,
        entities=tuple(entities),
        log_prob=-strength,
        trace=f"So far {index} clips." if index % 3 else "",
        failed=("extraction", "trace")[: index % 3],
    )


def fill(video, state, until: int, *, seed: int = 0, num_mentions: int = 2, decisions=None):
    """Appends clips up to number `until`; yields the memory after each."""
    for index in range(int(state.num_items), until):
        item = items(seed, num_mentions)[index]
        action, strength = decide(seed, index) if decisions is None else decisions[index]
        state = store.advance(state, item, action, strength)
        node_id = store.node_of(state, index)
        touched = np.asarray(state.schema.valid & (state.schema.span[:, 1] == item.span[1]))
        named = [(slot, f"thing {slot}") for slot in np.flatnonzero(touched).tolist()]
        store.append(video, record(item, index, action, strength, node_id, named), state)
        yield state


def last(states):
    """The last of an iterator of states."""
    return collections.deque(states, maxlen=1).pop()


def same(a, b) -> bool:
    """Whether two states are the same bit by bit, dtypes included."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return a.config == b.config and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


if __name__ == "__main__":
    folder, clips = sys.argv[1:]
    with store.open_store(folder, "toy", writable=True) as found:
        for done in fill(found, store.load_state(found), int(clips)):
            print(int(done.num_items), flush=True)
        store.finish(found, done)
