"""Accuracy, memory and time by the length of the stream, with the slots the manager trained with.

Question: a manager trained on streams of 256 chunks passes streams up to 256 times as long in the
same slots. Up to which length is its accuracy above the best fixed rule's? Claim: neither the bytes
of the state nor the milliseconds a chunk takes grow (spread within 5%).

    python benchmarks/length.py [--full] [--workdir=RUN]

Streams are held out. They pass in segments of 256 chunks that hand the state on, which changes
nothing: a decision draws by its position in the stream. Rules that need to know the stream's length
are told. --full trains the default config if RUN holds no run, then takes about ten minutes.
Keys: lengths, learned, best_rule, state_bytes, ms_per_chunk (lists), their standard errors and
spreads (largest over smallest less 1); unlimited is null where a slot for every chunk is too much.
"""

import functools
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from flax import nnx

from benchmarks import common
from mmmem_jax import memory
from mmmem_jax.data import encoded
from mmmem_jax.evals import protocol, world_eval
from mmmem_jax.policies import rules
from mmmem_jax.train import world_job

SEGMENT = 256
FULL = {256: 32, 1024: 16, 4096: 8, 16384: 8, 65536: 4}  # streams of each length
QUICK = {256: 4, 512: 4}
UNLIMITED = 1024  # longest stream of which every chunk is kept
TIMED_STREAMS = 4  # pass at once while timed, the same at every length


@functools.partial(jax.jit, static_argnames="decide_fn", donate_argnames="states")
def pass_segment(params, keys, states, items, *, decide_fn):
    """The memories [S] after a segment of their streams [S, T]."""

    def one(key, state, stream):
        return memory.scan(params, key, state, stream, decide_fn=decide_fn)[0]

    return jax.vmap(one)(keys, states, items)


def segment_items(streams, start: int):
    """Chunks [S, SEGMENT] from `start` on; a trace id is the place in the whole stream."""
    part = streams._replace(
        **{f: getattr(streams, f)[:, start : start + SEGMENT] for f in _CHUNK_FIELDS}
    )
    items = encoded.to_items(part)
    return items.replace(trace_id=items.trace_id + start)


_CHUNK_FIELDS = tuple(
    f for f in encoded.EncodedStream._fields if f not in (*encoded.QUESTION_FIELDS, "relevant")
)


def empty_states(policy: protocol.Policy, num_streams: int):
    """Keys and empty memories [S]."""
    keys = jax.random.split(jax.random.key(0), num_streams)
    states = jax.vmap(lambda _: memory.init(policy.config))(keys)
    return keys, states


def pass_streams(policy: protocol.Policy, streams, stop: int):
    """Keys, and the memories [S] after the first `stop` chunks."""
    keys, states = empty_states(policy, len(streams.valid))
    for start in range(0, stop, SEGMENT):
        items = segment_items(streams, start)
        states = pass_segment(policy.params, keys, states, items, decide_fn=policy.decide_fn)
    return keys, states


def accuracy(run, policy: protocol.Policy, streams) -> dict[str, float]:
    """Accuracy from the whole memory at the end of the streams, and its standard error."""
    _, states = pass_streams(policy, streams, streams.valid.shape[1])
    log_probs, *_ = protocol.answer(
        *nnx.split(run.reader),
        states,
        encoded.to_questions(streams),
        retrieval=world_job.retrieval_config(run.config),
    )
    right = np.asarray(log_probs).argmax(-1) == streams.answer
    return protocol.accuracy_and_error(right, streams.question_valid)


def before_last_segment(policy: protocol.Policy, streams):
    """What timing one segment at the end of long streams takes: keys, states and items."""
    few = jax.tree.map(lambda x: x[:TIMED_STREAMS], streams)
    stop = few.valid.shape[1] - SEGMENT
    keys, states = pass_streams(policy, few, stop)
    return keys, jax.device_get(states), segment_items(few, stop)


