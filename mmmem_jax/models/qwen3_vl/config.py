"""Sizes of a Qwen3-VL, read from the config.json of an official folder, or by name."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmem_jax.errors import UserError
from mmmem_jax.models.json_object import read_object

MODEL_TYPE = "qwen3_vl"


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    deepstack_layers: tuple[int, ...]  # blocks whose output also goes into the language model
    num_position_embeddings: int = 2304  # of a square grid
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches merged into one token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True)
class TextConfig:
    """The language model."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    tie_word_embeddings: bool
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_section: tuple[int, int, int] = (24, 20, 20)  # frequencies of time, height, width
    max_positions: int = 262144


@dataclass(frozen=True)
class Qwen3VLConfig:
    """A whole model."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653


def _named(
    hidden: int, layers: int, heads: int, inner: int, *, tied: bool, large_eye: bool
) -> Qwen3VLConfig:
    eye = (27, 1152, 16, 4304) if large_eye else (24, 1024, 16, 4096)
    return Qwen3VLConfig(
        TextConfig(
            vocab_size=151936,
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=inner,
            tie_word_embeddings=tied,
        ),
        VisionConfig(
            *eye,
            out_hidden_size=hidden,
            deepstack_layers=(8, 16, 24) if large_eye else (5, 11, 17),
        ),
    )


# The dense models as published: https://huggingface.co/Qwen/Qwen3-VL-8B-Instruct and its siblings.
SIZES: Mapping[str, Qwen3VLConfig] = {
    "2b": _named(2048, 28, 16, 6144, tied=True, large_eye=False),
    "4b": _named(2560, 36, 32, 9728, tied=True, large_eye=False),
    "8b": _named(4096, 36, 32, 12288, tied=False, large_eye=True),
    "32b": _named(5120, 64, 64, 25600, tied=False, large_eye=True),
}


def read_config(folder: str | Path) -> Qwen3VLConfig:
    """Reads config.json of a model folder.

    Raises:
      UserError: if it is missing, no JSON, of another architecture, or of sizes that cannot be.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no config.json; a Qwen3-VL folder holds config.json, tokenizer.json and"
            " *.safetensors"
        )
    found = read_object(path)
    kind = found.get("model_type")
    if kind != MODEL_TYPE:
        raise UserError(f"{path} is of model_type {kind!r}; only {MODEL_TYPE!r} (dense) is read")
    try:
        config = _from_json(found)
    except KeyError as error:
        raise UserError(f"{path} has no {error}; it is not a whole Qwen3-VL config") from error
    _check(config, path)
    return config


def _from_json(found: dict[str, Any]) -> Qwen3VLConfig:
    text, vision = found["text_config"], found["vision_config"]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return Qwen3VLConfig(
        TextConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            intermediate_size=text["intermediate_size"],
            tie_word_embeddings=bool(
                found.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
            ),
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or text.get("rope_theta", 5e6)),
            mrope_section=tuple(rope.get("mrope_section", (24, 20, 20))),
            max_positions=text["max_position_embeddings"],
        ),
        VisionConfig(
            depth=vision["depth"],
            hidden_size=vision["hidden_size"],
            num_heads=vision["num_heads"],
            intermediate_size=vision["intermediate_size"],
            out_hidden_size=vision["out_hidden_size"],
            deepstack_layers=tuple(vision["deepstack_visual_indexes"]),
            num_position_embeddings=vision["num_position_embeddings"],
            patch_size=vision["patch_size"],
            temporal_patch_size=vision["temporal_patch_size"],
            spatial_merge_size=vision["spatial_merge_size"],
            in_channels=vision.get("in_channels", 3),
        ),
        **{
            name: found[name]
            for name in (f.name for f in dataclasses.fields(Qwen3VLConfig))
            if name.endswith("_token_id")
        },
    )


def _check(config: Qwen3VLConfig, path: Path) -> None:
    text, vision = config.text, config.vision
    problems = {
        "num_attention_heads is no multiple of num_key_value_heads": (
            text.num_heads % text.num_kv_heads
        ),
        "mrope_section does not add up to half of head_dim": (
            2 * sum(text.mrope_section) != text.head_dim
        ),
        "the vision tower's num_heads do not divide its hidden_size": (
            vision.hidden_size % (4 * vision.num_heads)
        ),
        "out_hidden_size is not the hidden_size of the language model": (
            vision.out_hidden_size != text.hidden_size
        ),
        "deepstack_visual_indexes are no rising blocks of the vision tower": (
            list(vision.deepstack_layers)
            != sorted(set(vision.deepstack_layers) & set(range(vision.depth)))
        ),
        "num_position_embeddings is no square": (
            round(vision.num_position_embeddings**0.5) ** 2 != vision.num_position_embeddings
        ),
        "there are fewer layers than deepstack_visual_indexes": (
            len(vision.deepstack_layers) > text.num_layers
        ),
    }
    for problem, wrong in problems.items():
        if wrong:
            raise UserError(f"{path}: {problem}; fetch it again")


def to_json(config: Qwen3VLConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json of a model, as the official ones are laid out."""
    text, vision = config.text, config.vision
    rope = {
        "mrope_interleaved": True,
        "mrope_section": list(text.mrope_section),
        "rope_type": "default",
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "tie_word_embeddings": text.tie_word_embeddings,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": dtype,
            "head_dim": text.head_dim,
            "hidden_act": "silu",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_positions,
            "num_attention_heads": text.num_heads,
            "num_hidden_layers": text.num_layers,
            "num_key_value_heads": text.num_kv_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_scaling": rope,
            "rope_theta": text.rope_theta,
            "tie_word_embeddings": text.tie_word_embeddings,
            "vocab_size": text.vocab_size,
        },
        "vision_config": {
            "model_type": MODEL_TYPE,
            "deepstack_visual_indexes": list(vision.deepstack_layers),
            "depth": vision.depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vision.hidden_size,
            "in_channels": vision.in_channels,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "num_position_embeddings": vision.num_position_embeddings,
            "out_hidden_size": vision.out_hidden_size,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        },
    }
