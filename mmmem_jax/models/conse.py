"""ConSE: images in the space of a text encoder, by what an ImageNet classifier sees in them.

Source: Norouzi et al., arXiv 1312.5650. An image's embedding is the mean of its likeliest labels'
text embeddings, each weighted with its probability, so a text query finds images by cosine with no
model trained on pairs of the two. What ImageNet has no label for, it finds only by likeness.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image

from mmmem_jax.errors import UserError
from mmmem_jax.models.efficientnet_lite import IMAGE_SIZE, EfficientNetLite0
from mmmem_jax.models.text_encoder import cached_embeddings
from mmmem_jax.models.weights import default_cache_dir

_FILE = "imagenet1k_clean_names.json"
_NUM_LABELS = 1000
_CROP = 0.875  # of the shorter side: how ImageNet's classifiers are evaluated

SeeFn = Callable[[UInt8[np.ndarray, "B H W 3"]], tuple[np.ndarray, np.ndarray]]


class Labels(NamedTuple):
    """What a classifier can name, in the order of its logits."""

    names: tuple[str, ...]
    embeddings: np.ndarray  # [len(names), D] float32, of length 1


def load_labels(
    classes_folder: str | Path,
    encoder_folder: str | Path,
    cache_dir: str | Path | None = None,
) -> Labels:
    """Reads ImageNet-1k's names and embeds "a photo of a {name}"; kept for the next call.

    Args:
      classes_folder: what `weights.fetch_imagenet_classes` returns.
      encoder_folder: a sentence encoder, such as `weights.fetch_minilm` returns.
      cache_dir: where the embeddings are kept; by default in the cache of the weights.

    Raises:
      UserError: the names are missing or are not a list of 1000; see also load_text_encoder.
    """
    names = _read_names(Path(classes_folder) / _FILE)
    texts = [f"a photo of a {name}" for name in names]
    cache_dir = default_cache_dir() / "embeddings" if cache_dir is None else cache_dir
    embeddings, _ = cached_embeddings(texts, encoder_folder, cache_dir)
    return Labels(names, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))


def conse(
    logits: Float[Array, "B N"],
    embeddings: Float[Array, "N D"],
    *,
    top_labels: int = 50,
    temperature: float = 2.0,
) -> Float[Array, "B D"]:
    """Returns the unit-length sum of the likeliest labels' embeddings, each times its probability.

    Args:
      logits: [B, N] over labels.
      embeddings: [N, D] of the labels.
      top_labels: how many labels count (eq. 3's T); all of them if there are fewer.
      temperature: divides the logits; above 1 it listens more to the lesser labels.
    """
    top_labels = min(top_labels, embeddings.shape[0])
    values, indices = jax.lax.top_k(jax.nn.softmax(logits / temperature), top_labels)
    with jax.default_matmul_precision("highest"):
        total = jnp.einsum("bk,bkd->bd", values, embeddings[indices])
    return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-12)


def make_see_fn(
    network: EfficientNetLite0,
    labels: Labels,
    *,
    views: Sequence[str] = ("squash", "crop"),
    batch_size: int = 4,
    top_labels: int = 50,
    temperature: float = 2.0,
) -> SeeFn:
    """Makes the function that sees images; one program is compiled, for `batch_size` images.

    Args:
      network: gives logits in the order of `labels`.
      labels: names and text embeddings.
      views: what is shown of an image, the logits averaged: "squash" is all of it made square,
        "crop" its centre in its own proportions. One view takes half the time of two.
      batch_size: fewer images are filled up to so many.
      top_labels: see conse, as is `temperature`.

    Returns:
      see(images uint8 [B, H, W, 3] RGB) -> (embeddings float32 [B, D] of length 1, probabilities
      float32 [B, labels] without temperature, for naming what is seen). Any B, one size a call.
    """
    if not views or any(view not in ("squash", "crop") for view in views):
        raise ValueError(f"views are of 'squash' and 'crop', not {views!r}")
    graphdef, state = nnx.split(network)
    label_embeddings = jnp.asarray(labels.embeddings)

    @jax.jit
    def see_batch(state, label_embeddings, pixels):  # [V, batch_size, 224, 224, 3] uint8
        flat = pixels.reshape(-1, *pixels.shape[2:]).astype(jnp.float32)
        logits = nnx.merge(graphdef, state)(flat).reshape(*pixels.shape[:2], -1).mean(axis=0)
        embeddings = conse(logits, label_embeddings, top_labels=top_labels, temperature=temperature)
        return embeddings, jax.nn.softmax(logits)

    def see(images: UInt8[np.ndarray, "B H W 3"]) -> tuple[np.ndarray, np.ndarray]:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"images are uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}"
            )
        widths = (label_embeddings.shape[1], label_embeddings.shape[0])
        seen = [tuple(np.zeros((0, width), np.float32) for width in widths)]
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            pixels = np.zeros((len(views), batch_size, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
            for view, name in enumerate(views):
                for row, image in enumerate(batch):
                    pixels[view, row] = show(image, name)
            # Dispatched, not awaited: the next batch is resized meanwhile.
            seen.append(see_batch(state, label_embeddings, pixels))
        embeddings, probabilities = (np.concatenate(parts) for parts in zip(*seen, strict=True))
        return embeddings[: len(images)], probabilities[: len(images)]

    return see


def show(image: UInt8[np.ndarray, "H W 3"], view: str) -> UInt8[np.ndarray, "224 224 3"]:
    """Resizes an image to the network's size, antialiased.

    Pillow does it in a fifth of the time that jax.image.resize takes on a CPU.
    """
    height, width = image.shape[:2]
    box = (0.0, 0.0, float(width), float(height))
    if view == "crop":
        side = max(_CROP * min(height, width), 1.0)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, box=box))


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); fetch it again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list or len(names) != _NUM_LABELS:
        raise UserError(f"{path} is not a list of {_NUM_LABELS} names; fetch it again")
    return tuple(names)
