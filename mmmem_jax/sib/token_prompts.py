"""Prompts of decisions, put together on the device from the parts of a state.

    fixed | text of the latest node | fixed | the clip's frame | fixed | its caption | fixed

Every part has room for its longest, and tokens count where they are valid, so that prompts of any
state have one shape. Positions are those of `models.qwen3_vl.inputs`: as if nothing lay between.

The prompt named `policies.qwen3_vl.PROMPT` is the one that `mmmem build` decides by, laid out and
answered likewise, but that an episode is its text, without its frames, and a clip one frame.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmmem_jax import prompts
from mmmem_jax.data.token_streams import LETTERS
from mmmem_jax.errors import UserError
from mmmem_jax.memory.types import NUM_ACTIONS
from mmmem_jax.models.qwen3_vl.chat import VISION_END, VISION_START, Chat, render
from mmmem_jax.models.qwen3_vl.config import VisionConfig
from mmmem_jax.models.qwen3_vl.modeling import Tokens
from mmmem_jax.models.qwen3_vl.vision import VisualInputs, grid_positions
from mmmem_jax.policies import qwen3_vl as manager

FRAME = "{frame}"
PARTS = ("{node}", FRAME, "{caption}")  # of a decision's prompt, in order
MEMORY_AND_QUESTION = "{memory}{question}"  # of a reader's
# Answered for ADD_NEW, MERGE, DISCARD; `policies.qwen3_vl.WORDS` where its prompt is used.
ACTION_WORDS = ("A", "M", "D")
# Where there is no tokenizer to count: of English, and of the turns around a prompt, about.
CHARACTERS_A_TOKEN, TURN_TOKENS = 4, 5


class Wording(NamedTuple):
    """What is the same in all prompts of a run, and what may be answered; token ids."""

    pieces: tuple[tuple[int, ...], ...]  # before, between and after PARTS
    action_ids: tuple[int, ...]  # the first token of the answer, by action
    stop_ids: tuple[int, ...]  # end an answer
    image_id: int  # stands for a frame's tokens


class Reading(NamedTuple):
    """What is the same whenever a memory is read to answer a question; token ids."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    letter_ids: tuple[int, ...]  # of the options
    separator_ids: tuple[int, ...]  # after a node


class Clips(NamedTuple):
    """What a prompt shows of clips."""

    caption: jax.Array  # [..., C] int32
    caption_valid: jax.Array  # [..., C] bool
    frame: jax.Array  # [...] int32, number of a frame in the VisualTokens


class Nodes(NamedTuple):
    """Text of latest nodes; none valid where there is no node."""

    ids: jax.Array  # [..., L] int32
    valid: jax.Array  # [..., L] bool


def load_wording(chat: Chat, name: str) -> Wording:
    """The wording of a decision's prompt file, in a chat's tokens.

    Raises:
      UserError: if the tokenizer has no token, or no token of its own, for an action's word.
    """
    if name == manager.PROMPT:
        action_ids = manager.action_ids(chat)
    else:
        action_ids = _single(chat, ACTION_WORDS)
    return Wording(_pieces(chat, name, PARTS), action_ids, chat.stop_ids, chat.image_id)


def load_reading(chat: Chat, name: str) -> Reading:
    """The wording of a reader's prompt file, in a chat's tokens.

    Raises:
      UserError: as `load_wording` does, for the letters of the options.
    """
    prefix_ids, suffix_ids = _pieces(chat, name, (MEMORY_AND_QUESTION,))
    return Reading(prefix_ids, suffix_ids, _single(chat, LETTERS), _encode(chat, "\n"))


def sized_wording(name: str) -> Wording:
    """A wording about as long as the real one, its ids without meaning: to plan by."""
    return Wording(_sizes(name, PARTS), tuple(range(NUM_ACTIONS)), (NUM_ACTIONS,), 0)


def sized_reading(name: str) -> Reading:
    """As `sized_wording`, for a reader's prompt file."""
    prefix_ids, suffix_ids = _sizes(name, (MEMORY_AND_QUESTION,))
    return Reading(prefix_ids, suffix_ids, tuple(range(len(LETTERS))), (0,))


