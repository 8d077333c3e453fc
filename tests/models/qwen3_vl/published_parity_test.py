"""A published Qwen3-VL folder against transformers: MMMEM_QWEN3_VL_DIR names it.

    MMMEM_QWEN3_VL_DIR=Qwen3-VL-2B-Instruct python -m pytest -m parity -s -k published

Both models are held in float32 side by side: 8 bytes for each parameter, and the frames besides.
"""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax import prompts
from mmmem_jax.models.qwen3_vl.chat import load_chat, render
from mmmem_jax.models.qwen3_vl.config import read_config
from mmmem_jax.models.qwen3_vl.images import read_image_config
from mmmem_jax.models.qwen3_vl.inputs import batch, encode_messages, message_visuals
from mmmem_jax.models.qwen3_vl.params import load_model
from mmmem_jax.models.qwen3_vl.videos import read_video_config
from mmmem_jax.models.qwen3_vl.vision import visual_inputs
from mmmem_jax.policies import qwen3_vl as manager
from mmmem_jax.sib import token_prompts

for module in ("torch", "transformers"):
    pytest.importorskip(module, reason="needs mmmem_jax[parity]")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.video_utils import VideoMetadata  # noqa: E402

from tests.models.qwen3_vl import reference  # noqa: E402

pytestmark = pytest.mark.parity

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (256, 384, 3), np.uint8)
FRAMES = RNG.integers(0, 256, (4, 128, 192, 3), np.uint8)
MESSAGES = (
    {"role": "system", "content": prompts.read("caption_v1")},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": PICTURE},
            {"type": "text", "text": "Was it 12:30 in the naïve café, 日本?\n"},
            {"type": "video", "video": FRAMES, "fps": 4.0},
            {"type": "text", "text": "And then?"},
        ],
    },
)


@pytest.fixture(scope="module")
def folder() -> Path:
    folder = os.environ.get("MMMEM_QWEN3_VL_DIR")
    if not folder:
        pytest.skip("no published weights: set MMMEM_QWEN3_VL_DIR to a folder of Qwen3-VL")
    return Path(folder)


@pytest.fixture(scope="module")
def visuals(folder):
    return message_visuals(MESSAGES, read_image_config(folder), read_video_config(folder))


@pytest.fixture(scope="module")
def prompt(folder, visuals):
    return encode_messages(load_chat(folder, read_config(folder)), MESSAGES, visuals)


@pytest.fixture(scope="module")
def theirs(folder):
    """What the public processor makes of the same."""
    processor = reference.load_processor(folder)
    text = processor.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    told = VideoMetadata(total_num_frames=len(FRAMES), fps=4.0)
    how = {"video_metadata": [told], "return_tensors": "pt"}
    return text, processor(text=[text], images=[PICTURE], videos=[FRAMES], **how)


def test_texts_and_ids(folder, prompt, theirs):
    text, inputs = theirs
    chat = load_chat(folder, read_config(folder))
    assert render(chat, MESSAGES, add_generation_prompt=True) == text
    np.testing.assert_array_equal(prompt.ids, inputs["input_ids"][0])


def test_pixels(visuals, theirs):
    _, inputs = theirs
    for visual, name in zip(visuals, ("pixel_values", "pixel_values_videos"), strict=True):
        np.testing.assert_allclose(visual.pixels.patches, inputs[name], rtol=0, atol=1e-6)


def test_words_of_decisions_and_letters_are_tokens_of_their_own(folder):
    chat = load_chat(folder, read_config(folder))
    assert len(set(manager.action_ids(chat))) == len(manager.WORDS)
    for name in (manager.PROMPT, "train_decide_v1", "train_write_v1"):
        token_prompts.load_wording(chat, name)
    token_prompts.load_reading(chat, "train_read_v1")


def test_logits(folder, prompt, visuals, theirs):
    config = read_config(folder)
    frames = visual_inputs([(v.pixels.patches, v.pixels.grid) for v in visuals], config.vision)
    frame_tokens = frames.patches.shape[1] // config.vision.merge_unit
    tokens = batch([prompt], pad_id=0, frame_tokens=frame_tokens)
    model = load_model(folder, dtype=jnp.float32)
    found, _ = model(tokens, model.vision(frames))
    found = np.asarray(model.logits(found))[tokens.valid]
    del model
    theirs = dict(theirs[1])
    ids = theirs["input_ids"]
    theirs["mm_token_type_ids"] = (ids == config.image_token_id) + 2 * (
        ids == config.video_token_id
    )
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        wanted = model(**theirs).logits[0].numpy()
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    print(f"published weights: {error:.1e}")
    assert error < 1e-4
