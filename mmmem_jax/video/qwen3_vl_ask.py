"""Asking with Qwen3-VL: the memory tells where to look, the model reads and answers (Section 3.3).

    thinker = load_thinker("Qwen3-VL-8B-Instruct")
    with load("memory", thinker) as loaded:
        print(answer(loaded, thinker, "Where is the dog?").text)

Entities are ranked by embedding and, where there is one, by a cross-encoder; episodes by the
model's yes. What is left is read in the order of `retrieval.top_down`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmmem_jax import prompts, store
from mmmem_jax.errors import UserError
from mmmem_jax.memory import MemoryState
from mmmem_jax.models import cross_encoder
from mmmem_jax.models.qwen3_vl import params
from mmmem_jax.models.qwen3_vl.conversation import default_context, load_speaker
from mmmem_jax.perception import qwen3_vl as perception
from mmmem_jax.retrieval import evidence as ev
from mmmem_jax.retrieval import qwen3_vl as reading
from mmmem_jax.retrieval import top_down, video_search
from mmmem_jax.retrieval.qwen3_vl import AnswerConfig, Evidence, Reader
from mmmem_jax.retrieval.top_down import RetrievalConfig, RetrievalOutput
from mmmem_jax.retrieval.video_search import Calibration, VideoSearch
from mmmem_jax.video import ask as asking
from mmmem_jax.video.ask import Answer, Loaded, Space

BACKBONE = "qwen3_vl"
KINDS = ("text", "visual", "entity")
PAPER = AnswerConfig()
UNANSWERED = "unanswered"

RerankFn = Callable[[str, Sequence[str]], np.ndarray]  # question, texts -> relevance of each

_order = jax.jit(top_down.order, static_argnames="config")


class Thinker(NamedTuple):
    """The models that answer."""

    reader: Reader
    space: Space
    rerank: RerankFn | None  # None: entities are ranked by embedding alone
    made_with: dict[str, str]  # fingerprints of what memories in this space are made with


class Plan(NamedTuple):
    """What is to be read, and when; slots are those of the joined memory, N of them."""

    scores: Float[np.ndarray, "N"]  # calibrated, of each slot; LOWEST if invalid
    entered: Int[np.ndarray, "N"]  # step at which each slot is read, S where never
    retrieval_entropy: Float[np.ndarray, "3"]  # nats, over the slots of each level
    verified: dict[int, float]  # p(yes) of the episodes looked at, likeliest first
    tokens_read: int  # to verify them


def load_thinker(
    checkpoint: str | Path,
    *,
    adapter: str | Path | None = None,
    text_encoder: str | Path | None = None,
    reranker: str | Path | None = None,
    context: int | None = None,
) -> Thinker:
    """Loads the models, each of an official folder or of the one of a repo id.

    Args:
      checkpoint: a Qwen3-VL.
      adapter: a PEFT adapter onto it; None: none.
      text_encoder: the sentence encoder that the memory was made with; None: all-MiniLM-L6-v2.
      reranker: an XLM-RoBERTa cross-encoder; None: none ranks.
      context: tokens that a prompt may have; None: `conversation.default_context`.

    Raises:
      UserError: if a file is missing, broken, or of another model.
    """
    folders = perception.locate(checkpoint, adapter or "", text_encoder or "")
    speaker = load_speaker(folders.checkpoint, adapter=folders.adapter)
    context = context or default_context(speaker.config)
    embedder = perception.load_embedder(speaker, folders.text_encoder)
    space = Space(partial(perception.embed_query, embedder), perception.background(embedder))
    rerank = None
    if reranker is not None:
        model = cross_encoder.load_cross_encoder(params.resolve(reranker))
        rerank = partial(cross_encoder.rerank_scores, *model)
    made_with = perception.fingerprints(folders)
    made_with.pop("adapter")  # it changes what is said, not where things lie
    return Thinker(reading.make_reader(speaker, context), space, rerank, made_with)


def load(
    memory_dir: str | os.PathLike,
    thinker: Thinker,
    *,
    at: float | None = None,
    videos: Sequence[str] | None = None,
) -> Loaded:
    """Reads memories as ask.load does, and looks whether they were made with the same models.

    Raises:
      UserError: as ask.load does, and naming a model that was another.
    """
    loaded = asking.load(memory_dir, at=at, videos=videos, space=thinker.space, backbone=BACKBONE)
    for video in loaded.stores:
        others = [name for name, x in thinker.made_with.items() if video.header.get(name) != x]
        if others:
            loaded.close()
            flag = others[0].replace("_", "-")
            raise UserError(
                f"{video.folder} was made with another --{flag}; give that one, or build it again"
            )
    return loaded


def ask(
    memory_dir: str | os.PathLike,
    question: str,
    load_fn: Callable[[], Thinker],
    *,
    options: Sequence[str] = (),
    at: float | None = None,
    videos: Sequence[str] | None = None,
    config: AnswerConfig = PAPER,
) -> Answer:
    """Answers one question of a folder and adds it to its questions.jsonl, as `ask.ask` does.

    Raises:
      UserError: as `load_fn`, `load` and `answer` do.
    """
    _check(question, options)
    thinker = load_fn()
    with load(memory_dir, thinker, at=at, videos=videos) as loaded:
        answered = answer(loaded, thinker, question, options, config=config)
    asking.write_down(memory_dir, answered)
    return answered


def answer(
    loaded: Loaded,
    thinker: Thinker,
    question: str,
    options: Sequence[str] = (),
    *,
    config: AnswerConfig = PAPER,
) -> Answer:
    """Answers a question, or says that the memory does not hold it.

    It counts as found if the model says of an episode that it helps, with p(yes) of config.found_at
    or more. `model` of the answer has the prompt's hash, log-probabilities, votes and p(yes).

    Args:
      loaded: from `load`.
      thinker: from `load_thinker`.
      question: plain words.
      options: two or more to choose from; none for an open question, which is answered in words
        from the verified episodes.
      config: how.

    Raises:
      UserError: as ask.check and reading.drill_down do.
    """
    _check(question, options)
    seconds, lap = asking.stopwatch()

    wanted = asking.embed(loaded.space, question, options)
    lap("embed")
    plan = _plan(loaded, thinker, question, options, wanted, config)
    lap("verify")
    answer_fn = _choose if len(options) else _word
    answered = answer_fn(loaded, thinker.reader, question, tuple(options), wanted[0], plan, config)
    lap("read")
    return answered._replace(seconds=seconds)


def _check(question: str, options: Sequence[str]) -> None:
    """Raises UserError as ask.check does, and for more options than letters."""
    asking.check(question, options)
    reading.check_count(len(options))


def _choose(loaded, reader, question, options, wanted, plan: Plan, config: AnswerConfig) -> Answer:
    """An answer among options, by reading step by step."""
    search = config.search
    gamma = float(video_search.gammas(search.confidence, len(options))[-1])
    steps = [_step_slots(plan, step) for step in range(len(search.step_levels))]
    drilled = reading.drill_down(
        reader, question, options, _evidence_of(loaded, steps), gamma=gamma, config=config
    )
    read = steps[: drilled.stop_step + 1]
    result = _searched(
        loaded, plan, plan.entered, read, drilled.tokens, drilled.answer_entropy,
        log_probs=drilled.log_probs, gamma=gamma, config=search,
    )  # fmt: skip
    answered = asking.told_by(
        loaded, question, options, wanted, result, search, _is_found(plan, config)
    )
    model = {
        "prompt_sha256": drilled.prompt_sha256,
        "letters": list(drilled.letters),
        "votes": list(drilled.votes),
        "written": drilled.written,
        "left_out": drilled.left_out,
    }
    text = f"{UNANSWERED}: the model wrote {drilled.written!r}, which names no option"
    if drilled.choice is not None:
        text = options[drilled.choice]
    return answered._replace(
        text=text, model=_model(loaded, plan, config, model, drilled.tokens_read)
    )


def _word(loaded, reader, question, options, wanted, plan: Plan, config: AnswerConfig) -> Answer:
    """An answer in words from the verified episodes that pass, or that there is none."""
    chosen = [slot for slot, p in plan.verified.items() if p >= config.found_at]
    chosen = chosen[: config.verified]
    one_step = RetrievalConfig(top_k=(1, config.verified, 1), rounds=(0, 1, 0))
    text, tokens, tokens_read = asking.NOT_FOUND, (), 0
    model = {"prompt_sha256": None, "left_out": 0}
    if chosen:
        pieces = [_evidence(loaded, slot) for slot in chosen]
        written = reading.write_answer(reader, question, pieces, config)
        text, tokens, tokens_read = written.text, written.tokens, written.tokens_read
        model = {"prompt_sha256": written.prompt_sha256, "left_out": written.left_out}
    entered = np.ones_like(plan.entered)
    entered[chosen] = 0
    share = np.array([plan.verified[slot] for slot in chosen])
    share = share / max(share.sum(), 1e-6)
    entropy = -np.sum(share * np.log(np.maximum(share, 1e-30)))
    result = _searched(
        loaded, plan, entered, [chosen], [tokens], np.array([entropy]),
        log_probs=np.zeros(0), gamma=-1.0, config=one_step,
    )  # fmt: skip
    answered = asking.told_by(loaded, question, options, wanted, result, one_step, bool(chosen))
    return answered._replace(
        text=text, gamma=None, model=_model(loaded, plan, config, model, tokens_read)
    )


def _is_found(plan: Plan, config: AnswerConfig) -> bool:
    return any(p >= config.found_at for p in plan.verified.values())


def _model(loaded, plan: Plan, config: AnswerConfig, model: dict, tokens_read: int) -> dict:
    """What the model did, in plain JSON."""
    verified = []
    for slot, p_yes in plan.verified.items():
        _, number, place = asking.level_of(loaded, slot)
        span = [float(t) for t in loaded.states[number].episodic.span[place]]
        video = loaded.stores[number].video_id
        verified.append({"video": video, "slot": place, "span": span, "p_yes": p_yes})
    return {
        "backbone": BACKBONE,
        "mode": config.mode,
        **model,
        "verified": verified,
        "tokens_read": tokens_read + plan.tokens_read,
    }


def _plan(loaded, thinker: Thinker, question, options, wanted, config: AnswerConfig) -> Plan:
    """What is to be read of the memory: the best entities, the verified episodes, then clips."""
    search, state = config.search, loaded.device_state
    scores = _scores(loaded, wanted)
    retrieval_entropy = np.asarray(_order(state, scores[None], config=search)[1][0])
    state = _only(state, "schema", _named(loaded))
    entities = _best(state, scores, ev.SCHEMA, config.entities, search)
    if thinker.rerank is not None and entities:
        texts = [_evidence(loaded, slot).text for slot in entities]
        by_relevance = np.argsort(-thinker.rerank(question, texts), kind="stable")
        entities = [entities[i] for i in by_relevance]
    state = _only(state, "schema", entities[: search.top_k[0] * search.rounds[0]])
    episodes = _best(state, scores, ev.EPISODIC, config.episodes, search)
    texts = {slot: _evidence(loaded, slot).text for slot in episodes}
    texts = {slot: text for slot, text in texts.items() if text}
    p_yes, tokens = reading.verify(thinker.reader, question, options, [*texts.values()])
    likeliest = sorted(zip(p_yes.tolist(), texts, strict=True), key=lambda pair: -pair[0])
    verified = {slot: p for p, slot in likeliest}
    kept = [*verified][: config.verified]
    ranks = scores.copy()
    ranks[kept] = np.arange(len(kept), 0, -1)  # 1 apart, more than any bonus of a link
    entered, _ = _order(_only(state, "episodic", kept), ranks[None], config=search)
    return Plan(scores, np.array(entered[0]), retrieval_entropy, verified, tokens)


def _scores(loaded: Loaded, wanted: tuple[np.ndarray, ...]) -> Float[np.ndarray, "N"]:
    """Of each slot: for the question, or for the option that it fits best."""
    rows = wanted[0] if len(wanted) == 2 else wanted[0][None]
    found = slot_scores(loaded.device_state, rows, loaded.device_background)
    return np.asarray(found)[wanted[1] if len(wanted) == 2 else slice(None)].max(0)


@jax.jit
def slot_scores(
    state: MemoryState, wanted: Float[Array, "O D"], background: Float[Array, "B D"]
) -> Float[Array, "O N"]:
    """video_search.slot_scores, where unrelated pairs are common things asked of this memory.

    How near a question lies to views rather than to texts differs from model to model.
    """
    lift = 100.0  # over LOWEST, which is left to what holds nothing of a kind
    usual = {}
    for kind in KINDS:
        lifted = Calibration(**dict.fromkeys(KINDS, (-lift, 1.0)))
        found = video_search.slot_scores(_holding(state, kind), background, background, lifted)
        held = found > video_search.LOWEST
        number = jnp.maximum(held.sum(), 1)
        mean = jnp.where(held, found, 0.0).sum() / number
        spread = jnp.sqrt(jnp.where(held, (found - mean) ** 2, 0.0).sum() / number)
        usual[kind] = (mean - lift, jnp.maximum(spread, 1e-3))
    return video_search.slot_scores(state, wanted, background, Calibration(**usual))


def _holding(state: MemoryState, kind: str) -> MemoryState:
    """The memory as if it held nothing of the other kinds."""

    def kept(x, of):
        return x if of == kind else jnp.zeros_like(x)

    s, e, g = state.sensory, state.episodic, state.schema
    return state.replace(
        sensory=s.replace(visual=kept(s.visual, "visual"), text=kept(s.text, "text")),
        episodic=e.replace(prototypes=kept(e.prototypes, "visual"), text=kept(e.text, "text")),
        schema=g.replace(embedding=kept(g.embedding, "entity"), told=kept(g.told, "text")),
    )


def _first_slot(state: MemoryState, level: str) -> int:
    """Number of a level's first slot among all."""
    n1, n2 = len(state.sensory.valid), len(state.episodic.valid)
    return {"sensory": 0, "episodic": n1, "schema": n1 + n2}[level]


