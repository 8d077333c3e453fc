"""The TPU kernel compiled ahead of time for TPUs that are not there."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from mmmem_jax.kernels.retrieval_entropy import retrieval_entropy, sharded

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install libtpu"
)


@pytest.fixture(autouse=True)
def no_metadata_server(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")


def compiled(function, *arrays):
    return jax.jit(function).lower(*arrays).compile()


@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8])
def test_the_bank_is_read_once_and_never_copied(name, dtype):
    device = topologies.get_topology_desc(name, platform="tpu").devices[0]

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def call(query, keys, scales, mask):
        return retrieval_entropy(
            query, keys, mask, scales=scales if dtype == jnp.int8 else None,
            temperature=0.1, top_k=5, implementation="pallas_tpu",
        )  # fmt: skip

    keys = array((1_000_001, 384), dtype)
    program = compiled(
        call,
        array((3, 384), jnp.float32),
        keys,
        array((keys.shape[0],), jnp.float32),
        array((keys.shape[0],), jnp.bool_),
    )
    size = keys.size * keys.dtype.itemsize
    assert program.memory_analysis().temp_size_in_bytes < 0.2 * size
    assert program.cost_analysis()["bytes accessed"] < 1.7 * size  # twice would be 2
    assert "tpu_custom_call" in program.as_text()


def test_a_hundred_million_keys_on_eight_devices():
    devices = topologies.get_topology_desc("v5p:2x2x2", platform="tpu").devices
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def call(query, keys):
        return sharded.retrieval_entropy(
            query, keys, mesh=mesh, axis="data", temperature=0.1, top_k=32,
            implementation="pallas_tpu",
        )  # fmt: skip

    query = array((8, 1024), jnp.float32, P())
    program = compiled(call, query, array((100_000_000, 1024), jnp.bfloat16, P("data")))
    memory = program.memory_analysis()
    bank = 100_000_000 * 1024 * 2 / len(devices)
    assert bank <= memory.argument_size_in_bytes < 1.01 * bank
    assert memory.temp_size_in_bytes < 0.05 * bank
