"""Tests of mmmem_jax/models/qwen3_vl/config.py."""

import json

import pytest

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl.config import SIZES, read_config, to_json


@pytest.fixture
def write(tmp_path):
    def write(content):
        (tmp_path / "config.json").write_text(json.dumps(content))
        return tmp_path

    return write


@pytest.mark.parametrize("size", SIZES)
def test_reads_what_it_writes(size, write):
    assert read_config(write(to_json(SIZES[size]))) == SIZES[size]


def test_reads_what_transformers_5_writes(write):
    found = to_json(SIZES["2b"])
    text = found["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    assert read_config(write(found)) == SIZES["2b"]


@pytest.mark.parametrize(
    ("name", "billions"), [("2b", 2.13), ("4b", 4.44), ("8b", 8.77), ("32b", 33.4)]
)
def test_published_sizes_have_as_many_parameters_as_published(name, billions):
    text, vision = SIZES[name].text, SIZES[name].vision
    attention = (2 * text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    layer = text.hidden_size * (attention + 3 * text.intermediate_size)
    words = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    merged = vision.hidden_size * vision.merge_unit
    mergers = (1 + len(vision.deepstack_layers)) * merged * (merged + vision.out_hidden_size)
    block = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    total = text.num_layers * layer + words + mergers + vision.depth * block
    assert total / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_folder_without_config(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_broken_json(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [{"model_type": "qwen3_vl_moe"}, {"model_type": "llama"}])
def test_another_architecture_names_itself(content, write):
    with pytest.raises(UserError, match="only 'qwen3_vl' \\(dense\\) is read"):
        read_config(write(content))


def test_a_missing_key_names_itself(write):
    found = to_json(SIZES["2b"])
    del found["text_config"]["num_key_value_heads"]
    with pytest.raises(UserError, match="has no 'num_key_value_heads'"):
        read_config(write(found))


@pytest.mark.parametrize(
    ("section", "key", "value", "problem"),
    [
        ("text_config", "num_key_value_heads", 5, "no multiple of num_key_value_heads"),
        ("text_config", "head_dim", 64, "half of head_dim"),
        ("vision_config", "num_heads", 3, "do not divide"),
        ("vision_config", "out_hidden_size", 8, "hidden_size of the language model"),
        ("vision_config", "deepstack_visual_indexes", [5, 4], "no rising blocks"),
        ("vision_config", "deepstack_visual_indexes", [99], "no rising blocks"),
        ("vision_config", "num_position_embeddings", 50, "no square"),
        ("text_config", "num_hidden_layers", 2, "fewer layers"),
    ],
)
def test_sizes_that_cannot_be(section, key, value, problem, write):
    found = to_json(SIZES["2b"])
    found[section][key] = value
    with pytest.raises(UserError, match=problem):
        read_config(write(found))
