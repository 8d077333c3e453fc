"""The manager of the paper: Qwen3-VL looks at the latest episode and a clip, and decides (eq. 2).

A prompt is [what to do] [the clips of the latest episode] [the new clip] [the question], every clip
its frames and its caption. So what was read serves again: after MERGE the new clip stays where it
is, as the episode's last; after DISCARD it is forgotten; after ADD_NEW it is read once more, right
after what to do. The decision is the first token of the answer, among those of three words; what
follows it, a sentence about the episode, is the trace.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from mmmem_jax import prompts, store
from mmmem_jax.errors import UserError
from mmmem_jax.memory import ADD_NEW, DISCARD, MERGE, MemoryState
from mmmem_jax.models.qwen3_vl import conversation, inputs
from mmmem_jax.models.qwen3_vl.buckets import bucket_length
from mmmem_jax.models.qwen3_vl.chat import TURN_END, TURN_START, Chat
from mmmem_jax.models.qwen3_vl.conversation import Said, Seen, Speaker, Talk
from mmmem_jax.perception.decode import Frame
from mmmem_jax.perception.qwen3_vl import frames_in, look
from mmmem_jax.perception.types import Percept, Work, total
from mmmem_jax.policies.types import Decision

NAME = "qwen3_vl"
PROMPT = "decide_v1"
WORDS = ("add", "merge", "discard")  # of ADD_NEW, MERGE, DISCARD
QUESTION = f"What becomes of the new clip?{TURN_END}\n{prompts.ANSWER}"
MAX_EPISODE_FRAMES = 64  # that one decision looks at
NO_TRACE = "trace"  # how it is recorded that there is no whole one
DECISION_TOKENS = 64  # written at most: the word and the trace


class Episode(NamedTuple):
    """A conversation that has read the latest episode, and the places in it to go back to."""

    talk: Talk
    start: Talk  # what to do was read
    end: Talk  # and the clips of the episode; `start` where none can be gone on with
    frames: int  # that those clips show
    untold: Work  # done, and not told of by a decision yet


def make_begin_fn(
    speaker: Speaker, context: int
) -> Callable[[store.VideoStore, MemoryState], Callable[[MemoryState, Percept], Decision]]:
    """begin(video, state) -> decide, for the clips of one video in order.

    Args:
      speaker: the model.
      context: tokens that a decision may look at.

    Raises:
      UserError: if two of WORDS begin with the same token, or the model has no such context; and
        when called, if a clip alone does not fit it.
    """
    ids = action_ids(speaker.chat)

    def begin(video: store.VideoStore, state: MemoryState):
        episode = _restored(speaker, _open(speaker, context), video, state)

        def decide(state: MemoryState, percept: Percept) -> Decision:
            nonlocal episode
            decision, episode = step(speaker, ids, episode, percept)
            return decision

        return decide

    return begin


def action_ids(chat: Chat, words: Sequence[str] = WORDS) -> tuple[int, ...]:
    """The token that each word begins with at the start of an answer.

    Raises:
      UserError: naming two words that begin with the same one.
    """
    found: dict[int, str] = {}
    for word in words:
        first = chat.tokenizer.encode(word, add_special_tokens=False).ids[0]
        if first in found:
            raise UserError(
                f"for this tokenizer {found[first]!r} and {word!r} begin with the same token"
                f" ({first}), so no decision can be read; take another checkpoint"
            )
        found[first] = word
    return tuple(found)


def step(
    speaker: Speaker, ids: tuple[int, ...], episode: Episode, percept: Percept
) -> tuple[Decision, Episode]:
    """Decides about a clip, and takes it into the conversation or not.

    Where episode and clip would have more than MAX_EPISODE_FRAMES or fill the context, the episode
    is closed: the clip is looked at alone, and MERGE is not offered.
    """
    before = episode.talk.tokens_read
    episode = _ready(speaker, episode, percept)
    alone = episode.end is episode.start
    talk, place = read_clip(speaker, episode.talk, percept.seen, percept.caption)
    talk = conversation.tell(speaker, talk, QUESTION)
    offered = (ADD_NEW, DISCARD) if alone else (ADD_NEW, MERGE, DISCARD)
    (answered,), talk = conversation.insist(
        speaker,
        talk,
        partial(_trace, ids),
        max_new_tokens=DECISION_TOKENS,
        seeds=(percept.index,),
        first_ids=tuple(ids[action] for action in offered),
    )
    first, trace = answered.attempts[0], answered.found
    action = ids.index(first.ids[0])
    shown = episode.frames + frames_in(speaker, percept.seen)
    episode = _after(speaker, episode, talk, place, percept, action)
    read, attempts = episode.talk.tokens_read - before, len(answered.in_view)
    done = Work(read, 0, sum(answered.in_view), attempts * shown)
    decision = Decision(
        action=action,
        strength=percept.span[1],  # the oldest go first
        log_prob=first.log_probs[0],
        trace=trace_of(first.text, WORDS[action]) if trace is None else trace,
        failed=(NO_TRACE,) if trace is None else (),
        work=total(episode.untold, done),
    )
    return decision, episode._replace(untold=Work())


def read_clip(speaker: Speaker, talk: Talk, seen: Seen, caption: str) -> tuple[Talk, Talk]:
    """The conversation after a clip, and the place there."""
    talk = conversation.show(speaker, talk, seen)
    talk = conversation.tell(speaker, talk, _note(caption))
    return talk, conversation.mark(talk)


def trace_of(text: str, word: str) -> str:
    """The sentence of an answer such as "add: A cat sleeps.", in one line; "" if it has none."""
    if not text.startswith(f"{word}:"):
        return ""
    return prompts.plain(text.removeprefix(f"{word}:"))


def _trace(ids: tuple[int, ...], said: Said) -> str:
    """The trace of an answer, "" for DISCARD; raises ValueError if it has none, or is cut off."""
    action = ids.index(said.ids[0])
    trace = "" if action == DISCARD else trace_of(said.text, WORDS[action])
    if action != DISCARD and not (trace and said.ended):
        raise ValueError("no whole sentence after the decision")
    return trace


def layout(episode: str, frame: str, caption: str) -> str:
    """A decision's prompt about an episode that is known by its text alone; what training shows."""
    return f"{_opening()}\n{episode}\n{frame}\n{caption}\n{QUESTION}"


