"""Tests of benchmarks/common.py."""

import json

import pytest

from benchmarks import common


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_the_last_line_is_the_result(results, capsys):
    common.emit("speed", {"ratio": 2.0}, full=False, seeds=[0, 1])
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["ratio"] == 2.0
    assert found.keys() == {"ratio", "seeds", "date", "device", "versions", "command"}
    assert not results.exists()


def test_a_full_result_is_saved_as_printed(results, capsys):
    common.emit("speed", {"ratio": 2.0, "seeds": [3]}, full=True)
    assert json.loads((results / "speed.json").read_text()) == json.loads(capsys.readouterr().out)


def test_quick_and_full_runs_have_folders_of_their_own(tmp_path):
    parser = common.make_parser("Claim.")
    quick, full = (common.workdir(parser.parse_args(a), "x") for a in ([], ["--full"]))
    assert quick != full
    chosen = parser.parse_args(["--full", f"--workdir={tmp_path}"])
    assert common.workdir(chosen, "x") == tmp_path


def test_a_mistake_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["speed.py"])

    def measure(full, workdir):
        raise common.UserError("no torch; install it")

    with pytest.raises(SystemExit, match="^speed: no torch; install it$"):
        common.run("speed", "Claim.", measure)
