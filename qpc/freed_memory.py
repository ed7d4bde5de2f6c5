"""Memory that is free, and that the C library keeps for the allocations to come."""

import ctypes
from functools import cache
from typing import Any


def give_back() -> None:
    """Let the system have it.

    After many tensors of some megabytes glibc keeps hundreds of megabytes, in pieces too small for the matrices to come, which get memory
    of their own. Without effect where the C library has no `malloc_trim`.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; on Windows the process by itself is no library
        return None
