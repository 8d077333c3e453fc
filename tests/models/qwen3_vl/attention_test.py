"""Splash attention, interpreted and compiled ahead of time for a TPU, against XLA's attention."""

import dataclasses
import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from mmmem_jax.models.qwen3_vl import attention
from mmmem_jax.models.qwen3_vl.language import DecoderLayer
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL, Tokens
from mmmem_jax.testing.qwen3_vl import TINY

AXES = ("data", "group", "model")
LONG = 8192
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


@pytest.fixture
def interpreted(monkeypatch):
    """Splash attention that runs anywhere."""
    monkeypatch.setattr(attention, "splash", partial(attention.splash, interpret=True))


def heads(rows, length, slots, num_heads, num_kv_heads, size, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 3)
    shapes = [(rows, length, num_heads, size), *[(rows, slots, num_kv_heads, size)] * 2]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def values_and_gradients(run, *args):
    """What attention gives, and gradients of a sum of it by query, key and value."""
    weights = jax.random.normal(jax.random.key(9), args[0].shape)

    def total(*args):
        out = run(*args)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*args)
    return out, *gradients


def close(found, wanted, dtype):
    for x, y in zip(found, wanted, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE[dtype] * np.abs(y).max())


@pytest.mark.usefixtures("interpreted")
class TestSplash:
    def test_causal_with_grouped_heads(self):
        args = heads(2, 140, 140, 4, 2, 128)
        found, wanted = (
            values_and_gradients(partial(attention.attend, causal=True, implementation=name), *args)
            for name in ("splash", "xla")
        )
        close(found, wanted, jnp.float32)

    def test_bfloat16(self):
        args = heads(1, 20, 20, 2, 1, 128, jnp.bfloat16)
        found, wanted = (
            jax.jit(partial(attention.attend, causal=True, implementation=name))(*args)
            for name in ("splash", "xla")
        )
        assert found.dtype == jnp.bfloat16
        close([found], [wanted], jnp.bfloat16)

    def test_all_of_frames_of_any_length(self):
        """The tower's heads of 72; a frame of no patches is finite too."""
        args, lengths = heads(3, 72, 72, 2, 2, 72), jnp.array([72, 35, 0])
        found, wanted = (
            values_and_gradients(
                partial(attention.attend, key_lengths=lengths, implementation=name), *args
            )
            for name in ("splash", "xla")
        )
        assert all(np.isfinite(x).all() for x in found)
        close(found, wanted, jnp.float32)

    @pytest.mark.parametrize(
        ("shape", "rows", "num_heads", "num_kv_heads"),
        [
            ((2, 1, 4), 2, 4, 2),  # key heads are repeated
            ((2, 2, 2), 3, 4, 2),  # rows are not split
        ],
    )
    def test_over_a_mesh(self, shape, rows, num_heads, num_kv_heads):
        devices = np.array(jax.devices()[:8]).reshape(shape)
        mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
        args = heads(rows, 40, 40, num_heads, num_kv_heads, 16)
        run = jax.jit(partial(attention.attend, causal=True, implementation="splash", mesh=mesh))
        close([run(*args)], [attention.attend(*args, causal=True)], jnp.float32)

    def test_a_dense_mask_is_left_to_xla(self):
        query, key, value = heads(1, 3, 7, 2, 1, 16)
        mask = jnp.arange(7)[None, None] <= 4 + jnp.arange(3)[:, None]
        found, wanted = (
            attention.attend(query, key, value, mask=mask, implementation=name)
            for name in ("splash", "xla")
        )
        np.testing.assert_array_equal(found, wanted)

    def test_the_whole_model_padded_left_and_right(self):
        """Rows of text are the same however they are padded, and by whichever kernel."""
        model = Qwen3VL(TINY, rngs=nnx.Rngs(0))
        ids = jax.random.randint(jax.random.key(0), (1, 9), 0, 400)
        kept = [(0, 9), (4, 9), (0, 0)]  # of 13: padded right, padded left, all padding

        def padded(row, columns=13):
            at, count = row
            place = jnp.arange(columns) - at
            inside = (place >= 0) & (place < count)
            place = jnp.where(inside, place, 0)
            return Tokens(
                ids=jnp.where(inside, ids[0][place], 7),
                positions=jnp.repeat(place[:, None], 3, axis=1),
                valid=inside,
                visual_index=jnp.full(columns, -1),
            )

        tokens = jax.tree.map(lambda *x: jnp.stack(x), *map(padded, kept))
        read = jax.jit(lambda d, p, t: nnx.merge(d, p)(t)[0], static_argnums=0)
        alone = read(*nnx.split(model), jax.tree.map(lambda x: x[:1, :9], tokens))[0]
        model.layers.attention = "splash"
        hidden = read(*nnx.split(model), tokens)
        assert np.isfinite(hidden).all()
        np.testing.assert_allclose(hidden[0, :9], alone, atol=2e-5)
        np.testing.assert_allclose(hidden[1, 4:], alone, atol=2e-5)


