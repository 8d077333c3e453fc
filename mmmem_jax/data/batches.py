"""Batches of an endless dataset, of which every process may load a part, and draws within one."""

from collections.abc import Sequence

import grain
import jax
import numpy as np

# Batches that a loader makes before they are asked for. Grain's own 500 keep a short run waiting,
# the more as it takes milliseconds to shuffle each element of a few.
AHEAD = 16


def valid_first(valid: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """`size` indices of `valid` (all, if it has fewer) in random order, valid ones first."""
    return np.argsort(rng.random(len(valid)) + ~np.asarray(valid), kind="stable")[:size]


def batches(
    elements: grain.MapDataset,
    batch_size: int,
    rows: Sequence[int] | None = None,
    *,
    ahead: int = AHEAD,
) -> grain.DatasetIterator:
    """An iterator of batches [B, ...] of an endless dataset, or of some rows of each.

    Batch b holds elements b * B to b * B + B - 1, whoever loads them: what the processes of a run
    load is together what one process would, and `get_state` is the number of a batch for all.

    Args:
      elements: endless (repeated); trees of arrays or numbers.
      batch_size: B, of the whole batch.
      rows: those to load, in order; all by default.
      ahead: batches made before they are asked for, and held.
    """
    rows = range(batch_size) if rows is None else [int(row) for row in rows]

    def batch(index: int):
        chosen = (elements[index * batch_size + row] for row in rows)
        return jax.tree.map(lambda *x: np.stack(x), *chosen)

    dataset = grain.MapDataset.range(len(elements) // batch_size).map(batch)
    options = grain.ReadOptions(num_threads=min(16, ahead), prefetch_buffer_size=ahead)
    return iter(dataset.to_iter_dataset(options))
