"""What is left of this process's address space, where a limit is set (RLIMIT_AS).

LMDB unmaps a file before it maps it anew, and has no map at all if the latter fails. So whoever has
it map more asks here first.
"""

import mmap
import resource
from typing import Final

# Where address space is limited, a map is larger than its file by this; and growing leaves as much.
MAP_SLACK_BYTES: Final = 16 << 20


def is_limited() -> bool:
    """Whether this process has a limit."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def map_size(wanted_bytes: int, data_size: int) -> int:
    """Return the size to map of a file of `data_size` bytes; LMDB never maps less than there is."""
    return min(wanted_bytes, with_slack(data_size)) if is_limited() else wanted_bytes


def with_slack(size_bytes: int) -> int:
    """Return the size of a map, in whole pages, that leaves a file of `size_bytes` room to grow."""
    return -(-(size_bytes + MAP_SLACK_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE


def is_free(size_bytes: int) -> bool:
    """Whether so many bytes more can be mapped now."""
    try:
        mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ).close()
    except OSError:
        return False
    return True
