"""One conversation with a model on the host's side: show it frames, tell it text, let it speak.

    speaker = load_speaker("Qwen3-VL-8B-Instruct")
    talk = begin(speaker, num_slots=8192)
    talk = show(speaker, tell(speaker, talk, "<|im_start|>user\\n"), see(speaker, frames, seconds))
    place = mark(talk)             # what comes after can be forgotten: rewind(talk, place)
    talk = tell(speaker, talk, "What happens?<|im_end|>\\n<|im_start|>assistant\\n")
    said, talk = say(speaker, talk, max_new_tokens=64)

Frames are encoded once, by `see`, however often they are shown; what was read stays in the cache,
so a prompt that begins as the last one did costs only what is new in it.

`widen` makes of one conversation several that go on side by side: to write a token the model reads
all its weights, for one conversation or for some. What can be done to one and to several takes a
text, or frames, for each (`tell`, `show`, `say_each`, `insist`); `choose` and `say` are of one.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl import generate, inputs, lora, params
from mmmem_jax.models.qwen3_vl.attention import best_implementation
from mmmem_jax.models.qwen3_vl.buckets import bucket_length, largest_bucket
from mmmem_jax.models.qwen3_vl.chat import Chat, load_chat, shorten
from mmmem_jax.models.qwen3_vl.config import Qwen3VLConfig, read_config
from mmmem_jax.models.qwen3_vl.images import Visual
from mmmem_jax.models.qwen3_vl.inputs import Prompt
from mmmem_jax.models.qwen3_vl.modeling import Cache, init_cache
from mmmem_jax.models.qwen3_vl.videos import VideoConfig, read_video_config, video_visual
from mmmem_jax.models.qwen3_vl.vision import VisualTokens, visual_inputs
from mmmem_jax.train.sharding import make_mesh

# Tokens. 64 frames of 16:9 and 256 lines are 32 x 112, the times before them 32 x 8; with what to
# do and captions that is under 5,000, and up to a third more is padding.
CONTEXT = 8192
ATTEMPTS = 3  # to get what was asked for
RETRY_TEMPERATURE = 0.7  # the first attempt takes the likeliest tokens


class Speaker(NamedTuple):
    """A model and what turns words and frames into its inputs."""

    graphdef: nnx.GraphDef
    params: nnx.State
    config: Qwen3VLConfig
    chat: Chat
    video: VideoConfig
    dtype: jnp.dtype


class Seen(NamedTuple):
    """Frames that the vision tower has encoded."""

    visual: VisualTokens
    frame_tokens: int  # rows of `visual` that a frame takes
    shown: Visual  # grid and times; without the patches


class Talk(NamedTuple):
    """Conversations so far; handed to a function they are taken over: use what is returned."""

    cache: Cache
    length: int  # slots written
    positions: tuple[int, ...]  # of the next token of each
    read: tuple[int, ...]  # tokens of each that the model read, those written included

    @property
    def tokens_read(self) -> int:
        """Of all conversations."""
        return sum(self.read)


class Said(NamedTuple):
    """What the model wrote, without the token that ended it."""

    text: str
    ids: tuple[int, ...]  # with the token that ended it
    log_probs: tuple[float, ...]  # of `ids`, nats, under the distribution sampled from
    ended: bool  # False: cut off at max_new_tokens


class Answered(NamedTuple):
    """What the model wrote until it could be read, or could not for good."""

    found: Any  # what was read; None: no attempt could be
    attempts: tuple[Said, ...]  # the first took the likeliest tokens
    in_view: tuple[int, ...]  # tokens of the prompt of each attempt, and of what was written


def default_dtype() -> jnp.dtype:
    """bfloat16 where the hardware multiplies it, float32 on CPUs."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def default_mesh(config: Qwen3VLConfig) -> Mesh | None:
    """All accelerators of this host that its heads can be split over; None where that is one."""
    mesh = mesh_over_heads(config, jax.local_devices())
    return None if jax.default_backend() == "cpu" or mesh.size == 1 else mesh


def mesh_over_heads(config: Qwen3VLConfig, devices: Sequence[jax.Device]) -> Mesh:
    """As many of the devices as the heads of keys can be split over, all on axis model."""
    return make_mesh(1, 1, math.gcd(len(devices), config.text.num_kv_heads), devices=devices)


