"""Reading and writing through a cache in blocks, against one dense product."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from mmmem_jax.models.qwen3_vl import cached_attention, generate
from mmmem_jax.models.qwen3_vl.cached_attention import Past, attend_past, written
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL, Tokens, init_cache
from mmmem_jax.testing.qwen3_vl import TINY


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(cached_attention, "QUERY_BLOCK", 8)
    monkeypatch.setattr(cached_attention, "SLOT_BLOCK", 16)


def make_past(slots, length, *, rows=2, layers=3, heads=2, size=16, dtype=jnp.float32):
    """A cache of random numbers; each row has slots before `length` that do not count."""
    keys = jax.random.split(jax.random.key(slots), 3)
    shape = (layers, rows, slots, heads, size)
    valid = jax.random.bernoulli(keys[2], 0.7, (rows, slots)) | (jnp.arange(slots) >= length)
    stacks = [jax.random.normal(k, shape, dtype) for k in keys[:2]]
    return Past(*stacks, valid, jnp.int32(1), jnp.int32(length))


def new_tokens(past, count, *, groups=2):
    keys = jax.random.split(jax.random.key(count), 3)
    _, rows, _, heads, size = past.keys.shape
    query = jax.random.normal(keys[0], (rows, count, heads * groups, size), past.keys.dtype)
    key, value = (
        jax.random.normal(k, (rows, count, heads, size), past.keys.dtype) for k in keys[1:]
    )
    return query, written(past, key, value)


def dense(query, past):
    """Softmax over all slots, in float64."""
    length, groups = query.shape[1], query.shape[2] // past.keys.shape[3]
    keys, values = (
        np.repeat(np.asarray(stack[past.layer], np.float64), groups, axis=2)
        for stack in (past.keys, past.values)
    )
    scores = np.einsum("blhd,bshd->bhls", np.asarray(query, np.float64), keys) / 4
    slots = np.arange(past.keys.shape[2])
    mask = slots <= int(past.length) + np.arange(length)[:, None]
    mask = mask & np.asarray(past.valid)[:, None, None]
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhls,bshd->blhd", weights / weights.sum(-1, keepdims=True), values)


@pytest.mark.usefixtures("small_blocks")
class TestAttendPast:
    @pytest.mark.parametrize(
        ("slots", "length", "count"),
        [(64, 0, 8), (64, 0, 21), (50, 13, 21), (50, 49, 1), (33, 0, 33), (33, 30, 3), (90, 5, 2)],
    )
    def test_equals_one_dense_product(self, slots, length, count):
        query, past = new_tokens(make_past(slots, length), count)
        found = jax.jit(attend_past)(query, past)
        np.testing.assert_allclose(found, dense(query, past), atol=2e-6)

    def test_cudnn_takes_a_mask(self):
        """Float32 goes by XLA there too, so it runs anywhere."""
        query, past = new_tokens(make_past(50, 13), 21)
        found = attend_past(query, past, implementation="cudnn")
        np.testing.assert_allclose(found, dense(query, past), atol=2e-6)

    def test_bfloat16(self):
        query, past = new_tokens(make_past(50, 13, dtype=jnp.bfloat16), 21)
        found = jax.jit(attend_past)(query, past)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float32), dense(query, past), atol=2e-2)

    def test_what_is_not_filled_is_not_looked_at(self):
        """Not even read: NaN there would spread by way of a weight of 0."""
        query, past = new_tokens(make_past(96, 10), 6)
        past = past._replace(values=past.values.at[:, :, 16:].set(jnp.nan))
        assert np.isfinite(jax.jit(attend_past)(query, past)).all()

    def test_padding_that_sees_nothing_is_finite(self):
        query, past = new_tokens(make_past(48, 0), 8)
        past = past._replace(valid=past.valid.at[0, :5].set(False))
        assert np.isfinite(jax.jit(attend_past)(query, past)).all()

    @pytest.mark.parametrize("count", [1, 24])
    def test_huge_scores(self, count):
        query, past = new_tokens(make_past(48, 20), count)
        found = jax.jit(attend_past)(query * 1e4, past)
        np.testing.assert_allclose(found, dense(query * 1e4, past), atol=1e-4)


@pytest.mark.parametrize("slots", [48, 40])
def test_writing_copies_none_of_the_cache(slots, monkeypatch):
    """Keys and values are written in place, whatever the number of layers and blocks."""
    monkeypatch.setattr(cached_attention, "SLOT_BLOCK", 48 if slots == 48 else 16)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Qwen3VL(TINY, rngs=nnx.Rngs(0))))
    cache = jax.eval_shape(lambda: init_cache(TINY.text, 1, slots, jnp.float32))
    rng_key = jax.eval_shape(lambda: jax.random.key(0))
    program = generate.decode.lower(
        graphdef, params, rng_key, cache, max_new_tokens=4, stop_ids=()
    ).compile()
    shape = ",".join(map(str, cache.keys.shape))
    assert re.search(rf"f32\[{shape}\]\S* dynamic-update-slice", program.as_text())
    assert not re.search(rf"f32\[{shape}\]\S* copy\(", program.as_text())


@pytest.mark.aot
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'mmmem_jax[aot]'",
)
def test_a_tpu_reads_a_chunk_in_blocks_and_in_place(monkeypatch):
    """No scores of a whole chunk with all slots, and no second cache."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # of no metadata server
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU that another may hold
    device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    slots, length = 8192, 1024
    model = partial(Qwen3VL, TINY, dtype=jnp.bfloat16, attention="splash")
    graphdef, params = nnx.split(nnx.eval_shape(lambda: model(rngs=nnx.Rngs(0))))
    ids = jnp.zeros((1, length), jnp.int32)
    tokens = Tokens(ids, jnp.repeat(ids[..., None], 3, -1), ids == 0, ids - 1)
    cache = jax.eval_shape(lambda: init_cache(TINY.text, 1, slots, jnp.bfloat16))
    params, tokens, cache = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)),
        (params, tokens, cache),
    )

    @partial(jax.jit, donate_argnums=2)
    def read(params, tokens, cache):
        return nnx.merge(graphdef, params)(tokens, None, cache)[1]

    program = read.lower(params, tokens, cache).compile()
    assert not re.search(rf"\[(\d+,)*{length},{slots}[,\]]", program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < cache.keys.size * 2
