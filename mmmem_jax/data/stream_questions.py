"""Questions made from a stream itself, without labels: who, when, order, cloze.

They imitate what a person later asks of a day: a question rests on a row that says something of
somebody, not on filler. Everything is decided by plain features of the text, so the same events,
statistics and seed give the same questions.

A row is askable if
  - it has 4 to 40 words;
  - it names or quotes a person other than the wearer (where the stream has names at all);
  - two or more of its words are content words, and one of these at least is distinctive: found in
    two rows or more of the statistics' stream, but in no more than 1 row of 100.
"""

import bisect
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmmem_jax.data.timed_text import Event, Question

TYPES = ("order", "when", "who", "cloze")

_COMMON = 0.01  # a distinctive word is in no larger share of the rows
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|\d+")
_SPEAKER = re.compile(r"([A-Z][a-z]+) ?[:\N{FULLWIDTH COLON}]\s*")
_CLAUSE = re.compile(
    r"(?:Then )?([A-Z][a-z]*)(?:(?:'m|'s| am| is| was)(?: still| now)? (\w+ing)| ([a-z]+))\b"
    r"([^.!?;:]*)[.!?]*"
)
_NOT_NAMES = frozenset("other others unknown everyone everybody someone somebody neighbor".split())
_STOPWORDS = frozenset(
    """
    a about above actually after again ah all almost also always am an and any anymore are
    around as at away back be because been before behind being below beside between both but by
    can cannot come could did do does doing don't done down each eh else even ever every
    everyone everything few first five for four from front get getting gets go goes going gonna
    good got great had hand hands has have having he her here hers herself hey him himself his
    hmm how i i'll i'm i've if in inside into is it it's its itself just keep kind know left let
    let's like little look looked looking looks lot made make many may maybe me mean mine more
    most much must my myself near need never next no not nothing now of off oh okay on once one
    only onto or other others our out over own please put really right said same say saying see
    seems she should side since so some someone something sort still stuff such take taking than
    thank thanks that that's the their them themselves then there there's these they they're
    thing things think this those though three through time to together too took toward towards
    turn turned turning two uh um under until up upon us use using very want wants was watch
    watching way we we're well were what what's when where which while who whole whose why will
    with within without won't would wow yeah yes yet you you're your yours yourself
    """.split()
)
_IRREGULAR = """
    bring:brought buy:bought come:came cut:cut do:did draw:drew drink:drank drive:drove eat:ate
    fall:fell feel:felt find:found get:got give:gave go:went hang:hung have:had hear:heard
    hold:held keep:kept lay:laid lead:led leave:left let:let lie:lay make:made meet:met pay:paid
    put:put read:read ride:rode ring:rang run:ran say:said see:saw sell:sold send:sent set:set
    shake:shook show:showed sing:sang sit:sat speak:spoke stand:stood stick:stuck take:took
    teach:taught tear:tore tell:told think:thought throw:threw understand:understood wear:wore
    write:wrote
"""
_BASE_FORMS = {past: base for base, past in (pair.split(":") for pair in _IRREGULAR.split())}


@dataclass(frozen=True)
class StreamStatistics:
    """What the rule for askable rows knows of a stream; computed on training events only.

    Attributes:
      num_rows: rows counted.
      frequency: lower-case content word to the number of rows that hold it.
      names: people named in the stream, except the wearer.
      wearer: name of the person who wears the camera, None if there is none.
    """

    num_rows: int
    frequency: Mapping[str, int]
    names: frozenset[str]
    wearer: str | None


class _Fact(NamedTuple):
    """An askable row taken apart."""

    event: Event
    person: str | None  # the answer of `who`; None if the row has no one person
    who: str  # a question after the person
    when: str  # a question after the time
    told: str  # the row in few words, an option of an order question
    word: str  # the most distinctive word, the answer of a cloze
    named: frozenset[str]  # everybody in the row


class _Stream(NamedTuple):
    """What the makers of questions draw from: one video's rows and facts, in the order of ends."""

    events: list[Event]
    ends: list[float]  # of events, s
    facts: list[_Fact]
    persons: list[str]  # answers of the facts' who questions
    words: list[str]  # distinctive words by frequency
    statistics: StreamStatistics


class _Draft(NamedTuple):
    question: str
    right: str
    wrong: list[str]
    rows: list[Event]  # those the question rests on


