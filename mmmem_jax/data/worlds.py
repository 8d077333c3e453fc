"""A procedural egocentric life: what is seen and told chunk by chunk, and what is asked at the end.

A stream is a first-person record of days. Some facts about the wearer's own things are told, some
seen, few are both; the rest is routine, near-duplicates, glitches, small talk, and loud events
about other people's things that nobody asks about. Everything follows from the seed through raw
Philox words (NumPy guarantees their stream), so a stream is the same on every machine.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

PEOPLE = ("ada", "ben", "cleo", "dan", "eva", "finn", "gus", "hana")
OWN_OBJECTS = (
    "lamp", "mug", "bike", "guitar", "plant", "laptop", "kettle", "jacket", "drone", "piano",
    "camera", "suitcase",
)  # fmt: skip
OTHER_OBJECTS = (
    "trumpet", "yacht", "tractor", "statue", "rocket", "parrot", "helmet", "ladder", "barrel",
    "anchor", "sword", "crown", "violin", "canoe", "engine", "puppet", "shield", "wagon", "lantern",
    "cannon", "telescope", "harp", "glider", "throne",
)  # fmt: skip
ROOMS = ("kitchen", "bedroom", "hall", "garage", "garden", "office")
ACTIVITIES = ("cleaned", "painted", "repaired", "carried", "opened", "washed", "packed", "tested")
HABITS = ("cooking", "reading", "running", "writing", "gaming", "sewing", "resting", "dancing")
STATES = ("on", "off", "broken", "missing")
PATTERNS = ("striped", "dotted", "checked", "plain")
PHASES = ("morning", "noon", "evening", "night")
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
NUMBERS = ("one", "two", "three", "four")
FUNCTION_WORDS = (
    "became", "put", "look", "did", "routine", "television", "walk", "says", "state", "where",
    "pattern", "who", "first", "many", "when", "usually", "mostly",
)  # fmt: skip
WORDS = ("", *PEOPLE, *OWN_OBJECTS, *OTHER_OBJECTS, *ROOMS, *ACTIVITIES, *HABITS, *STATES,
         *PATTERNS, *PHASES, *WEEKDAYS, *NUMBERS, *FUNCTION_WORDS)  # fmt: skip
WORD_ID = {word: i for i, word in enumerate(WORDS)}

KINDS = ("state", "place", "pattern", "action", "routine", "loud", "idle", "talk", "glitch")
KIND = {name: i for i, name in enumerate(KINDS)}
FAMILIES = ("state", "seen_once", "who", "order", "count", "when", "habit", "gist")
# The level a family should need, index of memory LEVELS: gist lives high, verbatim detail low.
FAMILY_LEVEL = (0, 2, 1, 1, 1, 1, 0, 0)

TEXT_WORDS, NUM_MENTIONS, QUESTION_WORDS, OPTION_WORDS, MAX_EVIDENCE = 6, 2, 5, 2, 8
NUM_OPTIONS = 4
FRAME_SIZE = 16
SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """What a life holds. Rates are shares of all chunks; facts thin out as streams grow."""

    num_chunks: int = 256
    chunks_per_day: int = 64
    facts: int = 32  # fact events in a stream of 256 chunks
    facts_growth: float = 0.25  # facts grow with (num_chunks / 256) ** facts_growth
    routine_rate: float = 0.12
    loud_rate: float = 0.40
    talk_rate: float = 0.08
    glitch_rate: float = 0.08
    duplicate_rate: float = 0.12
    told_only: float = 0.4
    seen_only: float = 0.3
    questions_per_family: int = 8

    def __post_init__(self):
        if self.num_chunks < 0 or self.chunks_per_day < 4:
            raise ValueError("WorldConfig needs num_chunks >= 0 and chunks_per_day >= 4")


class Stream(NamedTuple):
    """One life, [T, ...]. Word ids index WORDS; 0 is no word."""

    words: np.ndarray  # [T, TEXT_WORDS] uint8, the narration
    visible: np.ndarray  # [T, 5] uint8: object, person, value, room, pattern as seen
    loud: np.ndarray  # [T] bool
    glitch: np.ndarray  # [T] bool
    kind: np.ndarray  # [T] uint8, index of KINDS
    relevant: np.ndarray  # [T] bool, whether any question could need the chunk (for analysis only)
    mention: np.ndarray  # [T, NUM_MENTIONS] uint8, entities named or seen
    relation: np.ndarray  # [T] int32, relation between them, -1 for none
    span: np.ndarray  # [T, 2] float32, seconds
    noise_seed: int  # seeds the frames


class Questions(NamedTuple):
    """Questions asked at the end of a stream, [M, ...]."""

    words: np.ndarray  # [M, QUESTION_WORDS] uint8
    options: np.ndarray  # [M, 4, OPTION_WORDS] uint8
    answer: np.ndarray  # [M] int32
    family: np.ndarray  # [M] int32, index of FAMILIES
    evidence: np.ndarray  # [M, MAX_EVIDENCE] int32, chunks, -1 padding
    valid: np.ndarray  # [M] bool, False where the stream offers no such question


class Bits:
    """Uniform draws from raw Philox words, the same on every machine and NumPy version."""

    def __init__(self, *key: int):
        self._bits = np.random.Philox(np.random.SeedSequence(key))

    def uniform(self, *shape: int) -> np.ndarray:
        """float64 in [0, 1) of the given shape."""
        size = int(np.prod(shape))
        raw = self._bits.random_raw(size) if size else np.zeros(0, np.uint64)
        return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def integers(self, bound: int, *shape: int) -> np.ndarray:
        """int64 in [0, bound) of the given shape."""
        return (self.uniform(*shape) * bound).astype(np.int64)

    def permutation(self, n: int) -> np.ndarray:
        """A permutation of range(n)."""
        return np.argsort(self.uniform(n), kind="stable")

    def choice(self, pool, size: int) -> np.ndarray:
        """`size` distinct entries of `pool`."""
        return np.asarray(pool)[self.permutation(len(pool))[:size]]


def _ids(words) -> np.ndarray:
    return np.array([WORD_ID[w] for w in words])


_PEOPLE, _OWN, _OTHER, _ROOMS = _ids(PEOPLE), _ids(OWN_OBJECTS), _ids(OTHER_OBJECTS), _ids(ROOMS)
_ACTIVITIES, _HABITS, _STATES = _ids(ACTIVITIES), _ids(HABITS), _ids(STATES)
_PATTERNS, _PHASES, _WEEKDAYS, _NUMBERS = map(_ids, (PATTERNS, PHASES, WEEKDAYS, NUMBERS))


def _draw_kinds(bits: Bits, config: WorldConfig) -> np.ndarray:
    """Event kind of each chunk: facts at random places, the rest by their rates."""
    n = config.num_chunks
    rates = [config.routine_rate, config.loud_rate, config.talk_rate, config.glitch_rate]
    edges = np.cumsum(rates)
    background = np.array(
        [KIND["routine"], KIND["loud"], KIND["talk"], KIND["glitch"], KIND["idle"]]
    )
    kind = background[np.searchsorted(edges, bits.uniform(n), side="right")]
    num_facts = min(n, round(config.facts * (n / 256) ** config.facts_growth)) if n else 0
    places = bits.permutation(n)[:num_facts]
    fact_edges = np.cumsum([0.28, 0.18, 0.18])
    facts = np.array([KIND["state"], KIND["place"], KIND["pattern"], KIND["action"]])
    kind[places] = facts[np.searchsorted(fact_edges, bits.uniform(num_facts), side="right")]
    # An object's pattern shows once: later pattern events become state events.
    pattern = np.flatnonzero(kind == KIND["pattern"])
    kind[pattern[len(OWN_OBJECTS) :]] = KIND["state"]
    return kind.astype(np.uint8)


def _draw_patterns(bits: Bits, is_pattern, own) -> tuple[np.ndarray, np.ndarray]:
    """Own things, [T] word ids, each with its pattern shown at most once, and these patterns."""
    order, pattern_of = bits.permutation(12), _PATTERNS[bits.integers(4, 12)]
    shown = order[np.clip(np.cumsum(is_pattern) - 1, 0, 11)]
    return np.where(is_pattern, _OWN[shown], own), np.where(is_pattern, pattern_of[shown], 0)


def _draw_routines(bits: Bits, phase, day, ambient) -> tuple[np.ndarray, np.ndarray]:
    """Habits, mostly those of the phase, and rooms, mostly those of the weekday, [T] word ids."""
    n = len(phase)
    habit_of = bits.choice(_HABITS, 4)[phase]
    habit = np.where(bits.uniform(n) < 0.8, habit_of, _HABITS[bits.integers(8, n)])
    day_room = _ROOMS[bits.integers(6, 7)][day]
    return habit, np.where(bits.uniform(n) < 0.75, day_room, ambient)


def _draw_channels(bits: Bits, is_pattern, config: WorldConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which things are told and which are seen, bool [T]; a pattern is never told."""
    channel = bits.uniform(len(is_pattern))
    told_only = channel < config.told_only
    seen_only = ~told_only & (channel < config.told_only + config.seen_only)
    return ~seen_only & ~is_pattern, ~told_only | is_pattern