def _pieces(chat: Chat, name: str, parts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    text = _read(name)
    if name != manager.PROMPT:
        text = render(chat, [{"role": "user", "content": text}], add_generation_prompt=True)
    return tuple(_encode(chat, piece) for piece in _cut(text, name, parts))


def _read(name: str) -> str:
    return manager.layout(*PARTS) if name == manager.PROMPT else prompts.read(name)


def _sizes(name: str, parts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    pieces = _cut(_read(name), name, parts)
    return tuple((0,) * (TURN_TOKENS + len(piece) // CHARACTERS_A_TOKEN) for piece in pieces)


def _encode(chat: Chat, text: str) -> tuple[int, ...]:
    return tuple(chat.tokenizer.encode(text, add_special_tokens=False).ids)


def _single(chat: Chat, words: Sequence[str]) -> tuple[int, ...]:
    """One token for each word.

    Raises:
      UserError: if a word is several tokens, or two are the same.
    """
    found = [_encode(chat, word) for word in words]
    if any(len(ids) != 1 for ids in found) or len(set(found)) < len(words):
        raise UserError(
            f"the tokenizer writes {', '.join(words)} as {found}; each must be one token of its"
            " own: take the tokenizer.json of a Qwen3-VL folder"
        )
    return tuple(ids[0] for ids in found)


def _cut(text: str, name: str, parts: Sequence[str]) -> list[str]:
    """The text before, between and after parts; a frame stands between its own tokens."""
    text = text.replace(FRAME, VISION_START + FRAME + VISION_END)
    pieces = []
    for part in parts:
        piece, found, text = text.partition(part)
        if not found:
            raise ValueError(f"prompt {name} must have {', '.join(parts)}, in this order")
        pieces.append(piece)
    return [*pieces, text]


def frame_inputs(
    patches: Float[Array, "F P D"], grid: tuple[int, int], config: VisionConfig
) -> VisualInputs:
    """Frames of one grid (height, width in patches) as the vision tower reads them."""
    index, weight, rotary = (
        jnp.broadcast_to(x, (patches.shape[0], *x.shape)) for x in grid_positions(*grid, config)
    )
    lengths = jnp.full(patches.shape[0], patches.shape[1], jnp.int32)
    return VisualInputs(patches, index, weight, rotary, lengths)


def assemble(wording: Wording, nodes: Nodes, clips: Clips, token_grid: tuple[int, int]) -> Tokens:
    """Prompts [R, L] of the states of R nodes and clips.

    Args:
      wording: the fixed parts.
      nodes: text of the latest nodes, R rows.
      clips: the clips in question, R rows.
      token_grid: rows and columns of the tokens of a frame.
    """
    count, (height, width) = nodes.ids.shape[0], token_grid
    fixed = [_fixed(piece, count) for piece in wording.pieces]
    frame = _fixed((wording.image_id,) * (height * width), count)
    texts = [fixed[0], nodes, fixed[1], frame, fixed[2], _captions(clips), fixed[3]]
    ids = jnp.concatenate([x.ids for x in texts], axis=1)
    valid = jnp.concatenate([x.valid for x in texts], axis=1)
    first = sum(x.ids.shape[1] for x in texts[:3])
    token = jnp.arange(ids.shape[1]) - first
    in_frame = (token >= 0) & (token < height * width)
    # The frame counts as much as its longer edge, all of it with its last token.
    step = jnp.where(in_frame, jnp.where(token == height * width - 1, max(height, width), 0), 1)
    step = jnp.where(valid, step, 0)
    start = jnp.cumsum(step, axis=1) - step
    place = jnp.stack([jnp.zeros_like(token), token // width, token % width], axis=-1)
    positions = start[..., None] + jnp.where(in_frame[:, None], place, 0)
    visual_index = clips.frame[:, None] * height * width + token
    return Tokens(
        ids=ids,
        positions=jnp.where(valid[..., None], positions, 0),
        valid=valid,
        visual_index=jnp.where(in_frame, visual_index, -1),
    )


def with_completions(prompt: Tokens, ids: Int[Array, "R K"], valid: Bool[Array, "R K"]) -> Tokens:
    """Prompts followed by what was written after them."""
    start = jnp.max(jnp.where(prompt.valid[..., None], prompt.positions, -1), axis=(1, 2)) + 1
    positions = start[:, None] + jnp.arange(ids.shape[1])
    written = Tokens(
        ids=ids,
        positions=jnp.broadcast_to(positions[..., None], (*ids.shape, 3)),
        valid=valid,
        visual_index=jnp.full(ids.shape, -1),
    )
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), prompt, written)


def _fixed(piece: tuple[int, ...], count: int) -> Nodes:
    ids = jnp.broadcast_to(jnp.array(piece, jnp.int32), (count, len(piece)))
    return Nodes(ids, jnp.ones(ids.shape, bool))


def _captions(clips: Clips) -> Nodes:
    return Nodes(clips.caption, clips.caption_valid)