def stream_statistics(events: Iterable[Event], *, wearer: str | None = None) -> StreamStatistics:
    """Counts words and finds names.

    A name is a capitalised word that never occurs in lower case and that speaks ("Name: ...") or is
    the subject of a row ("Name is ...", "Name walked ...") ten times or more.
    """
    frequency: Counter[str] = Counter()
    lower: set[str] = set()
    subjects: Counter[str] = Counter()
    num_rows = 0
    for event in events:
        num_rows += 1
        speaker, said = _speaker(event.text)
        words = _words(said)
        frequency.update({word.lower() for word in words})
        lower.update(word for word in words if word.islower())
        if speaker:
            subjects[speaker] += 1
        elif len(words) > 1 and words[0].istitle() and words[1].islower():
            subjects[words[0]] += 1
    common = lower | _STOPWORDS | _NOT_NAMES
    names = {name for name, n in subjects.items() if n >= 10 and name.lower() not in common}
    return StreamStatistics(num_rows, dict(frequency), frozenset(names - {wearer}), wearer)


def askable(event: Event, statistics: StreamStatistics) -> bool:
    """Tells whether a person might later ask about `event`; the module's text has the rule."""
    return score(event, statistics) > 0


def score(event: Event, statistics: StreamStatistics) -> float:
    """Returns 0 for a row that is not askable, else the summed idf (nats) of its 3 rarest words."""
    speaker, said = _speaker(event.text)
    words = _words(said)
    if not 4 <= len(words) <= 40:
        return 0.0
    if statistics.names and not statistics.names & {speaker, *words}:
        return 0.0
    content = _content(words, statistics)
    if len(content) < 2 or not any(_is_distinctive(word, statistics) for word in content):
        return 0.0
    return sum(_idf(word, statistics) for word in _rarest(content, 3, statistics))


DESCRIPTION = ("idf_sum", "idf_max", "words", "content_words", "names", "known_speaker", "speaker")


def describe(event: Event, statistics: StreamStatistics) -> tuple[float, ...]:
    """Returns plain features of a row, one per name in DESCRIPTION.

    Summed and largest idf of its content words (nats), its words, its content words, the known
    names in it, and 0 or 1: whether a known person, or anybody, is quoted.
    """
    speaker, said = _speaker(event.text)
    words = _words(said)
    content = _content(words, statistics)
    idf = [_idf(word, statistics) for word in content]
    named = len(statistics.names & {*words})
    known = float(speaker in statistics.names)
    quoted = float(speaker is not None)
    return sum(idf), max(idf, default=0.0), len(words), len(content), named, known, quoted


def make_questions(
    events: Sequence[Event],
    statistics: StreamStatistics,
    *,
    num_questions: int,
    rng_seed: int,
    types: Sequence[str] = TYPES,
    window_seconds: float = 2.0,
    evidence_margin: float = 1.0,
    delay: tuple[float, float] = (600.0, 6 * 3600.0),
) -> list[Question]:
    """Makes four-option questions, at most one about each `window_seconds` of a video.

    Args:
      events: of any number of videos.
      statistics: of the training events.
      num_questions: at most so many, drawn evenly from the windows that have an askable row.
      rng_seed: seeds the draw, the types, the options and the query times.
      types: some of TYPES, made in equal numbers where the rows allow it.
      window_seconds: length of a window; its highest-scoring row is asked about.
      evidence_margin: seconds added on both sides of a row to make its evidence window.
      delay: a question comes log-uniformly so many seconds after its row, but not after the end of
        the video's last event.

    Returns:
      Questions sorted by (video, query_time). Embed `question` alone for retrieval, except for an
      order question, whose subject is in its options.
    """
    rng = random.Random(rng_seed)
    streams = _streams(events, statistics, window_seconds)
    anchors = [(video, n) for video, stream in streams.items() for n in range(len(stream.facts))]
    drawn = sorted(rng.sample(anchors, min(num_questions, len(anchors))))
    made: Counter[str] = Counter()
    questions = []
    for video, number in drawn:
        stream = streams[video]
        fact = stream.facts[number]
        wait = math.exp(rng.uniform(math.log(delay[0]), math.log(delay[1])))
        query_time = min(fact.event.t1 + wait, stream.ends[-1])
        for kind in sorted(types, key=lambda kind: (made[kind], rng.random())):
            draft = _MAKERS[kind](fact, query_time, stream, rng)
            if draft is not None:
                made[kind] += 1
                qid = f"{video}_{fact.event.t1:.2f}_{rng_seed}"
                questions.append(_question(qid, kind, draft, query_time, evidence_margin, rng))
                break
    return sorted(questions, key=lambda question: (question.video, question.query_time))


def _question(
    qid: str, kind: str, draft: _Draft, query_time: float, margin: float, rng: random.Random
) -> Question:
    options = [draft.right, *draft.wrong]
    rng.shuffle(options)
    return Question(
        qid=qid,
        video=draft.rows[0].video,
        question=draft.question,
        options=tuple(options),
        answer=options.index(draft.right),
        query_time=query_time,
        evidence=tuple(sorted((row.t0 - margin, row.t1 + margin) for row in draft.rows)),
        type=kind,
    )


