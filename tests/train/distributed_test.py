"""Tests of mmmem_jax/train/distributed.py in one process: who takes part, and who holds what."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from mmmem_jax.errors import UserError
from mmmem_jax.train import distributed

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-4]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
}  # fmt: skip
NOTHING = {"coordinator_address": None, "num_processes": None, "process_id": None}
FLAGS = {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1}
VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "other:99", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0",
}  # fmt: skip
EXPLICIT = {"cluster_detection_method": "deactivate"}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"},  # sbatch without srun
        SLURM | {"SLURM_NTASKS": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod, but of no indexed Job
        {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "1"},
        VARIABLES | {"JAX_NUM_PROCESSES": "1"},
    ],
)
def test_a_process_by_itself_starts_nothing(environ):
    assert distributed.arguments(NOTHING, environ) is None


@pytest.mark.parametrize(
    "environ",
    [
        SLURM,
        {"TPU_WORKER_HOSTNAMES": "a,b,c,d"},
        {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
        {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_in_a_cluster_jax_finds_out(environ):
    assert distributed.arguments(NOTHING, environ) == {}


def test_flags_win_over_variables_and_these_over_a_cluster():
    variables = {"coordinator_address": "other:99", "num_processes": 3, "process_id": 0}
    assert distributed.arguments(FLAGS, VARIABLES | SLURM) == FLAGS | EXPLICIT
    assert distributed.arguments(NOTHING, VARIABLES | SLURM) == variables | EXPLICIT
    only_id = NOTHING | {"process_id": 2}
    assert distributed.arguments(only_id, VARIABLES) == variables | {"process_id": 2} | EXPLICIT


@pytest.mark.parametrize(
    ("given", "environ", "says"),
    [
        ({"process_id": 1}, {}, "needs --coordinator or JAX_COORDINATOR_ADDRESS and --num_proc"),
        ({"coordinator_address": "h:1", "num_processes": 2}, {}, "needs --process_id or JAX_PROC"),
        (FLAGS | {"process_id": 2}, {}, "--process_id is 2; of 2 processes"),
        (FLAGS | {"coordinator_address": "host"}, {}, "'host'; it must be HOST:PORT"),
        ({}, VARIABLES | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID. is 'one'; it must be a numb"),
    ],
)
def test_what_cannot_be_is_said(given, environ, says):
    with pytest.raises(UserError, match=says):
        distributed.arguments(NOTHING | given, environ)


def test_an_indexed_job_must_say_how_many(monkeypatch):
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="set JAX_COORDINATOR_ADDRESS"):
        distributed.arguments(NOTHING, pod)
    assert distributed.arguments(NOTHING, pod | VARIABLES) is not None
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    assert distributed.arguments(NOTHING, pod) == {}


def mesh_of(data: int) -> Mesh:
    devices = np.array(jax.devices()[:data]).reshape(data, 1)
    return Mesh(devices, ("data", "group"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(("data", "batch_size"), [(1, 3), (4, 8), (4, 6)])
def test_one_process_holds_every_row(data, batch_size):
    split = distributed.split_batch(mesh_of(data), batch_size)
    rows = distributed.local_rows(split, batch_size)
    np.testing.assert_array_equal(rows, np.arange(batch_size))
    batch = {"x": np.arange(batch_size * 2.0).reshape(batch_size, 2)}
    put = distributed.put_batch(split)(batch)
    assert len({str(s.index) for s in put["x"].addressable_shards}) == (
        data if batch_size == 8 else 1
    )
    np.testing.assert_array_equal(distributed.to_host(put)["x"], batch["x"])
    assert distributed.to_local(put)["x"].devices() == {jax.devices()[0]}


def test_a_process_that_jax_aborts_says_why():
    code = (
        "import os; from mmmem_jax.train import distributed;"
        "say = distributed.make_speaker(); say('first words'); say('last words'); os.{}"
    )
    for ending, words in (
        ("abort()", "last words"),
        ("_exit(3)", ""),
        ("kill(os.getpid(), 9)", ""),
    ):
        command = [sys.executable, "-c", code.format(ending)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        assert done.stderr.strip() == words
