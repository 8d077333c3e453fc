"""TFDS builder of the procedural world: frames, narrations and questions, no TensorFlow needed.

import tensorflow_datasets as tfds
from data.mmmem_world import mmmem_world_dataset_builder as world

builder = world.Builder(data_dir=DIR, file_format="array_record")
builder.download_and_prepare()
source = builder.as_data_source("train")
"""

import numpy as np
import tensorflow_datasets as tfds

from mmmem_jax.data import worlds

SPLIT_SEEDS = {"train": (1, 64), "validation": (2, 16), "test": (3, 16)}  # seed, streams


class Builder(tfds.core.GeneratorBasedBuilder):
    """Streams of 256 chunks with 64 questions each; see mmmem_jax.data.worlds for the fields."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        config = worlds.WorldConfig()
        t, m = config.num_chunks, config.questions_per_family * len(worlds.FAMILIES)
        size, options = worlds.FRAME_SIZE, worlds.NUM_OPTIONS

        def tensor(*shape, dtype=np.uint8):
            return tfds.features.Tensor(shape=shape, dtype=dtype)

        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "frames": tensor(t, size, size, 3),
                    "words": tensor(t, worlds.TEXT_WORDS),
                    "kind": tensor(t),
                    "span": tensor(t, 2, dtype=np.float32),
                    "question_words": tensor(m, worlds.QUESTION_WORDS),
                    "question_options": tensor(m, options, worlds.OPTION_WORDS),
                    "question_answer": tensor(m, dtype=np.int32),
                    "question_family": tensor(m, dtype=np.int32),
                    "question_evidence": tensor(m, worlds.MAX_EVIDENCE, dtype=np.int32),
                    "question_valid": tensor(m, dtype=np.bool_),
                }
            )
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(*how) for split, how in SPLIT_SEEDS.items()}

    def _generate_examples(self, seed: int, size: int):
        for index in range(size):
            stream, questions = worlds.make_stream(seed, index, worlds.WorldConfig())
            yield (
                index,
                {
                    "frames": worlds.render(stream),
                    "words": stream.words,
                    "kind": stream.kind,
                    "span": stream.span,
                    "question_words": questions.words,
                    "question_options": questions.options,
                    "question_answer": questions.answer,
                    "question_family": questions.family,
                    "question_evidence": questions.evidence,
                    "question_valid": questions.valid,
                },
            )