def _who(fact: _Fact, query_time: float, stream: _Stream, rng: random.Random) -> _Draft | None:
    """Asks for the person; the others come as often among the options as among the answers."""
    if fact.person is None:
        return None
    others: list[str] = []
    for _ in range(100):
        other = rng.choice(stream.persons)
        if other not in fact.named and other not in others:
            others.append(other)
        if len(others) == 3:
            return _Draft(fact.who, fact.person, others, [fact.event])
    return None


def _when(fact: _Fact, query_time: float, stream: _Stream, rng: random.Random) -> _Draft | None:
    """Asks for one of four spans that hold equally many of the rows seen so far."""
    seen = stream.events[: bisect.bisect_right(stream.ends, query_time)]
    edges = [seen[len(seen) * part // 4].t0 for part in range(4)] + [query_time]
    if any(later - earlier < 60 for earlier, later in zip(edges, edges[1:], strict=False)):
        return None  # nobody tells times of day so finely
    options = [
        f"between {_clock(start)} and {_clock(end)}"
        for start, end in zip(edges, edges[1:], strict=False)
    ]
    right = options.pop(max(0, bisect.bisect_right(edges[:4], fact.event.t0) - 1))
    return _Draft(fact.when, right, options, [fact.event])


def _order(fact: _Fact, query_time: float, stream: _Stream, rng: random.Random) -> _Draft | None:
    """Asks which of four rows, a minute or more apart, came first."""
    known = bisect.bisect_right(stream.facts, query_time, key=lambda fact: fact.event.t1)
    chosen = [fact]
    for _ in range(100):
        other = stream.facts[rng.randrange(known)]
        if all(
            abs(other.event.t0 - one.event.t0) >= 60 and other.told != one.told for one in chosen
        ):
            chosen.append(other)
        if len(chosen) == 4:
            chosen.sort(key=lambda fact: fact.event.t0)
            told = [one.told for one in chosen]
            rows = [one.event for one in chosen]
            return _Draft("Which of these happened first?", told[0], told[1:], rows)
    return None


def _cloze(fact: _Fact, query_time: float, stream: _Stream, rng: random.Random) -> _Draft | None:
    """Asks for the most distinctive word among words that are as frequent and end alike."""
    frequency = stream.statistics.frequency
    count, present = frequency[fact.word], {word.lower() for word in _words(fact.event.text)}
    low = bisect.bisect_left(stream.words, count / 2, key=frequency.__getitem__)
    high = bisect.bisect_right(stream.words, count * 2, key=frequency.__getitem__)
    alike = [
        word
        for word in stream.words[low:high]
        if _ending(word) == _ending(fact.word) and word not in present
    ]
    if len(alike) < 3:
        return None
    gapped = re.sub(rf"\b{re.escape(fact.word)}\b", "____", fact.event.text, flags=re.IGNORECASE)
    return _Draft(f"Fill the gap: {gapped}", fact.word, rng.sample(alike, 3), [fact.event])


_MAKERS = {"order": _order, "when": _when, "who": _who, "cloze": _cloze}


def _streams(
    events: Sequence[Event], statistics: StreamStatistics, window_seconds: float
) -> dict[str, _Stream]:
    words = [word for word in statistics.frequency if _is_distinctive(word, statistics)]
    words = sorted(_content(words, statistics), key=lambda w: (statistics.frequency[w], w))
    streams = {}
    for video in sorted({event.video for event in events}):
        rows = sorted((e for e in events if e.video == video), key=lambda e: (e.t1, e.t0, e.text))
        facts = _facts(rows, statistics, window_seconds)
        persons = [fact.person for fact in facts if fact.person]
        ends = [row.t1 for row in rows]
        streams[video] = _Stream(rows, ends, facts, persons, words, statistics)
    return streams


def _facts(
    rows: Sequence[Event], statistics: StreamStatistics, window_seconds: float
) -> list[_Fact]:
    """Takes the best row of each window; rows that differ in nothing but a name are ambiguous."""
    count = Counter(_nameless(row, statistics) for row in rows)
    best: dict[int, tuple[float, Event]] = {}
    for row in rows:
        value, window = score(row, statistics), int(row.t1 // window_seconds)
        if value > best.get(window, (0.0,))[0] and count[_nameless(row, statistics)] == 1:
            best[window] = (value, row)
    return [_fact(row, statistics) for _, row in best.values()]


def _fact(event: Event, statistics: StreamStatistics) -> _Fact:
    speaker, said = _speaker(event.text)
    words = _words(said)
    content = _content(words, statistics)
    distinctive = [word for word in content if _is_distinctive(word, statistics)]
    word = min(distinctive, key=statistics.frequency.__getitem__)
    named = statistics.names & {*words}
    person = next(iter(named)) if len(named) == 1 else None
    rare = _listed(_rarest(content, 3, statistics))
    gist = _listed([*sorted(named), *_rarest(content, 2, statistics)])
    if speaker in statistics.names:
        person, who = speaker, f"Who talked about {gist}?"
        when, told = f"When did {speaker} talk about {gist}?", f"{speaker} talked about {gist}"
    elif speaker:
        subject = "I" if speaker == statistics.wearer else "someone"
        who = f"Who came up when {subject} talked about {rare}?"
        when, told = f"When did {subject} talk about {gist}?", f"{subject} talked about {gist}"
    elif clause := _clause(said, statistics):
        subject, did, when = clause
        told = f"{subject} {did}"
        if subject == "I":
            who = f"Who was it: I {did.replace(person, '____') if person else did}?"
        else:
            person, who = subject, f"Who {did}?"
    else:
        who = f"Who was there, with {rare}?"
        when, told = f"When was there something with {gist}?", said.rstrip(".!? ")
    return _Fact(event, person, who, when, told, word, named | {person, speaker})


def _clause(said: str, statistics: StreamStatistics) -> tuple[str, str, str] | None:
    """Splits "Tasha walked home." into ("Tasha", "walked home", "When did Tasha walk home?")."""
    match = _CLAUSE.fullmatch(said)
    if match is None or match[1] not in statistics.names | {"I"}:
        return None
    subject, doing, verb, rest = match.groups()
    if doing:
        return subject, f"was {doing}{rest}", f"When was {subject} {doing}{rest}?"
    base = _base_form(verb, statistics)
    return base and (subject, f"{verb}{rest}", f"When did {subject} {base}{rest}?")


def _base_form(verb: str, statistics: StreamStatistics) -> str | None:
    """Returns "walk" for "walked" or "walks": the candidate most frequent in the stream itself."""
    if verb in _BASE_FORMS:
        return _BASE_FORMS[verb]
    candidates: list[str] = []
    if verb.endswith("ed"):
        candidates = [verb[:-1], verb[:-2], verb[:-3], verb[:-3] + "y"]
    elif verb.endswith("s"):
        candidates = [verb[:-1], verb[:-2], verb[:-3] + "y"]
    known = [base for base in candidates if len(base) > 1 and base in statistics.frequency]
    return max(known, key=statistics.frequency.__getitem__, default=None)


def _speaker(text: str) -> tuple[str | None, str]:
    """Splits "Name: what was said"; (None, text) if nobody is quoted."""
    match = _SPEAKER.match(text)
    return (match[1], text[match.end() :]) if match else (None, text)


def _words(text: str) -> list[str]:
    text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return [word.removesuffix("'s") for word in _WORD.findall(text)]


def _content(words: Iterable[str], statistics: StreamStatistics) -> list[str]:
    """Returns the distinct content words in lower case, in their order."""
    lower = (word.lower() for word in words if word not in statistics.names | {statistics.wearer})
    return [*dict.fromkeys(w for w in lower if len(w) > 2 and w not in _STOPWORDS and "'" not in w)]


def _is_distinctive(word: str, statistics: StreamStatistics) -> bool:
    rows = statistics.frequency.get(word, 0)
    return 2 <= rows <= max(2, _COMMON * statistics.num_rows)


def _idf(word: str, statistics: StreamStatistics) -> float:
    """Inverse document frequency, nats; a word seen once or never counts as one seen twice."""
    return math.log(max(statistics.num_rows, 2) / max(statistics.frequency.get(word, 0), 2))


def _rarest(words: Sequence[str], number: int, statistics: StreamStatistics) -> list[str]:
    """Returns the `number` words of highest idf, in their order."""
    chosen = sorted(words, key=lambda word: -_idf(word, statistics))[:number]
    return [word for word in words if word in chosen]


def _nameless(event: Event, statistics: StreamStatistics) -> str:
    words = _words(_speaker(event.text)[1])
    return " ".join(word.lower() for word in words if word not in statistics.names)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _ending(word: str) -> str:
    return next((end for end in ("ing", "ed", "s", "ly") if word.endswith(end)), "")


def _clock(seconds: float) -> str:
    """Formats seconds since midnight of day 1 (or since a video's start) as [day d,] H:MM:SS."""
    day, rest = divmod(int(seconds), 86_400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"day {day + 1}, {clock}" if day else clock
