"""What the tests of whole commands share: toy networks, and a memory built with them."""

from pathlib import Path

import pytest

from mmmem_jax.testing.perception import toy_perception
from mmmem_jax.testing.videos import write_video
from mmmem_jax.video import build


@pytest.fixture(scope="session")
def toy_builder() -> build.Builder:
    """Keeps every clip of a few dozen."""
    return build.make_builder(build.Settings("keep_recent", slots=64), toy_perception())


@pytest.fixture(scope="session")
def scenes_video(tmp_path_factory) -> Path:
    """20 s: five colours of 2 s, and again."""
    return write_video(tmp_path_factory.mktemp("video") / "scenes.mp4", scenes=(2.0,) * 10)
