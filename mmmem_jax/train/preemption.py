"""Stopping when asked to: by SIGTERM, as clusters say that a machine is about to be taken away."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from mmmem_jax import provenance
from mmmem_jax.train import distributed

MARKER = "preempted.json"  # in the workdir, from when the run was stopped until it goes on


def mark(workdir: Path, phase: str, step: int) -> None:
    """Writes WORKDIR/preempted.json: the run was asked to stop, and what it has saved."""
    if distributed.is_first():
        provenance.write_json(workdir / MARKER, {"phase": phase, "step": step})


def unmark(workdir: Path) -> None:
    """Removes the marker, as the run goes on."""
    if distributed.is_first():
        (workdir / MARKER).unlink(missing_ok=True)


@contextlib.contextmanager
def notice() -> Iterator[Callable[[int], bool]]:
    """Yields (step) -> whether to stop after this step; to be asked after every step, in order.

    One process stops after the step in which SIGTERM comes. Of many, JAX tells all what one was
    told, and names the next step that none of them has done.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
