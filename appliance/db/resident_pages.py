"""For whoever reads a whole file through a map: its pages, on the disk and in this process.

The pages of a table lie all over the file, so a file that is not in the page cache would be read by
single pages in any order. And pages that were read stay in the process: the page cache has them
once for all processes, but they count for this one until the kernel needs them.
"""

import mmap
import os
import re
from pathlib import Path
from typing import Final

# The third number is that of resident pages of files and shared memory (proc(5)).
_STATM: Final = Path("/proc/self/statm")
_FILE_BYTES_MAX: Final = 96 << 20
_MEMINFO: Final = Path("/proc/meminfo")
_AVAILABLE: Final = re.compile(rb"MemAvailable:\s*(\d+) kB")
_READ_AHEAD_SHARE: Final = 4
# The kernel takes no more at a time than a device reads ahead (linux mm/readahead.c:
# force_page_cache_ra), which is at least so much by default.
_READ_AHEAD_STEP: Final = 128 << 10


def read_ahead(directory: Path) -> None:
    """Have the kernel read the file of an environment, in order, into the page cache.

    Nothing happens if it has more than a quarter of the memory that is available: others need that,
    and most of so large a file is content, which its reader passes over.

    Args:
        directory: that of the environment. If it has been moved, nothing happens either.
    """
    match = _AVAILABLE.search(_MEMINFO.read_bytes())
    available_bytes = int(match[1]) * 1024 if match else 0
    try:
        fd = os.open(directory / "data.mdb", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        size = os.fstat(fd).st_size
        if size * _READ_AHEAD_SHARE <= available_bytes:
            for at in range(0, size, _READ_AHEAD_STEP):
                os.posix_fadvise(fd, at, _READ_AHEAD_STEP, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)


def limit_pages(file: Path) -> None:
    """Take the pages of a mapped file out of this process if 96 MiB of files are in it.

    To be called after each few MiB that were read; below the bound, this costs a few system calls.
    Buffers of the map stay valid: what is read again is mapped again.
    """
    resident_bytes = int(_STATM.read_bytes().split()[2]) * mmap.PAGESIZE
    if resident_bytes > _FILE_BYTES_MAX:
        from appliance.system import libc  # noqa: PLC0415 - ctypes is slow to load

        libc.drop_mapped_pages(os.path.realpath(file))
