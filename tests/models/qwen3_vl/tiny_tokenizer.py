"""What tests of the input side share: a model's config that fits the toy tokenizer."""

from dataclasses import replace

from mmmem_jax.models.qwen3_vl.config import SIZES, Qwen3VLConfig
from mmmem_jax.testing.qwen3_vl import special_ids


def tiny_config() -> Qwen3VLConfig:
    """The 2B model's config, with the special ids of testing.qwen3_vl.toy_tokenizer."""
    ids = special_ids()
    return replace(
        SIZES["2b"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