def default_context(config: Qwen3VLConfig) -> int:
    """Tokens of a conversation where nobody says how many: CONTEXT, or all that the model knows."""
    return min(CONTEXT, config.text.max_positions)


def load_speaker(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype=None,
    mesh: Mesh | None = None,
) -> Speaker:
    """Loads an official folder, or the one of a repo id, and a PEFT adapter onto it.

    Args:
      name_or_path: folder or repo id.
      adapter: folder of the adapter; None: none.
      dtype: of parameters and activations; None: `default_dtype()`.
      mesh: of axes data, group and model, the parameters being split over model; None:
        `default_mesh` of the config.

    Raises:
      UserError: if a file is missing, broken, or of another model.
    """
    folder = params.resolve(name_or_path)
    dtype = dtype or default_dtype()
    config = read_config(folder)
    chat, video = load_chat(folder, config), read_video_config(folder)  # the weights take longer
    model = params.load_model(
        folder,
        dtype=dtype,
        mesh=mesh or default_mesh(config),
        attention=best_implementation(jax.default_backend()),
    )
    if adapter is not None:
        model = lora.with_adapter(model, adapter)
    graphdef, state = nnx.split(model)
    return Speaker(graphdef, state, config, chat, video, dtype)


def see(speaker: Speaker, frames: UInt8[np.ndarray, "T H W 3"], seconds) -> Seen:
    """Encodes video frames, shown at `seconds` [T], in order.

    Raises:
      UserError: if there are none, or they are too small.
    """
    if len(frames) == 1:  # a temporal patch takes two
        frames, seconds = np.repeat(frames, 2, axis=0), np.repeat(seconds, 2)
    shown = video_visual(frames, seconds, speaker.video)
    pixels = shown.pixels
    num_frames = 1 << max(pixels.grid[0] - 1, 0).bit_length()  # few shapes, so few programs
    batch = visual_inputs(
        [(pixels.patches, pixels.grid)], speaker.config.vision, num_frames=num_frames
    )
    visual = generate.encode_visual(speaker.graphdef, speaker.params, batch)
    frame_tokens = batch.patches.shape[1] // speaker.config.vision.merge_unit
    grid_only = pixels._replace(patches=pixels.patches[:0])
    return Seen(visual, frame_tokens, shown._replace(pixels=grid_only))


def begin(speaker: Speaker, num_slots: int) -> Talk:
    """An empty conversation with room for `num_slots` tokens.

    Raises:
      UserError: if the model knows no positions as high.
    """
    most = speaker.config.text.max_positions
    if not 0 < num_slots <= most:
        raise UserError(f"a context of {num_slots} tokens cannot be; this model takes 1 to {most}")
    return Talk(init_cache(speaker.config.text, 1, num_slots, speaker.dtype), 0, (0,), (0,))


def widen(talk: Talk, count: int) -> Talk:
    """`count` conversations that begin as this one; what it has read counts as read once."""
    return Talk(
        generate.repeat(talk.cache, count),
        talk.length,
        talk.positions * count,
        talk.read + (0,) * (count - 1),
    )


def tell(speaker: Speaker, talk: Talk, *texts: str) -> Talk:
    """Lets the model read text, one for each conversation; special tokens become themselves.

    Raises:
      UserError: if the context has no room for it.
    """
    pieces = [
        inputs.encode_text(speaker.chat, text, start=position)
        for text, position in zip(texts, talk.positions, strict=True)
    ]
    return _read(speaker, talk, pieces, None)


def show(speaker: Speaker, talk: Talk, *seen: Seen) -> Talk:
    """Lets the model look at encoded frames, those of each conversation after the text of a time.

    Raises:
      UserError: if the context has no room for them.
    """
    visual, frames, frame_tokens = _side_by_side(seen)
    pieces = [
        inputs.encode_visual(speaker.chat, one.shown, first_frame=row * frames, start=position)
        for row, (one, position) in enumerate(zip(seen, talk.positions, strict=True))
    ]
    return _read(speaker, talk, pieces, visual, frame_tokens)


def beginning(speaker: Speaker, talk: Talk, text: str, *, leave: int) -> str:
    """What of a text, from its start, can be told and leave room for so many tokens."""
    return shorten(speaker.chat, text, largest_bucket(_free(talk) - leave))


