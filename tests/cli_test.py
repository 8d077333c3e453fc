"""The command line: every mistake is one line and exit code 2; help needs no JAX."""

import subprocess
import sys

import pytest

from mmmem_jax import cli
from mmmem_jax.testing.videos import write_video

COMMANDS = ("build", "ask", "watch", "report")


def _run(*args: object):
    return subprocess.run(
        [sys.executable, "-m", "mmmem_jax.cli", *map(str, args)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def _one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mmmem: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS)])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: mmmem" in capsys.readouterr().out


def test_help_imports_neither_jax_nor_av():
    script = """
import sys
from mmmem_jax import cli
try:
    cli.main(["build", "--help"])
except SystemExit:
    pass
print("loaded:", {"jax", "av", "cv2", "numpy"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("loaded: set()\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["build", "--memory", "m"], "VIDEO"),
        (["build", "a.mp4"], "--memory"),
        (["build", "a.mp4", "--memory", "m", "--slots", "3"], "between 8 and 65536"),
        (["build", "a.mp4", "--memory", "m", "--slots", "many"], "many"),
        (["build", "a.mp4", "b.mp4", "--memory", "m", "--name", "x"], "--name"),
        (["build", "a.mp4", "b.mp4", "--memory", "m", "--subtitles", "x.srt"], "--subtitles"),
        (["build", "no such file.mp4", "--memory", "m"], "no such file.mp4"),
        (["ask", "what?", "--memory", "m", "--at", "noon"], "noon"),
        (["ask", "what?", "--memory", "no such folder"], "no such folder"),
        (["report", "--memory", "no such folder"], "no such folder"),
        (["watch", "no such file.mp4", "--memory", "m"], "no such file.mp4"),
        (["watch", "a.mp4", "--memory", "m", "--speed", "0"], "above 0"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert said in _one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_every_video_is_looked_at_before_the_first_is_built(tmp_path, capsys):
    good = write_video(tmp_path / "good.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    memory = tmp_path / "memory"
    assert cli.main(["build", str(good), str(tmp_path / "bad.mp4"), "--memory", str(memory)]) == 2
    assert "bad.mp4" in _one_line(capsys)
    assert not memory.exists()


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1:30", 90), ("1:02:03.5", 3723.5), ("0", 0), ("0:00", 0)]
)
def test_times(text, seconds):
    assert cli.parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1:60", "1.5:30", "a", "1:2:3:4", "nan", "inf", "1:-2"])
def test_no_times(text):
    with pytest.raises(cli.argparse.ArgumentTypeError):
        cli.parse_time(text)


def test_a_closed_pipe_is_no_traceback():
    done = subprocess.run(
        f'"{sys.executable}" -m mmmem_jax.cli --help | true', shell=True, capture_output=True
    )
    assert b"Traceback" not in done.stderr


def test_the_installed_command_is_this_one():
    done = _run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: mmmem")
