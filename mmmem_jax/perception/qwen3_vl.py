"""The `qwen3_vl` backbone: clips of a video to memory items, by the paper's own model.

The model sees the frames of a clip once, writes a caption (L1), and then, in the same conversation,
names its entities (L3). What it is told at the start of each stays in its cache. Where clips come
together, their conversations go on side by side.

An embedding has two parts side by side: [text, visual]. Texts are embedded by a sentence encoder,
[t, 0]; what is seen is the mean of the vision tower's merged tokens, projected, [0, v]. Those
tokens live in the language model's space of words, so a question's own words, projected alike, are
the visual part of a query [t, v], whose product with a text or a view is that of its own kind.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from mmmem_jax import prompts
from mmmem_jax.memory.types import Item
from mmmem_jax.models import text_encoder, weights
from mmmem_jax.models.qwen3_vl import conversation, params
from mmmem_jax.models.qwen3_vl.chat import TURN_END, shorten
from mmmem_jax.models.qwen3_vl.conversation import Answered, Said, Seen, Speaker, Talk
from mmmem_jax.models.text_encoder import BertEncoder
from mmmem_jax.perception import extraction, salient
from mmmem_jax.perception.decode import Frame
from mmmem_jax.perception.extraction import Extraction
from mmmem_jax.perception.lite import EPISODIC_FPS, KEY_FRAME_GAP, every
from mmmem_jax.perception.segment import Clip
from mmmem_jax.perception.types import Percept, Work

VISUAL_DIM = 256
PROMPTS = ("caption_v1", "extract_v1")
MAX_FRAMES = 16  # of a clip: four long clips are the paper's 64 frames of a decision
CLIPS_AT_ONCE = 4  # conversations side by side at most; each needs a cache of the whole context
CAPTION_TOKENS, EXTRACTION_TOKENS = 48, 160  # written at most
SUBTITLE_SHARE = 1 / 8  # of the context, that subtitles of a clip may take
# How it is recorded that the model wrote no whole line, and nothing that could be read, and that
# there were more subtitles than it was told.
NO_CAPTION, NO_ENTITIES, CUT_SUBTITLES = "caption", "extraction", "all of the subtitles"


class Embedder(NamedTuple):
    """What brings texts and views into the memory's space; D is its `dim`."""

    encoder: BertEncoder
    pieces: Tokenizer  # of the encoder
    query_prefix: str  # what the encoder wants before a question
    words: Tokenizer  # of the language model
    table: jax.Array  # [V, H] its embeddings of words
    projection: np.ndarray  # [H, VISUAL_DIM] float32

    @property
    def dim(self) -> int:
        """D, of the text part and the visual part together."""
        return self.encoder.config.hidden_size + VISUAL_DIM


class Folders(NamedTuple):
    """Where the networks lie."""

    checkpoint: Path
    adapter: Path | None
    text_encoder: Path


def locate(checkpoint: str | Path, adapter: str | Path, text_encoder: str | Path) -> Folders:
    """The folders of what is given as folder or repo id, downloaded where they are not here.

    Args:
      checkpoint: of a Qwen3-VL.
      adapter: of a LoRA by PEFT; "": none.
      text_encoder: of a BERT such as bge-large-en-v1.5; "": all-MiniLM-L6-v2.

    Raises:
      UserError: if one is neither a folder nor can be downloaded.
    """
    return Folders(
        params.resolve(checkpoint),
        params.resolve(adapter) if adapter else None,
        params.resolve(text_encoder) if text_encoder else weights.fetch_minilm(),
    )


def fingerprints(folders: Folders) -> dict[str, str]:
    """What tells each of the networks from others; "" where there is none."""
    named = folders._asdict().items()
    return {name: "" if folder is None else fingerprint(folder) for name, folder in named}


