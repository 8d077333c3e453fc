"""Made streams of clips as the `lite` backbone perceives videos, and questions with evidence.

No video is behind them. A stream visits places, some again; each holds a few of ImageNet's classes.
Perception is imitated in MiniLM's space: a clip's label logits are the similarities of its objects
with all labels, blurred by clarity and noise, and its view is ConSE (arXiv 1312.5650). Some clips
show nothing; in some a fact is told that a question will ask for, in others there is small talk.
Unlike those of real videos, captions name no colours.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmmem_jax.data import encoded
from mmmem_jax.data.encoded import EncodedStream
from mmmem_jax.errors import UserError
from mmmem_jax.perception import describe

SPLITS = ("train", "validation", "test")
FAMILIES = ("seen", "together", "said")
TOP_LABELS = 50  # of ConSE
MAX_EVIDENCE = 32  # clips of one question

PEOPLE = (
    "Maria", "Tom", "Aisha", "Ben", "Chloe", "Daniel", "Elena", "Farid", "Grace", "Hugo", "Ines",
    "Jonas", "Keiko", "Liam", "Mina", "Noah", "Olga", "Pedro", "Qing", "Rosa", "Sam", "Tara",
    "Umar", "Vera", "Will", "Xenia", "Yusuf", "Zoe", "Anna", "Boris",
)  # fmt: skip
THINGS = (
    "keys", "milk", "passport", "tickets", "charger", "wallet", "blue folder", "tent", "ladder",
    "old camera", "letters", "medicine", "guitar strings", "flour", "map", "red scarf", "batteries",
    "glasses", "suitcase", "contract", "bread", "paint", "hard drive", "flowers", "receipt",
    "rope", "torch", "notebook", "coffee", "spare tyre",
)  # fmt: skip
PLACES = (
    "kitchen", "garage", "station", "harbour", "library", "attic", "office", "market", "school",
    "hotel", "garden", "basement", "airport", "church", "workshop", "bakery", "museum", "hospital",
    "farm", "stadium",
)  # fmt: skip
TIMES = (
    "on Monday", "tomorrow morning", "at seven", "next week", "on Sunday", "tonight", "at noon",
    "in March", "after lunch", "before the rain",
)  # fmt: skip
FACTS = (  # what is told, what asks for it
    ("{person} left the {thing} in the {place}.", "Where did {person} leave the {thing}?"),
    ("We meet {person} at the {place} {time}.", "When do they meet {person}?"),
    ("We should buy the {thing} {time}.", "When should they buy the {thing}?"),
    ("{person} is afraid of the {label}.", "Who is afraid of the {label}?"),
    ("This {label} belongs to {person}.", "Who does the {label} belong to?"),
    ("{person} used to work at the {place}.", "Where did {person} work?"),
    ("They closed the {place} {time}.", "What happened to the {place}?"),
    ("I found the {thing} behind the {label}.", "Where did they find the {thing}?"),
    ("{person} wants to sell the {thing}.", "What does {person} want to sell?"),
    ("The {label} was bought {time}.", "When was the {label} bought?"),
    ("{person} broke an arm at the {place}.", "What happened to {person}?"),
    ("The {thing} must go to the {place}.", "What must go to the {place}?"),
    ("{person} married the doctor {time}.", "Who got married?"),
    ("Never touch the {label} with wet hands.", "What must not be touched with wet hands?"),
    ("{person} is moving to another city {time}.", "Who is moving to another city?"),
    ("The train from the {place} leaves {time}.", "When does the train leave?"),
)
SMALL_TALK = (
    "Well, you know.", "Oh, that's nice.", "Hello, how are you?", "Thank you very much.", "Yeah.",
    "Okay, okay.", "Haha, right.", "I don't know.", "Wow, look at that!", "Come on, let's go.",
    "Hmm.", "No way!", "See you later.", "Good morning everybody.", "Really?", "That's great.",
    "Sorry about that.", "All right then.", "What do you think?", "Exactly.", "I guess so.",
    "Just a moment, please.", "Oh my god.", "Here we go.", "Not bad at all.", "Nice to see you.",
    "Yes, of course.", "Wait, what?", "It is what it is.", "Let me see.",
)  # fmt: skip
SEEN = ("When was {a} seen?", "Where is the {name}?", "Show me {a}.", "{name}", "Is there {a}?")
TOGETHER = ("When were {a} and {b} seen together?", "{a} with {b}", "What was seen with {a}?")

EmbedFn = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]  # texts -> [n, E], tokens [n]


class Labels(NamedTuple):
    """The C classes: names, and embeddings of "a photo of a NAME"."""

    names: tuple[str, ...]
    embedding: np.ndarray  # [C, E] float32, unit length


@dataclasses.dataclass(frozen=True)
class LiteConfig:
    """What made streams are like; shares are of clips."""

    num_clips: int = 128
    num_questions: int = 48
    empty_share: float = 0.15  # show nothing that can be told: black frames, credits
    told_share: float = 0.2  # a fact is told
    talk_share: float = 0.2  # small talk
    blur: float = 0.08  # similarity at which a wrong label is e times less likely
    noise: float = 1.0  # standard deviation of the logits
    tell_threshold: float = 0.04  # probability of the true label from which a clip is evidence

    def __post_init__(self):
        if min(self.num_clips, self.num_questions) < 1:
            raise ValueError("num_clips and num_questions must be at least 1")
        if not 0.0 <= self.told_share + self.talk_share <= 1.0 or not 0 <= self.empty_share < 1:
            raise ValueError("told_share + talk_share, and empty_share, must be shares")


class Question(NamedTuple):
    """What is asked of a stream, and the clips that answer it."""

    text: str
    family: int
    evidence: tuple[int, ...]


class LiteStream(NamedTuple):
    """T clips as perceived, before their captions are embedded."""

    visual: np.ndarray  # [T, E] float32, ConSE of the key frames, unit length
    coarse: np.ndarray  # [T, E] float32, ConSE of all frames
    captions: tuple[str, ...]
    span: np.ndarray  # [T, 2] float32 s
    empty: np.ndarray  # [T] bool, for analysis
    questions: tuple[Question, ...]


def read_label_names(folder: Path) -> tuple[str, ...]:
    """The 1000 class names of ImageNet, in the order of the classes.

    Raises:
      UserError: if the folder does not hold them.
    """
    path = Path(folder) / "imagenet1k_clean_names.json"
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch the class names again") from error
    if not isinstance(names, list) or len(names) != 1000 or not all(map(str.strip, names)):
        raise UserError(f"{path} is no list of 1000 names; fetch the class names again")
    return tuple(names)


def with_article(name: str) -> str:
    """ "a tabby cat", "an ostrich"."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def make_labels(names: Sequence[str], embed_fn: EmbedFn) -> Labels:
    """Label embeddings in the space of ConSE."""
    return Labels(tuple(names), embed_fn([f"a photo of {with_article(n)}" for n in names])[0])