def _only(state: MemoryState, level: str, slots: Sequence[int]) -> MemoryState:
    """The memory as if it held no slots of that level but these."""
    table = getattr(state, level)
    keep = np.zeros(len(table.valid), bool)
    keep[np.array(slots, int) - _first_slot(state, level)] = True
    return state.replace(**{level: table.replace(valid=table.valid & jnp.asarray(keep))})


def _named(loaded: Loaded) -> list[int]:
    """Entities whose name is known: the others tell nothing."""
    joined = loaded.joined
    first = _first_slot(joined.state, "schema")
    places = joined.schema[joined.state.schema.valid].tolist()
    return [first + i for i, (number, slot) in enumerate(places) if loaded.names[number].get(slot)]


def _best(
    state: MemoryState, scores: np.ndarray, level: int, count: int, search: RetrievalConfig
) -> list[int]:
    """The slots of a level that top-down retrieval would read first, best first."""
    top_k, rounds = list(search.top_k), [0, 0, 0]
    top_k[level], rounds[:level], rounds[level] = count, search.rounds[:level], 1
    config = dataclasses.replace(search, top_k=tuple(top_k), rounds=tuple(rounds))
    entered = np.asarray(_order(state, scores[None], config=config)[0][0])
    slots = np.flatnonzero(entered == sum(rounds[:level]))
    return slots[np.argsort(-scores[slots], kind="stable")].tolist()


