"""Token ids, positions and times of whole conversations against the public processor and model."""

from types import SimpleNamespace

import numpy as np
import pytest

from mmmem_jax.models.qwen3_vl.chat import load_chat, render
from mmmem_jax.models.qwen3_vl.images import read_image_config
from mmmem_jax.models.qwen3_vl.inputs import batch, encode_messages, message_visuals
from mmmem_jax.models.qwen3_vl.videos import read_video_config
from mmmem_jax.testing.qwen3_vl import write_tokenizer
from tests.models.qwen3_vl.tiny_tokenizer import tiny_config

for module in ("torch", "transformers"):
    pytest.importorskip(module, reason="needs mmmem_jax[parity]")

import torch  # noqa: E402
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel  # noqa: E402

from tests.models.qwen3_vl import reference  # noqa: E402

pytestmark = pytest.mark.parity


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def image(height, width):
    return {"type": "image", "image": noise(height, width)}


def video(frames, height, width, fps):
    return {"type": "video", "video": noise(frames, height, width), "fps": fps}


def text(words):
    return {"type": "text", "text": words}


CONVERSATIONS = {
    "text": [[text("What is it? It's 1234 of naïve 空\n\n  text.")]],
    "image": [[image(64, 96), text("What is this?")]],
    "images": [[image(64, 96), text(" and "), image(128, 64), image(32, 32), text("?")]],
    "video": [[video(20, 64, 64, 5.0), text("When does he wave?")]],
    "odd video": [[video(5, 64, 96, 2.0)]],
    "mixed": [
        [text("See"), image(64, 64), video(9, 32, 64, 3.0), text(" then"), image(32, 96)],
        [video(30, 64, 64, 23.976), video(8, 96, 32, 4.0), text("Compare.")],
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_vl")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return reference.load_processor(folder)


@pytest.fixture(scope="module")
def encode(folder):
    """Our side: messages of several conversations to prompts and their visuals."""
    chat = load_chat(folder, tiny_config())
    configs = read_image_config(folder), read_video_config(folder)

    def encode(conversations):
        prompts, visuals, frame = [], [], 0
        for messages in conversations:
            seen = message_visuals(messages, *configs)
            prompts.append(encode_messages(chat, messages, seen, first_frame=frame))
            frame += sum(one.pixels.grid[0] for one in seen)
            visuals += seen
        return chat, prompts, visuals

    return encode


def conversation(turns):
    """A system turn, then the user's turns with answers between them."""
    messages = [{"role": "system", "content": "Be brief."}]
    for number, parts in enumerate(turns):
        if number:
            messages.append({"role": "assistant", "content": [text("Yes.")]})
        messages.append({"role": "user", "content": parts})
    return messages


def public_inputs(processor, conversations, side):
    """The reference's side: its processor's outputs for a padded batch."""
    texts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    contents = [m["content"] for messages in conversations for m in messages]
    parts = [p for content in contents if not isinstance(content, str) for p in content]
    images = [p["image"] for p in parts if p["type"] == "image"]
    clips = [p for p in parts if p["type"] == "video"]
    metadata = [{"fps": p["fps"], "total_num_frames": len(p["video"])} for p in clips]
    return texts, processor(
        text=texts,
        images=images or None,
        videos=[p["video"] for p in clips] or None,
        videos_kwargs={"video_metadata": metadata} if clips else {},
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )


def public_positions(inputs):
    """[B, L, 3] positions and [B] next positions of the reference's model."""
    vision = SimpleNamespace(spatial_merge_size=2)
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision),
        get_vision_position_ids=lambda *a, **k: Qwen3VLModel.get_vision_position_ids(None, *a, **k),
    )
    positions, delta = Qwen3VLModel.get_rope_index(
        model,
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs.get("image_grid_thw"),
        inputs.get("video_grid_thw"),
        inputs["attention_mask"],
    )
    lengths = inputs["attention_mask"].sum(1)
    return positions.permute(1, 2, 0).numpy(), (delta[:, 0] + lengths).tolist()


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_one_conversation(processor, encode, name):
    messages = conversation(CONVERSATIONS[name])
    texts, theirs = public_inputs(processor, [messages], "right")
    chat, [prompt], visuals = encode([messages])
    assert render(chat, messages, add_generation_prompt=True) == texts[0]
    assert prompt.ids.tolist() == theirs["input_ids"][0].tolist()
    positions, following = public_positions(theirs)
    np.testing.assert_array_equal(prompt.positions, positions[0])
    assert [prompt.next_position] == following
    check_visuals(visuals, theirs)
    check_slots(prompt, visuals)


def check_visuals(visuals, theirs):
    for names, wanted in (
        (("pixel_values", "image_grid_thw"), [one for one in visuals if not one.times]),
        (("pixel_values_videos", "video_grid_thw"), [one for one in visuals if one.times]),
    ):
        if not wanted:
            assert names[0] not in theirs
            continue
        patches = np.concatenate([one.pixels.patches for one in wanted])
        np.testing.assert_allclose(patches, theirs[names[0]].numpy(), rtol=0, atol=1e-6)
        assert [list(one.pixels.grid) for one in wanted] == theirs[names[1]].tolist()


def check_slots(prompt, visuals):
    """Every merged token of every frame stands in the prompt once, in order."""
    sizes = [h * w // 4 for one in visuals for t, h, w in [one.pixels.grid] for _ in range(t)]
    wanted = [[frame, token] for frame, size in enumerate(sizes) for token in range(size)]
    assert prompt.slots[prompt.slots[:, 0] >= 0].tolist() == wanted


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(processor, encode, side):
    conversations = [conversation(turns) for turns in CONVERSATIONS.values()]
    _, theirs = public_inputs(processor, conversations, side)
    chat, prompts, _ = encode(conversations)
    length = theirs["input_ids"].shape[1]
    ours = batch(prompts, pad_id=chat.text_end_id, frame_tokens=24, pad_to=length, side=side)
    np.testing.assert_array_equal(ours.ids, theirs["input_ids"].numpy())
    np.testing.assert_array_equal(ours.valid, theirs["attention_mask"].numpy().astype(bool))
    positions, following = public_positions(theirs)
    np.testing.assert_array_equal(ours.positions, positions)
    assert [prompt.next_position for prompt in prompts] == following
    seen = torch.isin(theirs["input_ids"], torch.tensor([chat.image_id, chat.video_id])).numpy()
    np.testing.assert_array_equal(ours.visual_index >= 0, seen)


def test_times_are_written_alike(processor, encode):
    messages = conversation([[video(30, 32, 32, 23.976)]])
    _, theirs = public_inputs(processor, [messages], "right")
    chat, [prompt], _ = encode([messages])
    written = chat.tokenizer.decode(prompt.ids, skip_special_tokens=False)
    assert written == processor.tokenizer.decode(theirs["input_ids"][0])
    assert "<0.2 seconds><|vision_start|><|video_pad|>" in written


def test_a_folder_that_transformers_saved(processor, folder, tmp_path):
    processor.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert read_image_config(tmp_path) == read_image_config(folder)
    assert read_video_config(tmp_path) == read_video_config(folder)
    messages, config = conversation([[text("What is it?")]]), tiny_config()
    ours = encode_messages(load_chat(tmp_path, config), messages, [])
    np.testing.assert_array_equal(
        ours.ids, encode_messages(load_chat(folder, config), messages, []).ids
    )