def _draw_sources(bits: Bits, kind: np.ndarray, config: WorldConfig) -> np.ndarray:
    """The chunk that each chunk shows: itself, or an earlier one where the camera lingers.

    It repeats a background chunk or a lasting fact, never a countable action.
    """
    source = np.arange(len(kind))
    previous = kind[np.maximum(source - 1, 0)]
    lingers = (
        (bits.uniform(len(kind)) < config.duplicate_rate)
        & (kind >= KIND["routine"])
        & (source > 0)
        & ~np.isin(previous, [KIND["action"], KIND["glitch"]])
    )
    for t in np.flatnonzero(lingers):
        source[t] = source[t - 1]
    return source


def make_stream(seed: int, index: int, config: WorldConfig) -> tuple[Stream, Questions]:
    """Stream `index` of the world `seed`, and its questions."""
    bits = Bits(seed, index, config.num_chunks)
    n = config.num_chunks
    kind = _draw_kinds(bits, config)
    phase = np.arange(n) % config.chunks_per_day * 4 // config.chunks_per_day
    day = np.arange(n) // config.chunks_per_day % 7
    person, own = _PEOPLE[bits.integers(8, n)], _OWN[bits.integers(12, n)]
    other, ambient = _OTHER[bits.integers(len(OTHER_OBJECTS), n)], _ROOMS[bits.integers(6, n)]
    activity, state = _ACTIVITIES[bits.integers(8, n)], _STATES[bits.integers(4, n)]
    is_kind = {name: kind == i for name, i in KIND.items()}

    own, pattern = _draw_patterns(bits, is_kind["pattern"], own)
    habit, routine_room = _draw_routines(bits, phase, day, ambient)
    room = np.where(is_kind["routine"], routine_room, ambient)

    # A loud event copies the form of a fact, about somebody else's thing.
    loud_form = bits.integers(3, n)
    form = np.where(
        is_kind["loud"], np.array([KIND["state"], KIND["place"], KIND["action"]])[loud_form], kind
    )
    thing = np.where(is_kind["loud"], other, own)
    value = np.select(
        [form == KIND["state"], form == KIND["place"], form == KIND["action"]],
        [state, room, activity],
        0,
    )
    told, seen = _draw_channels(bits, is_kind["pattern"], config)
    has_thing = np.isin(form, [KIND["state"], KIND["place"], KIND["action"], KIND["pattern"]])
    television = is_kind["loud"] & (bits.uniform(n) < 0.5)
    words = _narrate(form, thing, person, value, television, habit, phase, day, room)
    words[has_thing & ~told] = 0
    words[is_kind["glitch"]] = 0
    words[is_kind["idle"] & (bits.uniform(n) < 0.5)] = 0

    visible = _show(form, has_thing & seen, thing, person, value, habit, room, pattern)
    visible[is_kind["glitch"]] = 0
    mention = _mention(form, has_thing, thing, person, phase, day)
    relation = np.where(form == KIND["action"], activity, -1)
    source = _draw_sources(bits, kind, config)
    first = source == np.arange(n)

    seconds = SECONDS_PER_DAY / config.chunks_per_day
    start = np.arange(n) * seconds
    relevant = kind <= KIND["routine"]
    stream = Stream(
        words=words[source].astype(np.uint8),
        visible=visible[source].astype(np.uint8),
        loud=is_kind["loud"][source],
        glitch=is_kind["glitch"][source],
        kind=kind[source],
        relevant=relevant[source] & first,
        mention=mention[source].astype(np.uint8),
        relation=relation[source].astype(np.int32),
        span=np.stack([start, start + seconds], axis=1).astype(np.float32),
        noise_seed=int(bits.integers(2**31, 1)[0]),
    )
    facts = _Facts(kind, own, person, value, pattern, habit, room, phase, day, ~first)
    return stream, _make_questions(bits, facts, config)