def _opening() -> str:
    return prompts.turn("system", prompts.read(PROMPT)) + f"{TURN_START}user\n"


def _note(caption: str) -> str:
    return f"\n{prompts.plain(caption)}\n"


def _open(speaker: Speaker, context: int) -> Episode:
    """No episode yet."""
    talk = conversation.begin(speaker, context)
    talk = conversation.tell(speaker, talk, _opening())
    start = conversation.mark(talk)
    return Episode(talk, start, start, 0, Work(tokens=talk.tokens_read))


def _ready(speaker: Speaker, episode: Episode, percept: Percept) -> Episode:
    """The episode, or what is before it where the clip has no room after it."""
    frames = episode.frames + frames_in(speaker, percept.seen)
    if frames <= MAX_EPISODE_FRAMES and _fits(speaker, episode.end, percept.seen, percept.caption):
        return episode
    return _closed(episode)


def _fits(speaker: Speaker, place: Talk, seen: Seen, caption: str) -> bool:
    """Whether a clip, the question and the answer have room after a place."""
    chat = speaker.chat
    pieces = (
        inputs.encode_visual(chat, seen.shown, first_frame=0),
        inputs.encode_text(chat, _note(caption)),
        inputs.encode_text(chat, QUESTION),
    )
    needed = sum(bucket_length(len(piece.ids)) for piece in pieces) + DECISION_TOKENS
    return place.length + needed <= place.cache.valid.shape[1]


def _after(
    speaker: Speaker, episode: Episode, talk: Talk, place: Talk, percept: Percept, action: int
) -> Episode:
    """The conversation as the next clip finds it."""
    if action == DISCARD:
        return episode._replace(talk=conversation.rewind(talk, episode.end))
    alone, frames = episode.end is episode.start, frames_in(speaker, percept.seen)
    if action == MERGE or alone:
        talk = conversation.rewind(talk, place)
        return episode._replace(talk=talk, end=place, frames=episode.frames + frames)
    talk = conversation.rewind(talk, episode.start)
    talk, end = read_clip(speaker, talk, percept.seen, percept.caption)
    return episode._replace(talk=talk, end=end, frames=frames)


def _restored(
    speaker: Speaker, episode: Episode, video: store.VideoStore, state: MemoryState
) -> Episode:
    """The latest episode of a memory, read from what the disk has of it.

    That is captions and key frames, not all the frames that were shown: the decisions after a stop
    may differ from those of a build that went through.
    """
    latest = int(state.episodic.latest)
    if latest < 0:
        return episode
    node_id = int(state.episodic.node_id[latest])
    clips = store.read_clips(video, store.node_clips(video, [node_id])[node_id])
    for record in clips:
        frames = [Frame(time, store.read_image(video, path)) for time, path in record.frames]
        seen = look(speaker, frames)
        shown = episode.frames + frames_in(speaker, seen)
        if shown > MAX_EPISODE_FRAMES or not _fits(speaker, episode.talk, seen, record.caption):
            return _closed(episode)
        talk, end = read_clip(speaker, episode.talk, seen, record.caption)
        looked_at = episode.untold.frames + frames_in(speaker, seen)
        untold = Work(tokens=talk.tokens_read, frames=looked_at)
        episode = Episode(talk, episode.start, end, shown, untold)
    return episode


def _closed(episode: Episode) -> Episode:
    """A closed episode: the next clip is looked at alone."""
    talk = conversation.rewind(episode.talk, episode.start)
    return episode._replace(talk=talk, end=episode.start, frames=0)
