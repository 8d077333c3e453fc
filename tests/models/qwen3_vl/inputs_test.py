"""Prompts whole and in pieces, padded batches, and refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl.chat import load_chat
from mmmem_jax.models.qwen3_vl.images import Pixels, Visual, read_image_config
from mmmem_jax.models.qwen3_vl.inputs import (
    append,
    batch,
    bucket_length,
    check_context,
    encode_messages,
    encode_text,
    encode_visual,
    flat_index,
    message_visuals,
)
from mmmem_jax.models.qwen3_vl.videos import read_video_config
from mmmem_jax.testing.qwen3_vl import write_tokenizer
from tests.models.qwen3_vl.tiny_tokenizer import tiny_config

HEADER, FOOTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_vl")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def chat(folder):
    return load_chat(folder, tiny_config())


def visual(t, h, w, times=()):
    return Visual(Pixels(np.zeros((t * h * w, 4), np.float32), (t, h, w)), times)


def visuals():
    sizes = st.integers(1, 4).map(lambda tokens: 2 * tokens)
    video = st.lists(st.floats(0, 100), min_size=1, max_size=3).map(tuple)
    return st.tuples(sizes, sizes, st.just(()) | video).map(
        lambda drawn: visual(max(len(drawn[2]), 1), *drawn)
    )


class TestEncode:
    def test_golden_picture(self, chat):
        prompt = encode_visual(chat, visual(1, 4, 6), first_frame=3, start=10)
        assert [chat.tokenizer.id_to_token(i) for i in prompt.ids] == [
            "<|vision_start|>",
            *["<|image_pad|>"] * 6,
            "<|vision_end|>",
        ]
        assert prompt.positions.tolist() == [
            [10, 10, 10],
            [11, 11, 11],
            [11, 11, 12],
            [11, 11, 13],
            [11, 12, 11],
            [11, 12, 12],
            [11, 12, 13],
            [14, 14, 14],
        ]
        assert prompt.slots.tolist() == [[-1, -1], *([3, n] for n in range(6)), [-1, -1]]
        assert prompt.next_position == 15

    def test_golden_video(self, chat):
        prompt = encode_visual(chat, visual(2, 2, 2, (0.25, 12.0)), first_frame=0)
        assert chat.tokenizer.decode(prompt.ids, skip_special_tokens=False) == (
            "<0.2 seconds><|vision_start|><|video_pad|><|vision_end|>"
            "<12.0 seconds><|vision_start|><|video_pad|><|vision_end|>"
        )
        assert prompt.slots[prompt.slots[:, 0] >= 0].tolist() == [[0, 0], [1, 0]]
        assert prompt.positions[:, 0].tolist() == [*range(len(prompt.ids))]

    @settings(max_examples=40, deadline=None)
    @given(
        seen=st.lists(visuals(), max_size=3),
        texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=3, max_size=3),
        start=st.integers(0, 50),
    )
    def test_pieces_equal_the_whole(self, chat, seen, texts, start):
        parts = [{"type": "text", "text": texts[0]}]
        pieces = [encode_text(chat, HEADER + texts[0], start=start)]
        frame = 7
        for one in seen:
            parts.append({"type": "video" if one.times else "image"})
            piece = pieces[-1]
            if one.times:  # the template wraps a video once more
                pieces.append(encode_text(chat, "<|vision_start|>", start=piece.next_position))
                piece = pieces[-1]
            pieces.append(encode_visual(chat, one, first_frame=frame, start=piece.next_position))
            if one.times:
                start_at = pieces[-1].next_position
                pieces.append(encode_text(chat, "<|vision_end|>", start=start_at))
            frame += one.pixels.grid[0]
        parts.append({"type": "text", "text": texts[1] if seen else ""})
        tail = parts[-1]["text"] + FOOTER
        pieces.append(encode_text(chat, tail, start=pieces[-1].next_position))
        joined = pieces[0]
        for piece in pieces[1:]:
            joined = append(joined, piece)
        messages = [{"role": "user", "content": parts}]
        whole = encode_messages(chat, messages, seen, first_frame=7, start=start)
        for ours, wanted in zip(joined, whole, strict=True):
            np.testing.assert_array_equal(ours, wanted)

    @settings(max_examples=40, deadline=None)
    @given(seen=st.lists(visuals(), max_size=3))
    def test_positions_rise(self, chat, seen):
        parts = [{"type": "video" if one.times else "image"} for one in seen]
        prompt = encode_messages(chat, [{"role": "user", "content": parts}], seen)
        assert (np.diff(prompt.positions[:, 0]) >= 0).all()
        assert (prompt.positions >= prompt.positions[:, :1]).all()
        text = prompt.slots[:, 0] < 0
        assert (np.diff(prompt.positions[text].max(axis=1)) > 0).all()
        assert prompt.next_position == prompt.positions.max() + 1
        frames = sum(one.pixels.grid[0] for one in seen)
        assert len(np.unique(prompt.slots[~text], axis=0)) == (~text).sum()
        assert np.unique(prompt.slots[~text][:, 0]).tolist() == [*range(frames)]

    def test_empty_text(self, chat):
        prompt = encode_text(chat, "", start=4)
        assert (len(prompt.ids), prompt.positions.shape, prompt.next_position) == (0, (0, 3), 4)

    def test_append_elsewhere(self, chat):
        with pytest.raises(ValueError, match="starts at position 5, not 1"):
            append(encode_text(chat, "a"), encode_text(chat, "b", start=5))

    def test_placeholder_in_a_text(self, chat):
        with pytest.raises(UserError, match="write none in a text"):
            encode_text(chat, "see <|image_pad|>")

    @pytest.mark.parametrize(
        ("parts", "seen"),
        [
            ([{"type": "image"}], []),
            ([], [visual(1, 2, 2)]),
            ([{"type": "image"}], [visual(1, 2, 2, (0.0,))]),
            ([{"type": "text", "text": "<|image_pad|>"}, {"type": "image"}], [visual(1, 2, 2)]),
        ],
    )
    def test_other_visuals_than_messages_have(self, chat, parts, seen):
        messages = [{"role": "user", "content": parts}]
        with pytest.raises(UserError, match=r"places for pictures and .* visuals came"):
            encode_messages(chat, messages, seen)


class TestMessageVisuals:
    def test_in_order(self, folder):
        messages = [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": np.zeros((8, 64, 64, 3), np.uint8), "fps": 4.0},
                    {"type": "text", "text": "and"},
                    {"type": "image", "image": np.zeros((32, 64, 3), np.uint8)},
                ],
            },
        ]
        seen = message_visuals(messages, read_image_config(folder), read_video_config(folder))
        assert [one.pixels.grid for one in seen] == [(2, 4, 4), (1, 2, 4)]
        assert seen[0].times == pytest.approx((0.25, 1.5))

    def test_missing_key(self, folder):
        messages = [{"role": "user", "content": [{"type": "video", "video": None}]}]
        with pytest.raises(UserError, match="a part with type, video and without 'fps'"):
            message_visuals(messages, read_image_config(folder), read_video_config(folder))


class TestBatch:
    @settings(max_examples=100, deadline=None)
    @given(length=st.integers(0, 5000))
    def test_few_lengths(self, length):
        size = bucket_length(length)
        assert length <= size
        assert size == 16 or size < 1.5 * length
        while size % 2 == 0:
            size //= 2
        assert size in (1, 3)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, chat, side):
        prompts = [encode_text(chat, "ab"), encode_visual(chat, visual(1, 2, 4), first_frame=5)]
        tokens = batch(prompts, pad_id=7, frame_tokens=10, side=side)
        assert tokens.ids.shape == (2, 16)
        for row, prompt in enumerate(prompts):
            size = len(prompt.ids)
            at = slice(0, size) if side == "right" else slice(16 - size, 16)
            assert tokens.valid[row, at].all()
            assert tokens.valid[row].sum() == size
            np.testing.assert_array_equal(tokens.ids[row, at], prompt.ids)
            np.testing.assert_array_equal(tokens.positions[row, at], prompt.positions)
        assert (tokens.ids[~tokens.valid] == 7).all()
        assert (tokens.positions[~tokens.valid] == 0).all()
        seen = tokens.visual_index[tokens.visual_index >= 0]
        assert seen.tolist() == [50, 51]

    def test_frame_with_too_few_rows(self):
        with pytest.raises(ValueError, match="a frame has 4 tokens, more than the 3 rows"):
            flat_index(np.array([[0, 3]], np.int32), 3)

    def test_longer_than_asked(self, chat):
        with pytest.raises(UserError, match="20 tokens are 4 more than the context of 16"):
            batch([encode_text(chat, "x" * 20)], pad_id=0, frame_tokens=1, pad_to=16)

    def test_context(self):
        check_context(90, 100, new_tokens=10)
        message = "prompt's 95 tokens and 10 new ones are 5 more than the context of 100"
        with pytest.raises(UserError, match=message):
            check_context(95, 100, new_tokens=10)
