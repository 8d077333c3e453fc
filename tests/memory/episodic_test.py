"""The episodic stream against a plain reference, and its rules one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax import memory
from mmmem_jax.memory import ADD_NEW, DISCARD, MERGE, ManagerOutput, MemoryConfig
from mmmem_jax.policies import rules
from mmmem_jax.testing import toys

BASE = MemoryConfig(
    sensory_slots=3, episodic_slots=4, schema_slots=0, num_relations=0, num_prototypes=2, dim=8
)
CONFIGS = {
    "default": BASE,
    "budget": dataclasses.replace(BASE, token_budget=14, merge_keep=0.5),
    "short_nodes": dataclasses.replace(BASE, max_node_tokens=9, merge_keep=1.0),
    "nearest": dataclasses.replace(
        BASE, merge_target="nearest", num_prototypes=3, prototype_similarity=0.3
    ),
}


def dictated(params, key, state, item):
    """Takes action and strength of each chunk from `params`."""
    action, strength = (x[state.num_items] for x in params)
    return ManagerOutput(jnp.zeros(3), action, jnp.asarray(0.0), strength, jnp.zeros(0))


@jax.jit
def scan(state, items, actions, strengths):
    params = (jnp.asarray(actions, jnp.int32), jnp.asarray(strengths, jnp.float32))
    return memory.scan(params, jax.random.key(0), state, items, decide_fn=dictated)


def cosine(a, b):
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6))


class Reference:
    """The same rules over a list of nodes, without masks."""

    def __init__(self, config):
        self.config, self.nodes, self.latest, self.next_id = config, [], None, 0

    def similarity(self, node, item):
        total = cosine(node["text"], item.text)
        centres = sum(c * n for c, n in node["centres"])
        seen = sum(n for _, n in node["centres"])
        total += cosine(centres / max(seen, 1), item.coarse) if seen else 0.0
        return total / max(np.any(item.text) + np.any(item.coarse), 1)

    def target(self, item):
        if self.config.merge_target == "latest" or not self.nodes:
            return self.latest if self.config.merge_target == "latest" else None
        return max(self.nodes, key=lambda node: self.similarity(node, item))

    def step(self, item, action, strength):
        config = self.config
        if not item.valid or action == DISCARD:
            return
        kept = int(np.ceil(config.merge_keep * item.tokens))
        node = self.target(item) if action == MERGE else None
        limits = [x for x in (config.max_node_tokens, config.token_budget) if x is not None]
        if node is not None and limits and node["tokens"] + kept > min(limits):
            node = None
        if node is not None:
            self.merge(node, item, kept, strength)
        elif config.token_budget is None or item.tokens <= config.token_budget:
            self.open(item, strength)
        budget = config.token_budget
        while budget is not None and sum(n["tokens"] for n in self.nodes) > budget:
            self.drop(min(self.nodes, key=lambda n: (n["strength"], n["span"][0])))

    def merge(self, node, item, kept, strength):
        read = node["read"] + item.tokens
        node["text"] = node["text"] + (item.text - node["text"]) * item.tokens / max(read, 1)
        if np.any(item.coarse):
            centres = node["centres"]
            near = max(
                range(len(centres)), default=None, key=lambda i: cosine(centres[i][0], item.coarse)
            )
            room = len(centres) < self.config.num_prototypes
            if near is None or (
                room and cosine(centres[near][0], item.coarse) < self.config.prototype_similarity
            ):
                centres.append((item.coarse, 1))
            else:
                centre, n = centres[near]
                centres[near] = (centre + (item.coarse - centre) / (n + 1), n + 1)
        node["span"] = (min(node["span"][0], item.span[0]), max(node["span"][1], item.span[1]))
        node["tokens"] += kept
        node.update(read=read, count=node["count"] + 1, strength=max(node["strength"], strength))

    def open(self, item, strength):
        node = {
            "id": self.next_id,
            "text": item.text,
            "centres": [(item.coarse, 1)] if np.any(item.coarse) else [],
            "span": tuple(item.span),
            "count": 1,
            "tokens": int(item.tokens),
            "read": int(item.tokens),
            "strength": strength,
        }
        if len(self.nodes) < self.config.episodic_slots:
            self.nodes.append(node)
        else:
            weakest = min(self.nodes, key=lambda n: (n["strength"], n["span"][0]))
            if strength < weakest["strength"]:
                return
            self.nodes = [node if n is weakest else n for n in self.nodes]
        self.latest, self.next_id = node, self.next_id + 1

    def drop(self, node):
        self.nodes = [n for n in self.nodes if n is not node]
        self.latest = None if self.latest is node else self.latest


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_reference_without_masks(name):
    config, length = CONFIGS[name], 48
    for seed in range(4):
        rng = np.random.default_rng(seed)
        items = toys.random_items(seed, length)
        # Strengths repeat, so ties are common.
        actions = rng.choice(3, size=length, p=[0.4, 0.5, 0.1])
        strengths = rng.integers(4, size=length).astype(np.float32)
        state, _ = scan(memory.init(config), items, actions, strengths)
        reference = Reference(config)
        for t in range(length):
            item = jax.tree.map(lambda x, t=t: np.asarray(x)[t], items)
            reference.step(item, actions[t], strengths[t])
        stream = state.episodic
        found = {int(i): s for s, i in enumerate(stream.node_id) if stream.valid[s]}
        assert set(found) == {node["id"] for node in reference.nodes}
        for node in reference.nodes:
            slot = found[node["id"]]
            assert int(stream.count[slot]) == node["count"]
            assert int(stream.tokens[slot]) == node["tokens"]
            assert int(stream.source_tokens[slot]) == node["read"]
            assert float(stream.strength[slot]) == node["strength"]
            np.testing.assert_allclose(stream.span[slot], node["span"], rtol=1e-6)
            np.testing.assert_allclose(stream.text[slot], node["text"], atol=1e-5)
            counts = stream.prototype_count[slot]
            assert sorted(counts[counts > 0].tolist()) == sorted(n for _, n in node["centres"])
            for k, (centre, n) in enumerate(node["centres"]):
                assert int(counts[k]) == n
                np.testing.assert_allclose(stream.prototypes[slot, k], centre, atol=1e-5)


def items_with(count, **fields):
    """`count` chunks a second long, one token each, with the given fields."""
    items = toys.random_items(0, count)
    start = jnp.arange(float(count))
    fields = {"tokens": jnp.ones(count, jnp.int32), "valid": jnp.ones(count, bool)} | fields
    return items.replace(span=jnp.stack([start, start + 1], axis=1), **fields)


def held(state, field="source"):
    """First chunk of every node held, in order."""
    return sorted(np.asarray(state.episodic.source)[np.asarray(state.episodic.valid), 0].tolist())


class TestEviction:
    def test_the_weakest_goes(self):
        state, _ = scan(memory.init(BASE), items_with(6), [ADD_NEW] * 6, [5, 1, 4, 2, 3, 6])
        assert held(state) == [0, 2, 4, 5]

    def test_of_equals_the_oldest_goes(self):
        state, _ = scan(memory.init(BASE), items_with(6), [ADD_NEW] * 6, [1] * 6)
        assert held(state) == [2, 3, 4, 5]

    def test_an_item_weaker_than_all_is_not_kept(self):
        state, output = scan(memory.init(BASE), items_with(6), [ADD_NEW] * 6, [2, 2, 2, 2, 1, 3])
        assert held(state) == [1, 2, 3, 5]
        assert output.node_id.tolist() == [0, 1, 2, 3, -1, 4]
        assert output.tokens_added.tolist() == [1, 1, 1, 1, 0, 1]
        assert not np.any(state.sensory.trace_id == 4)

    def test_a_merge_renews_the_node(self):
        actions = [ADD_NEW, MERGE, ADD_NEW, ADD_NEW, ADD_NEW, ADD_NEW]
        state, _ = scan(memory.init(BASE), items_with(6), actions, [1, 9, 2, 3, 4, 5])
        assert held(state) == [0, 3, 4, 5]

    def test_e_star_is_not_restored_when_it_is_evicted(self):
        # Slot 0 goes; a MERGE right after extends the node that took its place.
        actions = [ADD_NEW] * 5 + [MERGE]
        state, output = scan(memory.init(BASE), items_with(6), actions, [1] * 6)
        assert output.node_id.tolist() == [0, 1, 2, 3, 4, 4]


class TestBudget:
    CONFIG = dataclasses.replace(BASE, token_budget=10, merge_keep=1.0)

    def scan(self, tokens, actions, strengths):
        items = items_with(6, tokens=jnp.asarray(tokens))
        return scan(memory.init(self.CONFIG), items, actions, strengths)

    def test_the_weakest_make_room(self):
        state, output = self.scan(
            [4, 4, 2, 3, 0, 0], [ADD_NEW] * 4 + [DISCARD] * 2, [3, 1, 2, 4, 0, 0]
        )
        assert held(state) == [0, 2, 3]
        assert output.tokens.tolist() == [4, 8, 10, 9, 9, 9]

    def test_an_item_larger_than_the_budget_is_not_kept(self):
        state, output = self.scan(
            [4, 4, 11, 1, 0, 0], [ADD_NEW] * 4 + [DISCARD] * 2, [1, 1, 9, 1, 0, 0]
        )
        assert held(state) == [0, 1, 3]
        assert output.node_id.tolist()[:4] == [0, 1, -1, 2]

    def test_merging_never_costs_the_whole_memory(self):
        state, output = self.scan([4, 4, 4, 4, 4, 4], [MERGE] * 6, [1, 2, 3, 4, 5, 6])
        assert output.tokens.tolist() == [4, 8, 4, 8, 4, 8]
        assert held(state) == [4]

    def test_an_item_too_weak_for_the_budget_goes_itself(self):
        state, output = self.scan(
            [5, 5, 1, 0, 0, 0], [ADD_NEW] * 3 + [DISCARD] * 3, [2, 3, 1, 0, 0, 0]
        )
        assert held(state) == [0, 1]
        assert output.node_id[2] == -1
        assert output.tokens_added[2] == 0
        assert not np.any((state.sensory.trace_id == 2) & state.sensory.valid)


class TestMerge:
    def test_nearest_extends_the_most_similar_node(self):
        corner = jnp.eye(8)
        text = jnp.stack([corner[0], corner[1], corner[2], 0.9 * corner[1] + 0.1 * corner[2]])
        items = items_with(4, text=text, coarse=jnp.zeros((4, 8)))
        actions = [ADD_NEW, ADD_NEW, ADD_NEW, MERGE]
        for target, expected in (("nearest", 1), ("latest", 2)):
            config = dataclasses.replace(BASE, merge_target=target)
            _, output = scan(memory.init(config), items, actions, [1, 1, 1, 1])
            assert int(output.node_id[3]) == expected

    def test_a_node_keeps_the_set_share_of_merged_tokens(self):
        items = items_with(3, tokens=jnp.array([6, 5, 8]))
        state, output = scan(memory.init(BASE), items, [ADD_NEW, MERGE, MERGE], [1, 1, 1])
        assert output.tokens_added.tolist() == [6, 2, 2]  # a quarter, rounded up
        assert int(state.episodic.tokens[0]) == 10
        assert int(state.episodic.source_tokens[0]) == 19

    def test_text_is_the_token_weighted_mean(self):
        items = items_with(3, tokens=jnp.array([6, 5, 8]))
        state, _ = scan(memory.init(BASE), items, [ADD_NEW, MERGE, MERGE], [1, 1, 1])
        mean = np.average(items.text, axis=0, weights=[6, 5, 8])
        np.testing.assert_allclose(state.episodic.text[0], mean, atol=1e-6)

    def test_one_prototype_is_the_mean_of_what_was_seen(self):
        config = dataclasses.replace(BASE, num_prototypes=1)
        items = items_with(8)
        state, _ = scan(memory.init(config), items, [ADD_NEW] + [MERGE] * 7, [1] * 8)
        seen = np.asarray(items.coarse)[np.any(items.coarse, axis=1)]
        assert len(seen) < 8
        np.testing.assert_allclose(state.episodic.prototypes[0, 0], seen.mean(0), atol=1e-6)
        assert int(state.episodic.prototype_count[0, 0]) == len(seen)


def test_a_reservoir_samples_time_uniformly():
    num_streams, length = 400, 32
    items = items_with(length)
    params, init = rules.reservoir().params, memory.init(BASE)
    scan = functools.partial(memory.scan, decide_fn=rules.decide)
    run = jax.jit(jax.vmap(scan, in_axes=(None, 0, None, None)))
    state, _ = run(params, jax.random.split(jax.random.key(0), num_streams), init, items)
    assert np.all(state.episodic.valid)
    kept = np.bincount(np.asarray(state.episodic.source[..., 0]).ravel(), minlength=length)
    expected = num_streams * BASE.episodic_slots / length
    chi_square = np.sum((kept - expected) ** 2 / expected)
    assert chi_square < 61.1  # 99.9% quantile with 31 degrees of freedom
