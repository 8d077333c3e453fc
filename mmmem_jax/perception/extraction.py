"""What the model says of the entities of a clip, read strictly or not at all."""

import json
from typing import Any, NamedTuple

from mmmem_jax.perception.types import RELATIONS

MAX_ENTITIES = 4
MAX_NAME, MAX_GLOSS = 40, 120  # characters


class Entity(NamedTuple):
    """One entity of a clip."""

    name: str
    gloss: str  # what is true of it there


class Extraction(NamedTuple):
    """The entities of a clip, and what the first has to do with the second."""

    entities: tuple[Entity, ...]
    relation: int  # of RELATIONS, -1: none


def parse(text: str) -> Extraction:
    """Reads {"entities": [{"name": ..., "gloss": ...}, ...], "relation": ...}, the last optional.

    Raises:
      ValueError: saying how the text is anything else, be it by a word before or after.
    """
    try:
        found = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None
    table = _of_keys(found, {"entities"}, {"relation"})
    listed = table["entities"]
    if not isinstance(listed, list) or len(listed) > MAX_ENTITIES:
        raise ValueError(f"entities are no list of at most {MAX_ENTITIES}")
    entities = tuple(_entity(one) for one in listed)
    if len({entity.name.casefold() for entity in entities}) < len(entities):
        raise ValueError("an entity is named twice")
    return Extraction(entities, _relation(table, len(entities)))


def _entity(found: Any) -> Entity:
    table = _of_keys(found, {"name", "gloss"})
    return Entity(_line(table["name"], 1, MAX_NAME), _line(table["gloss"], 0, MAX_GLOSS))


def _relation(table: dict, num_entities: int) -> int:
    if "relation" not in table:
        return -1
    if num_entities < 2 or table["relation"] not in RELATIONS:
        raise ValueError(f"relation {table['relation']!r} of {num_entities} entities")
    return RELATIONS.index(table["relation"])


def _of_keys(found: Any, needed: set[str], optional: frozenset | set[str] = frozenset()) -> dict:
    if not isinstance(found, dict) or not needed <= found.keys() <= needed | optional:
        raise ValueError(f"no object of {sorted(needed)}")
    return found


def _line(value: Any, least: int, most: int) -> str:
    """A printable line without spaces at its ends."""
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise ValueError(f"{value!r} is no text of {least} to {most} characters")
    if value != value.strip() or not value.isprintable():
        raise ValueError(f"{value!r} is no plain line")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key comes twice")
    return table


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON")
