"""The TPU kernel, interpreted on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax.kernels.retrieval_entropy import pallas_tpu, partial, xla
from tests.kernels.retrieval_entropy import oracle


@functools.partial(jax.jit, static_argnames="top_k")
def call(query, bank, temperature, top_k):
    summary = pallas_tpu.summary(query, bank, 1 / temperature, top_k, interpret=True)
    return partial.finish(summary)[:4]


def check(got, wanted):
    for a, b in zip(got[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(got[3], wanted[3])


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "dim", "top_k"),
    [(1, 1, 3, 5), (3, 513, 17, 5), (130, 4500, 8, 40)],  # over one tile, over one row of lanes
)
def test_agrees_with_float64(num_queries, num_keys, dim, top_k):
    query, keys, mask = oracle.bank(0, num_queries, num_keys, dim, masked=num_keys > 1)
    if mask is not None:
        mask[:128], mask[300] = False, True  # whole blocks gone
        keys[300] = keys[np.flatnonzero(mask)[-1]]  # a tie
        keys[~mask] = np.nan
    wanted = oracle.retrieval_entropy(query, keys, mask, temperature=0.5, top_k=top_k)
    check(call(query, xla.Bank(jnp.asarray(keys), mask=mask), 0.5, top_k), wanted)


def test_int8_rows_times_their_scales():
    rng = np.random.default_rng(3)
    keys = rng.integers(-127, 128, (700, 32), np.int8)
    scales = rng.normal(size=700).astype(np.float32) / 127
    scales[7] = 0.0
    query = np.asarray(jnp.asarray(rng.normal(size=(2, 32)), jnp.bfloat16), np.float32)
    whole = keys.astype(np.float64) * scales[:, None]
    wanted = oracle.retrieval_entropy(query, whole, None, temperature=1.0, top_k=4)
    check(call(query, xla.Bank(keys, scales), 1.0, 4), wanted)


def test_no_valid_slot():
    query, keys, _ = oracle.bank(5, 2, 70, 4)
    out = call(query, xla.Bank(keys, mask=np.zeros(70, bool)), 1.0, 3)
    for value, wanted in zip(out, (-np.inf, 0.0, -np.inf, -1), strict=True):
        np.testing.assert_array_equal(value, np.full_like(value, wanted))


def test_logits_of_ten_thousand():
    keys = np.array([[1e4], [-1e4], [1e4], [0.0]], np.float32)
    log_z, entropy, top, indices = call(np.ones((1, 1), np.float32), xla.Bank(keys), 1.0, 4)
    np.testing.assert_allclose(log_z, 1e4 + np.log(2), rtol=1e-6)
    np.testing.assert_allclose(entropy, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(indices, [[0, 2, 3, 1]])
    np.testing.assert_array_equal(top, [[1e4, 1e4, 0.0, -1e4]])
