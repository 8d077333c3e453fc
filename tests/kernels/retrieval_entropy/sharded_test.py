import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mmmem_jax.kernels.retrieval_entropy import retrieval_entropy, sharded
from tests.kernels.retrieval_entropy import oracle


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "group"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("axis", ["data", ("data", "group")])
def test_equals_one_device(mesh, axis):
    query, keys, mask = oracle.bank(0, 3, 160, 6)
    keys[100] = keys[np.flatnonzero(mask)[0]]  # a tie over two devices
    mask[100], mask[:40] = True, False  # a whole device's rows
    values = np.random.default_rng(0).normal(size=(160, 4)).astype(np.float32)
    over_mesh = functools.partial(sharded.retrieval_entropy, mesh=mesh, axis=axis)

    def loss(function, query, keys, values, temperature):
        out = function(query, keys, mask, temperature=temperature, top_k=7, values=values)
        return sum(jnp.sum(jnp.sin(x)) for x in out if x.dtype == jnp.float32), out

    def run(function):
        grad = jax.value_and_grad(functools.partial(loss, function), (0, 1, 2, 3), has_aux=True)
        return jax.jit(grad)(query, keys, values, 0.5)

    (_, got), got_grads = run(over_mesh)
    (_, wanted), wanted_grads = run(retrieval_entropy)
    np.testing.assert_array_equal(got[3], wanted[3])
    for a, b in zip((*got, *got_grads), (*wanted, *wanted_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # sums in another order


def test_no_device_holds_more_than_its_rows(mesh):
    """Planned without memory: float32 here, where a CPU would widen bfloat16."""
    shape = jax.ShapeDtypeStruct
    rows = NamedSharding(mesh, P(("data", "group")))
    keys = shape((8_000_000, 64), jnp.float32, sharding=rows)
    query = shape((2, 64), jnp.float32, sharding=NamedSharding(mesh, P()))
    call = functools.partial(
        sharded.retrieval_entropy, mesh=mesh, axis=("data", "group"), temperature=0.1, top_k=5
    )
    compiled = jax.jit(call).lower(query, keys).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes <= 1_000_000 * 64 * 4 + 4096
    assert memory.temp_size_in_bytes < 0.2 * memory.argument_size_in_bytes
    assert " all-gather" in compiled.as_text()
    assert "f32[8000000,64]" not in compiled.as_text()


def test_an_uneven_bank_is_named(mesh):
    query, keys, _ = oracle.bank(0, 2, 21, 4)
    with pytest.raises(ValueError, match="multiple of 4 rows"):
        sharded.retrieval_entropy(query, keys, mesh=mesh, axis="data", temperature=1.0, top_k=2)
