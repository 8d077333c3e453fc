"""What is timed, the formulas of what is needed, and the keys of the result."""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import kernel, qwen3_vl
from mmmem_jax.models.qwen3_vl.config import SIZES
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL, Tokens

LIMIT = {"copy_gb_s": 2.0, "matmul_tflops": 4.0}
TINY = qwen3_vl.SIZES["tiny"]


@pytest.fixture(scope="module")
def ours():
    return qwen3_vl.Ours(TINY)


@pytest.mark.parametrize("name", SIZES)
def test_the_matrices_are_those_of_the_model(name):
    model = nnx.eval_shape(lambda: Qwen3VL(SIZES[name], rngs=nnx.Rngs(0)))
    kernels = [
        x.size
        for path, x in jax.tree.leaves_with_path(nnx.state(model.layers))
        if "kernel" in jax.tree_util.keystr(path)
    ]
    assert qwen3_vl.layer_numbers(SIZES[name].text) == sum(kernels)
    published = {"2b": 2.1e9, "4b": 4.4e9, "8b": 8.8e9, "32b": 33.4e9}  # with the vision tower
    assert 0.6 < sum(kernels) / published[name] < 1


def test_operations_are_those_of_the_compiled_program():
    """But for the upper half of causal attention, which XLA computes, and what is no product."""
    text, length = TINY.config.text, 256
    model = nnx.eval_shape(lambda: Qwen3VL(TINY.config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    shape = jax.ShapeDtypeStruct((1, length), jnp.int32)
    tokens = Tokens(
        shape, jax.ShapeDtypeStruct((1, length, 3), jnp.int32),
        jax.ShapeDtypeStruct((1, length), bool), shape,
    )  # fmt: skip

    def layer(params, tokens):  # a loop's body is counted once, however often it runs
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens)[0][:, -1])

    counted = jax.jit(layer).lower(params, tokens).cost_analysis()["flops"]
    head = 2 * text.vocab_size * text.hidden_size
    needed = (qwen3_vl.prefill_flops(text, length) - head) / text.num_layers + head
    above = 2 * text.num_heads * text.head_dim * length * (length - 1)
    assert needed + above < counted < 1.25 * (needed + above)


def test_what_a_kept_prefix_can_save():
    """A fifth of the episode's frames is new; what looks back at the others is saved in part."""
    found = [qwen3_vl.prefix_limit(qwen3_vl.SIZES[name]) for name in ("small", "2b", "8b")]
    np.testing.assert_allclose(found, [4.89, 4.26, 4.57], atol=0.01)


def test_bytes_of_a_token_are_matrices_and_what_is_kept():
    text = SIZES["8b"].text
    weights = 2 * (qwen3_vl.layer_numbers(text) + text.vocab_size * text.hidden_size)
    assert qwen3_vl.decode_bytes(text, 0, 2) == weights
    kept = qwen3_vl.decode_bytes(text, 1000, 2) - weights
    assert kept == 1000 * 36 * 2 * 8 * 128 * 2


def test_pieces_look_at_the_frames_they_name():
    tokens = qwen3_vl.make_tokens(TINY, frames=2, first=3, text=5)
    index = np.asarray(tokens.visual_index)[0]
    seen = 2 * TINY.frame_tokens
    np.testing.assert_array_equal(index[:seen], 3 * TINY.frame_tokens + np.arange(seen))
    assert (index[seen:] == -1).all()
    assert len(index) == seen + 5


def test_a_decision_after_what_is_kept_is_that_of_the_whole_prompt(ours):
    kept = ours.decision()
    assert kept.shape == (1, len(qwen3_vl.ANSWER_IDS))
    np.testing.assert_allclose(kept, ours.decision_anew(), atol=1e-5)
    np.testing.assert_allclose(kept, ours.decision_prefix_anew(), atol=1e-5)
    np.testing.assert_allclose(kept, ours.decision(), atol=1e-6)


