"""Streams of the world in a language model's tokens."""

import jax
import numpy as np
import pytest

from mmmem_jax.data import token_streams, worlds
from mmmem_jax.errors import UserError
from mmmem_jax.memory.types import ADD_NEW, DISCARD, MERGE
from mmmem_jax.models.qwen3_vl.images import PixelConfig, image_visual
from mmmem_jax.testing.qwen3_vl import toy_tokenizer

WORLD = worlds.WorldConfig(num_chunks=32, questions_per_family=2, facts=32)
PIXELS = PixelConfig(min_pixels=32 * 32, max_pixels=64 * 64)
TOKENIZER = toy_tokenizer()
WIDTHS = token_streams.Widths(caption=80, question=90, subject=24, option=24)
NUM_STREAMS = 5


@pytest.fixture(scope="module")
def lives():
    return [worlds.make_stream(2, i, WORLD) for i in range(NUM_STREAMS)]


@pytest.fixture(scope="module")
def streams(lives):
    return token_streams.from_worlds(lives, TOKENIZER, PIXELS)


def widths(streams) -> token_streams.Widths:
    fields = token_streams.Widths._fields
    return token_streams.Widths(*(getattr(streams, name).shape[-1] for name in fields))


def text(ids, valid) -> str:
    return TOKENIZER.decode(ids[valid].tolist())


def parted(ids, valid) -> list[str]:
    """Words that slots which are not valid part."""
    runs = np.split(np.where(valid, ids, -1), np.flatnonzero(~valid))
    return [TOKENIZER.decode(run[run >= 0].tolist()).strip() for run in runs if (run >= 0).any()]


def said(words) -> str:
    return "".join(f" {worlds.WORDS[w]}" for w in words if w)


class TestTexts:
    def test_captions_tell_and_show_what_the_clip_does(self, lives, streams):
        for s, (stream, _) in enumerate(lives):
            for t in range(WORLD.num_chunks):
                seen = said(dict.fromkeys(stream.visible[t]))
                expected = said(stream.words[t]) + (f" seen:{seen}" if seen else "")
                assert text(streams.caption[s, t], streams.caption_valid[s, t]) == expected

    def test_questions_are_followed_by_their_options(self, lives, streams):
        _, questions = lives[0]
        for q in np.flatnonzero(questions.valid):
            lines = text(streams.question[0, q], streams.question_valid[0, q]).split("\n")
            options = [
                f"{letter}.{said(option)}"
                for letter, option in zip("ABCD", questions.options[q], strict=True)
            ]
            assert lines == [said(questions.words[q]), *options]

    def test_subjects_and_options_are_content_words_apart(self, lives, streams):
        _, questions = lives[0]
        functional = {worlds.WORD_ID[w] for w in worlds.FUNCTION_WORDS}
        for q in np.flatnonzero(questions.valid):
            about = [worlds.WORDS[w] for w in questions.words[q] if w and w not in functional]
            assert parted(streams.subject[0, q], streams.subject_valid[0, q]) == about
            for o, option in enumerate(questions.options[q]):
                words = [worlds.WORDS[w] for w in option if w]
                assert parted(streams.option[0, q, o], streams.option_valid[0, q, o]) == words

    def test_texts_are_padded_on_the_right_to_the_longest(self, streams):
        for name in ("caption", "question"):
            valid = getattr(streams, f"{name}_valid")
            assert np.all(valid[..., 1:] <= valid[..., :-1])
        for name in token_streams.Widths._fields:
            ids, valid = getattr(streams, name), getattr(streams, f"{name}_valid")
            assert valid[..., -1].any()
            assert not ids[~valid].any()

    def test_wider_texts_are_the_same(self, lives, streams):
        wide = token_streams.from_worlds(lives, TOKENIZER, PIXELS, widths=WIDTHS)
        for name, width in WIDTHS._asdict().items():
            narrow = getattr(streams, name)
            assert getattr(wide, name).shape == (*narrow.shape[:-1], width)
            assert np.array_equal(getattr(wide, name)[..., : narrow.shape[-1]], narrow)
            assert np.array_equal(
                getattr(wide, f"{name}_valid").sum(-1), getattr(streams, f"{name}_valid").sum(-1)
            )

    def test_never_cuts(self, lives, streams):
        needed = widths(streams)
        for name in needed._fields:
            most = getattr(needed, name)
            short = needed._replace(**{name: most - 1})
            with pytest.raises(UserError, match=f"a {name} has {most} tokens"):
                token_streams.from_worlds(lives, TOKENIZER, PIXELS, widths=short)