def _narrate(form, thing, person, value, television, habit, phase, day, room) -> np.ndarray:
    """Templated narrations, [T, TEXT_WORDS] word ids."""
    n = len(form)
    zero = np.zeros(n, np.int64)

    def word(name):
        return np.full(n, WORD_ID[name])

    tv = np.where(television, WORD_ID["television"], 0)
    templates = {
        "state": (person, word("became"), thing, value, tv, zero),
        "place": (person, word("put"), thing, value, tv, zero),
        "action": (person, word("did"), value, thing, tv, zero),
        "pattern": (zero,) * 6,
        "routine": (word("routine"), _WEEKDAYS[day], _PHASES[phase], habit, room, zero),
        "idle": (word("walk"), room, zero, zero, zero, zero),
        "talk": (person, word("says"), _HABITS[(person + room) % 8], zero, zero, zero),
    }
    words = np.zeros((n, TEXT_WORDS), np.int64)
    for name, columns in templates.items():
        here = form == KIND[name]
        words[here] = np.stack(columns, axis=1)[here]
    return words


def _show(form, shows_thing, thing, person, value, habit, room, pattern) -> np.ndarray:
    """What is seen, [T, 5] word ids: object, person, value, room, pattern."""
    shows_person = shows_thing & (form != KIND["pattern"])
    routine = np.where(form == KIND["routine"], habit, 0)
    columns = (
        np.where(shows_thing, thing, 0),
        np.where(shows_person, person, 0),
        np.where(shows_person, value, routine),
        room,
        pattern,
    )
    return np.stack(columns, axis=1)


