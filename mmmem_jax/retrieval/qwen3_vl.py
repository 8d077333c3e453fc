"""Answers by Qwen3-VL from what it reads: letters scored, episodes verified, words written.

Evidence is read into one conversation, the question after it. What was read stays in the cache:
after each step, and for each order of the options, only the question is read again (eq. 12, 13).
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from mmmem_jax import prompts
from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl import conversation
from mmmem_jax.models.qwen3_vl.buckets import bucket_length
from mmmem_jax.models.qwen3_vl.conversation import Said, Speaker
from mmmem_jax.retrieval.top_down import RetrievalConfig, may_stop, next_stall

Mode = Literal["likelihood", "generate"]
_YES, _NO = ("yes", "Yes"), ("no", "No")
_LETTER = re.compile(r"([A-Z])(?:[.):,]|\s*$)", re.MULTILINE)

Talk = Any  # a conversation so far, of whatever kind the reader's functions take


class Reader(NamedTuple):
    """Who reads and answers: `models.qwen3_vl.conversation` with a model bound, or a script.

    A conversation handed to a function is taken over: use what is returned.
    """

    begin: Callable[[], Talk]
    tell: Callable[[Talk, str], Talk]  # special tokens in the text become themselves
    beginning: Callable[[Talk, str, int], str]  # what of a text leaves room for so many tokens
    # Frames [T, H, W, 3] at seconds [T], which are to leave so much room; else it is as it was.
    look: Callable[[Talk, np.ndarray, Sequence[float], int], Talk]
    mark: Callable[[Talk], Talk]
    rewind: Callable[[Talk, Talk], Talk]  # the conversation as it was when it was marked
    choose: Callable[[Talk, tuple[int, ...]], np.ndarray]  # log-probabilities among these ids
    say: Callable[[Talk, int], tuple[Said, Talk]]  # greedily, so many tokens at most
    encode: Callable[[str], Sequence[int]]  # token ids of a text
    tokens_read: Callable[[Talk], int]  # so far, those forgotten since included


class Evidence(NamedTuple):
    """What a slot of the memory lets the model read."""

    text: str  # lines, "" for none; what comes from elsewhere has gone through prompts.plain
    frames: UInt8[np.ndarray, "T H W 3"] | None = None
    seconds: tuple[float, ...] = ()  # when each frame is shown


@dataclass(frozen=True)
class AnswerConfig:
    """How answers are sought; the numbers are the paper's where it gives them."""

    mode: Mode = "likelihood"  # "generate": the letter that the model writes counts
    search: RetrievalConfig = RetrievalConfig(
        top_k=(5, 2, 1), rounds=(1, 2, 3), temperature=1.0, link_bonus=0.25
    )
    entities: int = 20  # looked at, of which search.top_k are read
    episodes: int = 10  # verified
    verified: int = 3  # of these, read
    found_at: float = 0.5  # p(yes) from which an episode counts as found
    margin: float = 0.2  # between the two likeliest options, under which votes are taken
    num_votes: int = 5  # at least; see `vote_orders`
    seed: int = 0  # of the votes
    max_new_tokens: int = 64  # of a written answer

    def __post_init__(self):
        if self.mode not in ("likelihood", "generate"):
            raise ValueError(f"AnswerConfig.mode is likelihood or generate: {self.mode}")
        if min(self.entities, self.episodes, self.verified, self.num_votes) < 1:
            raise ValueError("AnswerConfig needs at least one entity, episode and vote")
        if self.max_new_tokens < 1:
            raise ValueError("AnswerConfig.max_new_tokens is at least 1")


class Drilled(NamedTuple):
    """An answer among options and the search that led to it, of S steps."""

    log_probs: Float[np.ndarray, "O"]  # of the options at the stop, after votes
    answer_entropy: np.ndarray  # [S] nats; past the stop it stays as it was
    stop_step: int
    tokens: tuple[tuple[int, ...], ...]  # read of each piece of each step up to the stop
    left_out: int  # pieces of which not all fitted the context
    letters: tuple[float, ...]  # log-probabilities in the order asked, before votes
    votes: tuple[dict, ...]  # order (option at each letter) and log_probs (of the options) of each
    written: str | None  # what the model wrote, in mode "generate"
    choice: int | None  # index of the option; None: what was written names none
    prompt_sha256: str  # of the text of all evidence and the question
    tokens_read: int  # by the model, questions read again included


