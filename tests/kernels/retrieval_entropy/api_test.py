import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax.kernels.retrieval_entropy import api, mosaic_gpu, retrieval_entropy, xla
from tests.kernels.retrieval_entropy import oracle

SIZES = [(1, 1, 3, False, False), (3, 300, 17, True, False), (3, 300, 17, True, True)]

jitted = jax.jit(retrieval_entropy, static_argnames=("top_k", "implementation"))


@pytest.fixture(params=["reference", "xla", "xla in parts"])
def call(request, monkeypatch):
    """`retrieval_entropy` by each implementation, XLA also over parts of 64 scores."""
    if request.param == "xla in parts":
        monkeypatch.setattr(xla, "MAX_SCORES", 64)
    call = functools.partial(retrieval_entropy, implementation=request.param.split()[0])
    return jax.jit(call, static_argnames="top_k")  # anew, since the parts' size is no argument


def check(got, wanted, atol=2e-5):
    for a, b in zip(got[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=2e-5, atol=atol)
    np.testing.assert_array_equal(np.asarray(got[3]), wanted[3])


class TestValues:
    @pytest.mark.parametrize(("num_queries", "num_keys", "dim", "masked", "own"), SIZES)
    def test_agree_with_float64(self, call, num_queries, num_keys, dim, masked, own):
        args = oracle.bank(0, num_queries, num_keys, dim, masked=masked, own=own)
        kwargs = {"temperature": 0.7, "top_k": 5}  # more than N = 1
        check(call(*args, **kwargs), oracle.retrieval_entropy(*args, **kwargs))

    def test_a_mask_of_each_query_over_a_shared_bank(self, call):
        query, keys, _ = oracle.bank(1, 3, 100, 8)
        mask = np.random.default_rng(1).random((3, 100)) < 0.5
        mask[1] = False
        wanted = oracle.retrieval_entropy(query, keys, mask, temperature=1.0, top_k=9)
        check(call(query, keys, mask, temperature=1.0, top_k=9), wanted)

    def test_bfloat16_is_exact_of_rounded_inputs(self, call):
        query, keys, mask = oracle.bank(2, 2, 90, 32)
        keys = jnp.asarray(keys, jnp.bfloat16)
        rounded = np.asarray(jnp.asarray(query, jnp.bfloat16), np.float32)
        wanted = oracle.retrieval_entropy(rounded, keys, mask, temperature=0.5, top_k=4)
        check(call(query, keys, mask, temperature=0.5, top_k=4), wanted)

    def test_int8_rows_times_their_scales(self, call):
        rng = np.random.default_rng(3)
        keys = rng.integers(-127, 128, (90, 32), np.int8)
        scales = rng.random(90).astype(np.float32) / 127
        query = np.asarray(jnp.asarray(rng.normal(size=(2, 32)), jnp.bfloat16), np.float32)
        whole = keys.astype(np.float64) * scales[:, None]
        wanted = oracle.retrieval_entropy(query, whole, None, temperature=1.0, top_k=4)
        check(call(query, keys, scales=scales, temperature=1.0, top_k=4), wanted)

    def test_read_out(self, call):
        query, keys, mask = oracle.bank(4, 3, 200, 8)
        values = np.random.default_rng(4).normal(size=(200, 6)).astype(np.float32)
        values[~mask] = np.nan
        *got, read = call(query, keys, mask, temperature=0.5, top_k=3, values=values)
        p = oracle.softmax(oracle.scores(query, keys, mask, 0.5))
        np.testing.assert_allclose(read, p[:, mask] @ values[mask], rtol=1e-5, atol=1e-5)
        check(got, oracle.retrieval_entropy(query, keys, mask, temperature=0.5, top_k=3))


class TestEdges:
    def test_no_valid_slot(self, call):
        query, keys, _ = oracle.bank(5, 2, 70, 4)
        out = call(query, keys, np.zeros(70, bool), temperature=1.0, top_k=3)
        for value, wanted in zip(out, (-np.inf, 0.0, -np.inf, -1), strict=True):
            np.testing.assert_array_equal(value, np.full_like(value, wanted))

    def test_nan_in_masked_slots_stays_there(self, call):
        query, keys, mask = oracle.bank(6, 2, 130, 4)
        bad = np.where(mask[:, None], keys, np.nan)
        wanted = oracle.retrieval_entropy(query, keys, mask, temperature=1.0, top_k=3)
        check(call(query, bad, mask, temperature=1.0, top_k=3), wanted)

    def test_of_equal_scores_the_lowest_index_first(self, call):
        keys = np.zeros((150, 4), np.float32)
        keys[[20, 77, 140], 0] = 1.0
        query = np.eye(4, dtype=np.float32)[:1]
        out = call(query, keys, None, temperature=1.0, top_k=6)
        np.testing.assert_array_equal(out[3], [[20, 77, 140, 0, 1, 2]])

    def test_logits_of_ten_thousand(self, call):
        keys = np.array([[1e4], [-1e4], [1e4], [0.0]], np.float32)
        log_z, entropy, top, indices = call(
            np.ones((1, 1), np.float32), keys, None, temperature=1.0, top_k=4
        )
        np.testing.assert_allclose(log_z, 1e4 + np.log(2), rtol=1e-6)
        np.testing.assert_allclose(entropy, np.log(2), rtol=1e-6)
        np.testing.assert_array_equal(indices, [[0, 2, 3, 1]])
        np.testing.assert_array_equal(top, [[1e4, 1e4, 0.0, -1e4]])

    @given(st.integers(0, 40), st.integers(0, 10**6), st.floats(1e-3, 1e3))
    @settings(max_examples=25, deadline=None)
    def test_entropy_lies_between_none_and_log_n(self, num_valid, seed, temperature):
        query, keys, _ = oracle.bank(seed, 2, 40, 3)
        args = query, keys, np.random.default_rng(seed).permutation(40) < num_valid
        out = jitted(*args, temperature=temperature, top_k=5, implementation="xla")
        wanted = oracle.retrieval_entropy(*args, temperature=temperature, top_k=5)
        scale = np.abs(np.nan_to_num(wanted[2], neginf=0)).max()  # what a logit's rounding may do
        check(out, wanted, atol=2e-5 * max(1.0, scale))
        assert (np.asarray(out[1]) >= 0).all()
        assert (np.asarray(out[1]) <= np.log(max(num_valid, 1)) + 1e-5).all()


class TestGradients:
    """The whole of them is in derivatives_test.py."""

    def test_of_entropy_and_log_z_are_the_analytic_ones(self):
        query, keys, mask = oracle.bank(7, 2, 150, 6)
        s = oracle.scores(query, keys, mask, 0.5)
        p = oracle.softmax(s)
        log_z, entropy, *_ = oracle.retrieval_entropy(query, keys, mask, temperature=0.5, top_k=1)
        log_p = np.where(p > 0, s - log_z[:, None], 0)
        weights = np.array([[0.3], [-1.1]])
        for output, ds in ((0, p), (1, -p * (log_p + entropy[:, None]))):

            def loss(query, keys, output=output):
                return jnp.sum(
                    weights[:, 0] * jitted(query, keys, mask, temperature=0.5, top_k=2)[output]
                )

            d_query, d_keys = jax.jit(jax.grad(loss, argnums=(0, 1)))(query, keys)
            ds = weights * ds / 0.5
            np.testing.assert_allclose(d_query, ds @ keys.astype(float), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(d_keys, ds.T @ query.astype(float), rtol=1e-4, atol=1e-5)


class TestTransformations:
    def test_jit_and_vmap_change_nothing(self, call):
        banks = [oracle.bank(seed, 2, 90, 5) for seed in range(3)]
        one = functools.partial(call, temperature=0.5, top_k=4)
        many = jax.jit(jax.vmap(one))(*(np.stack(x) for x in zip(*banks, strict=True)))
        for i, args in enumerate(banks):
            check([x[i] for x in many], oracle.retrieval_entropy(*args, temperature=0.5, top_k=4))

    def test_temperature_may_be_traced(self, call):
        args = oracle.bank(0, 2, 90, 5)
        out = jax.jit(lambda t: call(*args, temperature=t, top_k=4))(0.3)
        check(out, oracle.retrieval_entropy(*args, temperature=0.3, top_k=4))


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"query": np.ones((2, 3), np.float32)}, "need query"),
            ({"keys": np.ones((9, 4), np.float16)}, "float32, bfloat16 or int8"),
            ({"keys": np.ones((9, 4), np.int8)}, "int8 keys need them"),
            ({"scales": np.ones(9, np.float32)}, "scales belong to int8"),
            ({"mask": np.ones(8, bool)}, "mask is bool"),
            ({"mask": np.ones(9, np.float32)}, "mask is bool"),
            ({"values": np.ones((8, 2), np.float32)}, "values"),
            ({"top_k": 0}, "top_k"),
            ({"implementation": "triton"}, "implementation is one of"),
            ({"implementation": "mosaic_gpu"}, "bfloat16 alone"),
        ],
    )
    def test_is_named(self, change, says):
        query, keys = np.ones((2, 4), np.float32), np.ones((9, 4), np.float32)
        kwargs = {"query": query, "keys": keys, "temperature": 1.0, "top_k": 2} | change
        with pytest.raises(ValueError, match=says):
            retrieval_entropy(**kwargs)


