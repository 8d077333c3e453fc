"""Qwen3-VL against the PyTorch implementation of transformers, on tiny random models in float32.

An error is the largest difference divided by the largest value of the reference; -s prints it.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmmem_jax.models.qwen3_vl import cached_attention
from mmmem_jax.models.qwen3_vl.chat import load_chat
from mmmem_jax.models.qwen3_vl.generate import decode, prefill
from mmmem_jax.models.qwen3_vl.images import read_image_config
from mmmem_jax.models.qwen3_vl.inputs import Prompt, batch, encode_messages, message_visuals
from mmmem_jax.models.qwen3_vl.modeling import Tokens, init_cache
from mmmem_jax.models.qwen3_vl.params import load_model, save_params
from mmmem_jax.models.qwen3_vl.videos import read_video_config
from mmmem_jax.models.qwen3_vl.vision import VisualInputs, visual_inputs
from mmmem_jax.testing.qwen3_vl import TINY, write_checkpoint

torch = pytest.importorskip("torch", reason="needs mmmem_jax[parity]")
transformers = pytest.importorskip("transformers", reason="needs mmmem_jax[parity]")

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
TOLERANCE_BF16 = 5e-2
LENGTH = 160  # of padded prompts


class Asked(NamedTuple):
    """A conversation in our form and in that of the reference."""

    prompt: Prompt
    reference: dict  # arguments of the reference model


class Asking(NamedTuple):
    """All conversations, and the frames of all of them for one call of the tower."""

    asked: dict[str, Asked]
    visual: VisualInputs
    visuals: list  # in the order of their frames


def error(found, wanted) -> float:
    """The largest difference, relative to the largest value of the reference."""
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def picture(rng, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def conversations() -> dict[str, list]:
    """Messages by what they hold."""
    rng = np.random.default_rng(3)
    text = {"type": "text", "text": "what is red and yellow?"}
    small = {"type": "image", "image": picture(rng, 64, 96)}
    wide = {"type": "image", "image": picture(rng, 32, 160)}
    high = {"type": "image", "image": picture(rng, 128, 64)}
    frames = rng.integers(0, 256, (11, 64, 64, 3), np.uint8)
    video = {"type": "video", "video": frames, "fps": 3.0}
    contents = {
        "text": [text],
        "image": [text, small],
        "images": [wide, text, high, small, text],
        "video": [video, text],
        "video_and_image": [small, video, text, high],
    }
    return {name: [{"role": "user", "content": parts}] for name, parts in contents.items()}


def reference_inputs(prompt: Prompt, visuals: list) -> dict:
    """What the reference takes; it makes the positions itself."""
    ids = torch.tensor(prompt.ids[None], dtype=torch.long)
    kinds = 1 * (ids == TINY.image_token_id) + 2 * (ids == TINY.video_token_id)
    found = {"input_ids": ids, "mm_token_type_ids": kinds}
    names = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
    for (values, grids), moves in zip(names, (False, True), strict=True):
        if own := [v.pixels for v in visuals if bool(v.times) == moves]:
            found[values] = torch.tensor(np.concatenate([p.patches for p in own]))
            found[grids] = torch.tensor([p.grid for p in own])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="module")
def reference(folder):
    """The PyTorch model."""
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def split(folder):
    """(graphdef, params) of ours in float32."""
    return nnx.split(load_model(folder, dtype=jnp.float32))


@pytest.fixture(scope="module")
def asking(folder) -> Asking:
    chat = load_chat(folder, TINY)
    image, video = read_image_config(folder), read_video_config(folder)
    asked, all_visuals, frame = {}, [], 0
    for name, messages in conversations().items():
        visuals = message_visuals(messages, image, video)
        prompt = encode_messages(chat, messages, visuals, first_frame=frame)
        frame += sum(visual.pixels.grid[0] for visual in visuals)
        all_visuals += visuals
        asked[name] = Asked(prompt, reference_inputs(prompt, visuals))
    pixels = [visual.pixels for visual in all_visuals]
    return Asking(asked, visual_inputs(pixels, TINY.vision), all_visuals)


class Wanted(NamedTuple):
    """What the reference gives for a conversation."""

    logits: torch.Tensor  # [L, V]
    read: list[torch.Tensor]  # [L, D] that each layer reads, DeepStack added


@pytest.fixture(scope="module")
def wanted(reference, asking) -> dict[str, Wanted]:
    found, read = {}, []
    layers = reference.model.language_model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][0].clone()))
        for layer in layers
    ]
    for name, asked in asking.asked.items():
        read.clear()
        found[name] = Wanted(reference(**asked.reference).logits[0], list(read))
    for hook in hooks:
        hook.remove()
    return found


def padded(asking: Asking, side: str) -> Tokens:
    frame_tokens = asking.visual.patches.shape[1] // TINY.vision.merge_unit
    prompts = [asked.prompt for asked in asking.asked.values()]
    return batch(prompts, pad_id=0, frame_tokens=frame_tokens, pad_to=LENGTH, side=side)


@partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens: Tokens, inputs: VisualInputs):
    """Visual tokens, hidden states and logits."""
    model = nnx.merge(graphdef, params)
    visual = model.vision(inputs)
    hidden, _ = model(tokens, visual)
    return visual, hidden, model.logits(hidden)


@partial(jax.jit, static_argnums=0)
def read(graphdef, params, tokens: Tokens, visual, cache):
    """Logits of a piece, and the cache with it."""
    model = nnx.merge(graphdef, params)
    hidden, cache = model(tokens, visual, cache)
    return model.logits(hidden), cache


def worst(logits, tokens: Tokens, asking: Asking, wanted) -> dict[str, float]:
    """{name: error of the logits of one row's tokens}."""
    return {
        name: error(logits[row][tokens.valid[row]], wanted[name].logits)
        for row, name in enumerate(asking.asked)
    }


def test_positions_are_those_of_the_reference(reference, asking):
    for asked in asking.asked.values():
        arguments = {k: v for k, v in asked.reference.items() if not k.startswith("pixel")}
        positions, delta = reference.model.get_rope_index(**arguments)
        assert np.array_equal(asked.prompt.positions, positions[:, 0].T.numpy())
        assert asked.prompt.next_position == delta.item() + len(asked.prompt.ids)


def test_vision_tower_and_every_deepstack_layer(split, reference, asking):
    visual, _, _ = forward(*split, padded(asking, "right"), asking.visual)
    patches = torch.tensor(np.concatenate([v.pixels.patches for v in asking.visuals]))
    grids = torch.tensor([v.pixels.grid for v in asking.visuals])
    wanted = reference.model.visual(patches, grids)
    lengths = asking.visual.lengths // TINY.vision.merge_unit
    rows = np.arange(asking.visual.patches.shape[1] // TINY.vision.merge_unit)
    kept = (rows[None] < lengths[:, None]).ravel()
    errors = {"embeddings": error(visual.embeddings[kept], wanted.pooler_output)}
    for layer, features in enumerate(wanted.deepstack_features):
        errors[f"deepstack {layer}"] = error(visual.deepstack[layer][kept], features)
    print("vision", errors)
    assert len(errors) == 4
    assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(side, split, asking, wanted):
    tokens = padded(asking, side)
    errors = worst(forward(*split, tokens, asking.visual)[2], tokens, asking, wanted)
    print("logits", side, errors)
    assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_hidden_states_after_the_layers_that_deepstack_is_added_to(
    num_layers, split, reference, asking, wanted
):
    text = dataclasses.replace(TINY.text, num_layers=num_layers)
    model = nnx.clone(nnx.merge(*split))
    model.config = dataclasses.replace(TINY, text=text)
    nnx.update(model.layers, jax.tree.map(lambda x: x[:num_layers], nnx.state(model.layers)))
    tokens = padded(asking, "right")
    _, hidden, _ = forward(*nnx.split(model), tokens, asking.visual)
    errors = {}
    for row, name in enumerate(asking.asked):
        state = reference.model.language_model.norm(wanted[name].read[num_layers])
        errors[name] = error(hidden[row][tokens.valid[row]], state)
    print("layer", num_layers, errors)
    assert max(errors.values()) < TOLERANCE


@pytest.fixture(params=[512, 48])
def slots(request, monkeypatch):
    """Of a cache that is looked at whole, and of another in blocks; each has its own programs."""
    monkeypatch.setattr(cached_attention, "SLOT_BLOCK", request.param)
    monkeypatch.setattr(cached_attention, "QUERY_BLOCK", 32)
    return LENGTH + 8 + (request.param < LENGTH)


@pytest.mark.parametrize("side", ["left", "right"])
def test_two_pieces_through_the_cache(side, slots, split, asking, wanted):
    tokens = padded(asking, side)
    visual, _, _ = forward(*split, tokens, asking.visual)
    cache = init_cache(TINY.text, len(asking.asked), slots, jnp.float32)
    pieces = []
    for span in (slice(0, LENGTH // 2), slice(LENGTH // 2, LENGTH)):
        logits, cache = read(
            *split, jax.tree.map(lambda x, at=span: x[:, at], tokens), visual, cache
        )
        pieces.append(logits)
    errors = worst(np.concatenate(pieces, axis=1), tokens, asking, wanted)
    print("cache", side, errors)
    assert max(errors.values()) < TOLERANCE
    following = [asked.prompt.next_position for asked in asking.asked.values()]
    assert cache.next_position.tolist() == following
    last = np.stack([wanted[name].logits[-1] for name in asking.asked])
    assert error(nnx.merge(*split).logits(cache.hidden), last) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_written_and_how_likely_they_were(side, slots, split, reference, asking):
    """All conversations in one batch through the cache, against one after the other there."""
    tokens, count = padded(asking, side), 8
    visual, _, _ = forward(*split, tokens, asking.visual)
    cache = init_cache(TINY.text, len(asking.asked), slots, jnp.float32)
    cache = prefill(*split, tokens, visual, cache, chunk=LENGTH // 2)
    out, _ = decode(
        *split, jax.random.key(0), cache, max_new_tokens=count, stop_ids=(TINY.video_token_id,)
    )
    errors = {}
    for row, (name, asked) in enumerate(asking.asked.items()):
        wanted = reference.generate(
            **asked.reference, max_new_tokens=count, do_sample=False, output_logits=True,
            return_dict_in_generate=True, eos_token_id=TINY.video_token_id, pad_token_id=0,
        )  # fmt: skip
        written = wanted.sequences[0, len(asked.prompt.ids) :].numpy()
        valid = np.asarray(out.valid[row])
        assert np.asarray(out.ids[row])[valid].tolist() == written.tolist(), name
        logits = torch.stack(wanted.logits)[:, 0].log_softmax(-1)
        likely = logits[torch.arange(len(written)), torch.tensor(written)]
        errors[name] = error(out.log_probs[row][valid], likely)
    print("generated", side, errors)
    assert max(errors.values()) < TOLERANCE


def test_bfloat16(folder, asking, wanted):
    tokens = padded(asking, "left")
    _, _, logits = forward(*nnx.split(load_model(folder)), tokens, asking.visual)
    errors = worst(logits, tokens, asking, wanted)
    print("bfloat16 against float32", errors)
    assert max(errors.values()) < TOLERANCE_BF16


def text_alone(asking: Asking) -> tuple[Tokens, dict]:
    asked = asking.asked["text"]
    tokens = batch([asked.prompt], pad_id=0, frame_tokens=1, pad_to=len(asked.prompt.ids))
    return tokens, asked.reference


@pytest.mark.parametrize("tied", [True, False])
def test_models_that_the_reference_saves(tied, tmp_path, asking):
    ours = dataclasses.replace(
        TINY, text=dataclasses.replace(TINY.text, tie_word_embeddings=tied, num_layers=3)
    )
    made = write_checkpoint(tmp_path / "ours", ours, seed=1, num_shards=1)
    kind = transformers.Qwen3VLForConditionalGeneration
    reference, problems = kind.from_pretrained(made, output_loading_info=True)
    assert not any(problems.values())
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    model = load_model(tmp_path / "theirs", dtype=jnp.float32)
    assert model.config == ours
    tokens, arguments = text_alone(asking)
    hidden, _ = model(tokens)
    measured = error(model.logits(hidden)[0], reference(**arguments).logits[0].detach())
    print("tied" if tied else "untied", measured)
    assert measured < TOLERANCE


def test_saves_what_the_reference_reads(tmp_path, split, reference):
    save_params(tmp_path, split[1], TINY, max_shard_bytes=1e5)
    again, problems = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(problems.values())
    wanted = reference.state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in again.state_dict().items())
