"""A bound for the pages of a map that are in this process.

Whoever reads a whole file through a map keeps its pages: they are in the page cache, once for all
processes, but count for this one until the kernel needs them.
"""

import mmap
import os
from pathlib import Path
from typing import Final

# The third number is that of resident pages of files and shared memory (proc(5)).
_STATM: Final = Path("/proc/self/statm")
_FILE_BYTES_MAX: Final = 96 << 20


def limit_pages(file: Path) -> None:
    """Take the pages of a mapped file out of this process if 96 MiB of files are in it.

    To be called after each few MiB that were read; below the bound, this costs a few system calls.
    Buffers of the map stay valid: what is read again is mapped again.
    """
    resident_bytes = int(_STATM.read_bytes().split()[2]) * mmap.PAGESIZE
    if resident_bytes > _FILE_BYTES_MAX:
        from appliance.system import libc  # noqa: PLC0415 - ctypes is slow to load

        libc.drop_mapped_pages(os.path.realpath(file))
