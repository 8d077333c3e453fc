"""The network against recorded torch outputs and against itself written plainly; refusals."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax.errors import UserError
from mmmem_jax.models import efficientnet_lite, weights
from mmmem_jax.models.efficientnet_lite import LiteConfig, Stage, from_torch
from tests.models.record_efficientnet_lite_reference import reference_images

REFERENCE = Path(__file__).parent / "efficientnet_lite_reference.json"
TINY = LiteConfig(
    stem_width=4,
    stages=(Stage(1, 3, 1, 1, 4), Stage(2, 5, 2, 3, 6), Stage(1, 3, 1, 2, 5)),
    head_width=8,
    num_classes=7,
)


def tiny_checkpoint(seed=0):
    """Makes up a checkpoint in which every number matters, named as in the PyTorch package."""
    rng = np.random.default_rng(seed)
    tensors = {}

    def add(convolution, norm, shape):
        fan_in = np.prod(shape[1:])
        tensors[f"{convolution}.weight"] = rng.normal(0, 1.5 / np.sqrt(fan_in), shape)
        for name, low, high in (
            ("weight", 0.5, 1.5),
            ("bias", -0.5, 0.5),
            ("running_mean", -0.5, 0.5),
            ("running_var", 0.0, 2.0),
        ):
            tensors[f"{norm}.{name}"] = rng.uniform(low, high, shape[0])
        tensors[f"{norm}.num_batches_tracked"] = np.array(9)

    add("_conv_stem", "_bn0", (4, 3, 3, 3))
    sizes = [(4, 1, 3, 4), (4, 3, 5, 6), (6, 3, 5, 6), (6, 2, 3, 5)]
    for index, (width_in, expansion, kernel, width) in enumerate(sizes):
        name, inner = f"_blocks.{index}", width_in * expansion
        if expansion > 1:
            add(f"{name}._expand_conv", f"{name}._bn0", (inner, width_in, 1, 1))
        add(f"{name}._depthwise_conv", f"{name}._bn1", (inner, 1, kernel, kernel))
        add(f"{name}._project_conv", f"{name}._bn2", (width, inner, 1, 1))
    add("_conv_head", "_bn1", (8, 5, 1, 1))
    tensors["_fc.weight"] = rng.normal(0, 1, (7, 8))
    tensors["_fc.bias"] = rng.normal(0, 1, 7)
    return {
        name: tensor.astype(np.float32) if tensor.ndim else tensor
        for name, tensor in tensors.items()
    }


def plain_logits(tensors, images):
    """Does what the PyTorch model does, channels first and batch norm apart, for TINY."""

    def layer(x, convolution, norm, stride=1, relu=True):
        kernel = tensors[f"{convolution}.weight"]
        groups = x.shape[1] // kernel.shape[1]
        x = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", feature_group_count=groups, precision="highest"
        )
        gamma, beta, mean, variance = (
            tensors[f"{norm}.{name}"][:, None, None]
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        x = (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta
        return jnp.clip(x, 0, 6) if relu else x

    x = (jnp.asarray(images).transpose(0, 3, 1, 2) - 127) / 128
    x = layer(x, "_conv_stem", "_bn0", 2)
    for index, stride in enumerate((1, 2, 1, 1)):
        name, inner = f"_blocks.{index}", x
        if f"{name}._expand_conv.weight" in tensors:
            inner = layer(inner, f"{name}._expand_conv", f"{name}._bn0")
        inner = layer(inner, f"{name}._depthwise_conv", f"{name}._bn1", stride)
        inner = layer(inner, f"{name}._project_conv", f"{name}._bn2", relu=False)
        x = x + inner if index in (0, 2) else inner
    x = layer(x, "_conv_head", "_bn1").mean(axis=(2, 3))
    return x @ tensors["_fc.weight"].T + tensors["_fc.bias"]


def test_parity_with_torch():
    folder = weights.default_cache_dir() / "efficientnet-lite0"
    if not folder.is_dir():
        pytest.skip(f"no pretrained EfficientNet-Lite0 in {folder}")
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))
    network = efficientnet_lite.load_efficientnet_lite0(folder)
    logits = jax.jit(network)(reference_images())
    assert logits.dtype == jnp.float32
    assert np.abs(logits - np.array(reference["logits"])).max() < 1e-4


@pytest.mark.parametrize("on_cpu", [True, False])
def test_both_ways_agree_with_plain_convolutions(monkeypatch, on_cpu):
    monkeypatch.setattr(efficientnet_lite, "_on_cpu", lambda: on_cpu)
    tensors = tiny_checkpoint()
    images = np.random.default_rng(1).integers(0, 256, (3, 37, 44, 3)).astype(np.float32)
    logits = jax.jit(from_torch(tensors, TINY, Path("tiny")))(images)
    expected = plain_logits(tensors, images)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(8, 8), (9, 7), (2, 5), (1, 1)])
def test_shifts_are_a_depthwise_convolution(shape, stride, size):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *shape, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 1, 3)), jnp.float32)
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
        precision="highest",
    )
    shifted = efficientnet_lite.depthwise(x, kernel, stride)
    np.testing.assert_allclose(shifted, expected, atol=1e-5)


class TestRefusals:
    @pytest.mark.parametrize(
        "name",
        ["_conv_stem.weight", "_blocks.1._bn0.running_var", "_conv_head.weight", "_fc.bias"],
    )
    def test_each_tensor_is_needed_in_its_shape(self, name):
        tensors = tiny_checkpoint()
        tensors[name] = tensors[name][1:]
        with pytest.raises(UserError, match=f"w.pth: {name} has shape"):
            from_torch(tensors, TINY, Path("w.pth"))
        del tensors[name]
        with pytest.raises(UserError, match=f"w.pth has no tensor {name};"):
            from_torch(tensors, TINY, Path("w.pth"))

    def test_unknown_tensors(self):
        extra = {"_blocks.9._bn1.weight": np.zeros(3)}
        with pytest.raises(UserError, match=r"unknown tensor _blocks\.9\._bn1\.weight"):
            from_torch(tiny_checkpoint() | extra, TINY, Path("w.pth"))

    def test_numbers_that_are_not_finite(self):
        for name, number in (("running_mean", np.nan), ("bias", np.inf), ("running_var", -1)):
            tensors = tiny_checkpoint()
            tensors[f"_blocks.1._bn1.{name}"][0] = number
            with pytest.raises(UserError, match=r"not finite in blocks\.1\.depthwise"):
                from_torch(tensors, TINY, Path("w.pth"))

    def test_a_folder_without_weights(self, tmp_path):
        with pytest.raises(UserError, match=r"efficientnet-lite0-57934424\.pth cannot be read"):
            efficientnet_lite.load_efficientnet_lite0(tmp_path)
