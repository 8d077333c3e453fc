"""Conversations as the language model's inputs: token ids, M-RoPE positions, places of visuals.

Sources: M-RoPE (arXiv 2409.12191), Qwen3-VL (arXiv 2511.21631). A text token counts on by 1 in all
three axes. The tokens of a picture, or of one temporal patch of a video, stand at its start plus
(0, row, column), and it takes as many positions as its longer edge has tokens. Time within a video
is told by text, "<0.5 seconds>", before each temporal patch.

A "frame" here is one picture or one temporal patch of a video: one row of the vision tower's
batch. Whoever builds prompts numbers the frames, so several prompts may share one.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl.buckets import bucket_length
from mmmem_jax.models.qwen3_vl.chat import (
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    Chat,
    Messages,
    render,
)
from mmmem_jax.models.qwen3_vl.images import PixelConfig, Visual, image_visual
from mmmem_jax.models.qwen3_vl.modeling import Tokens
from mmmem_jax.models.qwen3_vl.videos import VideoConfig, sampled_video_visual

_PLACEHOLDER = re.compile("|".join(map(re.escape, (IMAGE, VIDEO))))


class Prompt(NamedTuple):
    """A conversation, or a piece that follows others."""

    ids: Int[np.ndarray, "L"]  # int32
    positions: Int[np.ndarray, "L 3"]  # int32; time, height, width
    slots: Int[np.ndarray, "L 2"]  # int32; number of a frame and token in it, -1 and -1 for text
    next_position: int  # of what is appended


def message_visuals(messages: Messages, image: PixelConfig, video: VideoConfig) -> list[Visual]:
    """Turns the pictures and videos of a conversation into patches, in order.

    Args:
      messages: see chat.render; a picture's part has "image": uint8 [H, W, 3], a video's has
        "video": uint8 [T, H, W, 3] and "fps": the frames it shows a second.
      image: preprocessing of pictures.
      video: sampling and preprocessing of videos.

    Raises:
      UserError: as image_visual and sampled_video_visual do, and for a part that lacks a key.
    """
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    visuals = []
    for part in parts:
        try:
            if part["type"] == "image":
                visuals.append(image_visual(part["image"], image))
            elif part["type"] == "video":
                visuals.append(sampled_video_visual(part["video"], part["fps"], video))
        except KeyError as error:
            raise UserError(
                f"a message has a part with {', '.join(sorted(part))} and without {error}; pictures"
                " need type and image, videos type, video and fps"
            ) from error
    return visuals


def encode_text(chat: Chat, text: str, *, start: int = 0) -> Prompt:
    """Encodes text; special tokens in it, such as <|im_end|>, become themselves.

    Args:
      chat: from load_chat.
      text: without placeholders of pictures and videos.
      start: position of the first token.

    Raises:
      UserError: if the text holds a placeholder.
    """
    return _encode(chat, text, (), first_frame=0, start=start)


def encode_visual(chat: Chat, visual: Visual, *, first_frame: int, start: int = 0) -> Prompt:
    """Encodes a picture, or a video with the time before each temporal patch.

    Args:
      chat: from load_chat.
      visual: of which only the grid and the times are read.
      first_frame: number of its first frame; the others count on.
      start: position of the first token.
    """
    text = _video_text(visual) if visual.times else VISION_START + IMAGE + VISION_END
    return _encode(chat, text, [visual], first_frame=first_frame, start=start)


def encode_messages(
    chat: Chat,
    messages: Messages,
    visuals: Sequence[Visual] = (),
    *,
    first_frame: int = 0,
    start: int = 0,
    add_generation_prompt: bool = True,
) -> Prompt:
    """Encodes a conversation with its pictures and videos.

    The template's own <|vision_start|> and <|vision_end|> stay around a video, outside those of
    its temporal patches, as they do in the public processor.

    Args:
      chat: from load_chat.
      messages: see chat.render.
      visuals: of the pictures and videos in `messages`, in order; see message_visuals.
      first_frame: number of the first visual's first frame; the others count on.
      start: position of the first token.
      add_generation_prompt: whether to open the assistant's turn at the end.

    Raises:
      UserError: if the text has other placeholders than `visuals`, or the template refuses it.
    """
    text = render(chat, messages, add_generation_prompt=add_generation_prompt)
    found = _PLACEHOLDER.findall(text)
    if found != [VIDEO if visual.times else IMAGE for visual in visuals]:
        raise UserError(
            f"the conversation has {found.count(IMAGE)} places for pictures and"
            f" {found.count(VIDEO)} for videos, and {len(visuals)} visuals came, or in another"
            f" order; give one each and write no {IMAGE} or {VIDEO} in a text"
        )
    left = iter(visuals)
    text = _PLACEHOLDER.sub(
        lambda match: _video_text(visual) if (visual := next(left)).times else match[0], text
    )
    return _encode(chat, text, visuals, first_frame=first_frame, start=start)


def append(prompt: Prompt, piece: Prompt) -> Prompt:
    """Joins two pieces, the second encoded with start=prompt.next_position.

    Text cut anywhere but beside a special token may be other tokens than the whole.
    """
    if len(piece.positions) and piece.positions[0].min() != prompt.next_position:
        raise ValueError(
            f"the piece starts at position {piece.positions[0].min()}, not {prompt.next_position}"
        )
    joined = (np.concatenate(pair) for pair in zip(prompt[:3], piece[:3], strict=True))
    return Prompt(*joined, piece.next_position)


def check_context(length: int, max_length: int, *, new_tokens: int = 0) -> None:
    """Raises UserError if a prompt and what is to follow it do not fit the context.

    Args:
      length: tokens of the prompt.
      max_length: tokens the context holds.
      new_tokens: tokens that are to follow.
    """
    over = length + new_tokens - max_length
    if over > 0:
        following = f" and {new_tokens} new ones" if new_tokens else ""
        raise UserError(
            f"the prompt's {length} tokens{following} are {over} more than the context of"
            f" {max_length}; give a larger context, fewer or smaller frames, or less text"
        )


def batch(
    prompts: Sequence[Prompt],
    *,
    pad_id: int,
    frame_tokens: int,
    pad_to: int | None = None,
    side: Literal["left", "right"] = "right",
) -> Tokens:
    """Pads prompts to one length.

    Args:
      prompts: B of them.
      pad_id: of padding.
      frame_tokens: merged tokens a frame takes in the tower's padded output, P / merge**2.
      pad_to: L; None: bucket_length of the longest.
      side: where padding goes.

    Returns:
      NumPy leaves; positions are 0 and visual_index is -1 on padding.

    Raises:
      UserError: if a prompt is longer than pad_to.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    length = bucket_length(longest) if pad_to is None else pad_to
    check_context(longest, length)
    shape = (len(prompts), length)
    ids = np.full(shape, pad_id, np.int32)
    positions = np.zeros((*shape, 3), np.int32)
    valid = np.zeros(shape, bool)
    visual_index = np.full(shape, -1, np.int32)
    for row, prompt in enumerate(prompts):
        size = len(prompt.ids)
        span = slice(0, size) if side == "right" else slice(length - size, length)
        ids[row, span], positions[row, span], valid[row, span] = prompt.ids, prompt.positions, True
        visual_index[row, span] = flat_index(prompt.slots, frame_tokens)
    return Tokens(ids, positions, valid, visual_index)


