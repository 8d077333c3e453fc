"""From frames and narrations to the items a memory reads."""
