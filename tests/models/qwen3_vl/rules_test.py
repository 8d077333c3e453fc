"""Tests of mmmem_jax/models/qwen3_vl/rules.py on eight CPU devices, and on abstract meshes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl.config import SIZES
from mmmem_jax.models.qwen3_vl.lora import add_lora, join, split_lora
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL, Tokens
from mmmem_jax.models.qwen3_vl.params import load_model
from mmmem_jax.models.qwen3_vl.rules import RULES, without_fsdp
from mmmem_jax.models.qwen3_vl.vision import visual_inputs
from mmmem_jax.testing.qwen3_vl import TINY, write_checkpoint
from mmmem_jax.train import sharding
from mmmem_jax.train.sharding import by_rules, make_mesh


def shapes_of(config) -> nnx.State:
    """Parameters with LoRA, as shapes."""
    return nnx.state(
        nnx.eval_shape(
            lambda: add_lora(
                Qwen3VL(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)
            )
        )
    )


def by_name(tree) -> dict:
    return {sharding._name(path): x for path, x in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_are_split_evenly(size):
    """Each of 16 devices holds a sixteenth, but for norms, biases and the grid of positions."""
    mesh = AbstractMesh((4, 1, 4), sharding.AXES)
    shapes = nnx.filter_state(shapes_of(SIZES[size]), nnx.Not(nnx.LoRAParam))
    held = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)), shapes, by_rules(mesh, shapes, RULES)
    )
    whole = jax.tree.map(lambda x: math.prod(x.shape), shapes)
    total = sum(jax.tree.leaves(whole))
    assert total / 16 <= sum(jax.tree.leaves(held)) < 1.03 * total / 16


def test_without_fsdp_the_model_axis_splits_as_before():
    mesh, shapes = make_mesh(2, 2, 2), shapes_of(TINY)
    whole, split = by_rules(mesh, shapes, RULES), by_rules(mesh, shapes, without_fsdp())

    def axes(tree):
        return {name: [axis or "" for axis in s.spec] for name, s in by_name(tree).items()}

    for name, found in axes(split).items():
        wanted = ["" if axis == "data" else axis for axis in axes(whole)[name]]
        assert found == wanted
    assert "data" in str(axes(whole))
    assert "model" in str(axes(split))


def test_what_comes_out_of_heads_and_units_is_split_the_other_way():
    found = {
        name: s.spec
        for name, s in by_name(by_rules(make_mesh(2, 2, 2), shapes_of(TINY), RULES)).items()
    }
    assert found["layers.q_proj.kernel"] == PartitionSpec(None, "data", "model")
    assert found["layers.o_proj.kernel"] == PartitionSpec(None, "model", "data")
    assert found["layers.down_proj.kernel"] == PartitionSpec(None, "model", "data")
    assert found["layers.q_proj.kernel_lora_a"] == PartitionSpec(None, "data")
    assert found["layers.q_proj.kernel_lora_b"] == PartitionSpec(None, None, "model")
    assert found["layers.o_proj.kernel_lora_a"] == PartitionSpec(None, "model")
    assert found["layers.o_proj.kernel_lora_b"] == PartitionSpec(None, None, "data")
    assert found["layers.q_norm.scale"] == PartitionSpec()
    assert found["embed.embedding"] == PartitionSpec("model", "data")
    assert found["vision.blocks.proj.kernel"] == PartitionSpec(None, "model", "data")
    assert found["vision.deepstack.1.fc2.kernel"] == PartitionSpec("model", "data")


def test_moments_lie_as_their_parameter():
    shapes = shapes_of(TINY)
    moments = jax.eval_shape(optax.adam(1e-3).init, shapes)
    found = by_name(by_rules(make_mesh(2, 2, 2), {"opt_state": moments}, RULES))
    for name, wanted in by_name(by_rules(make_mesh(2, 2, 2), shapes, RULES)).items():
        for moment in ("mu", "nu"):
            assert found[f"opt_state.0.{moment}.{name}"] == wanted


def test_heads_that_do_not_divide_are_one_line():
    with pytest.raises(UserError, match=r"does not divide over the 3 devices .* lower config.mesh"):
        by_rules(make_mesh(1, 1, 3), shapes_of(TINY), RULES)


def test_a_model_on_the_mesh_gives_what_it_gives_on_one_device(tmp_path):
    vision = dataclasses.replace(TINY.vision, depth=2, deepstack_layers=(0,))
    folder = write_checkpoint(tmp_path, dataclasses.replace(TINY, vision=vision))
    rng = np.random.default_rng(0)
    ids, index = rng.integers(0, 300, (4, 12)), np.full((4, 12), -1)
    index[:, 2:6] = np.arange(4)[:, None] * 16 + np.arange(4)
    positions = np.broadcast_to(np.arange(12)[None, :, None], (4, 12, 3))
    tokens = Tokens(ids, positions, np.ones((4, 12), bool), index)
    patches = rng.normal(size=(64, vision.patch_dim)).astype(np.float32)
    inputs = visual_inputs([(patches[16 * i :][:16], (1, 4, 4)) for i in range(4)], vision)

    def run(mesh):
        model = load_model(folder, dtype=jnp.float32, mesh=mesh)
        split = split_lora(add_lora(model, rank=4, alpha=8.0, rngs=nnx.Rngs(0)))

        @jax.jit
        def logits_of(lora, base, tokens, inputs):
            model = nnx.merge(split.graphdef, join(lora, base))
            hidden, _ = model(tokens, model.vision(inputs))
            return model.logits(hidden)

        return split, logits_of(split.lora, split.base, tokens, inputs)

    mesh = make_mesh(2, 2, 2)
    split, found = run(mesh)
    for state in (split.lora, split.base):
        placed = by_rules(mesh, state, RULES)
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, placed)
        assert all(jax.tree.leaves(same))
    np.testing.assert_allclose(found, run(None)[1], atol=1e-4)
