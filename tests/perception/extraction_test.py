"""Entities are read as they were asked for, or not at all."""

import json

import pytest

from mmmem_jax.perception import extraction
from mmmem_jax.perception.types import RELATIONS

CAT = {"name": "grey cat", "gloss": "sleeps"}
SOFA = {"name": "sofa", "gloss": ""}


def _parse(**table):
    return extraction.parse(json.dumps(table))


def test_entities_and_their_relation():
    found = _parse(entities=[CAT, SOFA], relation="is in")
    assert found.entities == (("grey cat", "sleeps"), ("sofa", ""))
    assert RELATIONS[found.relation] == "is in"


def test_no_relation_and_no_entities():
    assert _parse(entities=[CAT]) == ((("grey cat", "sleeps"),), -1)
    assert _parse(entities=[]) == ((), -1)


def test_the_prompt_shows_what_is_read():
    from mmmem_jax import prompts

    text = prompts.read("extract_v1")
    example = next(line for line in text.splitlines() if line.startswith("{"))
    assert len(extraction.parse(example).entities) == 2
    assert all(f'"{relation}"' in text for relation in RELATIONS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "null",
        "[" * 10**5,
        '{"entities": []} so it is',
        'Here: {"entities": []}',
        '{"entities": NaN}',
        '{"entities": [], "entities": []}',
        "{}",
        '{"entities": {}}',
        '{"entities": [7]}',
        '{"entities": [], "more": 1}',
        '{"entities": [], "relation": null}',
        '{"entities": [{"name": "cat"}]}',
        '{"entities": [{"name": "cat", "gloss": "", "age": 3}]}',
        '{"entities": [{"name": "cat", "gloss": 3}]}',
        '{"entities": [{"name": "", "gloss": ""}]}',
        '{"entities": [{"name": " cat", "gloss": ""}]}',
        '{"entities": [{"name": "a\\ncat", "gloss": ""}]}',
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        extraction.parse(text)


@pytest.mark.parametrize(
    ("entities", "more"),
    [
        ([CAT] * 5, {}),
        ([CAT, {"name": "Grey Cat", "gloss": "eats"}], {}),
        ([{"name": "x" * (extraction.MAX_NAME + 1), "gloss": ""}], {}),
        ([{"name": "x", "gloss": "x" * (extraction.MAX_GLOSS + 1)}], {}),
        ([CAT], {"relation": "is in"}),
        ([CAT, SOFA], {"relation": "eats"}),
        ([CAT, SOFA], {"relation": ["is in"]}),
    ],
)
def test_too_many_too_long_or_unknown_is_refused(entities, more):
    with pytest.raises(ValueError):  # noqa: PT011
        _parse(entities=entities, **more)
