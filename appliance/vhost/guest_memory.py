"""Guest memory as a front-end describes it: which regions may exist together.

Nothing is mapped here, and no descriptors are held. All addresses, sizes and offsets are in bytes.
A region has two addresses: `gpa`, the guest physical address, which the descriptors of a ring use;
and `user_addr`, an address in the front-end's address space, which SET_VRING_ADDR uses. Neither
range may overlap that of another region.

Spec: vhost-user: Memory region description; Memory access.
"""

from typing import Final

from appliance.bounds import REGIONS_MAX
from appliance.errors import VhostError
from appliance.vhost._vhost_wire import Region

_ADDRESS_SPACE: Final = 1 << 64
_PAGE_BYTES: Final = 4096


class RegionTable:
    """The regions of one front-end, immutable.

    A change returns a new table, which the caller keeps once the back-end has accepted the change.
    """

    def __init__(self, regions: tuple[Region, ...] = ()) -> None:
        self.regions = regions

    def with_region_untrusted(self, region: Region) -> "RegionTable":
        """Return a table with `region` added.

        Raises:
            VhostError: the region is empty, wraps around, is not page-aligned in its file, overlaps
                another region, or would exceed `REGIONS_MAX`.
        """
        _check_untrusted(region)
        for other in self.regions:
            if _overlap(region.gpa, region.size, other.gpa, other.size) or _overlap(
                region.user_addr, region.size, other.user_addr, other.size
            ):
                raise VhostError(f"region {describe(region)} overlaps {describe(other)}")
        if len(self.regions) == REGIONS_MAX:
            raise VhostError(
                f"region {describe(region)}: there are {REGIONS_MAX} regions, the largest number"
            )
        return RegionTable((*self.regions, region))

    def find(self, region: Region) -> Region | None:
        """Return the region that was added with these addresses and this size, or None."""
        return next((known for known in self.regions if known[:3] == region[:3]), None)

    def without_region_untrusted(self, region: Region) -> tuple["RegionTable", Region]:
        """Return a table without `region`, and the region as it was added.

        `mmap_offset` is not compared, because some front-ends do not fill it in here.

        Raises:
            VhostError: the table has no such region.
        """
        known = self.find(region)
        if known is None:
            raise VhostError(f"region {describe(region)} was never added")
        return RegionTable(tuple(other for other in self.regions if other is not known)), known

    def holds_user_range(self, user_addr: int, size: int) -> bool:
        """Return whether a single region contains the `size` bytes from user address `user_addr`.

        Spec: vhost-user: Memory access.
        """
        return any(
            0 <= user_addr - region.user_addr <= region.size - size for region in self.regions
        )


def describe(region: Region) -> str:
    """Return `region` as text for logs and errors."""
    return (
        f"gpa 0x{region.gpa:x} size 0x{region.size:x} user 0x{region.user_addr:x} "
        f"offset 0x{region.mmap_offset:x}"
    )


def _check_untrusted(region: Region) -> None:
    if region.size == 0:
        raise VhostError(f"region {describe(region)} is empty")
    if max(region.gpa, region.user_addr, region.mmap_offset) > _ADDRESS_SPACE - region.size:
        raise VhostError(f"region {describe(region)} wraps around")
    if region.mmap_offset % _PAGE_BYTES:
        raise VhostError(
            f"region {describe(region)}: the offset is not a multiple of {_PAGE_BYTES}"
        )


def _overlap(start: int, size: int, other_start: int, other_size: int) -> bool:
    return start < other_start + other_size and other_start < start + size
