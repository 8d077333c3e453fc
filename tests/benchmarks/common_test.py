"""Tests of benchmarks/common.py."""

import json

import pytest

from benchmarks import common
from mmmem_jax.errors import UserError


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_the_last_line_is_the_result(results, capsys):
    common.emit("speed", {"ratio": 2.0, "seeds": [0, 1]}, full=False)
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["ratio"] == 2.0
    assert found.keys() == {"ratio", "seeds", "date", "device", "versions", "command"}
    assert not results.exists()


def test_a_full_result_is_saved_as_printed(results, capsys):
    common.emit("speed", {"ratio": 2.0, "seeds": [3]}, full=True)
    assert json.loads((results / "speed.json").read_text()) == json.loads(capsys.readouterr().out)


def test_a_full_result_of_other_seeds_leaves_the_record_alone(results, capsys):
    common.emit("speed", {"seeds": [0, 1, 2]}, full=True, default_seeds=[0, 1, 2])
    record = (results / "speed.json").read_text()
    common.emit("speed", {"seeds": [0]}, full=True, default_seeds=[0, 1, 2])
    assert (results / "speed.json").read_text() == record
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["seeds"] == [0]
    assert said.err == (
        "speed: not saved to speed.json: this run is of the seeds [0], the record is of [0, 1, 2]\n"
    )


def test_quick_and_full_runs_have_folders_of_their_own(tmp_path):
    parser = common.make_parser("Claim.")
    quick, full = (common.workdir(parser.parse_args(a), "x") for a in ([], ["--full"]))
    assert quick != full
    chosen = parser.parse_args(["--full", f"--workdir={tmp_path}"])
    assert common.workdir(chosen, "x") == tmp_path


def claimed(folder, config):
    common.checkpoints.claim_workdir(folder, config.to_dict())
    return folder


def test_a_full_result_takes_any_seed_and_mesh_of_the_default_config(tmp_path):
    config = common.make_config(full=True)
    config.seed, config.mesh.data, config.mesh.model = 3, 2, 2
    assert common.run_config(True, claimed(tmp_path, config)).seed == 3


def test_a_full_result_takes_no_other_config(tmp_path):
    config = common.make_config(full=True)
    config.retrieval.top_k = (5, 2, 2)
    folder = claimed(tmp_path, config)
    with pytest.raises(UserError, match=r"has retrieval.top_k = \[5, 2, 2\] in place of \[5, 2, 1"):
        common.trained_config(True, folder)
    assert common.run_config(False, folder).retrieval.top_k == [5, 2, 2]


def test_a_run_of_another_job_is_refused(tmp_path):
    folder = claimed(tmp_path, common.load_config("egolife"))
    with pytest.raises(UserError, match="is no run of configs/sib_grpo.py"):
        common.trained_config(False, folder)


def test_a_copy_cut_short_is_done_again(tmp_path):
    base, workdir = tmp_path / "base/checkpoints", tmp_path / "run/checkpoints"
    for phase in common.SHARED:
        (base / phase).mkdir(parents=True)
        (base / phase / "state").write_text(phase)
    (workdir / "reader.partial").mkdir(parents=True)
    (workdir / "reader.partial/half").touch()
    (workdir / "perception").mkdir()  # its own
    common.copy_phases(base.parent, workdir.parent)
    found = {str(p.relative_to(workdir)) for p in workdir.rglob("*") if p.is_file()}
    assert found == {"reader/state", "calibrated_reader/state"}


def test_a_mistake_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["speed.py"])
    monkeypatch.setattr(common.flags, "log_plainly", lambda: None)

    def measure(full, workdir):
        raise UserError("no torch; install it")

    with pytest.raises(SystemExit, match="^speed: no torch; install it$"):
        common.run("speed", "Claim.", measure)