def has_room(speaker: Speaker, talk: Talk, seen: Seen, *, leave: int) -> bool:
    """Whether encoded frames can be shown and leave room for so many tokens."""
    count = len(inputs.encode_visual(speaker.chat, seen.shown, first_frame=0).ids)
    return count <= largest_bucket(_free(talk) - leave)


def in_view(talk: Talk) -> tuple[int, ...]:
    """Tokens that the next one of each conversation would look at."""
    return tuple(np.asarray(talk.cache.valid.sum(1)).tolist())


def mark(talk: Talk) -> Talk:
    """A place to `rewind` to, any number of times."""
    return talk._replace(cache=generate.marked(talk.cache))


def rewind(talk: Talk, place: Talk) -> Talk:
    """The conversations as they were at `place`; what was read since still counts as read."""
    return place._replace(cache=generate.rewind(talk.cache, place.cache), read=talk.read)


def choose(speaker: Speaker, talk: Talk, ids: tuple[int, ...]) -> Float[np.ndarray, "O"]:
    """Log-probabilities of the tokens `ids` to come next, among themselves (float32, nats)."""
    found = generate.next_log_probs(speaker.graphdef, speaker.params, talk.cache, ids=ids)
    return np.asarray(found[0])


def say(
    speaker: Speaker,
    talk: Talk,
    *,
    max_new_tokens: int,
    rng_key: jax.Array | None = None,
    temperature: float = 0.0,
    first_ids: tuple[int, ...] = (),
) -> tuple[Said, Talk]:
    """`say_each` of one conversation."""
    (said,), talk = say_each(
        speaker,
        talk,
        max_new_tokens=max_new_tokens,
        rng_keys=() if rng_key is None else (rng_key,),
        temperature=temperature,
        first_ids=first_ids,
    )
    return said, talk


def say_each(
    speaker: Speaker,
    talk: Talk,
    *,
    max_new_tokens: int,
    rng_keys: Sequence[jax.Array] = (),
    temperature: float = 0.0,
    first_ids: tuple[int, ...] = (),
    active: Sequence[bool] = (),
) -> tuple[list[Said], Talk]:
    """Lets the model write until it has ended its turn in every conversation.

    Args:
      speaker: who.
      talk: after what.
      max_new_tokens: at most, in each.
      rng_keys: for temperatures above 0, of each.
      temperature: 0 takes the likeliest token.
      first_ids: the only tokens that may come first; see generate.decode.
      active: in which of them it writes; in the others it says nothing. All, if empty.

    Raises:
      UserError: if the context has no room for so many.
    """
    inputs.check_context(talk.length, talk.cache.valid.shape[1], new_tokens=max_new_tokens)
    count = len(talk.positions)
    out, cache = generate.decode(
        speaker.graphdef,
        speaker.params,
        jnp.stack(tuple(rng_keys) or (jax.random.key(0),) * count),
        talk.cache,
        max_new_tokens=max_new_tokens,
        stop_ids=speaker.chat.stop_ids,
        temperature=jnp.float32(temperature),
        # Some twice, which changes nothing: of few lengths, so few programs.
        first_ids=first_ids + first_ids[-1:] * (-len(first_ids) % 4),
        active=np.array(tuple(active) or (True,) * count),
    )
    out, length, positions = jax.device_get((out, cache.length, cache.next_position))
    said = [_said(speaker.chat, *row) for row in zip(*out, strict=True)]
    # Of what was written all is read but the token that comes last.
    read = (before + max(len(one.ids) - 1, 0) for before, one in zip(talk.read, said, strict=True))
    return said, Talk(cache, int(length), tuple(positions.tolist()), tuple(read))


def _said(chat: Chat, ids: np.ndarray, log_probs: np.ndarray, valid: np.ndarray) -> Said:
    """What was written in one conversation."""
    count = int(valid.sum())
    ids = ids[:count].tolist()
    ended = bool(ids) and ids[-1] in chat.stop_ids
    text = chat.tokenizer.decode(ids[:-1] if ended else ids)
    return Said(text, tuple(ids), tuple(log_probs[:count].tolist()), ended)


