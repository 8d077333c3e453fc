"""Tests of mmmem_jax/models/qwen3_vl/lora.py."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl import lora as lora_lib
from mmmem_jax.models.qwen3_vl.lora import (
    TARGETS,
    LoraSplit,
    add_lora,
    join,
    load_adapter,
    save_adapter,
    split_lora,
    with_adapter,
    without_lora,
)
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL, Tokens
from mmmem_jax.testing.qwen3_vl import TINY, random_params

RANK, ALPHA = 4, 12.0
CONFIG = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, num_layers=2))
PREFIX = "base_model.model.model.language_model.layers.1.self_attn"


def model_of(dtype, *, remat: bool = False) -> Qwen3VL:
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: Qwen3VL(CONFIG, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))
    )
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_params(CONFIG, 0))
    return nnx.merge(graphdef, params)


def trained(lora: nnx.State, seed: int = 5) -> nnx.State:
    """An adapter whose B is not 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), lora)


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    ids = np.random.default_rng(1).integers(0, 300, (2, 9))
    positions = np.broadcast_to(np.arange(9)[None, :, None], (2, 9, 3))
    return Tokens(ids, positions, np.ones((2, 9), bool), np.full((2, 9), -1))


@pytest.fixture(scope="module")
def model() -> Qwen3VL:
    return model_of(jnp.float32)


@pytest.fixture(scope="module")
def split(model) -> LoraSplit:
    return split_lora(add_lora(model, rank=RANK, alpha=ALPHA, rngs=nnx.Rngs(0)))


@partial(jax.jit, static_argnums=0)
def logits_of(graphdef, params, tokens):
    model = nnx.merge(graphdef, params)
    return model.logits(model(tokens)[0])


@partial(jax.jit, static_argnums=0)
def gradient(graphdef, lora, base, tokens):
    def loss(lora):
        return jnp.mean(logits_of(graphdef, join(lora, base), tokens) ** 2)

    return jax.grad(loss)(lora)


def dtypes(tree) -> set[str]:
    return {str(x.dtype) for x in jax.tree.leaves(tree)}


def largest(tree) -> float:
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_a_new_adapter_changes_nothing(model, split, tokens):
    found = logits_of(split.graphdef, join(split.lora, split.base), tokens)
    np.testing.assert_array_equal(found, logits_of(*nnx.split(model), tokens))


def test_the_base_is_neither_changed_nor_copied(model, split):
    held = jax.tree.leaves(nnx.state(model))
    assert len(held) == len(jax.tree.leaves(split.base))
    assert all(a is b for a, b in zip(held, jax.tree.leaves(split.base), strict=True))
    assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))


def test_adapts_q_k_v_and_o_of_every_layer(split):
    sizes = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64)}
    assert set(split.lora["layers"]) == set(TARGETS)
    for name, (inputs, outputs) in sizes.items():
        a, b = (split.lora["layers"][name][f"kernel_lora_{side}"] for side in "ab")
        assert a.shape == (2, inputs, RANK)
        assert b.shape == (2, RANK, outputs)
        assert float(jnp.std(a[...])) == pytest.approx((2 / inputs) ** 0.5, rel=0.2)
        assert not np.array_equal(a[0], a[1])
        assert not jnp.any(b[...])


def test_adds_alpha_over_rank_times_a_b(model, split, tokens):
    lora = trained(split.lora)
    merged = nnx.clone(model)
    for name in TARGETS:
        a, b = (lora["layers"][name][f"kernel_lora_{side}"][...] for side in "ab")
        kernel = getattr(merged.layers, name).kernel
        kernel[...] = kernel[...] + ALPHA / RANK * a @ b
    wanted = logits_of(*nnx.split(merged), tokens)
    found = logits_of(split.graphdef, join(lora, split.base), tokens)
    plain = logits_of(*nnx.split(model), tokens)
    assert jnp.abs(wanted - plain).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_switched_off_gives_the_base_model(model, split, tokens):
    off = join(without_lora(trained(split.lora)), split.base)
    plain = logits_of(*nnx.split(model), tokens)
    np.testing.assert_array_equal(logits_of(split.graphdef, off, tokens), plain)


def test_at_first_only_b_has_a_gradient(split, tokens):
    found = gradient(*split, tokens)["layers"]
    for name in TARGETS:
        assert not jnp.any(found[name]["kernel_lora_a"][...])
        per_layer = jnp.abs(found[name]["kernel_lora_b"][...]).max(axis=(1, 2))
        assert jnp.all(per_layer > 0)


def test_computing_activations_again_gives_the_same_gradient(split, tokens):
    model = model_of(jnp.float32, remat=True)
    again = split_lora(add_lora(model, rank=RANK, alpha=ALPHA, rngs=nnx.Rngs(0)))
    lora = trained(split.lora)
    wanted = gradient(split.graphdef, lora, split.base, tokens)
    found = gradient(again.graphdef, lora, again.base, tokens)
    assert largest(wanted) > 1e-3
    assert largest(jax.tree.map(jnp.subtract, found, wanted)) < 1e-5 * largest(wanted)