def share_of(values: Sequence, split: str) -> list:
    """The part of `values` that a split may use: 7, 1 and 2 of every 10, so none is shared."""
    tenths = {"train": range(7), "validation": (7,), "test": (8, 9)}[split]
    return [value for i, value in enumerate(values) if i % 10 in tenths]


class _Shot(NamedTuple):
    """What a clip is of: objects with their prominence, and how clearly they are seen."""

    objects: tuple[int, ...]
    weights: tuple[float, ...]
    clarity: float
    motion: float  # mean difference of consecutive frames, grey levels
    brightness: float  # mean grey level


def _script(rng: np.random.Generator, classes: np.ndarray, config: LiteConfig) -> list[_Shot]:
    """Visits to a few places; a place shows the same objects each time, a still shot all along."""
    pace = rng.choice([1.5, 4.0, 10.0])  # mean clips a visit
    num_places = max(2, round(config.num_clips / pace / rng.uniform(1.2, 3.0)))
    places = [rng.choice(classes, rng.integers(1, 5), replace=False) for _ in range(num_places)]
    shots: list[_Shot] = []
    sharp = rng.uniform(0.7, 1.1)  # some films look like none of the classes
    while len(shots) < config.num_clips:
        length = int(rng.geometric(1 / pace))
        if rng.random() < config.empty_share:
            blank = _Shot((), (), 0.0, float(rng.exponential(2.0)), float(rng.uniform(0.0, 60.0)))
            shots += [blank] * min(length, 4)
            continue
        place = places[rng.integers(num_places)]
        clarity, still = sharp * rng.uniform(0.7, 1.0), rng.random() < 0.5
        motion, brightness = rng.exponential(0.5 if still else 8.0), rng.uniform(20.0, 180.0)
        shown = place
        for _ in range(length):
            if not still and rng.random() < 0.4:
                shown = rng.choice(place, rng.integers(1, len(place) + 1), replace=False)
            weights = tuple(rng.uniform(0.8, 1.0, len(shown)).tolist())
            clear = float(clarity * rng.uniform(0.85, 1.1))
            objects = tuple(map(int, shown))
            shots.append(_Shot(objects, weights, clear, float(motion), float(brightness)))
    return shots[: config.num_clips]


