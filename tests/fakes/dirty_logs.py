"""The front-end's side of a dirty log, and the truth about it: which pages of memory differ."""

import mmap
import os
from types import TracebackType
from typing import Self

from tests.fakes.driver import PAGE, GuestMemory


class LogFile:
    """A dirty log for guest memory, in a file of its own; owns its descriptor."""

    def __init__(self, memory: GuestMemory) -> None:
        end = max(region.gpa + region.size for region in memory.regions)
        self.size = -(-end // (8 * PAGE))
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)
        self._map = mmap.mmap(self.fd, self.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)

    def marked(self) -> set[int]:
        """Return the numbers of the pages that are marked."""
        bits = int.from_bytes(self._map[:], "little")
        return {page for page in range(bits.bit_length()) if bits >> page & 1}

    def clear(self) -> None:
        self._map[:] = bytes(self.size)


def changed_pages(memory: GuestMemory, before: bytes, after: bytes) -> set[int]:
    """Return the numbers of the guest's pages in which two images of all memory differ."""
    return {
        (region.gpa + at) // PAGE
        for region in memory.regions
        for at in range(0, region.size, PAGE)
        if before[region.mmap_offset + at : region.mmap_offset + at + PAGE]
        != after[region.mmap_offset + at : region.mmap_offset + at + PAGE]
    }


def pages_of(gpa: int, size: int) -> set[int]:
    """Return the numbers of the pages that a range of guest memory touches."""
    return set(range(gpa // PAGE, (gpa + size - 1) // PAGE + 1))
