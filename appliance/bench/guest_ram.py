"""Guest memory as a front-end has it: one memfd that is shared with the back-end."""

import mmap
import os
from collections import defaultdict
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from appliance.engine import MappedRegion

PAGE: Final = mmap.PAGESIZE
DEFAULT_REGIONS: Final = ((0, 0xA0000), (0xC0000, 0x2000000))
"""The hole of a PC below 1 MiB."""


class GuestRam:
    """Guest memory in one memfd. Owns the memfd and its own mapping of it.

    Args:
        regions: (gpa, size) of each region, whole pages, ascending; they may touch or leave holes.
        user_base: the front-end's address of the first region. Regions never touch in user space,
            and in the file a page that belongs to none lies between them.
    """

    def __init__(
        self,
        regions: Sequence[tuple[int, int]] = DEFAULT_REGIONS,
        *,
        user_base: int = 0x7F12_3400_0000,
    ) -> None:
        placed: list[MappedRegion] = []
        offset = PAGE
        for gpa, size in regions:
            placed.append(MappedRegion(gpa, size, user_base + offset, offset))
            offset += size + PAGE
        self.regions = tuple(placed)
        self.size = offset
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)
        self._mapping = mmap.mmap(self.fd, self.size)
        self.file = memoryview(self._mapping)
        self.words = self.file.cast("H")
        # Page 0 is never allocated, so that a zero address in a descriptor is nobody's buffer.
        self._next = [max(region.gpa, PAGE) for region in self.regions]
        self._free: defaultdict[int, list[int]] = defaultdict(list)

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
        """Unmap and close; views handed out must be gone."""
        self.words.release()
        self.file.release()
        self._mapping.close()
        os.close(self.fd)

    def region_of(self, gpa: int) -> MappedRegion:
        """Return the region that holds a guest address.

        Raises:
            KeyError: no region holds it.
        """
        for region in self.regions:
            if 0 <= gpa - region.gpa < region.size:
                return region
        raise KeyError(hex(gpa))

    def user_addr(self, gpa: int) -> int:
        """Return the front-end's address of a guest address."""
        region = self.region_of(gpa)
        return gpa - region.gpa + region.user_addr

    def offset(self, gpa: int) -> int:
        """Return where a guest address is in `file`."""
        region = self.region_of(gpa)
        return gpa - region.gpa + region.mmap_offset

    def alloc(self, size: int, *, region: int = -1) -> int:
        """Return the gpa of `size` bytes inside one region, the last one by default.

        The address is aligned to a page if `size` is a page or more, else to 16 bytes.

        Raises:
            MemoryError: the region is full.
        """
        align = PAGE if size >= PAGE else 16
        rounded = -(-size // align) * align
        home = self.regions[region]
        for at, gpa in enumerate(self._free[rounded]):
            if 0 <= gpa - home.gpa < home.size:
                return self._free[rounded].pop(at)
        gpa = -(-self._next[region] // align) * align
        if gpa + rounded > home.gpa + home.size:
            raise MemoryError(f"guest region {region} is full")
        self._next[region] = gpa + rounded
        return gpa

    def free(self, gpa: int, size: int) -> None:
        """Give back what `alloc(size)` returned."""
        align = PAGE if size >= PAGE else 16
        self._free[-(-size // align) * align].append(gpa)
