"""A toy Qwen3-VL folder, laid out as the published ones: tokenizer, preprocessing and weights."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from mmmem_jax.models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL
from mmmem_jax.models.qwen3_vl.params import save_params

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Words that are one token where a space stands before them; all else is spelt in bytes.
_WORDS = (
    "the of and to in is that it was for on are with at be this have from or by not but what all"
    " a I you he she we they who where when yes no man woman red blue green yellow seconds video"
)
# How Qwen2's tokenizer cuts text before it merges bytes.
_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'text' %}
                {{- part.text }}
            {%- elif part.type in ('image', 'video') %}
                {{- '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}
            {%- else %}
                {{- raise_exception('a part of type ' + part.type) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def toy_tokenizer() -> Tokenizer:
    """Bytes, the merges of a few dozen words, and Qwen3-VL's special tokens: at most 512 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces, merges = dict.fromkeys(alphabet), {}
    for word in _WORDS.split():
        left = "Ġ"  # a space, in byte-level spelling
        for letter in word:
            merges[left, letter] = None
            left += letter
            pieces[left] = None
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[*merges]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUTS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def special_ids() -> Mapping[str, int]:
    """The ids of SPECIAL_TOKENS in toy_tokenizer."""
    tokenizer = toy_tokenizer()
    return {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}


def write_tokenizer(folder: Path, words: Sequence[str] = ()) -> None:
    """Writes all of a toy folder that is neither config.json nor weights.

    Args:
      folder: that exists.
      words: to be one token too where a space stands before them.
    """
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens([AddedToken(f" {word}", normalized=False) for word in words])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "model_max_length": 4096,
        },
    )
    pixels = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 32 * 32},
            **pixels,
        },
    )
    _write_json(
        folder / "video_preprocessor_config.json",
        {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 32 * 32},
            "fps": 2,
            "min_frames": 4,
            "max_frames": 16,
            **pixels,
        },
    )


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def tiny_config() -> Qwen3VLConfig:
    """The smallest model that has every part, for the tokens of toy_tokenizer."""
    ids = special_ids()
    return Qwen3VLConfig(
        TextConfig(
            vocab_size=512,
            hidden_size=64,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            intermediate_size=128,
            tie_word_embeddings=False,
            mrope_section=(4, 2, 2),
            max_positions=4096,
        ),
        VisionConfig(
            depth=4,
            hidden_size=32,
            num_heads=2,
            intermediate_size=64,
            out_hidden_size=64,
            deepstack_layers=(0, 1, 2),
            num_position_embeddings=36,
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


TINY = tiny_config()
# With fewer layers, for tests of what is done with a model rather than in it.
SHALLOW = dataclasses.replace(
    TINY,
    text=dataclasses.replace(TINY.text, num_layers=2),
    vision=dataclasses.replace(TINY.vision, depth=2, deepstack_layers=(0, 1)),
)


def random_params(config: Qwen3VLConfig, seed: int) -> nnx.State:
    """Float32 parameters that keep activations near 1; norms and biases are random too."""
    rng = np.random.default_rng(seed)
    abstract = nnx.state(nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0))))

    def draw(path, x):
        leaf = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        mean = float(leaf.endswith("scale"))
        spread = {"scale": 0.1, "bias": 0.1, "embedding": x.shape[-1] ** -0.5}
        spread["kernel"] = x.shape[-2] ** -0.5 if x.ndim > 1 else 0.0
        return rng.normal(mean, spread[leaf.rsplit(".", 1)[-1]], x.shape).astype(np.float32)

    return jax.tree.map_with_path(draw, abstract)


def write_checkpoint(
    folder: str | Path,
    config: Qwen3VLConfig = TINY,
    seed: int = 0,
    num_shards: int = 2,
    words: Sequence[str] = (),
) -> Path:
    """Writes a whole folder of a random model, its safetensors in `num_shards` or one more.

    `words` are one token each, see `write_tokenizer`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    params = random_params(config, seed)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    save_params(
        folder, params, config, max_shard_bytes=np.inf if num_shards == 1 else size / num_shards
    )
    write_tokenizer(folder, words)
    return folder