class Written(NamedTuple):
    """An open answer."""

    text: str  # of the answer, or what became of it
    tokens: tuple[int, ...]  # read of each piece of evidence
    left_out: int  # pieces of which not all fitted the context
    prompt_sha256: str
    tokens_read: int


def make_reader(speaker: Speaker, num_slots: int) -> Reader:
    """A reader with a model and room for `num_slots` tokens."""

    def beginning(talk, text, leave):
        return conversation.beginning(speaker, talk, text, leave=leave)

    def look(talk, frames, seconds, leave):
        seen = conversation.see(speaker, frames, seconds)
        if not conversation.has_room(speaker, talk, seen, leave=leave):
            return talk
        return conversation.show(speaker, talk, seen)

    def say(talk, max_new_tokens):
        return conversation.say(speaker, talk, max_new_tokens=max_new_tokens)

    return Reader(
        begin=partial(conversation.begin, speaker, num_slots),
        tell=partial(conversation.tell, speaker),
        beginning=beginning,
        look=look,
        mark=conversation.mark,
        rewind=conversation.rewind,
        choose=partial(conversation.choose, speaker),
        say=say,
        encode=lambda text: speaker.chat.tokenizer.encode(text, add_special_tokens=False).ids,
        tokens_read=lambda talk: talk.tokens_read,
    )


def check_count(num_options: int) -> None:
    """Raises UserError if there are more options than letters."""
    if num_options > len(ascii_uppercase):
        raise UserError(f"{num_options} options are too many; give {len(ascii_uppercase)} at most")


def letter_ids(reader: Reader, num_options: int) -> tuple[int, ...]:
    """The tokens of A, B, C, ..., one for each option.

    Raises:
      UserError: if there are more options than letters, or a letter is not one token of its own.
    """
    check_count(num_options)
    found = [tuple(reader.encode(letter)) for letter in ascii_uppercase[:num_options]]
    for letter, ids in zip(ascii_uppercase, found, strict=False):
        if len(ids) != 1 or found.count(ids) > 1:
            raise UserError(
                f"the tokenizer has no token of its own for the letter {letter}; options cannot be"
                " scored with it, take the one of the model's folder"
            )
    return tuple(ids[0] for ids in found)


