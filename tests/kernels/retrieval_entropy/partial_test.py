import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax.kernels.retrieval_entropy import partial, xla
from tests.kernels.retrieval_entropy import oracle

merge = jax.jit(partial.merge)
top_k = jax.jit(partial.top_k, static_argnums=1)


@pytest.mark.parametrize(
    ("size", "k"), [(5, 32), (16_384, 5), (16_385, 1), (70_001, 5), (70_001, 32)]
)
def test_top_k_of_long_rows_is_that_of_a_stable_sort(size, k):
    scores = np.random.default_rng(size).integers(0, 50, (2, size)).astype(np.float32)  # many ties
    scores[1, 3:] = -np.inf
    values, indices = top_k(scores, k)
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    wanted = np.take_along_axis(scores, order, -1)
    pad = ((0, 0), (0, k - order.shape[-1]))
    np.testing.assert_array_equal(values, np.pad(wanted, pad, constant_values=-np.inf))
    order = np.where(np.isneginf(wanted), -1, order)
    np.testing.assert_array_equal(indices, np.pad(order, pad, constant_values=-1))


@pytest.mark.parametrize(("size", "k"), [(5, 32), (400, 30), (2047, 30), (2048, 1), (1800, 30)])
def test_tile_by_tile_is_at_once(size, k, monkeypatch):
    monkeypatch.setattr(partial, "TILE", 600)  # two rows of 256 columns
    scores = np.random.default_rng(size).integers(0, 50, (2, size)).astype(np.float32)  # many ties
    scores[1, : size - 3] = -np.inf
    tiled, at_once = (
        jax.jit(functools.partial(f, k=k))(scores)
        for f in (partial._tile_by_tile, partial._at_once)
    )
    np.testing.assert_array_equal(tiled.top_values, at_once.top_values)
    np.testing.assert_array_equal(tiled.top_indices, at_once.top_indices)
    for x, y in zip(partial.finish(tiled)[:2], partial.finish(at_once)[:2], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@jax.jit
def summary(query, keys, mask):
    return xla.summary(query, xla.Bank(keys, mask=mask), jnp.float32(1.0), 4)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_merge_is_associative_and_gives_the_whole(seed):
    query, keys, mask = oracle.bank(seed, 2, 9, 3)
    parts = []
    for start in (0, 3, 6):
        part = summary(query, keys[start : start + 3], mask[start : start + 3])
        indices = jnp.where(part.top_indices < 0, -1, part.top_indices + start)
        parts.append(part._replace(top_indices=indices))
    a, b, c = parts
    wanted = oracle.retrieval_entropy(query, keys, mask, temperature=1.0, top_k=4)
    for whole in (merge(merge(a, b), c), merge(a, merge(b, c))):
        got = partial.finish(whole)
        for x, y in zip(got[:3], wanted[:3], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got[3], wanted[3])
