"""Prompts put together on the device against those of the host, whatever padding lies between."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax import prompts
from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl import inputs
from mmmem_jax.models.qwen3_vl.chat import load_chat
from mmmem_jax.models.qwen3_vl.images import Pixels, Visual
from mmmem_jax.models.qwen3_vl.vision import visual_inputs
from mmmem_jax.policies import qwen3_vl as manager
from mmmem_jax.sib import token_prompts
from mmmem_jax.sib.token_prompts import Clips, Nodes
from mmmem_jax.testing.qwen3_vl import TINY, write_tokenizer

DECISIONS = ("train_decide_v1", "train_write_v1")
NODE, CAPTION = " the man in red", " a green video seen"
HEIGHT, WIDTH = 2, 3  # tokens of a frame


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_tokenizer(folder)
    return load_chat(folder, TINY)


def padded(ids, size):
    valid = np.arange(size) < len(ids)
    row = np.where(valid, np.resize(np.array([*ids, 0], np.int32), size), 7).astype(np.int32)
    return jnp.asarray(row), jnp.asarray(valid)


def encode(chat, text):
    return chat.tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", DECISIONS)
@pytest.mark.parametrize("node", [NODE, ""])
def test_a_prompt_is_that_of_the_whole_conversation(chat, name, node):
    wording = token_prompts.load_wording(chat, name)
    rows = [padded(encode(chat, node), 9), padded(encode(chat, node), 9)]
    captions = [padded(encode(chat, CAPTION), 12)] * 2
    found = token_prompts.assemble(
        wording,
        Nodes(*map(jnp.stack, zip(*rows, strict=True))),
        Clips(*map(jnp.stack, zip(*captions, strict=True)), jnp.array([0, 3])),
        (HEIGHT, WIDTH),
    )
    text = prompts.read(name).replace("{node}", node).replace("{caption}", CAPTION)
    before, after = text.split("{frame}")
    parts = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
    visual = Visual(Pixels(np.zeros((0, 1)), (1, HEIGHT * 2, WIDTH * 2)))
    expected = inputs.encode_messages(chat, [{"role": "user", "content": parts}], [visual])
    for row, frame in enumerate((0, 3)):
        valid = np.asarray(found.valid[row])
        np.testing.assert_array_equal(found.ids[row][valid], expected.ids)
        np.testing.assert_array_equal(found.positions[row][valid], expected.positions)
        place = expected.slots[:, 1]
        index = np.where(place < 0, -1, frame * HEIGHT * WIDTH + place)
        np.testing.assert_array_equal(found.visual_index[row][valid], index)
        assert found.valid[row, -1]


def test_the_prompt_of_the_build_is_laid_out_and_answered_as_there(chat):
    wording = token_prompts.load_wording(chat, manager.PROMPT)
    parts = [encode(chat, x) for x in (NODE, "<|image_pad|>", CAPTION)]
    ids = [*wording.pieces[0]]
    for part, piece in zip(parts, wording.pieces[1:], strict=True):
        ids += [*part, *piece]
    frame = "<|vision_start|><|image_pad|><|vision_end|>"
    assert chat.tokenizer.decode(ids, skip_special_tokens=False) == (
        f"<|im_start|>system\n{prompts.read(manager.PROMPT)}<|im_end|>\n<|im_start|>user\n"
        f"\n{NODE}\n{frame}\n{CAPTION}\n{manager.QUESTION}"
    )
    assert wording.action_ids == manager.action_ids(chat)


def test_completions_follow_at_the_next_positions(chat):
    wording = token_prompts.load_wording(chat, DECISIONS[0])
    node, caption = padded([1, 2], 4), padded([3], 2)
    prompt = token_prompts.assemble(
        wording,
        Nodes(*(x[None] for x in node)),
        Clips(*(x[None] for x in caption), jnp.zeros(1, int)),
        (1, 1),
    )
    ids, valid = jnp.array([[4, 5, 0]]), jnp.array([[True, True, False]])
    whole = token_prompts.with_completions(prompt, ids, valid)
    last = int(prompt.positions[0].max())
    np.testing.assert_array_equal(whole.positions[0, -3:, 0], last + 1 + np.arange(3))
    np.testing.assert_array_equal(whole.ids[0, -3:], ids[0])
    np.testing.assert_array_equal(whole.valid[0, -3:], valid[0])
    assert (whole.visual_index[0, -3:] == -1).all()


def test_frames_are_read_as_the_host_prepares_them():
    grid = (4, 6)
    patches = np.random.default_rng(0).normal(size=(2, 24, TINY.vision.patch_dim))
    patches = patches.astype(np.float32)
    found = token_prompts.frame_inputs(jnp.asarray(patches), grid, TINY.vision)
    expected = visual_inputs([(p, (1, *grid)) for p in patches], TINY.vision)
    cut = jax.tree.map(lambda x: x[:, :24] if x.ndim > 1 else x, expected)
    jax.tree.map(np.testing.assert_array_equal, found, cut)


def test_a_tokenizer_without_a_token_for_each_action_is_refused(chat, monkeypatch):
    for words in (("AB", "M", "D"), ("A", "A", "D")):
        monkeypatch.setattr(token_prompts, "ACTION_WORDS", words)
        with pytest.raises(UserError, match="each must be one token of its own"):
            token_prompts.load_wording(chat, DECISIONS[0])


def test_a_reader_has_a_letter_for_each_option(chat):
    reading = token_prompts.load_reading(chat, "train_read_v1")
    letters = [chat.tokenizer.decode([i]) for i in reading.letter_ids]
    assert letters == list("ABCDEFGH")
    assert chat.tokenizer.decode(list(reading.separator_ids)) == "\n"


@pytest.mark.parametrize("name", [*DECISIONS, manager.PROMPT])
def test_plans_have_pieces_for_the_same_parts(chat, name):
    planned, real = token_prompts.sized_wording(name), token_prompts.load_wording(chat, name)
    assert len(planned.pieces) == len(real.pieces) == 4
    assert len(set(planned.action_ids)) == 3
    written = len(prompts.read(name)) / sum(map(len, planned.pieces))
    assert 2.5 < written < 4  # characters a token, turns included


def test_a_prompt_without_its_parts_is_refused(chat, monkeypatch):
    monkeypatch.setattr(prompts, "read", lambda name: "{frame} {node} {caption}")
    with pytest.raises(ValueError, match="must have {node}, {frame}, {caption}, in this order"):
        token_prompts.load_wording(dataclasses.replace(chat), "any")
