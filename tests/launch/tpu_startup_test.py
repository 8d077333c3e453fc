"""launch/tpu_startup.sh on a stand-in TPU VM: metadata, systemd, apt and Python are made up."""

import pytest

CURL = """
key=${!#}
cat "$STATE/metadata/${key##*/}" 2>/dev/null || { echo '404' >&2; exit 22; }
"""
SYSTEMCTL = """
case $1 in
  is-active) [[ -e $STATE/active ]] ;;
  start) touch "$STATE/active" ;;
  stop) rm -f "$STATE/active" ;;
esac
"""
# Makes environments of itself; says what it was called with.
PYTHON = """
case "$*" in
  '-c '*version_info*) [[ $* != *print* ]] || echo 3.12 ;;
  '-m venv '*) mkdir -p "${!#}/bin"; cp "$0" "${!#}/bin/python" ;;
esac
"""


@pytest.fixture
def vm(machine):
    """A VM whose metadata name a repository, machine.clone, that has launch/ and a commit."""
    for name in ("pyproject.toml", "requirements.txt"):
        (machine.clone / name).write_text("")
    machine.git(machine.clone, "init", "--quiet")
    _commit(machine)
    machine.command("curl", CURL)
    machine.command("systemctl", SYSTEMCTL)
    machine.command("python3.12", PYTHON)
    metadata = machine.state / "metadata"
    metadata.mkdir()
    args = '--config=configs/sib_grpo.py\n--config.note=it\'s "a" $(touch pwned)\n'
    for key, value in {
        "repo": f"file://{machine.clone}",
        "ref": "main",
        "workdir": "gs://b/run 1",
        "args": args,
    }.items():
        (metadata / f"mmmem-{key}").write_text(value)
    return machine


def _commit(machine):
    machine.git(machine.clone, "add", "--all")
    machine.git(machine.clone, "commit", "--quiet", "--allow-empty", "--message=a")
    return machine.git(machine.clone, "rev-parse", "HEAD")


def _startup(vm, *args, **env):
    home = vm.state / "mmmem"
    given = {"MMMEM_HOME": str(home), "MMMEM_UNIT": str(vm.state / "mmmem.service")}
    done = vm.run("bash", vm.clone / "launch/tpu_startup.sh", *args, **given | env)
    return done, home


def _started(vm):
    """How often the service was started."""
    return sum(call[1] == "start" for call in vm.calls("systemctl"))


def _trains_with(vm):
    """What launch/program.sh gets when systemd starts the service."""
    (exec_start,) = [
        line.partition("=")[2]
        for line in (vm.state / "mmmem.service").read_text().splitlines()
        if line.startswith("ExecStart=")
    ]
    program = vm.state / "mmmem/code/launch/program.sh"
    kept = program.read_text()
    program.write_text("printf '%s\\0' \"$@\"\n")
    out = vm.run(*exec_start.split()).stdout
    program.write_text(kept)
    return out.split("\0")[:-1]


def test_the_first_boot_installs_and_trains(vm):
    commit = _commit(vm)
    done, home = _startup(vm)
    assert done.returncode == 0, done.stdout
    assert vm.git(home / "code", "rev-parse", "HEAD") == commit
    calls = vm.calls()
    (pip,) = [call for call in calls if "install" in call]
    assert pip[-4:] == ["--editable", str(home / "code"), "jax[tpu]", "gcsfs"]
    assert calls[-1] == ["systemctl", "start", "mmmem"]
    assert _trains_with(vm) == [
        str(home / "venv/bin/python"),
        "gs://b/run 1",
        "--config=configs/sib_grpo.py",
        '--config.note=it\'s "a" $(touch pwned)',
    ]
    assert "Installing main" in (home / "log").read_text()


def test_the_next_boot_only_starts(vm):
    _startup(vm)
    vm.calls()
    (vm.state / "active").unlink()
    done, _ = _startup(vm)
    assert done.returncode == 0, done.stdout
    assert vm.calls() == [["systemctl", "start", "mmmem"]]


def test_a_boot_that_was_interrupted_is_done_over(vm):
    (vm.state / "bin/python3.12").write_text("#!/bin/sh\nexit 1\n")
    vm.command("apt-get", "exit 100")
    done, home = _startup(vm)
    assert done.returncode == 100
    assert not (home / "program").exists()
    vm.command("python3.12", PYTHON)
    done, _ = _startup(vm)
    assert done.returncode == 0, done.stdout
    assert _started(vm) == 1


@pytest.mark.parametrize("known", [True, False])
def test_installs_python_where_the_image_has_an_older_one(vm, known):
    python = (vm.state / "bin/python3.12").rename(vm.state / "new python")
    vm.command("python3.12", "exit 1")
    vm.command("apt-cache", "" if known else "exit 100")
    vm.command("add-apt-repository")
    apt = f'[[ $* != *install* ]] || cp "{python}" "$STATE/bin/python3.12"'
    vm.command("apt-get", apt)
    done, _ = _startup(vm)
    assert done.returncode == 0, done.stdout
    calls = vm.calls()
    names = [call[0] for call in calls]
    assert ("add-apt-repository" in names) is not known
    assert ["install", "python3.12-venv"] in [call[-2:] for call in calls]


def test_run_starts_anew_only_with_other_settings(vm):
    repo = f"file://{vm.clone}"
    first, home = _startup(vm, "run", repo, "main", "gs://b/a", "--config=x.py")
    assert first.returncode == 0, first.stdout
    assert _started(vm) == 1
    again, _ = _startup(vm, "run", repo, "main", "gs://b/a", "--config=x.py")
    assert "The training is running" in again.stdout
    assert _started(vm) == 0
    _startup(vm, "run", repo, "main", "gs://b/a", "--config=y.py")
    verbs = [call[1] for call in vm.calls("systemctl")]
    assert verbs.index("stop") < verbs.index("start")
    # And a reboot finds what was run last, not what the metadata say.
    (vm.state / "active").unlink()
    assert _startup(vm)[0].returncode == 0
    assert _trains_with(vm)[1:] == ["gs://b/a", "--config=y.py"]


def test_run_fetches_the_commit_it_is_told(vm):
    repo, old = f"file://{vm.clone}", _commit(vm)
    (vm.clone / "new").touch()
    new = _commit(vm)
    for commit in (old, new, old):
        done, home = _startup(vm, "setup", repo, commit)
        assert done.returncode == 0, done.stdout
        assert vm.git(home / "code", "rev-parse", "HEAD") == commit
        assert (home / "code/new").exists() == (commit == new)
    assert not vm.calls("systemctl")


@pytest.mark.parametrize("missing", ["repo", "args"])
def test_metadata_that_are_missing_end_it(vm, missing):
    (vm.state / f"metadata/mmmem-{missing}").unlink()
    done, home = _startup(vm)
    assert done.returncode != 0
    assert "404" in (home / "log").read_text()
    assert not vm.calls("systemctl")


@pytest.mark.parametrize("args", [["fly"], ["setup"], ["run", "repo", "ref"]])
def test_other_arguments_end_it(vm, args):
    done, _ = _startup(vm, *args)
    assert done.returncode == 2


def test_the_unit_starts_again_what_is_not_over(vm):
    _startup(vm)
    unit = (vm.state / "mmmem.service").read_text()
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)
    assert settings["Restart"] == "on-failure"  # 75, of a preemption, is one
    assert int(settings["StartLimitBurst"]) * 300 > int(settings["StartLimitIntervalSec"])
    assert settings["KillMode"] == "mixed"
    assert int(settings["TimeoutStopSec"]) >= 300
