"""Tests of mmmem_jax/models/qwen3_vl/generate.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmmem_jax.models.qwen3_vl.generate import (
    completion_log_probs,
    decode,
    marked,
    next_log_probs,
    prefill,
    repeat,
    rewind,
)
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL, Tokens, init_cache
from mmmem_jax.testing.qwen3_vl import TINY, random_params

L, T, S = 8, 6, 32
STOP = (1, 2)
FIRST = (40, 41, 42)


@pytest.fixture(scope="module")
def model():
    return nnx.graphdef(nnx.eval_shape(lambda: Qwen3VL(TINY, rngs=nnx.Rngs(0)))), random_params(
        TINY, 0
    )


def text(ids, start=0):
    ids = np.atleast_2d(np.asarray(ids, np.int32))
    positions = start + np.arange(ids.shape[1], dtype=np.int32)[None, :, None]
    return Tokens(
        ids, np.broadcast_to(positions, (*ids.shape, 3)), np.ones(ids.shape, bool),
        np.full(ids.shape, -1, np.int32),
    )  # fmt: skip


def prompts(rows=2, seed=0):
    return text(np.random.default_rng(seed).integers(10, 250, (rows, L)))


def read(model, tokens, **kwargs):
    cache = init_cache(TINY.text, tokens.ids.shape[0], S, jnp.float32)
    return prefill(*model, tokens, None, cache, **kwargs)


def write(model, cache, seed=0, temperature=0.7, stop_ids=STOP, first_ids=FIRST, **kwargs):
    return decode(
        *model, jax.random.key(seed), cache, max_new_tokens=T, stop_ids=stop_ids,
        temperature=jnp.float32(temperature), first_ids=first_ids, **kwargs,
    )  # fmt: skip


def with_completion(tokens, out):
    """Left-padded prompts, two slots of padding, followed by what was written."""
    new = text(out.ids, L).replace(valid=np.asarray(out.valid))
    pad = text(np.zeros((len(out.ids), 2))).replace(valid=np.zeros((len(out.ids), 2), bool))
    return jax.tree.map(lambda *x: np.concatenate(x, axis=1), pad, tokens, new)


@pytest.mark.parametrize("first_ids", [FIRST, ()])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probs_are_those_of_the_whole_text(model, first_ids, temperature):
    tokens = prompts(rows=4)
    out, _ = write(model, read(model, tokens), temperature=temperature, first_ids=first_ids)
    found, entropy = completion_log_probs(
        nnx.merge(*model), with_completion(tokens, out), None, num_new=T, temperature=temperature,
        first_ids=first_ids,
    )  # fmt: skip
    np.testing.assert_allclose(found, out.log_probs, rtol=1e-4, atol=1e-4)
    assert (np.asarray(out.log_probs)[np.asarray(out.valid)] < 0).all()
    most = np.log(TINY.text.vocab_size)
    assert ((entropy >= -1e-5) & (entropy <= most + 1e-5)).all()
    if first_ids:
        assert (entropy[:, 0] <= np.log(len(FIRST)) + 1e-5).all()


def test_draws_follow_the_distribution(model):
    cache = repeat(read(model, prompts(rows=1)), 2000)
    wanted = np.exp(next_log_probs(*model, cache, ids=FIRST)[0])
    out, _ = decode(
        *model, jax.random.key(3), cache, max_new_tokens=1, stop_ids=STOP, temperature=1.0,
        first_ids=FIRST,
    )  # fmt: skip
    drawn = np.array([(np.asarray(out.ids)[:, 0] == i).mean() for i in FIRST])
    assert drawn.sum() == 1.0
    np.testing.assert_allclose(drawn, wanted, atol=4 * 0.5 / np.sqrt(2000))


def test_temperature_zero_takes_the_likeliest(model):
    tokens = prompts()
    out, _ = write(model, read(model, tokens), temperature=0.0, first_ids=())
    again, _ = write(model, read(model, tokens), temperature=0.0, first_ids=(), seed=9)
    assert (out.ids == again.ids).all()
    likeliest = np.argmax(next_log_probs(*model, read(model, tokens)), axis=1)
    assert (out.ids[:, 0] == likeliest).all()


def test_a_row_ends_with_its_stop_token_and_writes_nothing_after(model):
    tokens = prompts(rows=8)
    free, _ = write(model, read(model, tokens), temperature=2.0, first_ids=())
    stop = int(free.ids[0, 2])  # known to come third in the first row
    out, cache = write(model, read(model, tokens), temperature=2.0, first_ids=(), stop_ids=(stop,))
    for ids, log_probs, valid in zip(*map(np.asarray, out), strict=True):
        count = int(valid.sum())
        assert valid[:count].all()
        assert stop not in ids[: count - 1]
        assert count == T or ids[count - 1] == stop
        assert (ids[count:] == 0).all()
        assert (log_probs[count:] == 0).all()
    assert int(out.valid[0].sum()) <= 3
    assert cache.next_position.tolist() == (L + np.asarray(out.valid).sum(1) - 1).tolist()


def test_a_draw_depends_on_its_row_and_the_key_alone(model):
    tokens = prompts(rows=3)
    three, _ = write(model, read(model, tokens))
    first = jax.tree.map(lambda x: x[:1], tokens)
    one, _ = write(model, read(model, first))
    assert (three.ids[:1] == one.ids).all()
    other, _ = write(model, read(model, tokens), seed=1)
    assert not (three.ids == other.ids).all()


def test_chunks_are_the_whole(model):
    tokens = prompts()
    whole = read(model, tokens)
    np.testing.assert_allclose(
        read(model, tokens, chunk=3).hidden, whole.hidden, rtol=1e-4, atol=1e-4
    )


def test_rewinding_forgets_any_number_of_times(model):
    tokens, more = prompts(), text(np.full((2, 3), 77), L)
    cache = read(model, tokens)
    place = marked(cache)
    wanted = np.asarray(next_log_probs(*model, cache))
    for _ in range(2):
        cache = prefill(*model, more, None, cache)
        assert np.abs(next_log_probs(*model, cache) - wanted).max() > 1e-2
        cache = rewind(cache, place)
        np.testing.assert_array_equal(next_log_probs(*model, cache), wanted)
    straight = prefill(*model, more, None, read(model, tokens))
    cache = prefill(*model, more, None, cache)
    np.testing.assert_allclose(cache.hidden, straight.hidden, rtol=1e-5, atol=1e-5)


def test_repeating_repeats_rows_side_by_side(model):
    cache = read(model, prompts())
    alone = np.asarray(next_log_probs(*model, cache))
    found = next_log_probs(*model, repeat(cache, 3))
    np.testing.assert_allclose(found, alone.repeat(3, axis=0), rtol=1e-6)
