"""launch/slurm.sh against stand-ins of Slurm that keep one job."""

import pytest


@pytest.fixture
def cluster(machine):
    machine.command("squeue", '[[ ! -e $STATE/job ]] || cat "$STATE/job"')
    machine.command("sbatch", 'echo 42 > "$STATE/job"; echo "Submitted batch job 42"')
    machine.command("scancel", 'rm -f "$STATE/job"')
    python = machine.clone / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/bin/true")
    return machine


def test_submit_and_cancel_twice_is_once(cluster):
    first, second = (cluster.launch("slurm.sh", "submit", "--name=n") for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "n is queued or running already: job 42" in second.stdout
    assert len(cluster.calls("sbatch")) == 1
    for _ in range(2):
        assert cluster.launch("slurm.sh", "cancel", "--name=n").returncode == 0
    assert cluster.launch("slurm.sh", "submit", "--name=n").returncode == 0


def test_folders_are_those_of_where_it_is_called(cluster):
    """Though the job runs in the clone."""
    elsewhere = cluster.state / "else where"
    elsewhere.mkdir()
    script = f"cd '{elsewhere}' && bash '{cluster.clone}/launch/slurm.sh' \"$@\""
    args = ("submit", "--name=n", "--workdir=run", "--dry-run")
    done = cluster.run("bash", "-c", script, "bash", *args)
    assert done.returncode == 0, done.stderr
    assert f"'{elsewhere}/run'" in done.stdout
    done = cluster.run("bash", "-c", script, "bash", *args[:2], "--workdir=gs://b/r", "--dry-run")
    assert " gs://b/r " in done.stdout


def test_submit_needs_the_environment(cluster):
    done = cluster.launch("slurm.sh", "submit", "--name=n", "--venv=nowhere")
    assert done.returncode == 2
    assert "slurm.sh setup" in done.stderr
    assert cluster.calls("sbatch") == []


def test_an_error_of_sbatch_is_that_of_the_script(cluster):
    cluster.command("sbatch", "echo 'invalid partition' >&2; exit 1")
    done = cluster.launch("slurm.sh", "submit", "--name=n")
    assert done.returncode == 1
    assert done.stderr == "invalid partition\n"


def test_tail_needs_a_job(cluster):
    done = cluster.launch("slurm.sh", "tail", "--name=n")
    assert done.returncode == 2
    assert "runs/logs" in done.stderr


def test_tail_follows_the_log_of_the_job(cluster):
    cluster.command("tail")
    (cluster.state / "job").write_text("42\n")
    assert cluster.launch("slurm.sh", "tail", "--name=n").returncode == 0
    assert cluster.calls("tail") == [["tail", "-n", "200", "-F", "runs/logs/n-42.log"]]


def test_setup_installs_with_the_pins(cluster):
    """Through launch/venv.sh, as local.sh does."""
    for name in ("pyproject.toml", "requirements.txt"):
        (cluster.clone / name).write_text("")
    python = cluster.command("python")
    done = cluster.launch("slurm.sh", "setup", f"--venv={python.parents[1]}", "--jax=cuda13")
    assert done.returncode == 0, done.stderr
    (pip,) = [call for call in cluster.calls("python") if "install" in call]
    assert pip[-4:] == ["--editable", str(cluster.clone), "jax[cuda13]", "gcsfs"]
    assert pip[pip.index("--constraint") + 1] == str(cluster.clone / "requirements.txt")