def _step_slots(plan: Plan, step: int) -> list[int]:
    """What a step reads, best first."""
    slots = np.flatnonzero(plan.entered == step).tolist()
    return sorted(slots, key=lambda slot: (-plan.verified.get(slot, 0.0), -plan.scores[slot]))


def _evidence_of(loaded: Loaded, steps: Sequence[Sequence[int]]) -> Iterator[list[Evidence]]:
    """What each step reads, fetched as it is asked for."""
    for slots in steps:
        yield [_evidence(loaded, slot) for slot in slots]


def _evidence(loaded: Loaded, slot: int) -> Evidence:
    """What a slot lets the model read: nothing if a writer has forgotten it meanwhile."""
    level, number, place = asking.level_of(loaded, slot)
    video, state = loaded.stores[number], loaded.states[number]
    where = f"{prompts.plain(video.video_id)}, " if len(loaded.stores) > 1 else ""
    if level == "schema":
        span = tuple(state.schema.span[place].tolist())
        name, count = loaded.names[number][place], int(state.schema.mentions[place])
        times = "once" if count == 1 else f"{count} times"
        return Evidence(f"{where}{asking.during(span)}: {prompts.plain(name)} (seen {times})")
    if level == "episodic":
        node_id = int(state.episodic.node_id[place])
        clips = store.node_clips(video, [node_id])[node_id]
    else:
        clips = [int(state.sensory.trace_id[place])]
    records = [r for r in store.read_clips(video, clips) if r.item is not None]
    records = [r for r in records if r.span[1] <= float(state.clock) + 1e-3]
    lines = [where + _line(record) for record in records]
    if level == "episodic" and any(record.trace for record in records):
        newest = [record for record in records if record.trace][-1]  # of the episode until then
        span = (records[0].span[0], newest.span[1])
        lines.insert(0, f"{where}{asking.during(span)}: {prompts.plain(newest.trace)}")
    text = "\n".join(lines)
    if level == "episodic" or not records:
        return Evidence(text)
    frames, seconds = _frames(video, records[0])
    return Evidence(text, frames, seconds)


