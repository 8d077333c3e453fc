"""A stand-in clone, and stand-ins of the commands that the launch scripts call."""

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

# Every stand-in writes down how it was called, then does as it is told: NAME of the folder of its
# state is a script.
RECORD = """#!/usr/bin/env bash
{ printf '%s\\037' "${0##*/}" "$@"; printf '\\036'; } >> "$CALLS"
STATE=${CALLS%/*}
"""


@dataclasses.dataclass
class Machine:
    """A clone, and the commands on PATH beside those of the system.

    Attributes:
      clone: has launch/; its name has a space.
      state: what the stand-ins keep.
    """

    clone: Path
    state: Path

    def command(self, name: str, body: str = "") -> Path:
        """Makes the stand-in `name`: bash that may use $STATE and "$@"."""
        path = self.state / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(RECORD + body)
        path.chmod(0o755)
        return path

    def run(self, *command: object, stdin: str = "", **env: str) -> subprocess.CompletedProcess:
        """Runs a command from the clone, with none of the settings of whoever runs the tests."""
        path = f"{self.state / 'bin'}:{os.environ['PATH']}"
        given = {"PATH": path, "HOME": str(self.state), "CALLS": str(self.state / "calls")}
        return subprocess.run(
            list(map(str, command)),
            cwd=self.clone,
            env=given | env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def launch(self, script: str, *args: object, **env: str) -> subprocess.CompletedProcess:
        return self.run("bash", f"launch/{script}", *args, **env)

    def git(self, folder: Path, *args: str) -> str:
        """Runs git with none of the settings of whoever runs the tests; returns what it prints."""
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
        done = self.run("git", "-C", folder, *who, *args, GIT_CONFIG_NOSYSTEM="1")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def calls(self, name: str = "") -> list[list[str]]:
        """What has been called since the last time, of the command `name` where one is given."""
        path = self.state / "calls"
        calls = path.read_text().split("\036")[:-1] if path.exists() else []
        path.unlink(missing_ok=True)
        calls = [call.split("\037")[:-1] for call in calls]
        return [call for call in calls if call[0] == name or not name]


@pytest.fixture
def machine(tmp_path) -> Machine:
    clone, state = tmp_path / "a clone", tmp_path / "state"
    shutil.copytree(REPO / "launch", clone / "launch")
    state.mkdir()
    (state / "bin").mkdir()
    return Machine(clone, state)
