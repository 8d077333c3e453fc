"""What the soak counts: growth, what an overloaded watch reaches, and clips that a kill cost."""

import pytest

from benchmarks import watch_soak
from mmmem_jax.errors import UserError
from mmmem_jax.testing.perception import toy_perception
from mmmem_jax.testing.videos import write_video
from mmmem_jax.video import build

SETTINGS = build.Settings("keep_recent", slots=64)
FORGETFUL = """
import time
for index in range(50, 99):
    print(index, flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", scenes=(2.0,) * 10)


def test_growth_is_of_the_last_quarter_over_the_second():
    assert watch_soak.growth([9.0, 9.0, 2.0, 2.0, 5.0, 5.0, 3.0, 3.0]) == pytest.approx(0.5)
    hiccup = [1.0, 1.0, 1.0, 2.0, 2.0, 90.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0]
    assert watch_soak.growth(hiccup) == pytest.approx(0.5)
    assert watch_soak.growth([4.0] * 11) == 0.0
    with pytest.raises(UserError, match="too short"):
        watch_soak.growth([1.0] * 3)


def test_overload_tells_the_speed_that_was_reached(tmp_path, video):
    builder = build.make_builder(SETTINGS, toy_perception())
    found = watch_soak.overload(builder, video, tmp_path, 1000.0)
    assert found["speed"] == 1000.0
    assert 0.0 < found["speed_reached"] < 1000.0
    assert found["dropped_share"] == pytest.approx(found["dropped"] / 100, abs=1e-3)


def test_counts_the_clips_that_a_kill_cost(tmp_path, video, monkeypatch):
    toy = watch_soak.REPORT.replace("slots=64)", "slots=64), toy_perception()").replace(
        "import sys", "import sys\nfrom mmmem_jax.testing.perception import toy_perception"
    )
    monkeypatch.setattr(watch_soak, "REPORT", toy)
    found = watch_soak.lost_after_kill(video, tmp_path, "keep_recent", 1, 20.0)
    assert found["clips_lost_after_kill"] == 0
    assert 3 <= found["clips_reported"] <= 10
    monkeypatch.setattr(watch_soak, "REPORT", FORGETFUL)
    found = watch_soak.lost_after_kill(video, tmp_path, "keep_recent", 1, 20.0)
    assert 40 <= found["clips_lost_after_kill"] < 99
