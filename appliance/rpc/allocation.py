"""How the allocator keeps the memory of messages."""

import ctypes
from typing import Final

# Of malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

# Above a message of content.
_MMAP_THRESHOLD: Final = 4 << 20
_TRIM_THRESHOLD: Final = 16 << 20
_NUM_ARENAS: Final = 2


def keep_message_memory() -> None:
    """Have malloc keep what a message took for the next one; may be called again.

    Unasked, glibc gives each message's memory back to the system and faults it in again for the
    next: a 1 GiB blob took 500,000 page faults, and half as long again. What is kept is bounded.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # others than glibc lack it
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        libc.mallopt(_M_ARENA_MAX, _NUM_ARENAS)
