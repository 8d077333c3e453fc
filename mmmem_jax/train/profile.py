"""Traces of a few updates, for xprof or TensorBoard's profile tab."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from mmmem_jax.errors import UserError

LOG = logging.getLogger("mmmem_jax")
OnUpdate = Callable[[int, object], None]  # (updates done, state), before the first and after each


def parse_steps(text: str) -> tuple[int, int]:
    """First and last update to trace: of "A:B" those, of "N" the N after the first, that compiles.

    Raises:
      UserError: if it is neither.
    """
    match = re.fullmatch(r"(?:([0-9]+):)?([0-9]+)", text)
    first, last = (0, 0) if not match else (int(match[1] or 2), int(match[2]))
    if match and match[1] is None:
        last = first + last - 1
    if not 1 <= first <= last:
        raise UserError(
            f"--profile_steps is {text!r}; it must be FIRST:LAST, such as 11:15, or how many"
        )
    return first, last


@contextlib.contextmanager
def tracing(steps: tuple[int, int] | None, folder: Path) -> Iterator[OnUpdate | None]:
    """Gives what writes a trace of these updates, first and last, into a folder as it is called.

    One that is under way at the end is cut off there; if none was begun, a warning says so. Where
    there are no steps to trace, it gives None.
    """
    if steps is None:
        yield None
        return
    first, last = steps
    under_way = begun = False

    def stop():
        nonlocal under_way
        under_way = False
        jax.profiler.stop_trace()
        LOG.info("trace of updates up to %d: %s", last, folder)

    def on_update(step: int, state) -> None:
        nonlocal under_way, begun
        if under_way and step >= last:
            jax.block_until_ready(state)
            stop()
        elif not begun and first - 1 <= step < last:
            jax.block_until_ready(state)  # so that nothing of earlier updates is in it
            jax.profiler.start_trace(str(folder))
            under_way = begun = True

    try:
        yield on_update
    finally:
        if under_way:
            stop()
    if not begun:
        LOG.warning("nothing was traced: no update from %d to %d was made", first, last)
