"""Sizes that inputs are padded to: few of them, so that few programs are compiled."""

_SHORTEST = 16


def bucket_length(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: lengths to compile programs for."""
    size = _SHORTEST
    while size < length:
        size = _next(size)
    return size


def largest_bucket(room: int) -> int:
    """The last of these lengths that is at most `room`; 0 if none is."""
    size = _SHORTEST if room >= _SHORTEST else 0
    while size and _next(size) <= room:
        size = _next(size)
    return size


def _next(size: int) -> int:
    return size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
