"""Tests of mmmem_jax/models/qwen3_vl/modeling.py and language.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmmem_jax.models.qwen3_vl.language import rotation
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL, Tokens, init_cache
from mmmem_jax.models.qwen3_vl.vision import VisualTokens
from mmmem_jax.testing.qwen3_vl import TINY, random_params

B, L, M = 2, 11, 4


def make(config=TINY, **kwargs):
    abstract = nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0), **kwargs))
    return nnx.graphdef(abstract), random_params(config, 0)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def read(model):
    """(tokens, visual, cache) -> (hidden, cache), jitted once for each shape."""
    graphdef, params = model

    @jax.jit
    def read(tokens, visual, cache=None):
        return nnx.merge(graphdef, params)(tokens, visual, cache)

    return read


@pytest.fixture(scope="module")
def visual():
    rng = np.random.default_rng(1)
    width, depth = TINY.text.hidden_size, len(TINY.vision.deepstack_layers)
    return VisualTokens(
        jnp.asarray(rng.normal(size=(M, width)), jnp.float32),
        jnp.asarray(rng.normal(size=(depth, M, width)), jnp.float32),
    )


def tokens_of(length=L, seed=0):
    """Text with a frame of M tokens at places 3 to 6."""
    rng = np.random.default_rng(seed)
    index = np.full((B, length), -1, np.int32)
    index[:, 3 : 3 + M] = np.arange(M)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32)[None, :, None], (B, length, 3))
    return Tokens(
        ids=rng.integers(0, 256, (B, length)).astype(np.int32),
        positions=positions.copy(),
        valid=np.ones((B, length), bool),
        visual_index=index,
    )


def cut(tokens, start, stop):
    return jax.tree.map(lambda x: x[:, start:stop], tokens)


def padded(tokens, before, after):
    """The same tokens with padding that is anything but them."""

    def pad(x, value):
        widths = [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2)
        return np.pad(x, widths, constant_values=value)

    return Tokens(
        pad(tokens.ids, 7), pad(tokens.positions, 5), pad(tokens.valid, False),
        pad(tokens.visual_index, -1),
    )  # fmt: skip


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("before", "after"), [(0, 5), (4, 0), (2, 3)])
def test_padding_on_either_side_changes_nothing(before, after, read, visual):
    tokens = tokens_of()
    whole, _ = read(tokens, visual)
    found, _ = read(padded(tokens, before, after), visual)
    close(found[:, before : before + L], whole)


@pytest.mark.parametrize("place", [4, 9])  # within the frame, and in text
def test_pieces_read_into_a_cache_are_the_whole(place, read, visual):
    tokens = tokens_of()
    whole, _ = read(tokens, visual)
    cache = init_cache(TINY.text, B, 24, jnp.float32)
    first, cache = read(padded(cut(tokens, 0, place), 0, 2), visual, cache)
    second, cache = read(cut(tokens, place, L), visual, cache)
    close(np.concatenate([first[:, :place], second], axis=1), whole)
    close(cache.hidden, whole[:, -1])
    assert int(cache.length) == L + 2
    assert cache.next_position.tolist() == [L] * B
    assert cache.valid.sum(1).tolist() == [L] * B


def test_a_row_of_padding_leaves_a_cache_as_it_was(read, visual):
    tokens = tokens_of()
    _, cache = read(tokens, visual, init_cache(TINY.text, B, 24, jnp.float32))
    nothing = dataclasses.replace(cut(tokens, 0, 2), valid=np.array([[True] * 2, [False] * 2]))
    _, after = read(nothing, visual, cache)
    close(after.hidden[1], cache.hidden[1])
    assert after.next_position[1] == cache.next_position[1]
    assert np.abs(after.hidden[0] - cache.hidden[0]).max() > 1e-2


def test_no_token_sees_what_follows(read, visual):
    tokens = tokens_of()
    other = dataclasses.replace(tokens, ids=tokens.ids.copy())
    other.ids[:, -1] += 1
    a, b = read(tokens, visual)[0], read(other, visual)[0]
    close(a[:, :-1], b[:, :-1])
    assert np.abs(a[:, -1] - b[:, -1]).max() > 1e-2


def test_each_layer_of_deepstack_counts_at_the_visual_tokens_alone(read, visual):
    tokens = tokens_of()
    plain, _ = read(tokens, visual)
    for layer in range(len(visual.deepstack)):
        changed = visual.deepstack.at[layer].add(1.0)
        found, _ = read(tokens, visual.replace(deepstack=changed))
        close(found[:, :3], plain[:, :3])  # before the frame
        assert np.abs(found[:, 3 : 3 + M] - plain[:, 3 : 3 + M]).max() > 1e-3


def test_positions_interleave_time_height_and_width():
    text = TINY.text
    one_each = np.eye(3, dtype=np.int32)[:, None]  # a row for each axis, moved by 1
    turned = np.asarray(rotation(one_each, text, jnp.float32)[1][:, 0]) != 0
    assert turned.sum(0).tolist() == [1] * (text.head_dim // 2)  # each frequency by one axis
    assert turned.sum(1).tolist() == list(text.mrope_section)
    assert turned.argmax(0)[:6].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("tied", [True, False])
def test_logits_come_from_the_head_or_the_embedding(tied):
    text = dataclasses.replace(TINY.text, tie_word_embeddings=tied)
    graphdef, params = make(dataclasses.replace(TINY, text=text))
    model = nnx.merge(graphdef, params)
    hidden = jnp.ones((1, text.hidden_size))
    weights = model.embed.embedding[...].T if tied else model.lm_head.kernel[...]
    close(model.logits(hidden), hidden @ weights)
    assert hasattr(model, "lm_head") != tied


def test_remat_changes_no_gradient(model, visual):
    tokens, (graphdef, params) = tokens_of(), model
    again, _ = make(remat=True)

    def grad(graphdef):
        def loss(scale):
            changed = jax.tree.map(lambda x: x * scale, params)
            return nnx.merge(graphdef, changed)(tokens, visual)[0].sum()

        return jax.jit(jax.grad(loss))(1.0)

    assert float(grad(graphdef)) == pytest.approx(float(grad(again)), rel=1e-3)


def test_bfloat16_stays_bfloat16(visual):
    graphdef, params = make(dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    model = nnx.merge(graphdef, params)
    hidden, cache = model(tokens_of(), visual, init_cache(TINY.text, B, 16, jnp.bfloat16))
    assert hidden.dtype == cache.keys.dtype == jnp.bfloat16
    assert model.logits(hidden).dtype == jnp.float32