def test_stages_can_be_run_again(ours):
    assert ours.vision().embeddings.shape == (8 * TINY.frame_tokens, 64)
    np.testing.assert_array_equal(ours.prefill(), ours.prefill())
    written = ours.decode()
    assert written.shape == (1, TINY.new_tokens)
    np.testing.assert_array_equal(written, ours.decode())
    losses = [float(ours.lora_step()) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_a_minute_is_six_clips(ours, monkeypatch):
    counts = []
    monkeypatch.setattr(
        qwen3_vl.Reading, "write", lambda self, count: counts.append(count) or jnp.zeros(1)
    )
    ours.minute()
    notes, trace = [qwen3_vl.CAPTION_TOKENS, qwen3_vl.EXTRACTION_TOKENS], qwen3_vl.DECISION_TOKENS
    assert counts == [*notes, *[trace] * 4, *notes, *[trace] * 2]


def test_side_by_side_each_looks_at_its_own_frames():
    one = qwen3_vl.make_tokens(TINY, frames=2, text=1)
    seen = 2 * TINY.frame_tokens
    many = qwen3_vl.side_by_side(one, 3, seen)
    assert many.ids.shape == (3, seen + 1)
    wanted = np.arange(3 * seen).reshape(3, seen)
    np.testing.assert_array_equal(many.visual_index[:, :seen], wanted)
    assert (np.asarray(many.visual_index)[:, seen:] == -1).all()


@pytest.fixture
def quick(monkeypatch, ours):
    """Measures the tiny model once, without others."""
    medians = kernel.medians_us
    monkeypatch.setattr(
        kernel, "medians_us", lambda *args: medians(*args, batch_seconds=1e-4, repeats=1)
    )
    monkeypatch.setattr(kernel, "limits", lambda _: LIMIT)
    monkeypatch.setattr(kernel, "import_torch", lambda: None)
    monkeypatch.setattr(qwen3_vl, "Ours", lambda size: ours)
    monkeypatch.setattr(ours, "minute", ours.decision, raising=False)  # which takes long


def test_the_last_line_has_the_keys(quick, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(qwen3_vl, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["qwen3_vl.py", "--sizes=tiny", "--full"])
    qwen3_vl.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "qwen3_vl_cpu.json").read_text())
    assert result.keys() >= {"device", "versions", "date", "command", *qwen3_vl.KEYS}
    assert result["parity_max_rel"] is None
    assert set(result["vs_transformers"].values()) == {None}
    (row,) = result["rows"]
    took = row["seconds"]
    assert all(seconds > 0 for seconds in took.values())
    flops = qwen3_vl.prefill_flops(TINY.config.text, TINY.prompt_tokens)
    assert result["prefill_share"] == pytest.approx(flops / took["prefill"] / 4e12)
    context = TINY.prompt_tokens + 1.5
    needed = 3 * qwen3_vl.decode_bytes(TINY.config.text, context, 4)
    assert result["decode_share"] == pytest.approx(needed / took["decode"] / 2e9)
    for what in ("decision", "decision_prefix"):
        assert result[f"{what}_speedup"] == pytest.approx(took[f"{what}_anew"] / took["decision"])
    assert result["build_s_per_video_minute"] == took["minute"]
    assert result["peak_gb"] > 0


def test_ratios_are_of_their_time_over_ours():
    stages = dict.fromkeys(qwen3_vl.STAGES)
    row = qwen3_vl.make_row("tiny", stages | {"decode": 2.0}, stages | {"decode": 5.0}, 1.0, LIMIT)
    assert row["vs_transformers"] == {
        "vision": None, "prefill": None, "decode": 2.5, "lora_step": None,
    }  # fmt: skip
    assert row["decode_tokens_s"] == 1.5
    assert row["prefill_share"] is None


def test_past_the_deadline_nothing_is_measured():
    result = qwen3_vl.time_stages(TINY, time.perf_counter() - 1)
    assert set(result[0].values()) == set(result[1].values()) == {None}


def test_other_sizes_are_refused():
    assert qwen3_vl.sizes_of("2b,8b") == ["2b", "8b"]
    with pytest.raises(argparse.ArgumentTypeError, match="'9b' is no list of some of tiny, small"):
        qwen3_vl.sizes_of("9b")


@pytest.mark.parity
def test_logits_are_those_of_transformers():
    pytest.importorskip("torch", reason="needs mmmem_jax[parity]")
    pytest.importorskip("transformers", reason="needs mmmem_jax[parity]")
    assert qwen3_vl.parity(TINY) < 1e-4


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks it
def test_their_stages_can_be_run_again():
    pytest.importorskip("torch", reason="needs mmmem_jax[parity]")
    pytest.importorskip("peft", reason="needs mmmem_jax[parity]")
    theirs = qwen3_vl.make_theirs(TINY)
    assert theirs.vision().shape == (8 * TINY.frame_tokens, 64)
    np.testing.assert_array_equal(theirs.prefill(), theirs.prefill())
    one, *_ = theirs.calls("decode").values()
    np.testing.assert_array_equal(one(), theirs.decode())
    assert theirs.past.get_seq_length() == TINY.prompt_tokens
    losses = [float(theirs.lora_step()) for _ in range(5)]
    assert losses[-1] < losses[0]