def time_segments(policy: protocol.Policy, at_length: dict, num_rounds: int) -> dict:
    """Median milliseconds per chunk at each length, from rounds that visit all lengths in turn."""
    seconds = {n: [] for n in at_length}
    for _ in range(num_rounds + 1):
        for n, (keys, states, items) in at_length.items():
            states = jax.block_until_ready(jax.device_put(states))
            started = time.perf_counter()
            done = pass_segment(policy.params, keys, states, items, decide_fn=policy.decide_fn)
            jax.block_until_ready(done)
            seconds[n].append(time.perf_counter() - started)
    chunks = SEGMENT * TIMED_STREAMS
    return {n: 1000 * statistics.median(x[1:]) / chunks for n, x in seconds.items()}


def spread(values: list[float]) -> float:
    """Largest over smallest, less 1."""
    return max(values) / min(values) - 1


def measure_length(run, tuned: list[rules.Rule], learned: protocol.Policy, streams) -> dict:
    """Accuracy of every policy on streams of one length."""
    num_chunks, config = streams.valid.shape[1], learned.config
    told = [f(num_chunks, config.episodic_slots) for f in (rules.uniform, rules.uniform_merge)]
    told = {rule.name: rule for rule in told}
    here = [told.get(rule.name, rule) for rule in tuned]
    policies = [learned, *(protocol.rule_policy(rule, config) for rule in here)]
    if num_chunks <= UNLIMITED:
        policies.append(protocol.unlimited_policy(config, num_chunks))
    return {policy.name: accuracy(run, policy, streams) for policy in policies}


def measure(full: bool, workdir: Path) -> dict:
    """All lengths, shortest first, then the timing of all of them together."""
    sizes = FULL if full else QUICK
    config = common.trained_config(full, workdir)
    run = world_eval.load_run(workdir, num_streams=1)
    learned, step = world_eval.load_learned(run, workdir, None)
    tuned = world_eval.tuned_rules(run, workdir)
    scores, state_bytes, at_length = {}, [], {}
    for num_chunks, num_streams in sizes.items():
        made = world_job.make_streams(config, "test", num_streams, num_chunks=num_chunks)
        streams = world_job.encode_streams(run.eye, made, config.dim)
        scores[num_chunks] = measure_length(run, tuned, learned, streams)
        world_eval.LOG.info("%d chunks: %s", num_chunks, scores[num_chunks])
        at_length[num_chunks] = before_last_segment(learned, streams)
        held = pass_segment(learned.params, *at_length[num_chunks], decide_fn=learned.decide_fn)
        state_bytes.append(sum(x.nbytes for x in jax.tree.leaves(held)) // TIMED_STREAMS)
    timed = list(time_segments(learned, at_length, 400 if full else 5).values())
    fixed = [name for name in scores[SEGMENT] if name not in ("learned", "unlimited")]
    best = [max(fixed, key=lambda r, s=s: s[r]["accuracy"]) for s in scores.values()]

    def column(names, key):
        return [s.get(n, {}).get(key) for n, s in zip(names, scores.values(), strict=True)]

    return {
        "lengths": list(sizes),
        "learned": column(["learned"] * len(sizes), "accuracy"),
        "learned_se": column(["learned"] * len(sizes), "se"),
        "best_rule": column(best, "accuracy"),
        "best_rule_se": column(best, "se"),
        "best_rule_name": best,
        "unlimited": column(["unlimited"] * len(sizes), "accuracy"),
        "unlimited_se": column(["unlimited"] * len(sizes), "se"),
        "state_bytes": state_bytes,
        "state_bytes_spread": spread(state_bytes),
        "ms_per_chunk": timed,
        "ms_per_chunk_spread": spread(timed),
        "num_streams": list(sizes.values()),
        "num_questions": column(["learned"] * len(sizes), "n"),
        "step": step,
        "seeds": [config.seed],
    }


if __name__ == "__main__":
    common.run("length", __doc__, measure, default_seeds=[0])
