"""The public PyTorch processor of a folder, for parity tests."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import interpolate
from transformers import (
    Qwen2Tokenizer,
    Qwen3VLProcessor,
    image_processing_backends,
    video_processing_utils,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.utils import is_torchvision_available


def resize(images: torch.Tensor, size, **_) -> torch.Tensor:
    """What torchvision resizes uint8 [..., C, H, W] with on a CPU: torch's own antialiased filter.

    `size` is (height, width).
    """
    shape = images.shape
    resized = interpolate(
        images.reshape(-1, *shape[-3:]), size=tuple(size), mode="bicubic", antialias=True
    )
    return resized.reshape(*shape[:-2], *size)


def _normalize(images, mean, std, inplace):
    return (images - mean[:, None, None]) / std[:, None, None]


# The three functions of torchvision that the reference calls on RGB frames, for where there is
# none: its wheels ask for those of CUDA.
_STAND_IN = SimpleNamespace(
    resize=resize,
    normalize=_normalize,
    grayscale_to_rgb=lambda images: images,
    InterpolationMode=SimpleNamespace(LANCZOS="lanczos"),
)


def load_processor(folder: Path) -> Qwen3VLProcessor:
    """Builds the reference processor from the files of a model folder."""
    if not is_torchvision_available():
        image_processing_backends.tvF = video_processing_utils.tvF = _STAND_IN
        image_processing_backends.pil_torch_interpolation_mapping = {3: "bicubic"}
        # The check of the arguments' types looks torchvision up.
        Qwen3VLProcessor.check_argument_for_proper_class = lambda *_: None
    return Qwen3VLProcessor(
        # The one that resizes by Pillow; the other needs torchvision and differs in that alone.
        Qwen2VLImageProcessorPil.from_pretrained(folder),
        Qwen2Tokenizer.from_pretrained(folder),
        Qwen3VLVideoProcessor.from_pretrained(folder, cap_pixels_per_frame=False),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
    )