def _mention(form, has_thing, thing, person, phase, day) -> np.ndarray:
    """The entities of a chunk, [T, 2] word ids: a thing and a person, or a phase and a weekday."""
    routine, has_person = form == KIND["routine"], has_thing & (form != KIND["pattern"])
    columns = (
        np.select([has_thing, routine], [thing, _PHASES[phase]], 0),
        np.select([has_person, routine], [person, _WEEKDAYS[day]], 0),
    )
    return np.stack(columns, axis=1)


class _Facts(NamedTuple):
    """The latent events behind a stream, [T]."""

    kind: np.ndarray
    own: np.ndarray
    person: np.ndarray
    value: np.ndarray
    pattern: np.ndarray
    habit: np.ndarray
    room: np.ndarray
    phase: np.ndarray
    day: np.ndarray
    duplicate: np.ndarray

    def where(self, name: str) -> np.ndarray:
        """Chunks of a kind, without lingering repeats."""
        return np.flatnonzero((self.kind == KIND[name]) & ~self.duplicate)


class _Candidate(NamedTuple):
    words: tuple[int, ...]
    options: np.ndarray  # [4, <=2], the first is right
    evidence: np.ndarray


def _with_distractors(bits: Bits, right: int, pool: np.ndarray) -> np.ndarray:
    wrong = bits.choice(pool[pool != right], 3)
    return np.concatenate([[right], wrong])[:, None]


def _state_candidates(bits, f: _Facts):
    """Current state or place of a thing: the newest event decides."""
    for name, ask, pool in (("state", "state", _STATES), ("place", "where", _ROOMS)):
        events = f.where(name)
        for thing in np.unique(f.own[events]):
            mine = events[f.own[events] == thing]
            options = _with_distractors(bits, f.value[mine[-1]], pool)
            yield _Candidate((WORD_ID[ask], thing), options, mine[-1:])


