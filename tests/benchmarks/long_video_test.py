"""A repeated video: every picture of every copy, evenly timed."""

import numpy as np
import pytest

from benchmarks.long_video import repeat
from mmmem_jax.perception import decode
from mmmem_jax.testing.videos import write_video


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("times", [1, 3])
def test_holds_every_copy(tmp_path, name, times):
    once = write_video(tmp_path / f"once_{name}", scenes=(1.0, 1.0), options={"bf": "2", "g": "7"})
    long = repeat(once, tmp_path / name, times)
    pictures = [frame.image for frame in decode.read(once, fps=10.0)]
    found = list(decode.read(long, fps=10.0))
    assert len(pictures) == 20
    assert [f.time for f in found] == pytest.approx(np.arange(20 * times) / 10, abs=2e-3)
    np.testing.assert_array_equal([f.image for f in found], pictures * times)
    assert decode.probe(long).duration == pytest.approx(2.0 * times, abs=0.25)