def flat_index(slots: Int[np.ndarray, "L 2"], frame_tokens: int) -> Int[np.ndarray, "L"]:
    """Rows of the tower's tokens, flattened over frames of `frame_tokens` each; -1 for text."""
    frame, token = slots[:, 0], slots[:, 1]
    if len(slots) and token.max() >= frame_tokens:
        raise ValueError(f"a frame has {token.max() + 1} tokens, more than the {frame_tokens} rows")
    return np.where(frame < 0, -1, frame * frame_tokens + token).astype(np.int32)


def _video_text(visual: Visual) -> str:
    return "".join(
        f"<{time:.1f} seconds>{VISION_START}{VIDEO}{VISION_END}" for time in visual.times
    )


def _encode(
    chat: Chat, text: str, visuals: Sequence[Visual], *, first_frame: int, start: int
) -> Prompt:
    """Encodes text with one placeholder a frame, each of which becomes the frame's tokens."""
    merge = chat.merge_size
    frames = [
        (h // merge, w // merge) for v in visuals for t, h, w in [v.pixels.grid] for _ in range(t)
    ]
    ids = np.array(chat.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    places = np.flatnonzero((ids == chat.image_id) | (ids == chat.video_id))
    if len(places) != len(frames):
        raise UserError(
            f"the text has {len(places)} of {IMAGE} and {VIDEO} for {len(frames)} frames; write"
            " none in a text"
        )
    counts, steps = np.ones_like(ids), np.ones_like(ids)
    counts[places] = [h * w for h, w in frames]
    steps[places] = [max(h, w) for h, w in frames]
    starts = start + np.cumsum(steps) - steps
    positions = np.repeat(starts, counts)[:, None] + np.zeros(3, np.int32)
    slots = np.full((len(positions), 2), -1, np.int32)
    firsts = (np.cumsum(counts) - counts)[places]
    for number, (first, (h, w)) in enumerate(zip(firsts, frames, strict=True), first_frame):
        span, token = slice(first, first + h * w), np.arange(h * w)
        positions[span, 1] += token // w
        positions[span, 2] += token % w
        slots[span, 0], slots[span, 1] = number, token
    return Prompt(
        np.repeat(ids, counts), positions.astype(np.int32), slots, start + int(steps.sum())
    )
