"""The TFDS builder writes what the generator makes, without TensorFlow."""

import sys

import numpy as np
import pytest

from data.mmmem_world import mmmem_world_dataset_builder as builder_module
from mmmem_jax.data import worlds


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_builder_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(builder_module, "SPLIT_SEEDS", {"test": (3, 2)})
    builder = builder_module.Builder(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = builder.as_data_source("test")
    assert len(source) == 2
    made = [worlds.make_stream(3, i, worlds.WorldConfig()) for i in range(2)]
    expected = {stream.words.tobytes(): worlds.render(stream) for stream, _ in made}
    for row in source:
        np.testing.assert_array_equal(row["frames"], expected[row["words"].tobytes()])
    assert "tensorflow" not in sys.modules
