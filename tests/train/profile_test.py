"""Tests of mmmem_jax/train/profile.py: which updates are traced, and where the trace is."""

import jax
import jax.numpy as jnp
import pytest

from mmmem_jax.errors import UserError
from mmmem_jax.train import profile


@pytest.mark.parametrize(
    ("text", "steps"), [("3:7", (3, 7)), ("5:5", (5, 5)), ("1:2", (1, 2)), ("4", (2, 5))]
)
def test_parses_a_range_or_a_count(text, steps):
    assert profile.parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "0", "0:3", "7:3", "a", "1:2:3", "-1", "1:", ":4", "1.5"])
def test_what_is_neither_is_refused(text):
    with pytest.raises(UserError, match="--profile_steps is .* FIRST:LAST"):
        profile.parse_steps(text)


@pytest.fixture
def traced(monkeypatch):
    """{"start": updates done, "stop": updates done} of a run of updates, with the profiler away."""

    def run(first, last, done, num_steps):
        seen, step = {}, done
        monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.update(start=step))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.update(stop=step))
        with profile.tracing((first, last), "folder") as on_update:
            for step in range(done, num_steps + 1):
                on_update(step, jnp.zeros(()))
        return seen

    return run


@pytest.mark.parametrize(
    ("done", "num_steps", "expected"),
    [
        (0, 9, {"start": 2, "stop": 5}),
        (3, 9, {"start": 3, "stop": 5}),  # resumed within
        (0, 4, {"start": 2, "stop": 4}),  # the run ends before
        (5, 9, {}),  # made already
        (0, 2, {"start": 2, "stop": 2}),
        (0, 1, {}),
    ],
)
def test_traces_the_updates_asked_for(traced, done, num_steps, expected):
    assert traced(3, 5, done, num_steps) == expected


def test_a_trace_is_left_in_the_folder(tmp_path):
    with profile.tracing((1, 1), tmp_path) as on_update:
        on_update(0, jnp.zeros(()))
        on_update(1, jnp.sin(jnp.ones(())))
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size


def test_without_steps_nothing_is_traced(tmp_path, caplog):
    with profile.tracing(None, tmp_path / "profile") as on_update:
        assert on_update is None
    assert not (tmp_path / "profile").exists()
    assert not caplog.records
