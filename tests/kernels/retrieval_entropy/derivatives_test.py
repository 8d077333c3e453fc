"""Forward mode, and its agreement with reverse mode, under every transformation and over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mmmem_jax.kernels.retrieval_entropy import pallas_tpu, retrieval_entropy, sharded, xla
from tests.kernels.retrieval_entropy import oracle

B, N, D, K, V = 2, 152, 6, 3, 2


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "group"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(params=["reference", "xla", "xla in parts", "pallas_tpu", "sharded in parts"])
def function(request, monkeypatch, mesh):
    """`retrieval_entropy` by each implementation; parts are of 64 scores, or of 10 per device."""
    name = request.param
    if "parts" in name:
        monkeypatch.setattr(xla, "MAX_SCORES", 64 if "xla" in name else 20)
    if name == "pallas_tpu":
        summary = functools.partial(pallas_tpu.summary, interpret=True)
        monkeypatch.setattr(pallas_tpu, "summary", summary)
    if name == "sharded in parts":
        return functools.partial(sharded.retrieval_entropy, mesh=mesh, axis=("data", "group"))
    return functools.partial(retrieval_entropy, implementation=name.split()[0])


@pytest.fixture(scope="module")
def case():
    """A point (query, keys, temperature), a direction, the mask, weights of the outputs."""
    query, keys, mask = oracle.bank(11, B, N, D)
    keys[~mask] = np.nan
    rng = np.random.default_rng(11)
    point = query, keys, np.float32(0.8)
    directions = tuple(rng.normal(size=np.shape(x)).astype(np.float32) for x in point)
    weights = rng.normal(size=B), rng.normal(size=B), rng.normal(size=(B, K))
    return point, directions, mask, [w.astype(np.float32) for w in weights]


def weighted(function, mask, weights):
    """A scalar of all differentiable outputs."""

    def loss(query, keys, temperature):
        out = function(query, keys, mask, temperature=temperature, top_k=K)
        return sum((w * x).sum() for w, x in zip(weights, out[:3], strict=True))

    return loss


def slope(function, point, directions, h=1e-6):
    """Directional derivative of a NumPy function by differences in float64."""
    ahead, back = (
        function(*(np.asarray(x, float) + s * d for x, d in zip(point, directions, strict=True)))
        for s in (h, -h)
    )
    return (ahead - back) / (2 * h)


def dot(a, b):
    return sum(np.vdot(np.nan_to_num(np.asarray(x, float)), y) for x, y in zip(a, b, strict=True))


def test_jvp_is_the_slope_in_float64_and_the_gradient_times_the_direction(function, case):
    point, directions, mask, weights = case
    loss = weighted(function, mask, weights)
    value, forward = jax.jit(functools.partial(jax.jvp, loss))(point, directions)
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))(*point)
    exact = weighted(oracle.retrieval_entropy, mask, weights)
    np.testing.assert_allclose(value, exact(*point), rtol=1e-5)
    np.testing.assert_allclose(forward, slope(exact, point, directions), rtol=1e-4)
    assert all(np.isfinite(g).all() for g in gradient)  # though masked keys are NaN
    np.testing.assert_allclose(dot(gradient, directions), forward, rtol=1e-4)


def test_hessian_between_two_directions_is_the_second_difference(function, case):
    """Forward over reverse."""
    point, directions, mask, weights = case
    gradient = jax.grad(weighted(function, mask, weights), (0, 1, 2))
    product = jax.jit(lambda *args: jax.jvp(gradient, *args)[1])(point, directions)
    exact = weighted(oracle.retrieval_entropy, mask, weights)
    slopes = (
        slope(exact, [x + s * d for x, d in zip(point, directions, strict=True)], directions)
        for s in (np.float64(1e-4), np.float64(-1e-4))
    )
    wanted = np.subtract(*slopes) / 2e-4
    np.testing.assert_allclose(dot(product, directions), wanted, rtol=1e-3)


def test_vmap_of_the_gradient_is_the_gradient_of_each(function, case):
    (query, keys, temperature), directions, mask, weights = case
    if function.func is sharded.retrieval_entropy:
        pytest.skip("a bank over the mesh is one bank")
    gradient = jax.grad(weighted(function, mask, weights), (0, 1, 2))
    queries = np.stack([query, directions[0]])
    many = jax.jit(jax.vmap(gradient, (0, None, None)))(queries, keys, temperature)
    for i, one in enumerate(queries):
        for a, b in zip(many, jax.jit(gradient)(one, keys, temperature), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [False, True])
def test_under_shard_map_queries_may_be_split(mesh, monkeypatch, parts):
    """Each device has one of the queries; the gradient of the keys is the sum over all."""
    if parts:
        monkeypatch.setattr(xla, "MAX_SCORES", 20)
    query, keys, mask = oracle.bank(12, 8, N, D)

    def loss(query, keys):
        out = retrieval_entropy(query, keys, mask, temperature=0.8, top_k=K, implementation="xla")
        return sum(jnp.sum(jnp.sin(x)) for x in out[:3])

    def split(query, keys):
        return jax.lax.psum(loss(query, keys), ("data", "group"))

    specs = P(("data", "group")), P()
    mapped = jax.shard_map(split, mesh=mesh, in_specs=specs, out_specs=P())
    got = jax.jit(jax.value_and_grad(mapped, (0, 1)))(query, keys)
    wanted = jax.jit(jax.value_and_grad(loss, (0, 1)))(query, keys)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["own banks", "values", "int8"])
def test_forward_and_reverse_agree_with_the_oracle_on_other_banks(kind, monkeypatch):
    monkeypatch.setattr(xla, "MAX_SCORES", 64)
    rng = np.random.default_rng(13)
    query, keys, mask = oracle.bank(13, B, N, D, own=kind == "own banks")
    kwargs = {"temperature": 0.8, "top_k": K}
    if kind == "int8":
        keys = rng.integers(-127, 128, (N, D), np.int8)
        query = np.asarray(jnp.asarray(query, jnp.bfloat16), np.float32)
        more = {"scales": np.where(mask, rng.random(N) / 127, np.nan)}
    else:
        keys[~mask] = np.nan
        more = {"keys": keys}
    if kind == "values":
        more |= {"values": np.where(mask[:, None], rng.normal(size=(N, V)), np.nan)}
    point = {"query": query} | {name: x.astype(np.float32) for name, x in more.items()}
    directions = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in point.items()}

    def loss(implementation, point):
        args = {"keys": keys, "mask": mask} | kwargs | point
        out = retrieval_entropy(**args, implementation=implementation)
        return sum(jnp.sum(jnp.sin(x)) for x in out if x.dtype == jnp.float32)

    by_xla = functools.partial(loss, "xla")
    forward = jax.jit(lambda *args: jax.jvp(by_xla, *args)[1])((point,), (directions,))
    gradient = jax.jit(jax.grad(by_xla))(point)
    clean = jax.tree.map(np.nan_to_num, point)
    wanted = jax.jit(jax.grad(functools.partial(loss, "reference")))(clean)
    for name in point:
        rtol = 5e-3 if kind == "int8" else 1e-4  # of the oracle, whose products are rounded twice
        np.testing.assert_allclose(gradient[name], wanted[name], rtol=rtol, atol=1e-4)
    product = dot(map(gradient.get, point), map(directions.get, point))
    np.testing.assert_allclose(forward, product, rtol=1e-4)


def test_the_gradient_keeps_no_scores_of_a_part(monkeypatch):
    monkeypatch.setattr(xla, "MAX_SCORES", 16 * 10_000)

    def loss(query, keys):
        return retrieval_entropy(query, keys, temperature=0.1, top_k=5, implementation="xla")[
            1
        ].sum()

    arrays = [jax.ShapeDtypeStruct((n, 8), jnp.float32) for n in (16, 205_000)]
    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile().memory_analysis()
    all_scores = 4 * 16 * 205_000
    assert memory.temp_size_in_bytes < all_scores / 3