class TestFrames:
    @pytest.mark.parametrize("image_size", [32, 64])
    def test_are_what_the_processor_makes_of_each(self, lives, image_size):
        frames = worlds.render(lives[0][0])
        found = token_streams.frame_patches(frames, PIXELS, image_size, np.float32)
        times = image_size // worlds.FRAME_SIZE
        for frame, patches in zip(frames[:4], found, strict=False):
            large = np.kron(frame, np.ones((times, times, 1), np.uint8))
            pixels = image_visual(large, PIXELS).pixels
            assert pixels.grid == (1, image_size // 16, image_size // 16)
            np.testing.assert_array_equal(patches, pixels.patches)
        assert len(found) == len(frames)

    @pytest.mark.parametrize("image_size", [0, 16, 40])
    def test_fill_their_size(self, lives, image_size):
        with pytest.raises(UserError, match=f"image_size is {image_size}; .* of 16 and 32"):
            token_streams.from_worlds(lives[:1], TOKENIZER, PIXELS, image_size=image_size)


class TestTeacher:
    def test_keeps_what_matters_and_merges_what_goes_on(self):
        stream, _ = worlds.make_stream(0, 0, WORLD)
        lamp, mug, ada, ben = (worlds.WORD_ID[w] for w in ("lamp", "mug", "ada", "ben"))
        clips = [  # entity, person, relevant, expected
            (lamp, ada, True, ADD_NEW),
            (lamp, ada, False, DISCARD),
            (lamp, ben, True, MERGE),  # the lamp again, whatever lay between
            (mug, ben, True, ADD_NEW),
            (mug, ben, True, MERGE),
            (lamp, ben, True, ADD_NEW),  # no longer the latest
        ]
        entity, person, relevant, expected = zip(*clips, strict=True)
        stream = stream._replace(
            kind=np.zeros(len(clips), np.uint8),
            relevant=np.array(relevant),
            mention=np.array([entity, person]).T,
        )
        assert token_streams.teach(stream).tolist() == list(expected)

    def test_discards_all_that_no_question_needs(self, lives, streams):
        relevant = np.stack([stream.relevant for stream, _ in lives])
        assert np.array_equal(streams.teacher != DISCARD, relevant)
        assert set(np.unique(streams.teacher)) == {ADD_NEW, MERGE, DISCARD}


class TestLoader:
    def loader(self, streams, **kwargs):
        options = {"seed": 0, "batch_size": 3, "questions_per_stream": 4}
        return token_streams.make_loader(streams, **(options | kwargs))

    def take(self, loader, count):
        return [next(loader) for _ in range(count)]

    def same(self, a, b) -> bool:
        return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))

    def test_order_and_draws_follow_from_the_seed_and_resume(self, streams):
        first = self.loader(streams)
        batches = self.take(first, 2)
        assert self.same(batches, self.take(self.loader(streams), 2))
        assert not self.same(batches, self.take(self.loader(streams, seed=1), 2))
        state, rest = first.get_state(), self.take(first, 2)
        other = self.loader(streams)
        other.set_state(state)
        assert self.same(self.take(other, 2), rest)

    def test_questions_stay_with_their_stream(self, streams):
        known = {row.tobytes(): s for s in range(NUM_STREAMS) for row in streams.caption[s : s + 1]}
        for batch in self.take(self.loader(streams), 4):
            for b in range(3):
                s = known[batch.caption[b].tobytes()]
                asked = [
                    *zip(streams.question[s], streams.option[s], streams.answer[s], strict=True)
                ]
                for question, option, answer in zip(
                    batch.question[b], batch.option[b], batch.answer[b], strict=True
                ):
                    assert any(
                        np.array_equal(question, q) and np.array_equal(option, o) and answer == a
                        for q, o, a in asked
                    )

    def test_those_that_are_asked_come_first(self, streams):
        some = streams.replace(asked=np.arange(16) % 8 < np.full((NUM_STREAMS, 1), 1))
        (batch,) = self.take(self.loader(some), 1)
        assert batch.asked.tolist() == [[True, True, False, False]] * 3

    def test_rows_are_part_of_the_whole(self, streams):
        (whole,) = self.take(self.loader(streams), 1)
        (part,) = self.take(self.loader(streams, rows=[2, 0]), 1)
        assert self.same(part, jax.tree.map(lambda x: x[[2, 0]], whole))

    def test_shapes_are_those_of_a_batch(self, streams):
        expected = token_streams.shapes(
            3,
            num_chunks=WORLD.num_chunks,
            num_questions=4,
            widths=widths(streams),
            num_patches=4,
            patch_dim=3 * 2 * 16 * 16,
        )
        (batch,) = self.take(self.loader(streams), 1)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
            lambda x: (x.shape, x.dtype), expected
        )
