"""The Hopper kernel: interpreted on a CPU where JAX can, compiled where there is such a GPU."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmmem_jax.kernels.retrieval_entropy import blocks, mosaic_gpu, retrieval_entropy
from tests.kernels.retrieval_entropy import oracle

SHAPES = [(3, 1088, 64, True, 4), (1, 1088, 128, False, 4), (70, 1024, 64, True, 8)]


@pytest.fixture
def run():
    """A context in which the kernel runs here."""
    if mosaic_gpu.runs_here():
        return contextlib.nullcontext
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("no Hopper GPU, and this JAX cannot interpret Mosaic GPU kernels (0.11 can)")
    return plgpu.force_gpu_interpret_mode


def bank(num_queries, num_keys, dim, masked):
    query, keys, mask = oracle.bank(0, num_queries, num_keys, dim, masked=masked)
    if masked:
        mask[:64] = False  # whole blocks
        keys[~mask] = np.nan
    return jnp.asarray(query, jnp.bfloat16), jnp.asarray(keys, jnp.bfloat16), mask


@pytest.mark.parametrize(("num_queries", "num_keys", "dim", "masked", "block"), SHAPES)
def test_triples_of_each_block(run, num_queries, num_keys, dim, masked, block):
    query, keys, mask = bank(num_queries, num_keys, dim, masked)
    with run():
        m, mass, t = mosaic_gpu.block_triples(
            query,
            keys,
            None if mask is None else jnp.asarray(mask),
            jnp.float32(0.5),
            block=block,
            num_processors=2,  # several work items each
        )
    s = oracle.scores(query, keys, mask, 2.0).reshape(num_queries, -1, block)
    top = s.max(-1)
    d = np.where(np.isneginf(s), -np.inf, s - np.where(np.isneginf(top), 0, top)[..., None])
    p = np.exp(d)
    np.testing.assert_allclose(m.T, np.maximum(top, blocks.LOWEST), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mass.T, p.sum(-1), rtol=1e-5)
    np.testing.assert_allclose(t.T, (p * np.where(p > 0, d, 0)).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [5, 200])
def test_whole_result_agrees_with_float64(run, top_k):
    query, keys, mask = bank(2, 1088, 64, True)
    keys = keys.at[700].set(keys[np.flatnonzero(mask)[0]])  # a tie, in another block
    mask[700] = True
    kwargs = {"temperature": 2.0, "top_k": top_k}
    with run():
        got = retrieval_entropy(
            query, keys, jnp.asarray(mask), implementation="mosaic_gpu", **kwargs
        )
    wanted = oracle.retrieval_entropy(query, keys, mask, **kwargs)
    for a, b in zip(got[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(got[3], wanted[3])


def test_no_valid_slot(run):
    query, keys, mask = bank(2, 512, 64, True)
    with run():
        out = retrieval_entropy(
            query, keys, jnp.zeros_like(mask), temperature=2.0, top_k=3, implementation="mosaic_gpu"
        )
    for value, wanted in zip(out, (-np.inf, 0.0, -np.inf, -1), strict=True):
        np.testing.assert_array_equal(value, np.full_like(value, wanted))


def test_logits_of_ten_thousand(run):
    keys = np.zeros((512, 64), np.float32)
    keys[[3, 400], 0], keys[[4, 401], 0] = 1.0, -1.0
    query = np.eye(64, dtype=np.float32)[:1]
    with run():
        log_z, entropy, top, indices = retrieval_entropy(
            jnp.asarray(query, jnp.bfloat16), jnp.asarray(keys, jnp.bfloat16),
            temperature=1e-4, top_k=3, implementation="mosaic_gpu",
        )  # fmt: skip
    np.testing.assert_allclose(log_z, 1e4 + np.log(2), rtol=1e-6)
    np.testing.assert_allclose(entropy, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(indices, [[3, 400, 0]])
    np.testing.assert_allclose(top, [[1e4, 1e4, 0.0]], rtol=1e-6)


@pytest.mark.parametrize(("num_queries", "num_keys", "dim"), [(1, 10_000, 1024), (100, 4096, 192)])
@pytest.mark.parametrize("masked", [False, True])
def test_lowers_for_cuda_anywhere(num_queries, num_keys, dim, masked):
    mask = jax.ShapeDtypeStruct((num_keys,), jnp.bool_) if masked else None
    arrays = [jax.ShapeDtypeStruct((n, dim), jnp.bfloat16) for n in (num_queries, num_keys)]
    call = functools.partial(
        retrieval_entropy, temperature=0.1, top_k=5, implementation="mosaic_gpu"
    )
    lowered = jax.jit(call).trace(*arrays, mask).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("num_keys", "wanted"), [(1_000_000, 20), (100_000, 4), (10_001, None), (496, None)]
)
def test_block_size_shares_the_work_of_132_processors(num_keys, wanted):
    assert mosaic_gpu.block_size(num_keys, 132) == wanted


def test_under_vmap_over_banks_xla_takes_over():
    query, keys, mask = bank(2, 1024, 64, True)
    call = functools.partial(retrieval_entropy, temperature=2.0, top_k=5)
    many = jax.vmap(functools.partial(call, implementation="mosaic_gpu"), in_axes=(None, 0, None))(
        query, jnp.stack([keys, 2 * keys]), jnp.asarray(mask)
    )
    for i, scale in enumerate((1, 2)):
        one = call(query, scale * keys, jnp.asarray(mask), implementation="xla")
        for a, b in zip(many, one, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)
