"""Tests of what a user installs and starts: the wheel, the pins, the launch script."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mmmem_jax

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def _run(*command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def _pins(python: str) -> dict[str, str]:
    """Package name to pinned version, for a Python such as "3.11"."""
    pins = {}
    for line in (REPO / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                name = canonicalize_name(pin.name)
                assert name not in pins
                (pins[name],) = re.fullmatch(r"==([^,*]+)", str(pin.specifier)).groups()
    return pins


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_dependency_has_one_pin_within_its_range(python):
    pins = _pins(python)
    extras = PROJECT["optional-dependencies"]
    needs = map(Requirement, PROJECT["dependencies"] + extras["test"] + extras["benchmark"])
    here = [n for n in needs if n.marker is None or n.marker.evaluate({"python_version": python})]
    assert len(here) == len({need.name for need in here})
    for need in here:
        assert need.specifier.contains(pins[canonicalize_name(need.name)]), need


def test_importing_the_package_imports_nothing_else():
    script = "import sys; import mmmem_jax; print({'jax', 'numpy', 'absl'} & set(sys.modules))"
    assert _run(sys.executable, "-c", script).stdout == "set()\n"


def test_no_module_needs_tensorflow_or_torch():
    script = """
import importlib, pkgutil, sys
sys.modules["tensorflow"] = sys.modules["torch"] = None  # importing either now fails
import mmmem_jax
for module in pkgutil.walk_packages(mmmem_jax.__path__, "mmmem_jax."):
    importlib.import_module(module.name)
"""
    done = _run(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr


def test_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert citation["version"] == mmmem_jax.__version__
    assert "2603.01455" in citation["preferred-citation"]["url"]


@pytest.fixture
def source():
    """The folder that the wheel under test was built from, as test.sh tells."""
    if "MMMEM_TEST_INSTALLED" not in os.environ:
        pytest.skip("only test.sh tests an installed wheel")
    return Path(os.environ["MMMEM_TEST_INSTALLED"])


class TestInstalled:
    @pytest.mark.usefixtures("source")
    def test_the_wheel_is_what_is_tested(self):
        installed = Path(mmmem_jax.__file__)
        assert installed.is_relative_to(sys.prefix)
        assert installed.parent.parent.name == "site-packages"
        assert metadata.version("mmmem_jax") == mmmem_jax.__version__

    def test_the_wheel_holds_every_file_of_the_package(self, source):
        def files(folder):
            paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
            return {path for path in paths if "__pycache__" not in path.parts}

        assert files(source) == files(Path(mmmem_jax.__file__).parent)

    def test_the_pinned_versions_are_installed(self, source):
        pins = _pins("{}.{}".format(*sys.version_info))
        # "+cpu" and the like tell builds of one version apart.
        installed = {
            canonicalize_name(d.name): d.version.partition("+")[0] for d in metadata.distributions()
        }
        tested = installed.keys() & pins.keys()
        assert {"jax", "jaxlib", "flax", "orbax-checkpoint", "grain", "pytest"} <= tested
        assert {name: installed[name] for name in tested} == {name: pins[name] for name in tested}


class TestLaunch:
    """launch/local.sh in a stand-in clone, whose Python writes down how it is called."""

    @pytest.fixture
    def clone(self, tmp_path, monkeypatch):
        monkeypatch.delenv("PYTHON", raising=False)  # of test.sh, as .ci/run calls it
        clone = tmp_path / "a clone"
        (clone / "launch").mkdir(parents=True)
        for name in ("launch/local.sh", "launch/venv.sh", "pyproject.toml", "requirements.txt"):
            (clone / name).write_text((REPO / name).read_text())
        self._make_python(clone / ".venv/bin/python")
        return clone

    def _make_python(self, path, *, version="3.11", pip="true"):
        """A stand-in of a Python version, whose pip runs or is "false"; as PYTHON it makes
        environments of itself."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"""#!/bin/sh
case "$*" in
  *default_backend*) echo "$BACKEND"; exit ;;
  -c*) echo {version}; exit ;;
  "-m pip --version") exec {pip} ;;
esac
echo "$PWD: $*" >> "$CALLS"
case "$*" in
  *"$FAIL"*) exit 7 ;;  # a word no call has, by default
  "-m venv"*) for folder; do :; done; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
