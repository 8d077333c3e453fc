"""Tests of mmmem_jax/provenance.py."""

import datetime
import json
import platform
import subprocess
import sys

import pytest

from mmmem_jax import provenance


def test_a_result_says_where_it_comes_from():
    found = provenance.provenance()
    assert found.keys() == {"date", "device", "versions", "command"}
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(found["date"])
    assert abs(age) < datetime.timedelta(minutes=1)
    assert found["device"].startswith("CPU, ")
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"].keys() == {"python", "mmmem_jax", *provenance.PACKAGES}
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "command"),
    [(["-m", "tell", "--full"], "python -m tell --full"), (["tell.py", "x"], "python tell.py x")],
)
def test_the_command_is_what_was_typed(tmp_path, arguments, command):
    (tmp_path / "tell.py").write_text(
        "from mmmem_jax import provenance\nprint(provenance.command())\n"
    )
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == command


def test_json_is_written_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "result.json"
    provenance.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        provenance.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
