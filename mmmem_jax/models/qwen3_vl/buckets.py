"""Sizes that inputs are padded to: few of them, so that few programs are compiled."""

_SHORTEST = 16


def bucket_length(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: lengths to compile programs for."""
    size = _SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