def _line(record: store.ClipRecord) -> str:
    """What was noted of a clip; the caption holds what was said, where anything was."""
    return f"{asking.during(record.span)}: {prompts.plain(record.caption or record.subtitles)}"


def _frames(video: store.VideoStore, record: store.ClipRecord):
    """The key frames of a clip, uint8 [T, H, W, 3] or None, and their times (s)."""
    images = [store.read_image(video, path) for _, path in record.frames]
    return (np.stack(images) if images else None), tuple(when for when, _ in record.frames)


def _searched(
    loaded: Loaded,
    plan: Plan,
    entered: Int[np.ndarray, "N"],
    read: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    answer_entropy: np.ndarray,
    *,
    log_probs: Float[np.ndarray, "O"],
    gamma: float,
    config: RetrievalConfig,
) -> VideoSearch:
    """A search in the form of that without a language model: see video_search.VideoSearch."""
    counts = np.zeros(len(plan.scores), np.int32)
    for slots, found in zip(read, tokens, strict=True):
        counts[list(slots)] = found
    stop = np.array([len(read) - 1])
    output = RetrievalOutput(
        log_probs=log_probs[None],
        answer_entropy=answer_entropy[None],
        retrieval_entropy=plan.retrieval_entropy[None],
        entered=entered[None],
        stop_step=stop,
        stop_level=np.array(config.step_levels)[stop],
        tokens_read=counts.sum(keepdims=True),
    )
    moments = _moments(loaded, plan, [slot for slots in read for slot in slots])
    slots, items, is_read = np.array(moments, int).reshape(-1, 3).T
    return VideoSearch(
        output=output,
        gamma=gamma,
        scores=plan.scores,
        tokens=counts,
        moments=slots,
        moment_scores=plan.scores[slots],
        best_items=items,
        item_read=is_read.astype(bool),
    )


def _moments(loaded: Loaded, plan: Plan, read: Sequence[int]) -> list[tuple[int, int, bool]]:
    """Places that an answer rests on, likeliest first: slot, best item or -1, whether it was read.

    A place is an episode that was read or holds a clip that was, or a clip whose episode is gone.
    """
    state = loaded.joined.state
    n1, n2 = len(state.sensory.valid), len(state.episodic.valid)
    holds = np.asarray(ev.links(state)[1])
    items = [slot for slot in read if slot < n1]
    found = {slot: -1 for slot in read if n1 <= slot < n1 + n2}
    for item in sorted(items, key=lambda slot: -plan.scores[slot]):
        holder = np.flatnonzero(holds[:, item])
        place = n1 + int(holder[0]) if len(holder) else item
        if found.get(place, -1) < 0:
            found[place] = item
    moments = []
    for place, item in found.items():
        held = np.flatnonzero(holds[place - n1]) if place >= n1 and item < 0 else []
        best = int(held[np.argmax(plan.scores[held])]) if len(held) else item
        moments.append((place, best, item >= 0))
    return sorted(moments, key=lambda m: (-plan.verified.get(m[0], 0.0), -plan.scores[m[0]]))