esac
""")
        path.chmod(0o755)
        return str(path)

    def _launch(self, clone, *args, fail="nothing", **env):
        """Returns the finished script and the calls that Python got, but for that for JAX's name of
        the backend."""
        calls, cwd = clone.parent / "calls", clone.parent / "elsewhere"
        cwd.mkdir(exist_ok=True)
        calls.write_text("")
        given = {"CALLS": str(calls), "FAIL": fail, "BACKEND": "gpu", "XLA_FLAGS": ""}
        env = os.environ | given | env
        done = _run("bash", str(clone / "launch/local.sh"), *args, cwd=cwd, env=env)
        return done, calls.read_text().splitlines()

    def test_installs_once_then_trains_and_evaluates(self, clone):
        done, calls = self._launch(clone)
        assert done.returncode == 0, done.stderr
        install, *runs = calls
        assert "-m pip install" in install
        assert f"--constraint {clone}/requirements.txt --editable {clone}" in install
        workdir = f"{clone}/runs/sib_grpo"
        assert runs == [
            f"{clone}: -m mmmem_jax.main --config=configs/sib_grpo.py --workdir={workdir}",
            f"{clone}: -m mmmem_jax.eval_main --workdir={workdir}",
        ]
        assert self._launch(clone)[1] == runs
        (clone / "pyproject.toml").write_text("changed")
        assert self._launch(clone)[1] == calls

    @pytest.mark.parametrize("made", [True, False], ids=["made", "not finished"])
    @pytest.mark.parametrize("marked", [True, False], ids=["environment", "other folder"])
    def test_an_environment_without_pip_is_made_anew(self, clone, made, marked):
        assert self._launch(clone)[0].returncode == 0  # leaves a stamp that must not be believed
        environment = clone / ".venv"
        self._make_python(environment / "bin/python", pip="true" if made else "false")
        if marked:
            (environment / "pyvenv.cfg").touch()
        python = self._make_python(clone.parent / "python")
        done, calls = self._launch(clone, PATH=f"{self._named(python)}:{os.environ['PATH']}")
        assert done.returncode == 0, done.stderr
        if made:
            assert len(calls) == 2
        else:  # a folder that is no environment is never cleared
            assert calls[0].endswith(f": -m venv {'--clear ' if marked else ''}{environment}")
            assert "pip install" in calls[1]
            assert len(calls) == 4

    def _named(self, python):
        """A folder in which that stand-in is the first Python to be found."""
        folder = Path(python).parent / "first"
        folder.mkdir()
        (folder / "python3.12").symlink_to(python)
        return folder

    def test_the_environment_has_the_version_of_python_that_is_asked_for(self, clone):
        (clone / ".venv/pyvenv.cfg").touch()
        trained = self._launch(clone)[1][-2:]
        same = self._make_python(clone.parent / "same")
        assert self._launch(clone, PYTHON=same)[1] == trained
        other = self._make_python(clone.parent / "other", version="3.12")
        done, (make, install, *rest) = self._launch(clone, PYTHON=other)
        assert done.returncode == 0, done.stderr
        assert make.endswith(f": -m venv --clear {clone}/.venv")
        assert "pip install" in install
        assert self._launch(clone, PYTHON=other)[1] == rest == trained
        assert self._launch(clone)[1] == trained

    def test_a_python_that_is_not_there_is_one_line(self, clone):
        done, calls = self._launch(clone, PYTHON="python3.1l")
        message = "PYTHON=python3.1l is no Python 3.11 or 3.12 with the venv module"
        assert (done.returncode, done.stderr) == (2, f"local.sh: {message}\n")
        assert calls == []

    def test_other_extras_are_installed_too(self, clone):
        self._launch(clone)
        calls = clone.parent / "calls"
        script = 'source "$1/launch/venv.sh"; set -eu; ensure_venv "$1/.venv" "$@"'
        env = os.environ | {"CALLS": str(calls), "FAIL": "nothing"}
        for stage, installs in (("a", 1), ("b", 0)):  # another folder is no other extra
            calls.write_text("")
            arguments = [str(clone), f"/tmp/{stage}/source[test]"]
            done = _run("bash", "-c", script, "test.sh", *arguments, env=env)
            assert done.returncode == 0, done.stderr
            assert calls.read_text().count("source[test]") == installs

    @pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
    @pytest.mark.parametrize(
        ("config", "env", "splits"),
        [
            ("configs/sib_grpo.py:smoke", {"BACKEND": "cpu"}, True),
            ("configs/sib_grpo.py", {"BACKEND": "gpu"}, False),
            ("configs/sib_grpo.py", {"BACKEND": "cpu", "XLA_FLAGS": "--mine"}, False),
            ("configs/timed_text.py", {"BACKEND": "cpu"}, False),
        ],
    )
    def test_splits_streams_over_the_cores_of_a_cpu(self, clone, config, env, splits):
        _, (*_, train, _) = self._launch(clone, "--config", config, **env)
        assert train.endswith(" --config.mesh.data=2") == splits

    def test_options(self, clone):
        _, calls = self._launch(clone, "--config", "configs/sib_grpo.py:smoke", "--workdir=my run")
        assert calls[-1].endswith(f"eval_main --workdir={clone.parent}/elsewhere/my run")
        _, calls = self._launch(clone, "--config=configs/sib_grpo.py:smoke")
        assert calls[-1].endswith(f"--workdir={clone}/runs/sib_grpo_smoke")

    @pytest.mark.parametrize(
        ("step", "runs"), [("pip", 1), ("mmmem_jax.main", 2), ("mmmem_jax.eval_main", 3)]
    )
    def test_a_failing_step_stops_with_its_code(self, clone, step, runs):
        done, calls = self._launch(clone, fail=step)
        assert done.returncode == 7
        assert len(calls) == runs
        # A failed install is tried again, a finished one is not.
        assert ("pip" in self._launch(clone)[1][0]) == (step == "pip")

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--workdr=x"], "unknown argument --workdr=x; see --help"),
            (["--workdir"], "--workdir needs a value; see --help"),
        ],
    )
    def test_a_mistake_is_one_line(self, clone, args, message):
        done, calls = self._launch(clone, *args)
        assert (done.returncode, done.stderr) == (2, f"local.sh: {message}\n")
        assert calls == []

    def test_help(self, clone):
        done, calls = self._launch(clone, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith("Usage: bash launch/local.sh")
        assert calls == []

    def test_without_a_fitting_python_it_says_so(self, clone, tmp_path):
        for name in ("basename", "dirname"):  # all that the script needs from PATH so far
            (tmp_path / name).symlink_to(f"/usr/bin/{name}")
        script = [str(clone / "launch/local.sh"), f"--venv={tmp_path}/new"]
        done = _run("/bin/bash", *script, env={"PATH": str(tmp_path)})
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "needs Python 3.11 or 3.12" in done.stderr
        done = _run("/bin/bash", *script, env={"PATH": str(tmp_path), "PYTHON": "python2"})
        assert done.returncode == 2
        assert done.stderr == (
            "local.sh: PYTHON=python2 is no Python 3.11 or 3.12 with the venv module\n"
        )


class TestContinuousIntegration:
    @pytest.fixture
    def run_ci(self, tmp_path):
        """Runs .ci/run with a test.sh that says how it was called, where these Pythons are."""
        (tmp_path / ".ci").mkdir()
        (tmp_path / ".ci/run").write_text((REPO / ".ci/run").read_text())

        def run(pythons: tuple[str, ...], code: int) -> subprocess.CompletedProcess:
            script = f'echo "$PYTHON ${{VENV##*/}} $*"; exit {code}'
            (tmp_path / "test.sh").write_text(script)
            for name in pythons:
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("#!/bin/sh\n")
                path.chmod(0o755)
            for name in ("bash", "dirname"):
                (tmp_path / "bin").mkdir(exist_ok=True)
                (tmp_path / "bin" / name).symlink_to(shutil.which(name))
            env = {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path / "pyenv")}
            return _run("bash", str(tmp_path / ".ci/run"), "-k", "a word", cwd="/", env=env)

        return run

    def test_both_pythons_from_path_or_pyenv(self, run_ci, tmp_path):
        newer = "pyenv/versions/3.12.9/bin/python"
        done = run_ci(("bin/python3.11", newer), 0)
        assert (done.returncode, done.stdout.splitlines()) == (0, [
            "Testing on Python 3.11", "python3.11 .venv-test-3.11 -k a word",
            "Testing on Python 3.12", f"{tmp_path / newer} .venv-test-3.12 -k a word",
            "Passed on Python 3.11 3.12",
        ])  # fmt: skip

    def test_the_one_that_is_there(self, run_ci):
        done = run_ci(("bin/python3.12",), 0)
        assert done.returncode == 0
        assert "Python 3.11 is not here: not tested\n" in done.stdout
        assert done.stdout.endswith("Passed on Python 3.12\n")

    def test_the_code_of_the_first_that_fails(self, run_ci):
        done = run_ci(("bin/python3.11", "bin/python3.12"), 5)
        assert done.returncode == 5
        assert "3.12" not in done.stdout

    def test_none(self, run_ci):
        done = run_ci((), 0)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