def _seen_once_candidates(bits, f: _Facts):
    """An attribute that one frame showed."""
    for t in f.where("pattern"):
        options = _with_distractors(bits, f.pattern[t], _PATTERNS)
        yield _Candidate((WORD_ID["pattern"], f.own[t]), options, np.array([t]))


def _unique_actions(f: _Facts):
    """Actions on a thing that happened once: (chunks, activities, things)."""
    events = f.where("action")
    pairs = np.stack([f.value[events], f.own[events]], axis=1)
    _, first, count = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    return np.sort(events[first[count == 1]])


def _who_candidates(bits, f: _Facts):
    for t in _unique_actions(f):
        options = _with_distractors(bits, f.person[t], _PEOPLE)
        yield _Candidate((WORD_ID["who"], f.value[t], f.own[t]), options, np.array([t]))


def _when_candidates(bits, f: _Facts):
    for t in _unique_actions(f):
        options = _with_distractors(bits, _PHASES[f.phase[t]], _PHASES)
        yield _Candidate((WORD_ID["when"], f.value[t], f.own[t]), options, np.array([t]))


def _order_candidates(bits, f: _Facts):
    """Which of four actions came first."""
    events = _unique_actions(f)
    for _ in range(8 if len(events) >= 4 else 0):
        four = np.sort(bits.choice(events, 4))
        options = np.stack([f.value[four], f.own[four]], axis=1)
        yield _Candidate((WORD_ID["first"],), options, four)


def _count_candidates(bits, f: _Facts):
    """How often somebody acted on the wearer's things, one to four times."""
    events = f.where("action")
    people, counts = np.unique(f.person[events], return_counts=True)
    numbers = np.unique(counts[counts <= 4])
    # Every number that occurs is asked for equally often, so the commonest is no safe guess.
    for _ in range(2):
        for number in numbers:
            person = bits.choice(people[counts == number], 1)[0]
            mine = events[f.person[events] == person]
            options = _with_distractors(bits, _NUMBERS[number - 1], _NUMBERS)
            yield _Candidate((WORD_ID["many"], WORD_ID["did"], person), options, mine)


def _most(values: np.ndarray):
    """The most frequent value, or None on a tie."""
    found, count = np.unique(values, return_counts=True)
    best = np.flatnonzero(count == count.max())
    return found[best[0]] if len(best) == 1 else None


def _habit_candidates(bits, f: _Facts):
    events = f.where("routine")
    for phase in range(4):
        mine = events[f.phase[events] == phase]
        if len(mine) >= 2 and (usual := _most(f.habit[mine])) is not None:
            options = _with_distractors(bits, usual, _HABITS)
            support = mine[f.habit[mine] == usual][:MAX_EVIDENCE]
            yield _Candidate((WORD_ID["usually"], _PHASES[phase]), options, support)


def _gist_candidates(bits, f: _Facts):
    events = f.where("routine")
    for day in range(7):
        mine = events[f.day[events] == day]
        if len(mine) >= 2 and (usual := _most(f.room[mine])) is not None:
            options = _with_distractors(bits, usual, _ROOMS)
            support = mine[f.room[mine] == usual][:MAX_EVIDENCE]
            yield _Candidate((WORD_ID["mostly"], _WEEKDAYS[day]), options, support)


_CANDIDATES = (
    _state_candidates, _seen_once_candidates, _who_candidates, _order_candidates,
    _count_candidates, _when_candidates, _habit_candidates, _gist_candidates,
)  # fmt: skip


