"""Tests of mmmem_jax/models/qwen3_vl/conversation.py, on a random model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl import conversation, lora, params
from mmmem_jax.models.qwen3_vl.conversation import (
    begin,
    choose,
    insist,
    load_speaker,
    mark,
    rewind,
    say,
    say_each,
    see,
    show,
    tell,
    widen,
)
from mmmem_jax.testing.qwen3_vl import TINY, write_checkpoint
from mmmem_jax.train.sharding import make_mesh

SLOTS = 192
OPENING = "<|im_start|>user\nLook at this video.\n"
ASKED = "What is it?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def speaker(folder):
    return load_speaker(folder)


@pytest.fixture(scope="module")
def seen(speaker):
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3)).astype(np.uint8)
    return see(speaker, frames, [0.0, 0.5, 1.0, 1.5])


def words(speaker):
    return tuple(speaker.chat.tokenizer.token_to_id(f"Ġ{word}") for word in ("yes", "no", "red"))


def test_what_was_read_before_counts(speaker, seen):
    ids = words(speaker)
    talk = tell(speaker, begin(speaker, SLOTS), OPENING)
    blind = choose(speaker, tell(speaker, talk, ASKED), ids)
    talk = tell(speaker, begin(speaker, SLOTS), OPENING)
    found = choose(speaker, tell(speaker, show(speaker, talk, seen), ASKED), ids)
    assert np.exp(found).sum() == pytest.approx(1.0, abs=1e-5)
    assert np.abs(found - blind).max() > 1e-3


def test_an_adapter_changes_what_is_chosen(speaker, folder, tmp_path):
    model = params.load_model(folder, dtype=jnp.float32)
    split = lora.split_lora(lora.add_lora(model, rank=2, alpha=4.0, rngs=nnx.Rngs(0)))
    trained = jax.tree.map(lambda x: x + 0.1, split.lora)
    lora.save_adapter(tmp_path, trained, rank=2, alpha=4.0, base=str(folder))
    adapted = load_speaker(folder, adapter=tmp_path)
    plain, found = (
        choose(s, tell(s, begin(s, SLOTS), ASKED), words(s)) for s in (speaker, adapted)
    )
    assert np.abs(found - plain).max() > 1e-3


def test_rewound_it_answers_as_if_it_had_not_heard(speaker, seen):
    ids = words(speaker)
    talk = show(speaker, tell(speaker, begin(speaker, SLOTS), OPENING), seen)
    place = mark(talk)
    straight = tell(speaker, talk, ASKED)
    wanted, read = choose(speaker, straight, ids), straight.tokens_read
    talk = rewind(tell(speaker, rewind(straight, place), " no no no"), place)
    assert (talk.length, talk.positions) == (place.length, place.positions)
    talk = tell(speaker, talk, ASKED)
    np.testing.assert_allclose(choose(speaker, talk, ids), wanted, atol=1e-5)
    assert talk.tokens_read > read  # what was forgotten had to be read


def test_counts_tokens_not_padding(speaker, seen):
    talk = begin(speaker, SLOTS)
    for piece in (OPENING, ASKED):
        before = talk.tokens_read
        talk = tell(speaker, talk, piece)
        count = len(speaker.chat.tokenizer.encode(piece, add_special_tokens=False).ids)
        assert talk.tokens_read - before == count
    assert talk.positions == talk.read  # of text alone
    assert int(talk.cache.valid.sum()) == talk.tokens_read
    after = show(speaker, talk, seen)
    assert after.positions[0] - talk.positions[0] < after.tokens_read - talk.tokens_read


def test_says_what_it_may_and_how_likely_it_was(speaker):
    ids = words(speaker)
    talk = tell(speaker, begin(speaker, SLOTS), OPENING + ASKED)
    wanted = choose(speaker, talk, ids)
    said, after = say(speaker, talk, max_new_tokens=4, first_ids=ids)
    assert said.ids[0] == ids[int(wanted.argmax())]
    assert said.log_probs[0] == pytest.approx(float(wanted.max()), abs=1e-5)
    assert len(said.ids) == len(said.log_probs) <= 4
    assert said.ended == (said.ids[-1] in speaker.chat.stop_ids)
    assert after.read == after.positions  # all but the last, which nobody has read
    again = tell(speaker, begin(speaker, SLOTS), OPENING + ASKED)
    key = jax.random.key(1)
    drawn, _ = say(speaker, again, max_new_tokens=4, temperature=5.0, rng_key=key)
    assert drawn.ids != said.ids


def test_side_by_side_each_goes_its_own_way(speaker, seen):
    """Of other frames, texts and ends; nothing is said where nothing is asked."""
    frames = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    shown, texts = (seen, see(speaker, frames, [0.0, 0.5])), (ASKED, f"Yes or no? {ASKED}")
    keys = [jax.random.key(2), jax.random.key(3)]
    how = {"max_new_tokens": 6, "temperature": 1.0}
    talk = widen(tell(speaker, begin(speaker, SLOTS), OPENING), 3)
    assert talk.tokens_read == talk.read[0] > talk.read[1] == 0
    talk = tell(speaker, show(speaker, talk, *shown, shown[1]), *texts, texts[1])
    place = mark(talk)
    said, talk = say_each(
        speaker, talk, rng_keys=[*keys, keys[0]], active=[True, True, False], **how
    )
    assert said[2] == ("", (), (), False)
    again, talk = say_each(
        speaker, rewind(talk, place), rng_keys=[*keys, keys[0]], active=[False, True, False], **how
    )
    assert (again[0].ids, again[1].ids) == ((), said[1].ids)
    for row in range(2):
        alone = show(speaker, tell(speaker, begin(speaker, SLOTS), OPENING), shown[row])
        alone = tell(speaker, alone, texts[row])
        assert alone.positions[0] == place.positions[row]
        wanted, alone = say(speaker, alone, rng_key=keys[row], **how)
        assert said[row].ids == wanted.ids
        np.testing.assert_allclose(said[row].log_probs, wanted.log_probs, atol=1e-4)
    assert said[0].ids != said[1].ids


def test_it_is_asked_again_where_nothing_can_be_read(speaker):
    """Each by seeds of its own, so that it says what it would alone."""

    def read(said):
        if sum(said.ids) % 4:
            raise ValueError("not to be divided")
        return sum(said.ids)

    how = {"max_new_tokens": 5}
    opened = [f"{OPENING}{text}{ASKED}" for text in ("", " red", " no")]
    talk = tell(speaker, widen(begin(speaker, SLOTS), 4), *opened, opened[0])
    answers, after = insist(speaker, talk, read, seeds=[3, 4, 5], **how)
    assert (after.length, after.positions) == (talk.length, talk.positions)
    assert len({len(answer.attempts) for answer in answers}) > 1
    for text, seed, answer in zip(opened, (3, 4, 5), answers, strict=True):
        alone = tell(speaker, begin(speaker, SLOTS), text)
        (wanted,), _ = insist(speaker, alone, read, seeds=[seed], **how)
        assert [said.ids for said in answer.attempts] == [said.ids for said in wanted.attempts]
        assert (answer.found, answer.in_view) == (wanted.found, wanted.in_view)


def test_a_clip_of_one_frame_is_a_video(speaker):
    frames = np.zeros((1, 64, 64, 3), np.uint8)
    one, two = see(speaker, frames, [3.0]), see(speaker, frames.repeat(2, 0), [3.0, 3.0])
    jax.tree.map(np.testing.assert_array_equal, one.visual, two.visual)


def test_no_frames(speaker):
    with pytest.raises(UserError, match="no frames"):
        see(speaker, np.zeros((0, 64, 64, 3), np.uint8), [])


def test_a_prompt_longer_than_the_context_says_by_how_much(speaker, seen):
    talk = tell(speaker, begin(speaker, 24), "a" * 20)
    with pytest.raises(UserError, match=r"\d+ more than the context of 24"):
        show(speaker, talk, seen)
    with pytest.raises(UserError, match="10 new ones are 10 more than the context of 24"):
        say(speaker, talk, max_new_tokens=10)


@pytest.mark.parametrize("slots", [0, 10**9])
def test_a_context_that_cannot_be(speaker, slots):
    with pytest.raises(UserError, match=r"this model takes 1 to \d+"):
        begin(speaker, slots)


def test_dtype_follows_the_machine(monkeypatch):
    assert conversation.default_dtype() == jnp.float32
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert conversation.default_dtype() == jnp.bfloat16


def test_split_over_devices_it_says_the_same(speaker, folder, seen):
    ids, split = words(speaker), load_speaker(folder, mesh=make_mesh(1, 1, 2))
    kernel = nnx.merge(split.graphdef, split.params).layers.q_proj.kernel[...]
    assert len(kernel.sharding.device_set) == 2
    found = []
    for someone in (speaker, split):
        talk = tell(someone, begin(someone, SLOTS), OPENING)
        talk = show(someone, talk, seen._replace(visual=jax.device_get(seen.visual)))
        found.append(choose(someone, tell(someone, talk, ASKED), ids))
    np.testing.assert_allclose(*found, atol=1e-4)


def test_all_accelerators_of_a_host_that_divide_the_heads(monkeypatch):
    assert conversation.default_mesh(TINY) is None  # CPUs
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for count, size in ((8, 2), (4, 2), (1, None)):
        devices = jax.devices()[:count]
        monkeypatch.setattr(jax, "local_devices", lambda devices=devices: devices)
        mesh = conversation.default_mesh(TINY)
        assert (mesh and mesh.shape["model"]) == size
