"""Programs compiled ahead of time for TPUs that are not there: one read of the bank, and no copy.

python -m pytest -m aot    # needs libtpu (the extra `aot`), and no TPU
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from mmmem_jax.kernels.retrieval_entropy import retrieval_entropy, sharded

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install 'mmmem_jax[aot]'",
    ),
]
COLLECTIVE = re.compile(
    r" = (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2, "s8": 1}


@pytest.fixture(autouse=True)
def no_tpu_here(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # of no metadata server
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU that another process may hold


def devices(name):
    return topologies.get_topology_desc(name, platform="tpu").devices


def collective_bytes(program) -> int:
    """Of the results of all collectives of a compiled program, per device."""
    shapes = (
        shape
        for result in COLLECTIVE.findall(program.as_text())
        for shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
    )
    return sum(
        BYTES[kind] * int(np.prod([int(n) for n in size.split(",") if n])) for kind, size in shapes
    )


def compiled(name, num_queries, num_keys, dim, dtype):
    """The kernel for one device, with a mask, and scales if int8; and its bank's bytes."""
    sharding = SingleDeviceSharding(devices(name)[0])
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)

    def call(query, keys, mask, scales):
        return retrieval_entropy(
            query, keys, mask, scales=scales, temperature=0.1, top_k=5,
            implementation="pallas_tpu",
        )  # fmt: skip

    keys = array((num_keys, dim), dtype)
    mask = array((num_keys,), jnp.bool_)
    scales = array((num_keys,), jnp.float32) if dtype == jnp.int8 else None
    query = array((num_queries, dim), jnp.float32)
    program = jax.jit(call).lower(query, keys, mask, scales).compile()
    assert "tpu_custom_call" in program.as_text()
    return program, keys.size * keys.dtype.itemsize


@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize(
    ("dtype", "most"), [(jnp.bfloat16, 1.03), (jnp.float32, 1.02), (jnp.int8, 1.07)]
)
def test_the_bank_is_read_once_and_never_copied(name, dtype, most):
    program, size = compiled(name, 1, 1_000_001, 1024, dtype)
    assert program.memory_analysis().temp_size_in_bytes < 0.02 * size
    assert size < program.cost_analysis()["bytes accessed"] < most * size


def test_vmap_over_queries_reads_the_bank_once_too():
    array = functools.partial(
        jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(devices("v5e:2x2")[0])
    )

    def call(query, keys):
        return retrieval_entropy(
            query, keys, temperature=0.1, top_k=1, implementation="pallas_tpu"
        )[:2]

    keys = array((1_000_000, 1024), jnp.bfloat16)
    program = jax.jit(jax.vmap(call, (0, None))).lower(array((3, 2, 1024), jnp.float32), keys)
    assert program.compile().cost_analysis()["bytes accessed"] < 1.1 * keys.size * 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8])
def test_any_size_compiles(dtype):
    for num_queries, num_keys, dim in ((1, 1, 3), (130, 4099, 100)):
        compiled("v5e:2x2", num_queries, num_keys, dim, dtype)


@pytest.mark.parametrize(
    ("name", "dim", "gigabytes"), [("v5e:2x4", 384, 16), ("v5p:2x2x2", 1024, 95)]
)
def test_a_hundred_million_keys_fit_eight_devices(name, dim, gigabytes):
    mesh = Mesh(devices(name), ("data",), axis_types=(AxisType.Auto,))
    array = lambda shape, dtype, spec: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )

    @jax.jit
    def call(query, keys):
        return sharded.retrieval_entropy(
            query, keys, mesh=mesh, axis="data", temperature=0.1, top_k=32,
            implementation="pallas_tpu",
        )  # fmt: skip

    keys = array((100_000_000, dim), jnp.bfloat16, P("data"))
    program = call.lower(array((8, dim), jnp.float32, P()), keys).compile()
    bank = keys.size * 2 / mesh.size
    memory = program.memory_analysis()
    assert bank <= memory.argument_size_in_bytes < 1.01 * bank
    assert memory.temp_size_in_bytes < 0.05 * bank
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert total < 0.9 * gigabytes * 1e9
    # Of each query and device m, l, t and the top 32: gathered, a second time where asynchronous.
    summaries = 8 * 8 * (3 + 2 * 32) * 4
    assert summaries <= collective_bytes(program) <= 3 * summaries
