"""Slot arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax.memory import slots


@pytest.mark.parametrize(
    ("strength", "age", "valid", "expected"),
    [
        ([3, 1, 2], [0, 0, 0], [1, 1, 1], 1),
        ([1, 1, 1], [5, 3, 4], [1, 1, 1], 1),  # a tie goes to the oldest
        ([0, 1, 2], [0, 0, 0], [1, 1, 0], 2),  # an empty slot comes before the weakest
        ([0, 9, 9], [0, 2, 1], [1, 0, 0], 2),
    ],
)
def test_weakest(strength, age, valid, expected):
    arrays = (np.array(strength, np.float32), np.array(age, np.float32), np.array(valid, bool))
    assert int(slots.weakest(*map(jnp.asarray, arrays))) == expected


@pytest.mark.parametrize("enabled", [True, False])
def test_write_touches_one_row_or_none(enabled):
    tree = {"a": jnp.arange(6.0).reshape(3, 2), "b": jnp.arange(3)}
    values = {"a": jnp.array([8.0, 9.0]), "b": 7.0}
    out = slots.write(tree, jnp.asarray(1), values, jnp.asarray(enabled))
    expected = [[8.0, 9.0], 7] if enabled else [[2.0, 3.0], 1]
    assert [out["a"][1].tolist(), int(out["b"][1])] == expected
    others = jnp.array([0, 2])
    assert all(np.array_equal(out[k][others], tree[k][others]) for k in tree)
    assert all(out[k].dtype == tree[k].dtype for k in tree)


def test_cosine_is_zero_where_a_vector_is():
    a = jnp.array([[3.0, 4.0], [0.0, 0.0], [-3.0, -4.0]])
    np.testing.assert_allclose(slots.cosine(a, jnp.array([6.0, 8.0])), [1, 0, -1], atol=1e-6)
    assert slots.cosine(a, jnp.zeros(2)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", ["few values", "any"])
def test_argmin_is_the_first_smallest(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 7)).astype(np.float32)
    if dtype == "few values":
        x = rng.choice(np.float32([-np.inf, -1, 0, 2, np.inf]), size=(200, 7))
    assert np.array_equal(jax.vmap(slots.argmin)(x), np.argmin(x, -1))
    assert np.array_equal(jax.vmap(slots.argmax)(x), np.argmax(x, -1))


def test_unit_keeps_directions_and_zero():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(slots.unit(x), [[0.6, 0.8], [0.0, 0.0]], atol=1e-6)


def test_a_known_norm_gives_the_same_cosine():
    a, b = jnp.array([[1.0, 2.0], [-3.0, 0.5]]), jnp.array([0.3, -2.0])
    norm = jnp.linalg.norm(a, axis=-1)
    assert np.array_equal(slots.cosine(a, b, norm), slots.cosine(a, b))


def test_only_marks_one_or_none():
    assert slots.only(jnp.asarray(1), jnp.asarray(True), 3).tolist() == [False, True, False]
    assert slots.only(jnp.asarray(1), jnp.asarray(False), 3).tolist() == [False, False, False]
