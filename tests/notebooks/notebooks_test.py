"""Tests of notebooks/: each runs whole at toy size, ends with a picture and is committed bare."""

import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import REPO

FOLDER = REPO / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
TRAINING = ("quick_start", "sib_grpo_dissected")  # these take the run that they find


def _read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def _code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_runs_without_a_warning_and_ends_with_a_picture(name, request, tmp_path, monkeypatch):
    if name in TRAINING:
        shutil.copytree(request.getfixturevalue("tiny_run"), tmp_path / "quick_start")
    monkeypatch.setenv("MMMEM_NOTEBOOK_SMOKE", str(tmp_path))
    # tqdm would like a widget that a notebook can do without.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    notebook = _read(name)
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(FOLDER)}}).execute()
    cells = _code(notebook)
    said = "".join(out.text for cell in cells for out in cell.outputs if "text" in out)
    assert said.startswith("CPU: ")
    assert "Warning" not in said
    assert any("image/png" in out.get("data", {}) for out in cells[-1].outputs)


@pytest.mark.parametrize("name", NAMES)
def test_is_committed_without_what_a_run_leaves(name):
    notebook = _read(name)
    nbformat.validate(notebook)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata == {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        assert not cell.metadata
    for cell in _code(notebook):
        assert (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_cell_is_introduced(name):
    cells = _read(name).cells
    assert cells[0].cell_type == cells[1].cell_type == "markdown"
    kinds = "".join(cell.cell_type[0] for cell in cells)
    assert "ccc" not in kinds  # what is computed and its picture may share a sentence


def test_all_begin_with_the_same_cell_which_names_no_machine():
    first, *others = (_code(_read(name))[0].source for name in NAMES)
    assert all(other == first for other in others)
    assert 'REPO = ""' in first
    assert not re.search(r"://|@|(?<!/)/(home|root|usr|mnt|work|tmp|content|opt)\b", first)


@pytest.fixture
def bare(tmp_path):
    """Runs the first cell as a program in a new folder, where the package is not installed."""
    cell = tmp_path / "cell.py"
    source = _code(_read("quick_start"))[0].source
    # In the place of pip and git, whose calls are written down.
    cell.write_text(
        "import importlib.util, subprocess\n"
        "importlib.util.find_spec = lambda name: None\n"
        "subprocess.run = lambda command, check: print(*command)\n" + source
    )

    def run(folder):
        command = [sys.executable, str(cell)]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    return run


def test_without_a_clone_it_asks_for_the_address(bare, tmp_path):
    done = bare(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "There is no clone of mmmem_jax here: set REPO to its address\n"


def test_installs_the_clone_with_the_versions_that_were_tested(bare):
    done = bare(FOLDER)
    assert done.returncode == 0, done.stderr
    install, devices = done.stdout.splitlines()
    package, jax_here = install.split(f"--constraint {REPO / 'requirements.txt'} ")[1].split()
    assert "-m pip install --quiet" in install
    assert package == str(REPO)
    assert jax_here.startswith("jax")
    assert devices.startswith("CPU: ")