def test_adapter_of_a_bfloat16_model_is_trained_in_float32(tokens):
    model = add_lora(model_of(jnp.bfloat16), rank=RANK, alpha=ALPHA, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    split = split_lora(model)
    assert dtypes(params) == dtypes(split.base) == {"bfloat16"}
    assert dtypes(split.lora) == {"float32"}

    @partial(jax.eval_shape, tokens=tokens)
    def hidden(tokens):
        joined = nnx.merge(graphdef, join(split.lora, split.base))
        return nnx.merge(graphdef, params)(tokens)[0], joined(tokens)[0]

    assert dtypes(hidden) == {"bfloat16"}
    found = jax.eval_shape(partial(gradient, graphdef), split.lora, split.base, tokens)
    assert dtypes(found) == {"float32"}


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path, split):
        save_adapter(tmp_path, trained(split.lora), rank=RANK, alpha=ALPHA, base="owner/name")
        return tmp_path

    def load(self, folder, split):
        return load_adapter(folder, split.lora, rank=RANK, alpha=ALPHA)

    def change_config(self, folder, **change):
        path = folder / lora_lib.CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    def change_tensors(self, folder, change):
        path = folder / lora_lib.WEIGHTS_FILE
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path)

    def test_an_adapter_comes_back(self, folder, split):
        jax.tree.map(np.testing.assert_array_equal, self.load(folder, split), trained(split.lora))

    def test_a_model_takes_it_at_the_rank_it_has(self, folder, model, split, tokens):
        adapted = with_adapter(model, folder)
        wanted = logits_of(split.graphdef, join(trained(split.lora), split.base), tokens)
        np.testing.assert_allclose(logits_of(*nnx.split(adapted), tokens), wanted, atol=1e-5)
        assert largest(jax.tree.map(jnp.subtract, nnx.state(model), split.base)) == 0

    @pytest.mark.parametrize("change", [{"r": 0}, {"r": "4"}, {"lora_alpha": None}])
    def test_a_rank_that_cannot_be_is_refused(self, folder, model, change):
        self.change_config(folder, **change)
        with pytest.raises(UserError, match=r"has r .* and lora_alpha .*; both must be over 0"):
            with_adapter(model, folder)

    def test_tensors_lie_as_peft_has_them(self, folder, split):
        tensors = safetensors.numpy.load_file(folder / lora_lib.WEIGHTS_FILE)
        assert len(tensors) == 2 * 2 * len(TARGETS)
        a, b = (trained(split.lora)["layers"]["k_proj"][f"kernel_lora_{s}"][1] for s in "ab")
        np.testing.assert_array_equal(tensors[f"{PREFIX}.k_proj.lora_A.weight"], a.T)
        np.testing.assert_array_equal(tensors[f"{PREFIX}.k_proj.lora_B.weight"], b.T)

    @pytest.mark.parametrize(
        "change",
        [
            {"r": 8},
            {"lora_alpha": 16},
            {"target_modules": ["q_proj", "v_proj"]},
            {"target_modules": "all-linear"},
            {"peft_type": "LOHA"},
            {"use_rslora": True},
        ],
    )
    def test_an_adapter_of_another_kind_is_refused(self, folder, split, change):
        self.change_config(folder, **change)
        with pytest.raises(UserError, match=rf"adapter_config.json has {[*change][0]}\b"):
            self.load(folder, split)

    def test_targets_may_come_in_any_order(self, folder, split):
        self.change_config(folder, target_modules=[*reversed(TARGETS)])
        assert largest(self.load(folder, split)) > 0

    def test_tensors_name_themselves(self, folder, split):
        name = f"{PREFIX}.q_proj.lora_A.weight"
        self.change_tensors(folder, lambda tensors: tensors.update({name: np.zeros((4, 63))}))
        with pytest.raises(UserError, match=rf"{name} of shape \(4, 63\), not \(4, 64\)"):
            self.load(folder, split)
        self.change_tensors(folder, lambda tensors: tensors.pop(name))
        with pytest.raises(UserError, match=f"has no {name}"):
            self.load(folder, split)

    def test_an_extra_tensor_names_itself(self, folder, split):
        extra = {"base_model.model.lm_head.lora_A.weight": np.zeros((4, 64))}
        self.change_tensors(folder, lambda tensors: tensors.update(extra))
        with pytest.raises(UserError, match="has base_model.model.lm_head.lora_A.weight, which"):
            self.load(folder, split)

    @pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff"])
    @pytest.mark.parametrize("name", [lora_lib.CONFIG_FILE, lora_lib.WEIGHTS_FILE])
    def test_broken_files_are_one_line(self, folder, split, name, content):
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=name) as refused:
            self.load(folder, split)
        assert "\n" not in str(refused.value)
