"""Tests of mmmem_jax/remote.py: a run whose workdir is in a bucket, of a store on the loopback."""

import json
import os
import subprocess
import sys

import pytest

from mmmem_jax import remote
from mmmem_jax.errors import UserError
from tests import fake_gcs
from tests.conftest import REPO

# Trains in a bucket, in two pieces, and in a folder, and compares; prints what both have.
SCRIPT = """
import sys
from pathlib import Path

import jax
import numpy as np

from mmmem_jax import remote
from mmmem_jax.errors import UserError
from mmmem_jax.train import checkpoints
from tests.train.trainer_test import CONFIG, fit, rows_of

bucket, folder = remote.folder("gs://bucket/runs/one"), Path(sys.argv[1])
for workdir in (bucket, folder):
    checkpoints.claim_workdir(workdir, CONFIG)
fit(bucket, 2)
states = [fit(workdir, 5) for workdir in (bucket, folder)]
jax.tree.map(np.testing.assert_array_equal, *states)
assert rows_of(bucket) == rows_of(folder)
assert len(rows_of(bucket)) == 5
for workdir in (bucket, folder):
    print(checkpoints.read_config(workdir), checkpoints.steps(workdir / "checkpoints" / "phase"))
try:
    checkpoints.check_workdir(bucket, {"seed": 1})
except UserError as error:
    print(error)
"""


def test_a_run_in_a_bucket_is_the_run_in_a_folder(tmp_path):
    pytest.importorskip("gcsfs", reason="gs:// needs the extra gcs")
    with fake_gcs.serve() as store:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            cwd=REPO, capture_output=True, text=True, timeout=240,
            env=os.environ | fake_gcs.environment(store),
        )  # fmt: skip
        found = {name for bucket, name in store.objects if bucket == "bucket"}
        config = json.loads(store.objects["bucket", "runs/one/config.json"][0])
    assert done.returncode == 0, done.stderr
    in_bucket, in_folder, refused = done.stdout.strip().splitlines()
    assert in_bucket == in_folder == "{'seed': 0} [4, 5]"
    assert refused.startswith("gs://bucket/runs/one belongs to another config (seed: 0 there")
    assert config == {"seed": 0}
    folders = {name.removeprefix("runs/one/").split("/")[0] for name in found}
    assert folders == {"checkpoints", "config.json", "metrics.jsonl", "tensorboard"}
    steps = {name.split("/")[4] for name in found if "/checkpoints/" in name}
    assert steps == {"4", "5"}


def test_only_folders_and_buckets_of_gs_are_known(monkeypatch):
    with pytest.raises(UserError, match="'s3://b/run' is neither a folder nor in a bucket"):
        remote.folder("s3://b/run")
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mmmem_jax\[gcs\]'"):
        remote.folder("gs://b/run")


def test_a_folder_is_a_path(tmp_path):
    path = remote.folder(str(tmp_path)) / "rows"
    for line in ("one", "two"):
        remote.append(path, line)
    assert path.read_text() == "one\ntwo\n"
    assert remote.absolute(path) == path