@pytest.mark.parametrize(
    ("length", "block"), [(1, 128), (128, 128), (129, 256), (384, 384), (1024, 512), (1152, 384)]
)
def test_blocks_pad_little(length, block):
    assert attention._block(length) == block


def test_every_platform_has_an_implementation():
    assert {attention.best_implementation(p) for p in ("cpu", "gpu", "tpu")} == {
        *attention.IMPLEMENTATIONS
    }


def assert_no_scores(program):
    """The kernel runs, and no array has two axes of all tokens."""
    assert "tpu_custom_call" in program.as_text()
    assert not re.search(rf"\[(\d+,)*{LONG},{LONG}[,\]]", program.as_text())


@pytest.mark.aot
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'mmmem_jax[aot]'",
)
class TestAheadOfTime:
    @pytest.fixture(autouse=True)
    def no_tpu_here(self, monkeypatch):
        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # of no metadata server
        monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU that another may hold

    @pytest.fixture
    def devices(self):
        return topologies.get_topology_desc("v5e:2x2", platform="tpu").devices

    def layer_program(self, sharding, mesh=None, rows=1):
        """A layer over LONG tokens and its gradient, compiled for where `sharding` is."""
        config = dataclasses.replace(
            TINY.text, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=128,
            intermediate_size=512, mrope_section=(24, 20, 20),
        )  # fmt: skip
        make = partial(DecoderLayer, config, dtype=jnp.bfloat16, attention="splash")
        graphdef, params = nnx.split(nnx.eval_shape(lambda: make(mesh=mesh, rngs=nnx.Rngs(0))))

        def total(params, x, angles):
            out, _ = nnx.merge(graphdef, params)(x, (angles, angles))
            return jnp.sum(out.astype(jnp.float32))

        args = (
            params,
            jax.ShapeDtypeStruct((rows, LONG, 256), jnp.bfloat16),
            jax.ShapeDtypeStruct((rows, LONG, 64), jnp.bfloat16),
        )
        args = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), args
        )
        return jax.jit(jax.grad(total, argnums=(0, 1))).lower(*args).compile()

    def test_a_layer_and_its_gradient_keep_no_scores(self, devices):
        program = self.layer_program(lambda _: SingleDeviceSharding(devices[0]))
        assert program.memory_analysis().temp_size_in_bytes < LONG * LONG  # of 4 heads' scores
        assert_no_scores(program)

    def test_a_layer_over_a_mesh(self, devices):
        mesh = Mesh(np.array(devices).reshape(2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3)

        def sharding(x):
            return NamedSharding(mesh, P(("data", "group")) if len(x.shape) == 3 else P())

        assert_no_scores(self.layer_program(sharding, mesh, rows=2))

    @pytest.mark.parametrize("size", [64, 72])
    def test_heads_of_the_vision_tower_compile(self, devices, size):
        array = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(devices[0]))
        x, lengths = array((2, 300, 16, size), jnp.bfloat16), array((2,), jnp.int32)

        @jax.jit
        def run(x, lengths):
            return attention.attend(x, x, x, key_lengths=lengths, implementation="splash")

        assert "tpu_custom_call" in run.lower(x, lengths).compile().as_text()
