"""What is left of this process's address space, where a limit is set (RLIMIT_AS).

LMDB unmaps the old map before it maps the new one. If that failed, no map would be left; so it is
tested here first whether there is room for the new one.
"""

import mmap
import resource
from typing import Final

# Where address space is limited, a map exceeds its file by this much at first; and a map only grows
# if this much address space stays free.
MAP_SLACK_BYTES: Final = 16 << 20


def is_limited() -> bool:
    """Whether this process has a limit."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def map_size(wanted_bytes: int, data_size: int) -> int:
    """Return the size of the map of a file of `data_size` bytes.

    If this is less than the size of the file, LMDB maps the whole file.
    """
    return min(wanted_bytes, with_slack(data_size)) if is_limited() else wanted_bytes


def with_slack(size_bytes: int) -> int:
    """Return the size of a map, in whole pages, that leaves a file of `size_bytes` room to grow."""
    return -(-(size_bytes + MAP_SLACK_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE


def is_free(size_bytes: int) -> bool:
    """Return whether another `size_bytes` bytes of address space can be mapped now."""
    try:
        mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ).close()
    except OSError:
        return False
    return True
