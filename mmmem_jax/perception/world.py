"""Perception of the procedural world: frames and word ids to embeddings in one space.

Seen things enter the text space as ConSE does: the probability-weighted sum of word vectors
(Norouzi et al., arXiv 1312.5650), so what is seen and what is told can be compared.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mmmem_jax.data import worlds
from mmmem_jax.data.encoded import EncodedStream
from mmmem_jax.models.frame_encoder import FrameEncoder


@functools.cache
def word_vectors(dim: int) -> np.ndarray:
    """Fixed unit vectors of the world's words, float32 [V, dim]; word 0 (none) is zero."""
    bits = worlds.Bits(1_603_014_55, dim)
    # Sum of uniforms: near-normal and the same on every machine.
    vectors = bits.uniform(len(worlds.WORDS), dim, 12).sum(-1) - 6.0
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors[0] = 0.0
    return vectors.astype(np.float32)


def embed_words(words: np.ndarray, dim: int) -> np.ndarray:
    """Unit sum of word vectors: ids [..., W] -> float32 [..., dim], zero where there is none."""
    total = word_vectors(dim)[words].sum(-2)
    return total / np.maximum(np.linalg.norm(total, axis=-1, keepdims=True), 1e-6)


@functools.partial(jax.jit, static_argnames="dim")
def see(
    graphdef, params, frames: Array, dim: int
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """Embeddings of frames at full and at low resolution, unit length, zero where nothing shows."""

    def embed(logits):
        shown = jax.nn.sigmoid(logits).at[:, 0].set(0.0)
        shown = jnp.where(shown > 0.2, shown, 0.0)
        total = shown @ word_vectors(dim)
        return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-6)

    fine, coarse = nnx.merge(graphdef, params)(frames)
    return embed(fine), embed(coarse)


def shown_words(stream: worlds.Stream) -> np.ndarray:
    """Multi-hot target of the frame encoder, float32 [T, V]."""
    target = np.zeros((len(stream.kind), len(worlds.WORDS)), np.float32)
    np.put_along_axis(target, stream.visible.astype(np.int64), 1.0, axis=1)
    target[:, 0] = 0.0
    return target


def change_of(visual: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Distance of each chunk from the one before, 1 - cosine of [visual, text], float32 [T]."""
    both = np.concatenate([visual, text], axis=-1)
    norm = np.linalg.norm(both, axis=-1)
    dot = np.sum(both[1:] * both[:-1], axis=-1)
    cosine = dot / np.maximum(norm[1:] * norm[:-1], 1e-6)
    return np.concatenate([[1.0] * min(1, len(both)), 1.0 - cosine]).astype(np.float32)


def perceive(
    encoder: FrameEncoder, stream: worlds.Stream, questions: worlds.Questions, dim: int
) -> EncodedStream:
    """The stream and its questions as embeddings; questions are asked when the stream ends."""
    graphdef, params = nnx.split(encoder)
    visual, coarse = map(np.asarray, see(graphdef, params, worlds.render(stream), dim))
    text = embed_words(stream.words, dim)
    end = stream.span[-1, 1] if len(stream.span) else 0.0
    half = np.float16
    return EncodedStream(
        visual=visual.astype(half),
        coarse=coarse.astype(half),
        text=text.astype(half),
        span=stream.span,
        tokens=(stream.words > 0).sum(-1).astype(np.int32),
        mention=word_vectors(dim)[stream.mention].astype(half),
        mention_valid=stream.mention > 0,
        change=change_of(visual, text),
        relation=stream.relation,
        valid=np.ones(len(stream.kind), bool),
        relevant=stream.relevant,
        query=embed_words(questions.words, dim).astype(half),
        options=embed_words(questions.options, dim).astype(half),
        answer=questions.answer,
        family=questions.family,
        evidence=questions.evidence,
        query_time=np.full(len(questions.answer), end, np.float32),
        question_valid=questions.valid,
    )