class TestChoice:
    def test_takes_xla_where_nothing_was_measured(self, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(mosaic_gpu, "runs_here", lambda: True)
        monkeypatch.setattr(api, "measurements", lambda: [])
        bank = xla.Bank(jax.ShapeDtypeStruct((4096, 128), jnp.bfloat16))
        assert api.choose((1, 128), bank, 5) == "xla"

    def test_takes_the_fastest_of_the_nearest_size(self, monkeypatch):
        kind = jax.devices()[0].device_kind

        def row(queries, keys, xla_us, mosaic_us):
            times = {"xla": xla_us, "mosaic_gpu": mosaic_us}
            size = {"queries": queries, "keys": keys, "dim": 128, "top_k": 5}
            return size | {"device": kind, "dtype": "bfloat16", "microseconds": times}

        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(mosaic_gpu, "runs_here", lambda: True)
        monkeypatch.setattr(api, "measurements", lambda: [row(1, 4096, 9, 5), row(64, 4096, 5, 9)])
        bank = xla.Bank(jax.ShapeDtypeStruct((4096, 128), jnp.bfloat16))
        assert api.choose((2, 128), bank, 5) == "mosaic_gpu"
        assert api.choose((32, 128), bank, 5) == "xla"
        unaligned = xla.Bank(jax.ShapeDtypeStruct((4097, 128), jnp.bfloat16))
        assert api.choose((2, 128), unaligned, 5) == "xla"

    def test_the_table_names_what_it_was_measured_on(self):
        for row in api.measurements():
            assert row["device"]
            assert min(row["microseconds"].values()) > 0
            assert set(row["microseconds"]) <= set(api.IMPLEMENTATIONS)