def fingerprint(folder: Path) -> str:
    """Of a model's files: names, sizes, and the first and last MB of each."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors"):
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{path.name} {size} ".encode() + file.read(1 << 20))
                file.seek(max(size - (1 << 20), 0))
                digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


def load_embedder(speaker: Speaker, folder: Path) -> Embedder:
    """Loads the sentence encoder of a folder, beside a model that is loaded already.

    Args:
      speaker: whose space of words the visual part comes from.
      folder: of the encoder.

    Raises:
      UserError: if the encoder cannot be read.
    """
    encoder, pieces = text_encoder.load_text_encoder(folder)
    # BERTs that pool their first token (bge, arctic-embed, mxbai) were trained with this.
    wants_prefix = encoder.config.pooling == "cls"
    return Embedder(
        encoder,
        pieces,
        text_encoder.BGE_QUERY_PREFIX if wants_prefix else "",
        speaker.chat.tokenizer,
        speaker.params["embed"]["embedding"][...],
        _projection(speaker.config.text.hidden_size),
    )


def embed_texts(embedder: Embedder, texts: Sequence[str]) -> Float[np.ndarray, "B D"]:
    """Texts of the memory, [t, 0]; float32, of unit length."""
    rows = 8 if len(texts) <= 8 else 64  # few shapes, so few programs
    found, _ = text_encoder.encode_texts(embedder.encoder, embedder.pieces, texts, batch_size=rows)
    return np.pad(found, ((0, 0), (0, VISUAL_DIM)))


def embed_visual(embedder: Embedder, views: Float[np.ndarray, "B H"]) -> Float[np.ndarray, "B D"]:
    """Means of visual tokens, [0, v]; float32, of unit length."""
    seen = _unit(views.astype(np.float32) @ embedder.projection)
    return np.pad(seen, ((0, 0), (embedder.encoder.config.hidden_size, 0)))


def embed_query(
    embedder: Embedder, texts: Sequence[str], *, prefix: str | None = None
) -> Float[np.ndarray, "B D"]:
    """Questions to a memory, [t, v]; float32, of unit length, both parts weighing the same.

    Args:
      embedder: that the memory was made with.
      texts: one or more.
      prefix: before each for the sentence encoder; None: what that wants before questions.
    """
    prefix = embedder.query_prefix if prefix is None else prefix
    told = embed_texts(embedder, [prefix + text for text in texts])
    meant = embed_visual(embedder, _mean_words(embedder, texts))
    return (told + meant) / np.sqrt(np.float32(2))


def background(embedder: Embedder) -> Float[np.ndarray, "B D"]:
    """Queries for common things, which tell how near a question is to anything at all."""
    return embed_query(embedder, prompts.read("nouns_v1").splitlines(), prefix="")


def _projection(width: int) -> np.ndarray:
    """The same random directions for every model of a width."""
    return np.random.default_rng(0).standard_normal((width, VISUAL_DIM), np.float32)


def _mean_words(embedder: Embedder, texts: Sequence[str]) -> Float[np.ndarray, "B H"]:
    """The mean of each text's embedded tokens."""
    tokens = [embedder.words.encode(text, add_special_tokens=False).ids for text in texts]
    ids, mask = text_encoder.pad_batch(tokens, len(tokens), max(map(len, tokens), default=1))
    return np.asarray(_masked_mean(embedder.table, ids, mask))


