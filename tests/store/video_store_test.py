"""A video on disk: the memory that is read back is the memory that was written."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmem_jax import memory, store
from mmmem_jax.errors import UserError
from mmmem_jax.memory import ADD_NEW, DISCARD, MERGE
from mmmem_jax.store import arrays
from tests.conftest import REPO
from tests.store import filling
from tests.store.filling import HEADER, LARGE, SMALL, fill, last, same

decisions = st.lists(
    st.tuples(st.sampled_from((ADD_NEW, MERGE, DISCARD)), st.floats(0, 1, width=32)),
    min_size=1,
    max_size=80,
)


class TestRoundTrip:
    @given(decisions=decisions, config=st.sampled_from((SMALL, LARGE)), seed=st.integers(0, 2))
    @settings(max_examples=12, deadline=None)
    def test_memory_on_disk_is_the_live_one_bit_by_bit(
        self, decisions, config, seed, tmp_path_factory
    ):
        folder = tmp_path_factory.mktemp("memory")
        with store.create(folder, "toy", HEADER, config) as video:
            state = memory.init(config)
            state = last(fill(video, state, len(decisions), seed=seed, decisions=decisions))
            assert same(store.load_state(video), state)
        with store.open_store(folder, "toy") as video:
            assert same(store.load_state(video), state)
            assert store.progress(video).clips == len(decisions)

    @pytest.mark.parametrize("config", [SMALL, LARGE])
    def test_live_steps_are_those_of_the_memory(self, config):
        step = jax.jit(memory.step)
        live = plain = memory.init(config)
        for index, item in enumerate(filling.items()[:100]):
            action, strength = filling.decide(0, index)
            live = store.advance(live, item, action, strength)
            plain = step(plain, item, action, np.float32(strength))
        for a, b in zip(jax.tree.leaves(live), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    def test_memory_at_any_time_is_what_it_was_then(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, LARGE) as video:
            states = list(fill(video, memory.init(LARGE), 140))
            for index in (0, 1, 30, 63, 64, 100, 138, 139):
                end = float(filling.items()[index].span[1])
                assert same(store.state_at(video, end), states[index]), index
                assert same(store.state_at(video, end + 1e-3), states[index]), index
            assert same(store.state_at(video, -1.0), memory.init(LARGE))
            assert same(store.state_at(video, 1e9), states[-1])

    def test_token_budget_is_replayed_too(self, tmp_path):
        config = dataclasses.replace(SMALL, token_budget=12)
        with store.create(tmp_path, "toy", HEADER, config) as video:
            state = memory.init(config)
            for index, item in enumerate(filling.items()[:90]):
                action, strength = filling.decide(0, index)
                state = store.advance(state, item, action, strength)
                node_id = store.node_of(state, index)
                record = filling.record(item, index, action, strength, node_id)
                store.append(video, record._replace(item=item), state)
                assert index % 9 or same(store.load_state(video), state)

    def test_finished_video_replays_nothing(self, tmp_path, monkeypatch):
        with store.create(tmp_path, "toy", HEADER, SMALL) as video:
            state = last(fill(video, memory.init(SMALL), 70))
            store.finish(video, state)
        monkeypatch.setattr("mmmem_jax.store.replay._run", None)
        with store.open_store(tmp_path, "toy") as video:
            assert same(store.load_state(video), state)
            assert store.progress(video) == (70, float(filling.items()[69].span[1]), True)

    def test_video_without_clips(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, SMALL) as video:
            store.finish(video, memory.init(SMALL))
            assert same(store.load_state(video), memory.init(SMALL))
            assert store.progress(video) == (0, 0.0, True)
            assert store.counts(video) == (0, 0, 0, 0, 0, 0)
            assert store.read_clips(video) == []


class TestClips:
    def test_clips_come_back_as_they_were(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, LARGE) as video:
            states = list(fill(video, memory.init(LARGE), 70))
            held = store.read_clips(video)
            assert [c.index for c in held] == [
                i for i in range(70) if store.node_of(states[i], i) >= 0
            ]
            for clip in held:
                item = filling.items()[clip.index]
                action, strength = filling.decide(0, clip.index)
                node_id = store.node_of(states[clip.index], clip.index)
                given = filling.record(item, clip.index, action, strength, node_id)
                same_fields = clip._replace(frames=(), item=None, entities=())
                assert same_fields == given._replace(frames=(), item=None, entities=())
                for a, b in zip(jax.tree.leaves(clip.item), jax.tree.leaves(item), strict=True):
                    np.testing.assert_array_equal(a, b)
                    assert a.dtype == b.dtype
                ((when, path),) = clip.frames
                assert when == given.frames[0][0]
                assert store.read_frame(video, path) == path.read_bytes() == given.frames[0][1]

    def test_chosen_clips_come_in_the_order_asked(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, LARGE) as video:
            last(fill(video, memory.init(LARGE), 20))
            assert [c.index for c in store.read_clips(video, [7, 3, 7])] == [7, 3, 7]
            with pytest.raises(UserError, match="no clip 20"):
                store.read_clips(video, [1, 20])

    def test_failures_are_counted_of_all_clips_and_stay(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, SMALL) as video:
            assert store.failures(video) == {}
            state = last(fill(video, memory.init(SMALL), 70))
            store.prune(video, state)
            assert store.counts(video).forgotten
            assert store.counts(video).discarded
            third = len(range(1, 70, 3)), len(range(2, 70, 3))
            assert store.failures(video) == {"extraction": sum(third), "trace": third[1]}
            for clip in store.read_clips(video, range(70)):
                assert clip.failed == ("extraction", "trace")[: clip.index % 3]
                assert bool(clip.trace) == (clip.item is not None and clip.index % 3 > 0)

    def test_discarded_clip_leaves_index_span_and_action(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, SMALL) as video:
            item = filling.items()[0]
            state = store.advance(memory.init(SMALL), item, DISCARD, 1.0)
            store.append(video, filling.record(item, 0, DISCARD, 1.0, -1), state)
            (clip,) = store.read_clips(video, [0])
            assert (clip.caption, clip.labels, clip.frames, clip.item) == ("", (), (), None)
            assert clip.span == tuple(map(float, item.span))
            assert not list((video.folder / "frames").iterdir())

    def test_counts_add_up(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, LARGE) as video:
            states = list(fill(video, memory.init(LARGE), 70))
            nodes = [store.node_of(state, i) for i, state in enumerate(states)]
            found = store.counts(video)
            assert found.seen == 70 == found.kept + found.merged + found.discarded
            assert found.kept == len({n for n in nodes if n >= 0})
            assert found.discarded == nodes.count(-1)
            item = filling.items()[70]
            state = store.advance(states[-1], item, DISCARD, 0.0)
            record = filling.record(item, 70, DISCARD, 0.0, -1)
            store.append(video, record, state, frames_dropped=5)
            assert store.counts(video).frames_dropped == 5

    def test_clips_of_an_episode(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, LARGE) as video:
            states = list(fill(video, memory.init(LARGE), 70))
            of_node = {}
            for index, state in enumerate(states):
                of_node.setdefault(store.node_of(state, index), []).append(index)
            of_node.pop(-1)
            found = store.node_clips(video, [*of_node, 10**6])
            assert found == {n: tuple(c) for n, c in of_node.items()} | {10**6: ()}


class TestForgetting:
    def test_evicted_clips_go_with_their_frames(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, SMALL) as video:
            state = last(fill(video, memory.init(SMALL), 256))
            nodes = set(np.asarray(state.episodic.node_id)[np.asarray(state.episodic.valid)])
            buffer = set(np.asarray(state.sensory.trace_id)[np.asarray(state.sensory.valid)])
            held = store.read_clips(video)
            assert held
            assert all(c.node_id in nodes or c.index in buffer for c in held)
            frames = {path.name for path in (video.folder / "frames").iterdir()}
            assert frames == {path.name for clip in held for _, path in clip.frames}
            found = store.counts(video)
            assert found.seen == 256
            assert found.kept + found.merged == found.forgotten + len(held)
            assert same(store.load_state(video), state)

    def test_past_of_a_full_memory_holds_only_what_was_there(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, SMALL) as video:
            last(fill(video, memory.init(SMALL), 256))
            end = float(filling.items()[240].span[1])
            state = store.state_at(video, end)
            held = [c for c in store.read_clips(video) if c.index <= 240]
            nodes = {c.node_id for c in held}
            valid = np.asarray(state.episodic.valid)
            assert valid.any()
            assert set(np.asarray(state.episodic.node_id)[valid].tolist()) <= nodes
            assert int(state.num_items) == 241
            assert float(state.clock) == end
            assert (np.asarray(state.sensory.span)[:, 1] <= end).all()

    def test_only_the_newest_snapshot_is_kept(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, SMALL) as video:
            state = memory.init(SMALL)
            for until, name in ((63, None), (64, 64), (127, 64), (128, 128), (130, 128)):
                state = last(fill(video, state, until))
                found = [p.name for p in video.folder.glob("state-*")]
                assert found == ([f"state-{name:06d}.safetensors"] if name else [])
            store.finish(video, state)
            assert [p.name for p in video.folder.glob("state-*")] == ["state-000130.safetensors"]


class TestEntities:
    def follow(self, video, state, until):
        """Appends clips of one mention each under names that tell who the entity is."""
        names = {}
        for index in range(int(state.num_items), until):
            item = filling.items(0, 1)[index]
            action, strength = filling.decide(0, index)
            state = store.advance(state, item, action, strength)
            count = np.asarray(state.schema.mentions)
            ended = np.asarray(state.schema.valid & (state.schema.span[:, 1] == item.span[1]))
            entities = ()
            if ended.any():
                slot = int(np.flatnonzero(ended)[0])
                if count[slot] == 1:
                    names[slot] = Counter()
                name = f"entity opened by {index}" if count[slot] == 1 else f"alias {index % 3}"
                names[slot][name] += 1
                entities = ((slot, name),)
            node_id = store.node_of(state, index)
            record = filling.record(item, index, action, strength, node_id, entities)
            store.append(video, record, state)
            yield state, {slot: dict(found) for slot, found in names.items()}

    @pytest.mark.parametrize("config", [SMALL, LARGE])
    def test_names_are_those_of_who_holds_the_slot_now(self, config, tmp_path):
        with store.create(tmp_path, "toy", HEADER, config) as video:
            for index, (state, names) in enumerate(self.follow(video, memory.init(config), 200)):
                if index % 13 and index < 190:
                    continue
                found = store.entities(video, state)
                assert {e.slot: dict(e.names) for e in found} == names
                for entity in found:
                    assert entity.mentions == sum(count for _, count in entity.names)
                    assert entity.name == entity.names[0][0]
                    assert entity.span == tuple(np.asarray(state.schema.span)[entity.slot])

    def test_names_of_the_past(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, LARGE) as video:
            followed = list(self.follow(video, memory.init(LARGE), 100))
            for index in (5, 50, 80):
                state, names = followed[index]
                then = store.state_at(video, float(filling.items(0, 1)[index].span[1]))
                assert {e.slot: dict(e.names) for e in store.entities(video, then)} == names

    def test_mentions_do_not_pile_up(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, SMALL) as video:
            sizes = []
            for state, _ in self.follow(video, memory.init(SMALL), 384):
                if int(state.num_items) % 64 == 0:
                    query = "SELECT count(*) FROM mentions"
                    sizes.append(video.database.execute(query).fetchone()[0])
            assert max(sizes[1:]) <= 2 * sizes[0] + 8


class TestWriting:
    def test_bytes_per_clip_do_not_grow(self, tmp_path):
        def written():
            with open("/proc/self/io") as file:
                return int(dict(line.split(": ") for line in file)["wchar"])

        cost = []
        with store.create(tmp_path, "toy", HEADER, SMALL) as video:
            start = written()
            for state in fill(video, memory.init(SMALL), 320):
                if int(state.num_items) % 64 == 0:
                    cost.append(written() - start)
                    start = written()
        assert max(cost[1:]) < 1.3 * min(cost[1:]), cost

    def test_second_writer_is_told(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, SMALL):
            with pytest.raises(UserError, match="being written by another process"):
                store.open_store(tmp_path, "toy", writable=True)
            store.open_store(tmp_path, "toy").close()
        store.open_store(tmp_path, "toy", writable=True).close()

    def test_video_is_made_once(self, tmp_path):
        store.create(tmp_path, "toy", HEADER, SMALL).close()
        with pytest.raises(UserError, match="already there"):
            store.create(tmp_path, "toy", HEADER, SMALL)
        with store.open_store(tmp_path, "toy") as video:
            assert video.header == HEADER
            assert video.config == SMALL

    def test_removed_video_is_gone(self, tmp_path):
        with store.create(tmp_path, "toy", HEADER, SMALL):
            with pytest.raises(UserError, match="being written"):
                store.remove(tmp_path, "toy")
        (tmp_path / "toy/memory.sqlite").write_bytes(b"damaged")
        (tmp_path / ".toy.old/half").mkdir(parents=True)
        store.remove(tmp_path, "toy")
        assert not list(tmp_path.iterdir())
        with pytest.raises(UserError, match="holds no video"):
            store.remove(tmp_path, "toy")
        store.create(tmp_path, "toy", HEADER, SMALL).close()

    def test_half_made_video_is_made_anew(self, tmp_path):
        half = tmp_path / ".toy.new"
        (half / "frames").mkdir(parents=True)
        (half / "memory.sqlite").write_bytes(b"half")
        assert store.list_videos(tmp_path) == ()
        store.create(tmp_path, "toy", HEADER, SMALL).close()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["toy"]

    @pytest.mark.parametrize("wrong", ["index", "state", "rounding", "item", "span"])
    def test_record_that_does_not_follow_is_refused(self, wrong, tmp_path):
        with store.create(tmp_path, "toy", HEADER, SMALL) as video:
            state = last(fill(video, memory.init(SMALL), 3, decisions=[(ADD_NEW, 1.0)] * 3))
            item = filling.items()[3]
            after = store.advance(state, item, ADD_NEW, 1.0)
            record = filling.record(item, 3, ADD_NEW, 1.0, 3)
            if wrong == "index":
                record = record._replace(index=4)
            elif wrong == "state":
                after = state
            elif wrong == "rounding":
                record = record._replace(item=item.replace(visual=item.visual + np.float32(1e-7)))
            elif wrong == "item":
                record = record._replace(item=None)
            else:
                record = record._replace(span=(0.0, 0.1))
            with pytest.raises(ValueError, match="clip|rounded"):
                store.append(video, record, after)
            assert same(store.load_state(video), state)

    def test_numbers_that_float16_cannot_hold_are_refused(self):
        item = filling.items()[0]
        for x in (np.nan, np.inf, 1e6):
            with pytest.raises(ValueError, match="float16"):
                store.rounded(item.replace(text=np.full_like(item.text, x)))


def _writer(folder, clips: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.store.filling", str(folder), str(clips)]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)


class TestTwoProcesses:
    def test_kill_at_any_moment_loses_no_finished_clip(self, tmp_path):
        store.create(tmp_path, "toy", HEADER, SMALL).close()
        rng = np.random.default_rng(0)
        reported = 0
        for _ in range(3):
            with _writer(tmp_path, 400) as writer:
                wanted = reported + int(rng.integers(1, 60))
                for line in writer.stdout:
                    reported = int(line)
                    if reported >= wanted:
                        break
                time.sleep(rng.uniform(0, 0.02))
                os.kill(writer.pid, signal.SIGKILL)
                reported = max([reported, *(int(x) for x in writer.stdout if x.endswith("\n"))])
            with store.open_store(tmp_path, "toy") as video:
                clips = store.progress(video).clips
                assert clips in (reported, reported + 1)
                read = store.load_state(video)
            live = memory.init(SMALL)
            for index in range(clips):
                live = store.advance(live, filling.items()[index], *filling.decide(0, index))
            assert same(read, live)
            reported = clips
        with store.open_store(tmp_path, "toy", writable=True) as video:
            state = last(fill(video, store.load_state(video), 330))
            store.finish(video, state)
            named = {path.name for clip in store.read_clips(video) for _, path in clip.frames}
            assert {path.name for path in (video.folder / "frames").iterdir()} == named
            assert not list(video.folder.rglob("*.tmp"))

    def test_reader_sees_one_moment_while_another_process_writes(self, tmp_path):
        store.create(tmp_path, "toy", HEADER, SMALL).close()
        seen = []
        with _writer(tmp_path, 200) as writer:
            with store.open_store(tmp_path, "toy") as video:
                while writer.poll() is None:
                    state = store.load_state(video)
                    seen.append(int(state.num_items))
                    held = store.read_clips(video)
                    assert all(clip.item is not None for clip in held)
                    store.entities(video, state)
        assert writer.returncode == 0
        assert seen == sorted(seen)
        assert len(set(seen)) > 3
        with store.open_store(tmp_path, "toy") as video:
            live = memory.init(SMALL)
            for index in range(200):
                live = store.advance(live, filling.items()[index], *filling.decide(0, index))
            assert same(store.load_state(video), live)


def test_state_of_another_shape_is_not_read(tmp_path):
    path = tmp_path / "state.safetensors"
    data = arrays.state_to_bytes(memory.init(LARGE))
    path.write_bytes(data)
    with pytest.raises(UserError, match="other shapes"):
        arrays.read_state(path, arrays.digest(data), SMALL)
    assert same(arrays.read_state(path, arrays.digest(data), LARGE), memory.init(LARGE))
