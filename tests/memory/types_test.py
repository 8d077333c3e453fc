"""What a memory may be configured to hold."""

import pytest

from mmmem_jax.memory import MemoryConfig


@pytest.mark.parametrize("field", ["schema_slots", "num_relations", "token_budget"])
def test_less_than_nothing_is_refused(field):
    with pytest.raises(ValueError, match=f"MemoryConfig.{field} must be at least 0, got -1"):
        MemoryConfig(**{field: -1})


def test_a_part_may_be_switched_off():
    config = MemoryConfig(schema_slots=0, num_relations=0, token_budget=0)
    assert (config.schema_slots, config.num_relations, config.token_budget) == (0, 0, 0)
