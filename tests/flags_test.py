"""Tests of mmmem_jax/flags.py through a small binary, as a user meets it."""

import subprocess
import sys

import pytest

BINARY = '''
"""Trains nothing.

Example: tiny --workdir=DIR
"""
import sys
from mmmem_jax import flags
from mmmem_jax.errors import UserError

FLAGS = flags.FlagValues()
CONFIG = flags.define_config("configs/tiny.py", FLAGS)
WORKDIR = flags.DEFINE_string("workdir", "runs", "Folder of the run.", flag_values=FLAGS)
STEP = flags.DEFINE_integer("step", None, "Which step.", flag_values=FLAGS)


def main(argv):
    if WORKDIR.value == "bad":
        raise UserError("workdir 'bad' holds\\nanother config; choose another")
    if WORKDIR.value == "interrupt":
        raise KeyboardInterrupt
    if WORKDIR.value == "bug":
        raise ValueError("a bug keeps its traceback")
    assert "jax" not in sys.modules
    print(CONFIG.value.manager.learning_rate, CONFIG.value.steps, CONFIG.value.sizes)
    print(WORKDIR.value, STEP.value, len(argv), CONFIG.value.is_locked)
    return 3 if WORKDIR.value == "three" else None


if __name__ == "__main__":
    flags.run(main, FLAGS, name="tiny", usage=__doc__)
'''

CONFIG = """
import ml_collections


def get_config(arg="full"):
    if arg not in ("full", "smoke"):
        raise ValueError(f"no variant {arg!r}; there are full and smoke")
    config = ml_collections.ConfigDict()
    config.steps = 2 if arg == "smoke" else 100
    config.sizes = (8, 8)
    config.manager = ml_collections.ConfigDict({"learning_rate": 1e-2, "layers": 2})
    return config
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Runs the binary with the given arguments, in a folder with a config."""
    folder = tmp_path_factory.mktemp("a binary")
    (folder / "tiny.py").write_text(BINARY)
    (folder / "configs").mkdir()
    (folder / "configs/tiny.py").write_text(CONFIG)
    (folder / "configs/broken.py").write_text("def get_config(:\n")
    (folder / "configs/empty.py").write_text("")

    def call(*args):
        command = [sys.executable, "tiny.py", *args]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    return call


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), "0.01 100 (8, 8)\nruns None 1 True\n"),
        (("--config=configs/tiny.py:smoke", "--step=4"), "0.01 2 (8, 8)\nruns 4 1 True\n"),
        (("--config", "configs/tiny.py:smoke"), "0.01 2 (8, 8)\nruns None 1 True\n"),
        (("--config.manager.learning_rate=1e-3",), "0.001 100 (8, 8)\nruns None 1 True\n"),
        # An override may come before the config that it overrides, or be given as two words.
        (
            ("--config.steps", "7", "--config.sizes=(1, 2)", "--config=configs/tiny.py:smoke"),
            "0.01 7 (1, 2)\nruns None 1 True\n",
        ),
    ],
)
def test_flags_and_overrides_reach_main(tiny, args, expected):
    done = tiny(*args)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--confg=x",), ["unknown flag --confg", "did you mean --config?"]),
        (("--zzzz=1",), ["unknown flag --zzzz", "--help lists the flags"]),
        (
            ("--config.manager.learning_rat=1",),
            ["configs/tiny.py has no key 'manager.learning_rat'", "mean 'manager.learning_rate'?"],
        ),
        (
            ("--config=configs/tiny.py:smoke", "--config.learning_rate=1"),
            ["configs/tiny.py:smoke has no key", "mean 'manager.learning_rate'?"],
        ),
        (("--config.manager.layers.x=1",), ["no key 'manager.layers.x'"]),
        (("--config=configs/tinny.py",), ["no config file", "did you mean configs/tiny.py?"]),
        (("--config=",), ["no config file ''"]),
        (("--config",), ["no config file ''"]),
        (("--config=configs/tiny.py:smok",), ["no variant 'smok'; there are full and smoke"]),
        (("--config=configs/broken.py",), ["cannot read config configs/broken.py"]),
        (("--config=configs/empty.py",), ["configs/empty.py defines no get_config()"]),
        (("--config.manager.layers=two",), ["--config.manager.layers=two"]),
        (("--config.manager.layers",), ["config.manager.layers"]),
        (("--config.manager=1",), ["config.manager"]),
        (("--config.=1",), ["tiny: "]),
        (("--step=one",), ["--step=one"]),
        (("--workdir",), ["workdir"]),
        (("stray",), ["unexpected argument 'stray'"]),
        (("--workdir=bad",), ["workdir 'bad' holds another config; choose another"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tiny, args, words):
    done = tiny(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("tiny: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_help_is_short_and_shows_only_own_flags(tiny):
    done = tiny("--help")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "Trains nothing.",
        "",
        "Example: tiny --workdir=DIR",
        "",
        "Flags:",
        "  --config: Config file, FILE or FILE:ARG; --config.KEY=VALUE sets one of its keys."
        " (default: configs/tiny.py)",
        "  --workdir: Folder of the run. (default: runs)",
        "  --step: Which step.",
    ]


def test_exit_codes_of_main_pass_through(tiny):
    assert tiny("--workdir=three").returncode == 3
    interrupted = tiny("--workdir=interrupt")
    assert (interrupted.returncode, interrupted.stderr) == (130, "tiny: interrupted\n")
    bug = tiny("--workdir=bug")
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr
