"""One stream of the world as data to draw: chunks, the pyramid a policy left, one search."""

import base64
import functools
import io

import jax
import numpy as np
from flax import nnx
from matplotlib import image

from mmmem_jax.data import worlds
from mmmem_jax.data.encoded import EncodedStream, to_items, to_questions
from mmmem_jax.evals.protocol import Policy, build
from mmmem_jax.memory.types import LEVELS
from mmmem_jax.models import reader as reader_lib
from mmmem_jax.models.reader import Reader
from mmmem_jax.perception.world import word_vectors
from mmmem_jax.retrieval.top_down import RetrievalConfig, top_down

ACTIONS = ("ADD_NEW", "MERGE", "DISCARD")


def _text(words) -> str:
    return " ".join(worlds.WORDS[w] for w in words if w)


def _describe(stream: worlds.Stream, t: int) -> str:
    told, seen = _text(stream.words[t]), _text(stream.visible[t])
    parts = [f"told: {told}"] * bool(told) + [f"seen: {seen}"] * bool(seen)
    return "; ".join(parts) or worlds.KINDS[stream.kind[t]]


def _png(frame: np.ndarray) -> str:
    buffer = io.BytesIO()
    image.imsave(buffer, frame.repeat(4, axis=0).repeat(4, axis=1), format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _levels(state, stream: worlds.Stream, node_of: np.ndarray, entered, num_steps: int) -> dict:
    """The valid slots of each level with the step at which the search read them."""
    frames = worlds.render(stream)
    n1, n2 = len(state.sensory.valid), len(state.episodic.valid)
    vectors = word_vectors(state.schema.embedding.shape[-1])

    def base(level, i, offset):
        step = int(entered[offset + i])
        span = np.asarray(level.span[i])
        return {
            "t0": float(span[0]),
            "t1": float(span[1]),
            "step": step if step < num_steps else None,
        }

    sensory, episodic, schema = [], [], []
    for i in np.flatnonzero(state.sensory.valid):
        t = int(state.sensory.trace_id[i])
        slot = base(state.sensory, i, 0)
        sensory.append(slot | {"text": _describe(stream, t), "image": _png(frames[t])})
    for i in np.flatnonzero(state.episodic.valid):
        held = np.flatnonzero(node_of == state.episodic.node_id[i])
        text = " | ".join(_describe(stream, t) for t in held[:6])
        slot = base(state.episodic, i, n1)
        episodic.append(slot | {"text": text, "count": int(state.episodic.count[i])})
    for i in np.flatnonzero(state.schema.valid):
        name = worlds.WORDS[int(np.argmax(vectors @ state.schema.embedding[i]))]
        slot = base(state.schema, i, n1 + n2)
        schema.append(slot | {"label": name, "mentions": int(state.schema.mentions[i])})
    return {"schema": schema, "episodic": episodic, "sensory": sensory}


def make_example(
    policy: Policy,
    reader: Reader,
    world: tuple[worlds.Stream, worlds.Questions],
    encoded: EncodedStream,
    retrieval: RetrievalConfig,
) -> dict:
    """The example of results.json: the question of one stream whose search went deepest and right.

    `encoded` holds that one stream, [1, T].
    """
    stream, questions = world
    items, asked = to_items(encoded), to_questions(encoded)
    states, steps = build(
        policy.params, jax.random.key(0), items, decide_fn=policy.decide_fn, config=policy.config
    )
    state, asked = jax.tree.map(lambda x: x[0], (states, asked))
    answer_fn = functools.partial(
        reader.answer, reader_lib.project(state), reader.ask(asked.query, asked.options)
    )
    found = jax.device_get(
        nnx.jit(
            lambda: top_down(
                state, asked.query, asked.options, answer_fn=answer_fn, config=retrieval
            )
        )()
    )
    state, steps = jax.device_get((state, steps))
    right = found.log_probs.argmax(-1) == questions.answer
    depth = np.where(questions.valid, found.stop_step + 100 * right, -1)
    q = int(np.argmax(depth))
    levels = [LEVELS[i] for i in retrieval.step_levels]
    num_steps = len(levels)
    evidence = questions.evidence[q][questions.evidence[q] >= 0]
    return {
        "question": _text(questions.words[q]) + "?",
        "options": [_text(o) for o in questions.options[q]],
        "answer": int(questions.answer[q]),
        "predicted": int(found.log_probs[q].argmax()),
        "probabilities": np.exp(found.log_probs[q]).tolist(),
        "family": worlds.FAMILIES[questions.family[q]],
        "evidence_spans": stream.span[evidence].tolist(),
        "chunks": [
            {
                "t0": float(stream.span[t, 0]),
                "t1": float(stream.span[t, 1]),
                "text": _describe(stream, t),
                "kind": worlds.KINDS[stream.kind[t]],
                "relevant": bool(stream.relevant[t]),
                "action": ACTIONS[int(steps.action[0, t])],
            }
            for t in range(len(stream.kind))
        ],
        "levels": _levels(state, stream, steps.node_id[0], found.entered[q], num_steps),
        "steps": [
            {
                "level": levels[s],
                "answer_entropy": float(found.answer_entropy[q, s]),
                "stopped": s == int(found.stop_step[q]),
            }
            for s in range(num_steps)
        ],
    }