@jax.jit
def _masked_mean(
    table: Float[Array, "V H"], ids: Int[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float[Array, "B H"]:
    found = table[ids].astype(jnp.float32) * mask[..., None]
    return found.sum(1) / mask.sum(1, keepdims=True)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


class Notes(NamedTuple):
    """What the model wrote of one clip."""

    caption: str
    subtitles: str  # that it was told
    entities: Extraction | None  # None: nothing that it wrote could be read
    probability: float  # of the entities as written, geometric mean over tokens
    failed: tuple[str, ...]  # of NO_CAPTION, NO_ENTITIES, CUT_SUBTITLES
    in_view: tuple[int, ...]  # tokens of every prompt, and of what was written after it


PerceiveFn = Callable[[Sequence[Clip], np.ndarray | None], list[Percept]]


def make_perceive_fn(speaker: Speaker, embedder: Embedder, context: int) -> PerceiveFn:
    """perceive(clips, before) -> percepts; `before` is the `coarse` of the clip before, or None.

    Args:
      speaker: sees and writes.
      embedder: of texts and views.
      context: tokens that the conversation about a clip may have.

    Raises:
      UserError: if the model has no such context; and when called, if a clip does not fit it.
    """
    talk: Talk | None = _open(speaker, context)
    start = conversation.mark(talk)
    untold = talk.tokens_read  # by no percept
    at_once = _clips_at_once(talk, jax.local_devices()[0].memory_stats())

    def together(clips: Sequence[Clip], before: np.ndarray | None) -> list[Percept]:
        nonlocal talk, start, untold
        chosen = [_choose(clip) for clip in clips]
        seen = [look(speaker, shown) for _, shown in chosen]
        if talk is None:
            talk = _open(speaker, context)
            start, untold = conversation.mark(talk), untold + talk.tokens_read
        # Taken over, so lost if a clip turns out not to fit.
        begun, talk = conversation.rewind(talk, start), None
        if len(clips) > len(begun.read):
            begun = conversation.widen(begun, at_once)
            start = conversation.mark(begun)
        notes, talk = take_notes(speaker, begun, clips, seen)
        percepts = []
        for row, (clip, (key, _)) in enumerate(zip(clips, chosen, strict=True)):
            frames, anew = frames_in(speaker, seen[row]), notes[row].in_view
            read = untold + talk.read[row] - begun.read[row]
            untold = 0
            percept = _percept(speaker, embedder, clip, notes[row], key, seen[row], before)
            work = Work(read, frames, sum(anew), frames * len(anew))
            percepts.append(percept._replace(work=work))
            before = percept.item.coarse
        return percepts

    def perceive(clips: Sequence[Clip], before: np.ndarray | None) -> list[Percept]:
        percepts: list[Percept] = []
        for first in range(0, len(clips), at_once):
            percepts += together(clips[first : first + at_once], before)
            before = percepts[-1].item.coarse
        return percepts

    return perceive


def _clips_at_once(talk: Talk, memory: dict[str, int] | None) -> int:
    """Conversations such as this one that half of a device's free memory has room for."""
    if memory is None:  # of a CPU nothing is said
        return CLIPS_AT_ONCE
    free = memory["bytes_limit"] - memory["bytes_in_use"]
    needed = talk.cache.keys.nbytes + talk.cache.values.nbytes
    return min(max(free // 2 // needed, 1), CLIPS_AT_ONCE)


def look(speaker: Speaker, frames: Sequence[Frame]) -> Seen:
    """Encodes frames."""
    images = np.stack([frame.image for frame in frames])
    return conversation.see(speaker, images, [frame.time for frame in frames])


def take_notes(
    speaker: Speaker, talk: Talk, clips: Sequence[Clip], seen: Sequence[Seen]
) -> tuple[list[Notes], Talk]:
    """Lets the model write the captions of clips, then their entities.

    Args:
      speaker: who.
      talk: one conversation for each clip or more, all of which have read how to do it.
      clips: whose subtitles are told.
      seen: their frames.
    """

    def for_all(things: list) -> list:  # nothing is asked for where there is no clip
        return things + things[-1:] * (len(talk.read) - len(things))

    ask = partial(conversation.insist, speaker, seeds=[clip.index for clip in clips])
    spoken = [prompts.plain(subtitles_of(clip)) for clip in clips]
    most = int(talk.cache.valid.shape[1] * SUBTITLE_SHARE)
    subtitles = [shorten(speaker.chat, text, most) for text in spoken]
    told = [f'\nSubtitles: "{text}"' if text else "" for text in subtitles]
    talk = conversation.show(speaker, talk, *for_all(list(seen)))
    answer = f"{TURN_END}\n{prompts.ANSWER}"
    talk = conversation.tell(speaker, talk, *for_all([text + answer for text in told]))
    lines, talk = ask(talk, _whole_line, max_new_tokens=CAPTION_TOKENS)
    captions = [line.found or prompts.plain(line.attempts[0].text) for line in lines]
    # Told again as it is kept, so that what is read from here on depends on nothing else.
    asked = f"{TURN_END}\n{prompts.turn('user', 'Entities?')}{prompts.ANSWER}"
    talk = conversation.tell(speaker, talk, *for_all([text + asked for text in captions]))
    lists, talk = ask(talk, _entities, max_new_tokens=EXTRACTION_TOKENS)
    cut = [a != b for a, b in zip(subtitles, spoken, strict=True)]
    return [_notes(*of) for of in zip(lines, lists, captions, subtitles, cut, strict=True)], talk


def _notes(line: Answered, listed: Answered, caption: str, subtitles: str, cut: bool) -> Notes:
    failed = {
        NO_CAPTION: line.found is None,
        NO_ENTITIES: listed.found is None,
        CUT_SUBTITLES: cut,
    }
    return Notes(
        caption,
        subtitles,
        listed.found,
        float(np.exp(np.mean(listed.attempts[-1].log_probs))),
        tuple(name for name, has in failed.items() if has),
        line.in_view + listed.in_view,
    )


def _whole_line(said: Said) -> str:
    """What was written, in one line. Raises ValueError if it is nothing, or cut off."""
    if not said.ended or not (text := prompts.plain(said.text)):
        raise ValueError("no whole line")
    return text


def _entities(said: Said) -> Extraction:
    return extraction.parse(said.text)


def frames_in(speaker: Speaker, seen: Seen) -> int:
    """Frames that were encoded, those that only fill up a temporal patch included."""
    return seen.shown.pixels.grid[0] * speaker.config.vision.temporal_patch_size


def subtitles_of(clip: Clip) -> str:
    """What was said or written meanwhile, each cue once."""
    return " ".join(dict.fromkeys(cue.text for cue in clip.cues))


def _open(speaker: Speaker, context: int) -> Talk:
    """A conversation that has read how to take notes."""
    return conversation.tell(speaker, conversation.begin(speaker, context), _opening())


def _opening() -> str:
    system = "\n\n".join(prompts.read(name) for name in PROMPTS)
    return prompts.turn("system", system) + f"{prompts.TURN_START}user\n"


def _choose(clip: Clip) -> tuple[tuple[Frame, ...], tuple[Frame, ...]]:
    """The key frames of a clip, and the frames that the model is shown."""
    key = salient.salient_frames(np.stack([frame.image for frame in clip.frames]), KEY_FRAME_GAP)
    shown = every(clip.frames, EPISODIC_FPS)
    if len(shown) > MAX_FRAMES:
        shown = [shown[i] for i in np.linspace(0, len(shown) - 1, MAX_FRAMES).round().astype(int)]
    return tuple(clip.frames[i] for i in key), tuple(clip.frames[i] for i in shown)


def _percept(
    speaker: Speaker,
    embedder: Embedder,
    clip: Clip,
    notes: Notes,
    key: tuple[Frame, ...],
    seen: Seen,
    before: np.ndarray | None,
) -> Percept:
    text = f'{notes.caption} Subtitle: "{notes.subtitles}"' if notes.subtitles else notes.caption
    found = Extraction((), -1) if notes.entities is None else notes.entities
    return Percept(
        index=clip.index,
        span=clip.span,
        caption=text,
        subtitles=subtitles_of(clip),
        labels=tuple((entity.name, notes.probability) for entity in found.entities),
        key_frames=key,
        item=_make_item(speaker, embedder, clip, text, found, key, seen, before),
        failed=notes.failed,
        seen=seen,
    )


def _make_item(
    speaker: Speaker,
    embedder: Embedder,
    clip: Clip,
    text: str,
    found: Extraction,
    key: tuple[Frame, ...],
    seen: Seen,
    before: np.ndarray | None,
) -> Item:
    """The memory's item of a clip (eq. 1): `visual` of what stands out, `coarse` of all."""
    named = [f"{entity.name}, {entity.gloss}" for entity in found.entities]
    told = embed_texts(embedder, [text, *named])
    means, times = patch_means(speaker, seen), np.array(seen.shown.times)
    salient_patches = sorted({int(np.abs(times - frame.time).argmin()) for frame in key})
    visual, coarse = embed_visual(
        embedder, np.stack([means[salient_patches].mean(0), means.mean(0)])
    )
    mention = np.zeros((extraction.MAX_ENTITIES, embedder.dim), np.float32)
    mention[: len(named)] = told[1:]
    return Item(
        visual=visual,
        coarse=coarse,
        text=told[0],
        span=np.array(clip.span, np.float32),
        tokens=np.int32(len(speaker.chat.tokenizer.encode(text, add_special_tokens=False).ids)),
        mention=mention,
        mention_valid=np.arange(extraction.MAX_ENTITIES) < len(named),
        change=np.float32(1.0 if before is None else 1.0 - before @ coarse),
        relation=np.int32(found.relation),
        trace_id=np.int32(clip.index),
        valid=np.bool_(True),
    )


def patch_means(speaker: Speaker, seen: Seen) -> Float[np.ndarray, "T H"]:
    """The mean token of each temporal patch; float32."""
    t, height, width = seen.shown.pixels.grid
    rows = np.asarray(seen.visual.embeddings).astype(np.float32)
    rows = rows.reshape(-1, seen.frame_tokens, rows.shape[-1])
    return rows[:t, : height * width // speaker.config.vision.merge_unit].mean(1)