def insist(
    speaker: Speaker,
    talk: Talk,
    read: Callable[[Said], Any],
    *,
    max_new_tokens: int,
    seeds: Sequence[int],
    first_ids: tuple[int, ...] = (),
) -> tuple[list[Answered], Talk]:
    """Lets the model write until it can be read, ATTEMPTS times at most, in each conversation.

    Args:
      speaker: who.
      talk: after what; each attempt follows it directly.
      read: what comes of an attempt; raises ValueError if it cannot be read.
      max_new_tokens: at most, each time.
      seeds: of the attempts after the first, for the first of the conversations; in those that
        have none nothing is asked for.
      first_ids: the only tokens that may come first; the one that did stays in later attempts. Of
        one conversation alone.

    Returns:
      What came of each, and the conversations as they were.

    Raises:
      UserError: if the context has no room for so many tokens.
    """
    place, unasked = mark(talk), len(talk.positions) - len(seeds)
    answers = [Answered(None, (), ()) for _ in seeds]
    for attempt in range(ATTEMPTS):
        active = [answer.found is None for answer in answers]
        if not any(active):
            break
        seeded = [*seeds, *[0] * unasked]
        said, talk = say_each(
            speaker,
            talk,
            max_new_tokens=max_new_tokens,
            rng_keys=[jax.random.fold_in(jax.random.key(seed), attempt) for seed in seeded],
            temperature=RETRY_TEMPERATURE if attempt else 0.0,
            first_ids=first_ids,
            active=[*active, *[False] * unasked],
        )
        views = in_view(talk)
        talk = rewind(talk, place)
        for row in np.flatnonzero(active):
            answers[row] = _with_attempt(answers[row], said[row], views[row], read)
        first_ids = said[0].ids[:1] if first_ids else ()
    return answers, talk


def _with_attempt(answer: Answered, said: Said, view: int, read: Callable[[Said], Any]) -> Answered:
    try:
        found = read(said)
    except ValueError:
        found = None  # whoever asked sees that nothing was found
    return Answered(found, (*answer.attempts, said), (*answer.in_view, view))


def _free(talk: Talk) -> int:
    return talk.cache.valid.shape[1] - talk.length


def _read(
    speaker: Speaker,
    talk: Talk,
    pieces: Sequence[Prompt],
    visual: VisualTokens | None,
    frame_tokens: int = 0,
) -> Talk:
    """Reads a piece of each conversation, padded to one of few lengths."""
    longest, slots = max(len(piece.ids) for piece in pieces), talk.cache.valid.shape[1]
    inputs.check_context(talk.length + longest, slots)
    padded = min(bucket_length(longest), _free(talk))
    tokens = inputs.batch(
        pieces, pad_to=padded, pad_id=speaker.chat.text_end_id, frame_tokens=frame_tokens
    )
    cache = generate.prefill(speaker.graphdef, speaker.params, tokens, visual, talk.cache)
    return Talk(
        cache,
        talk.length + padded,
        tuple(piece.next_position for piece in pieces),
        tuple(read + len(piece.ids) for read, piece in zip(talk.read, pieces, strict=True)),
    )


def _side_by_side(seen: Sequence[Seen]) -> tuple[VisualTokens, int, int]:
    """Tokens of the frames of all, as many for each: with how many frames, of how many tokens."""
    sizes = [(len(one.visual.embeddings) // one.frame_tokens, one.frame_tokens) for one in seen]
    frames, frame_tokens = (max(size) for size in zip(*sizes, strict=True))
    visual = (
        seen[0].visual
        if len(seen) == 1
        else _stacked(tuple(one.visual for one in seen), tuple(sizes), (frames, frame_tokens))
    )
    return visual, frames, frame_tokens


@partial(jax.jit, static_argnames=("sizes", "size"))
def _stacked(
    visuals: Sequence[VisualTokens], sizes: Sequence[tuple[int, int]], size: tuple[int, int]
) -> VisualTokens:
    """Tokens of frames of `sizes` (frames, tokens of a frame), each padded to `size`."""

    def padded(x, own):  # [..., rows, D]
        x = x.reshape(*x.shape[:-2], *own, x.shape[-1])
        room = [(0, most - has) for most, has in zip(size, own, strict=True)]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + room + [(0, 0)])
        return x.reshape(*x.shape[:-3], size[0] * size[1], x.shape[-1])

    def together(leaves):
        return jnp.concatenate([padded(x, own) for x, own in zip(leaves, sizes, strict=True)], -2)

    return jax.tree.map(lambda *leaves: together(leaves), *visuals)