def yes_no_ids(reader: Reader) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that yes, and that no, may begin with.

    Raises:
      UserError: if they share one.
    """
    yes, no = (
        tuple(dict.fromkeys(reader.encode(word)[0] for word in words)) for words in (_YES, _NO)
    )
    if set(yes) & set(no):
        raise UserError(
            "the tokenizer begins yes and no with the same token; episodes cannot be verified with"
            " it, take the one of the model's folder"
        )
    return yes, no


def verify(
    reader: Reader, question: str, options: Sequence[str], texts: Sequence[str]
) -> tuple[Float[np.ndarray, "N"], int]:
    """How likely each text holds something that helps to answer: p(yes) against p(no).

    Of a text that does not fit the context the beginning is judged.

    Returns:
      float32 [N], and the tokens that the model read.

    Raises:
      UserError: if the context has no room, and as yes_no_ids does.
    """
    yes, no = yes_no_ids(reader)
    asked = "\n".join([prompts.plain(question), *_lettered(options)])
    head, tail = _halves("verify_v1", question=asked)
    if not texts:
        return np.zeros(0, np.float32), 0
    talk = reader.tell(reader.begin(), head)
    place, found, leave = reader.mark(talk), [], _room_for(reader, tail)
    for text in texts:
        talk = reader.tell(talk, f"{reader.beginning(talk, text, leave)}\n{tail}")
        found.append(np.exp(reader.choose(talk, yes + no))[: len(yes)].sum())
        talk = reader.rewind(talk, place)
    return np.array(found, np.float32), reader.tokens_read(talk)


def drill_down(
    reader: Reader,
    question: str,
    options: Sequence[str],
    steps: Iterable[Sequence[Evidence]],
    *,
    gamma: float,
    config: AnswerConfig,
) -> Drilled:
    """Reads evidence step by step until the options are told apart, and answers.

    The search stops once the answer entropy is `gamma` nats or less, or falls no more. An answer by
    a small margin is then voted on, see `vote`.

    Args:
      reader: who reads.
      question: plain words.
      options: two or more.
      steps: what each of the S steps of config.search reads; no further than it is read.
      gamma: nats.
      config: how.

    Raises:
      UserError: if the context has no room, and as letter_ids does.
    """
    ids = letter_ids(reader, len(options))
    scored = partial(_score, reader, question=question, options=options, ids=ids)
    new_tokens = config.max_new_tokens if config.mode == "generate" else 0
    tail = _tail(question, options)
    leave = _room_for(reader, tail, new_tokens)
    talk, found = _search(reader, steps, scored, len(options), leave, gamma, config.search)
    log_probs, given = found.log_probs, np.arange(len(options))
    if log_probs is None:  # there was nothing to read
        log_probs, talk = scored(talk, order=given)
    letters, votes, written = tuple(log_probs.tolist()), (), None
    choice = int(log_probs.argmax())
    if config.mode == "generate":
        said, talk = _ask(reader, talk, tail, config.max_new_tokens)
        written, choice = said.text, parse_letter(said.text, len(options))
    elif _margin(log_probs) < config.margin:
        log_probs, votes, talk = vote(reader, talk, question, options, ids, config)
        choice = int(log_probs.argmax())
    return Drilled(
        log_probs=log_probs,
        answer_entropy=found.answer_entropy,
        stop_step=max(len(found.tokens) - 1, 0),
        tokens=found.tokens,
        left_out=found.left_out,
        letters=letters,
        votes=votes,
        written=written,
        choice=choice,
        prompt_sha256=_digest([*found.told, tail]),
        tokens_read=reader.tokens_read(talk),
    )


class _Searched(NamedTuple):
    """What was read until the options were told apart."""

    log_probs: Float[np.ndarray, "O"] | None  # None: there was nothing to read
    answer_entropy: np.ndarray  # see Drilled
    tokens: tuple[tuple[int, ...], ...]
    left_out: int
    told: tuple[str, ...]


def _search(
    reader: Reader,
    steps: Iterable[Sequence[Evidence]],
    scored: Callable[..., tuple[np.ndarray, Talk]],
    num_options: int,
    leave: int,
    gamma: float,
    config: RetrievalConfig,
) -> tuple[Talk, _Searched]:
    """Reads step by step, leaving room for so many tokens; see drill_down."""
    head, _ = _halves("answer_v1", question="", options="")
    talk, told = reader.tell(reader.begin(), head), [head]
    entropies = np.full(len(config.step_levels), np.log(num_options))  # as long as nothing is read
    tokens, left_out, stalled, log_probs = [], 0, 0, None
    for step, pieces in enumerate(steps):
        talk, notes = _read_all(reader, talk, pieces, leave)
        told += notes.told
        tokens.append(notes.tokens)
        left_out += notes.left_out
        if any(notes.tokens):
            log_probs, talk = scored(talk, order=np.arange(num_options))
            entropies[step:] = _entropy(log_probs)
        if step:
            drop = entropies[step - 1] - entropies[step]
            stalled = int(next_stall(stalled, drop, any(notes.tokens), config))
        if may_stop(entropies[step], stalled, gamma, config):
            break
    return talk, _Searched(log_probs, entropies, tuple(tokens), left_out, tuple(told))


def vote(
    reader: Reader,
    talk: Talk,
    question: str,
    options: Sequence[str],
    ids: tuple[int, ...],
    config: AnswerConfig,
) -> tuple[Float[np.ndarray, "O"], tuple[dict, ...], Talk]:
    """Scores the options in several orders, and takes the mean of their log-probabilities.

    What the model gives a letter for being that letter all options get alike, and the order in
    which the options are given has no say.

    Returns:
      float32 [O] log-probabilities in the order given, the votes, and the conversation as it was.
    """
    by_text = np.argsort(np.array(options, object), kind="stable")
    votes = []
    for order in vote_orders(len(options), config.num_votes, config.seed):
        order = by_text[order]
        log_probs, talk = _score(reader, talk, question, options, ids, order)
        votes.append({"order": order.tolist(), "log_probs": log_probs.tolist()})
    mean = np.mean([v["log_probs"] for v in votes], axis=0)
    mean = mean - np.log(np.exp(mean).sum())
    return mean.astype(np.float32), tuple(votes), talk


def vote_orders(num_options: int, num_votes: int, seed: int) -> Int[np.ndarray, "N O"]:
    """`num_votes` orders or some more: whole rounds, in which each option has each place once.

    A round is a random order and its rotations.
    """
    rng, orders = np.random.default_rng(seed), []
    while len(orders) < num_votes:
        first = rng.permutation(num_options)
        orders.extend(np.roll(first, shift) for shift in range(num_options))
    return np.array(orders)


def write_answer(
    reader: Reader, question: str, pieces: Sequence[Evidence], config: AnswerConfig
) -> Written:
    """Lets the model answer an open question in words, greedily.

    Raises:
      UserError: if the context has no room.
    """
    head, tail = _halves("word_v1", question=prompts.plain(question))
    leave = _room_for(reader, tail, config.max_new_tokens)
    talk, notes = _read_all(reader, reader.tell(reader.begin(), head), pieces, leave)
    said, talk = reader.say(reader.tell(talk, tail), config.max_new_tokens)
    text = " ".join(said.text.split())
    if not text:
        text = "(the model wrote no answer)"
    elif not said.ended:
        text += f" ... (cut off after {config.max_new_tokens} tokens)"
    digest = _digest([head, *notes.told, tail])
    return Written(text, notes.tokens, notes.left_out, digest, reader.tokens_read(talk))


def parse_letter(text: str, num_options: int) -> int | None:
    """The option whose letter a text starts with, alone or before . ) : or a comma; else None."""
    found = _LETTER.match(text)
    index = ascii_uppercase.index(found[1]) if found else num_options
    return index if index < num_options else None


class _Notes(NamedTuple):
    """Of pieces that were read."""

    told: tuple[str, ...]  # text of each
    tokens: tuple[int, ...]  # of each
    left_out: int  # see Drilled


def _read_all(
    reader: Reader, talk: Talk, pieces: Sequence[Evidence], leave: int
) -> tuple[Talk, _Notes]:
    """Reads evidence, of each piece what leaves room for so many tokens."""
    told, tokens, left_out = [], [], 0
    for piece in pieces:
        before = reader.tokens_read(talk)
        wanted = f"{piece.text}\n" if piece.text else ""
        text = reader.beginning(talk, wanted, leave)
        if text:
            talk = reader.tell(talk, text)
        read, whole = reader.tokens_read(talk), text == wanted
        if piece.frames is not None:
            talk = reader.look(talk, piece.frames, piece.seconds, leave)
            whole &= reader.tokens_read(talk) > read
        told.append(text)
        tokens.append(reader.tokens_read(talk) - before)
        left_out += not whole
    return talk, _Notes(tuple(told), tuple(tokens), left_out)


def _room_for(reader: Reader, tail: str, new_tokens: int = 0) -> int:
    """Tokens of the context that a question takes, its options in whichever order, and an answer.

    Beside other neighbours each line may be a token longer.
    """
    return bucket_length(len(reader.encode(tail)) + tail.count("\n")) + new_tokens


def _score(reader, talk, question, options, ids, order) -> tuple[np.ndarray, Talk]:
    """Log-probabilities of the options, shown in an `order`; the conversation as it was."""
    place = reader.mark(talk)
    talk = reader.tell(talk, _tail(question, [options[i] for i in order]))
    by_option = np.empty(len(options), np.float32)
    by_option[order] = reader.choose(talk, ids)
    return by_option, reader.rewind(talk, place)


def _ask(reader, talk, tail: str, max_new_tokens: int) -> tuple[Said, Talk]:
    """What the model writes when it is asked for a letter; the conversation as it was."""
    place = reader.mark(talk)
    said, talk = reader.say(reader.tell(talk, tail), max_new_tokens)
    return said, reader.rewind(talk, place)


def _tail(question: str, options: Sequence[str]) -> str:
    """The question after the evidence, up to where the answer begins."""
    lines = "\n".join(_lettered(options))
    return _halves("answer_v1", question=prompts.plain(question), options=lines)[1]


def _lettered(options: Sequence[str]) -> list[str]:
    return [
        f"{letter}. {prompts.plain(o)}" for letter, o in zip(ascii_uppercase, options, strict=False)
    ]


def _halves(name: str, **values: str) -> tuple[str, str]:
    """A prompt as one turn of the user, before and after its evidence."""

    def fill(text):
        return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], text)

    head, tail = prompts.read(name).split("{evidence}")
    start, end = prompts.turn("user", "{evidence}").split("{evidence}")
    return start + fill(head), f"{fill(tail)}{end}{prompts.ANSWER}"


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def _margin(log_probs: np.ndarray) -> float:
    """How much likelier the best option is than the second."""
    second, first = np.sort(np.exp(log_probs))[-2:]
    return float(first - second)


def _entropy(log_probs: np.ndarray) -> float:
    """Nats (eq. 13)."""
    return float(-np.sum(np.exp(log_probs) * np.maximum(log_probs, -1e30)))
