"""What every test shares: JAX on eight CPU devices, its compilation cache, real data if present."""

import gc
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from absl.testing import flagsaver
from filelock import FileLock

import mmmem_jax

REPO = Path(__file__).resolve().parent.parent

# Set before JAX is first imported, and inherited by the programs that tests start: these import
# the package under test, and find what an earlier test or run has compiled.
os.environ["PYTHONPATH"] = str(Path(mmmem_jax.__file__).parent.parent)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".pytest_cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.005")
# Without its newer emitters of fused kernels XLA compiles for CPUs in a third of the time. Later
# versions have no others, and end the process over a flag that they do not know.
if metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# Started in the background by a shell, tests would ignore Ctrl-C, and so would what they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # this process alone, for the mesh tests


# Files of few and long tests: begun first, no worker is left alone with one of them at the end.
LONG = (
    "train/two_process_test.py",
    "main_test.py",
    "notebooks/notebooks_test.py",
    "train/world_job_test.py",
    "benchmarks/scripts_test.py",
    "train/qwen3_vl_job_test.py",
    "train/lite_job_test.py",
    "remote_test.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves LONG to the front; xdist keeps the order with --no-loadscope-reorder."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 20_000  # Linux gives a process 65,530; past them XLA crashes


@pytest.fixture(scope="module", autouse=True)
def bounded_mappings():
    """Between files, lets go of compiled programs, each of which maps some pages of memory."""
    yield
    if MAPPINGS.is_file() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def egolife_dir() -> Path:
    """The folder of the real EgoLife annotations; skips where it is absent."""
    folder = Path(os.environ.get("MMMEM_EGOLIFE_DIR") or REPO.parent / "shared/data/egolife")
    if not folder.is_dir():
        pytest.skip("no EgoLife data: set MMMEM_EGOLIFE_DIR to its folder")
    return folder


# The whole of the main job in seconds: too small to learn anything.
TINY = {
    "world.num_chunks": 32, "world.questions_per_family": 2,
    "streams.perception": 2, "streams.train": 4, "streams.validation": 4, "streams.test": 4,
    "perception.num_steps": 2, "perception.log_every": 1, "perception.save_every": 1,
    "reader.num_steps": 2, "reader.log_every": 1, "reader.save_every": 1, "reader.batch_size": 4,
    "manager.num_steps": 16, "manager.log_every": 1, "manager.save_every": 2,
    "manager.batch_size": 2, "sib.num_generations": 2,
}  # fmt: skip
TINY_CONFIG = [
    "--config=configs/sib_grpo.py:smoke",
    *(f"--config.{k}={v}" for k, v in TINY.items()),
]


def run_module(*args: object, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs `python -m ARGS` from the clone, as a user does."""
    command = [sys.executable, "-m", *map(str, args)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def call_main(monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess]:
    """(binary, *args) -> what `python -m BINARY ARGS` says and exits with, in this process.

    For what takes a process seconds to import. Flags are as before afterwards.
    """

    def call(binary: ModuleType, *args: object) -> subprocess.CompletedProcess:
        name = binary.__name__.rpartition(".")[2]
        monkeypatch.setattr("sys.argv", [name, *map(str, args)])
        monkeypatch.setattr(binary.flags, "log_plainly", lambda: None)
        monkeypatch.setattr(
            binary.flags.app, "run", lambda main_fn, flags_parser: main_fn(flags_parser(sys.argv))
        )
        monkeypatch.chdir(REPO)
        capsys.readouterr()
        unset = flagsaver.save_flag_values(binary.FLAGS)
        with warnings.catch_warnings():
            # So does ml_collections 1.1, the newest, load a config.
            warnings.filterwarnings("ignore", r"the load_module\(\)", DeprecationWarning)
            with pytest.raises(SystemExit) as ended:
                binary.flags.run(binary.main, binary.FLAGS, name=name, usage=binary.__doc__)
        flagsaver.restore_flag_values(unset, binary.FLAGS)
        binary.FLAGS.unparse_flags()
        return subprocess.CompletedProcess(args, ended.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A workdir of `TINY_CONFIG`, trained to its end once for all workers; copy it to change it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "tiny.lock"):
        if not (folder / "tiny").exists():
            command = (*TINY_CONFIG, f"--workdir={folder / 'tiny.new'}")
            done = run_module("mmmem_jax.main", *command)
            assert done.returncode == 0, done.stderr
            (folder / "tiny.new").rename(folder / "tiny")
    return folder / "tiny"