def _probabilities(rng, shots: Sequence[_Shot], similarity: np.ndarray, config: LiteConfig):
    """Label probabilities of the shots, float32 [T, C]: similar labels are taken for each other."""
    logits = np.zeros((len(shots), len(similarity)), np.float32)
    for row, shot in zip(logits, shots, strict=True):
        if shot.objects:
            weights = np.array(shot.weights, np.float32)[:, None]
            row += shot.clarity / config.blur * (weights * similarity[list(shot.objects)]).max(0)
    logits += rng.normal(0.0, config.noise, logits.shape)
    p = np.exp(logits - logits.max(1, keepdims=True))
    return (p / p.sum(1, keepdims=True)).astype(np.float32)


def conse(probabilities: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """Label embeddings weighted by the surest probabilities, unit float32 [T, E]."""
    floor = np.partition(probabilities, -TOP_LABELS, axis=1)[:, -TOP_LABELS, None]
    x = np.where(probabilities >= floor, probabilities, 0.0) @ embedding
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def _caption(shot: _Shot, probabilities: np.ndarray, names: Sequence[str], said: str) -> str:
    """What perception would write of the shot."""
    surest = np.argsort(-probabilities)[: describe.MAX_LABELS]
    labels = [(names[i], float(probabilities[i])) for i in surest]
    return describe.caption(labels, motion=shot.motion, brightness=shot.brightness, subtitles=said)


def _speech(rng, shots: Sequence[_Shot], names, classes, split: str, config: LiteConfig):
    """What is said in each clip, "" for nothing, and the questions that facts answer."""
    people, things, places, times, talk = (
        share_of(values, split) for values in (PEOPLE, THINGS, PLACES, TIMES, SMALL_TALK)
    )
    said, asked = [], []
    for t, shot in enumerate(shots):
        kind = rng.random()
        if kind < config.told_share:
            words = {
                "person": rng.choice(people),
                "thing": rng.choice(things),
                "place": rng.choice(places),
                "time": rng.choice(times),
                "label": names[rng.choice(shot.objects or classes)],
            }
            fact, question = FACTS[rng.integers(len(FACTS))]
            said.append(fact.format(**words))
            asked.append(Question(question.format(**words), FAMILIES.index("said"), (t,)))
        else:
            talks = kind < config.told_share + config.talk_share
            said.append(str(rng.choice(talk)) if talks else "")
    return said, asked


def _same_evidence(asked: Sequence[Question]) -> list[Question]:
    """Questions of one wording as one, with the evidence of all."""
    merged: dict[str, Question] = {}
    for q in asked:
        before = merged[q.text].evidence if q.text in merged else ()
        merged[q.text] = q._replace(evidence=(*before, *q.evidence))
    return list(merged.values())


def _sights(rng, shots: Sequence[_Shot], told: np.ndarray, names) -> list[Question]:
    """What can be asked of what was seen; `told` [T, C] says which true labels can be told."""
    where = {c: np.flatnonzero(told[:, c]) for c in {o for s in shots for o in s.objects}}
    pairs = {tuple(sorted((a, b))) for s in shots for a in s.objects for b in s.objects if a != b}
    asked = []
    for c in sorted(where):
        text = rng.choice(SEEN).format(a=with_article(names[c]), name=names[c])
        asked.append(Question(text, FAMILIES.index("seen"), tuple(where[c].tolist())))
    for a, b in sorted(pairs):
        both = np.intersect1d(where[a], where[b])
        text = rng.choice(TOGETHER).format(a=with_article(names[a]), b=with_article(names[b]))
        asked.append(Question(text, FAMILIES.index("together"), tuple(both.tolist())))
    return [q for q in asked if q.evidence]


def make_stream(
    seed: int, index: int, split: str, labels: Labels, config: LiteConfig
) -> LiteStream:
    """Stream number `index` of a split, drawn from (seed, split, index) alone."""
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    names, classes = labels.names, np.array(share_of(range(len(labels.names)), split))
    shots = _script(rng, classes, config)
    similarity = labels.embedding @ labels.embedding.T
    close = _probabilities(rng, shots, similarity, config)
    wide = _probabilities(rng, shots, similarity, config)
    said, asked = _speech(rng, shots, names, classes, split, config)
    told = np.zeros(close.shape, bool)
    for t, shot in enumerate(shots):
        told[t, list(shot.objects)] = close[t, list(shot.objects)] >= config.tell_threshold
    asked = _same_evidence(asked + _sights(rng, shots, told, names))
    drawn = rng.permutation(len(asked))[: config.num_questions]
    ends = np.cumsum(rng.uniform(2.0, 10.0, len(shots)))
    return LiteStream(
        visual=conse(close, labels.embedding),
        coarse=conse(wide, labels.embedding),
        captions=tuple(
            _caption(shot, p, names, text) for shot, p, text in zip(shots, wide, said, strict=True)
        ),
        span=np.stack([np.r_[0.0, ends[:-1]], ends], axis=1).astype(np.float32),
        empty=np.array([not shot.objects for shot in shots]),
        questions=tuple(asked[i] for i in drawn),
    )


def encode(streams: Sequence[LiteStream], config: LiteConfig, embed_fn: EmbedFn) -> EncodedStream:
    """Streams of one length as the memory and SIB-GRPO read them, stacked [S, T, ...]."""
    vectors, tokens = embed_fn([text for stream in streams for text in stream.captions])
    queries, _ = embed_fn([question.text for stream in streams for question in stream.questions])
    shape = (len(streams), -1)
    cuts = np.cumsum([len(stream.questions) for stream in streams[:-1]], dtype=np.int64)
    parts = zip(
        streams,
        vectors.reshape(*shape, vectors.shape[-1]),
        tokens.reshape(shape),
        np.split(queries, cuts),
        strict=True,
    )
    return encoded.stack([_encode(*part, config.num_questions) for part in parts])


def change_of(coarse: np.ndarray) -> np.ndarray:
    """1 - cosine of each clip's view [T, E] with the one before, 1 for the first; float32 [T]."""
    change = np.ones(len(coarse), np.float32)
    change[1:] = 1.0 - np.sum(coarse[1:] * coarse[:-1], axis=-1)
    return change


def _encode(stream: LiteStream, text, tokens, query, num_questions: int) -> EncodedStream:
    """One stream; questions are padded to `num_questions`, evidence is thinned to fit."""
    num_clips, dim = text.shape
    missing = num_questions - len(stream.questions)
    evidence = np.full((num_questions, MAX_EVIDENCE), -1, np.int32)
    for row, question in zip(evidence, stream.questions, strict=False):
        found = np.array(question.evidence)
        thinned = np.unique(np.linspace(0, len(found) - 1, min(len(found), MAX_EVIDENCE)).round())
        row[: len(thinned)] = found[thinned.astype(int)]
    return EncodedStream(
        visual=stream.visual.astype(np.float16),
        coarse=stream.coarse.astype(np.float16),
        text=text.astype(np.float16),
        span=stream.span,
        tokens=np.maximum(tokens, 1).astype(np.int32),
        mention=np.zeros((num_clips, 0, dim), np.float16),
        mention_valid=np.zeros((num_clips, 0), bool),
        change=change_of(stream.coarse),
        relation=np.full(num_clips, -1, np.int32),
        valid=np.ones(num_clips, bool),
        relevant=np.isin(np.arange(num_clips), evidence),
        query=np.pad(query, ((0, missing), (0, 0))).astype(np.float16),
        options=np.zeros((num_questions, 0, dim), np.float16),
        answer=np.zeros(num_questions, np.int32),
        family=np.pad([q.family for q in stream.questions], (0, missing)).astype(np.int32),
        evidence=evidence,
        query_time=np.full(num_questions, stream.span[-1, 1], np.float32),
        question_valid=np.arange(num_questions) < len(stream.questions),
    )