def _make_questions(bits: Bits, facts: _Facts, config: WorldConfig) -> Questions:
    """`questions_per_family` of each family, drawn from what the stream offers."""
    per_family = config.questions_per_family
    m = per_family * len(FAMILIES)
    out = Questions(
        words=np.zeros((m, QUESTION_WORDS), np.uint8),
        options=np.zeros((m, NUM_OPTIONS, OPTION_WORDS), np.uint8),
        answer=np.zeros(m, np.int32),
        family=np.repeat(np.arange(len(FAMILIES), dtype=np.int32), per_family),
        evidence=np.full((m, MAX_EVIDENCE), -1, np.int32),
        valid=np.zeros(m, bool),
    )
    for family, make_candidates in enumerate(_CANDIDATES):
        candidates = list(make_candidates(bits, facts))
        if not candidates:
            continue
        order = bits.permutation(len(candidates))
        for j in range(per_family):
            row = family * per_family + j
            c = candidates[order[j % len(candidates)]]
            shuffle = bits.permutation(NUM_OPTIONS)
            out.words[row, : len(c.words)] = c.words
            out.options[row, :, : c.options.shape[1]] = c.options[shuffle]
            out.answer[row] = np.flatnonzero(shuffle == 0)[0]
            out.evidence[row, : len(c.evidence)] = c.evidence[:MAX_EVIDENCE]
            out.valid[row] = True
    return out


def ask_once(questions: Questions) -> Questions:
    """The same, valid only where the words and the options (in any order) are not asked before.

    A family that a short stream has few questions for repeats them with the options shuffled.
    """
    options = np.sort(questions.options.astype(int) @ [len(WORDS), 1], axis=1)
    asked = np.concatenate([questions.words, options, questions.valid[:, None]], axis=1)
    first = np.zeros_like(questions.valid)
    first[np.unique(asked, axis=0, return_index=True)[1]] = True
    return questions._replace(valid=questions.valid & first)


def _appearances() -> np.ndarray:
    """A fixed 4 x 4 colour patch per word, [V, 4, 4, 3] in 0.29..0.71: what a thing looks like.

    With a texture and the light of a quiet frame it stays off black and white, so that nothing is
    clipped, and with it nothing of the texture left for a low resolution to see.
    """
    patches = Bits(20_260_301, len(WORDS)).uniform(len(WORDS), 4, 4, 3)
    return (0.5 + 0.42 * (patches - 0.5)).astype(np.float32)


def _textures() -> np.ndarray:
    """Pixel textures of the patterns, [4, 8, 8, 1], zero mean over every 2 x 2 block.

    Averaging 2 x 2 pixels erases them: a pattern shows at full resolution only.
    """
    row, column = np.mgrid[0:8, 0:8] % 2
    striped = np.where(row == 0, 1.0, -1.0)
    dotted = np.where((row + column) % 2 == 0, 1.0, -1.0)
    checked = np.where(column == 0, 1.0, -1.0)
    return np.stack([striped, dotted, checked, np.zeros((8, 8))])[..., None].astype(np.float32)


def render(stream: Stream) -> np.ndarray:
    """Frames [T, 16, 16, 3] uint8: object, person, value and room fill a quadrant each."""
    n = len(stream.kind)
    bits = Bits(stream.noise_seed, n)

    def uniform(*shape):
        return bits.uniform(*shape).astype(np.float32)

    patches = _appearances().repeat(2, axis=1).repeat(2, axis=2)  # [V, 8, 8, 3]
    patches[0] = 0.5
    quadrants = patches[stream.visible[:, :4]]
    pattern = stream.visible[:, 4].astype(np.int64)
    texture = _textures()[np.clip(pattern - WORD_ID[PATTERNS[0]], 0, 3)]
    quadrants[:, 0] += 0.12 * texture * (pattern > 0)[:, None, None, None]
    top = np.concatenate([quadrants[:, 0], quadrants[:, 1]], axis=2)
    bottom = np.concatenate([quadrants[:, 2], quadrants[:, 3]], axis=2)
    frames = np.concatenate([top, bottom], axis=1)
    flash = np.where(stream.loud, 1.0 + uniform(n), np.float32(0.8) + np.float32(0.4) * uniform(n))
    frames = (frames - 0.5) * flash[:, None, None, None] + 0.5
    frames = frames + 0.2 * (uniform(*frames.shape) - 0.5)
    # A broken chunk is a cross-fade of its neighbours or noise.
    fade = (np.roll(frames, 1, axis=0) + np.roll(frames, -1, axis=0)) / 2
    broken = np.where(uniform(n, 1, 1, 1) < 0.5, fade, uniform(*frames.shape))
    frames = np.where(stream.glitch[:, None, None, None], broken, frames)
    return (np.clip(frames, 0.0, 1.0) * 255).astype(np.uint8)
