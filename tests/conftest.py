"""What every test shares: JAX on eight CPU devices, its compilation cache, real data if present."""

import os
from pathlib import Path

import pytest

import mmmem_jax

REPO = Path(__file__).resolve().parent.parent

# Set before JAX is first imported, and inherited by the programs that tests start: these import
# the package under test, and find what an earlier test or run has compiled.
os.environ["PYTHONPATH"] = str(Path(mmmem_jax.__file__).parent.parent)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".pytest_cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # this process alone, for the mesh tests


@pytest.fixture(scope="session")
def egolife_dir() -> Path:
    """The folder of the real EgoLife annotations; skips where it is absent."""
    folder = Path(os.environ.get("MMMEM_EGOLIFE_DIR") or REPO.parent / "shared/data/egolife")
    if not folder.is_dir():
        pytest.skip("no EgoLife data: set MMMEM_EGOLIFE_DIR to its folder")
    return folder
