"""Guest memory as a front-end describes it: regions, and what may stand beside what.

Nothing is mapped here. A region has two addresses: `gpa`, which descriptors use, and `user_addr`,
the front-end's own, which SET_VRING_ADDR uses; neither range may overlap another region's.

Spec: vhost-user: Memory region description; Communication.
"""

from typing import Final

from appliance.errors import VhostError
from appliance.vhost._vhost_wire import Region

MAX_REGIONS: Final = 509  # as KVM has slots; never to shrink between connections
_ADDRESS_SPACE: Final = 1 << 64
_PAGE_BYTES: Final = 4096


class RegionTable:
    """The regions of one front-end; a change returns a new table, to keep once it took effect."""

    def __init__(self, regions: tuple[Region, ...] = ()) -> None:
        self.regions = regions

    def with_region_untrusted(self, region: Region) -> "RegionTable":
        """Return this table and `region`.

        Raises:
            VhostError: the region is empty, wraps around, is not page-aligned in its file, overlaps
                another or is one too many.
        """
        _check_untrusted(region)
        for other in self.regions:
            if _overlap(region.gpa, region.size, other.gpa, other.size) or _overlap(
                region.user_addr, region.size, other.user_addr, other.size
            ):
                raise VhostError(f"region {describe(region)} overlaps {describe(other)}")
        if len(self.regions) == MAX_REGIONS:
            raise VhostError(f"region {describe(region)} is one more than {MAX_REGIONS}")
        return RegionTable((*self.regions, region))

    def without_region_untrusted(self, region: Region) -> tuple["RegionTable", Region]:
        """Return this table without a region, and the region as it was added.

        Front-ends fill in `mmap_offset` or not: it is not compared.

        Raises:
            VhostError: there is no such region.
        """
        for index, known in enumerate(self.regions):
            if known[:3] == region[:3]:
                return RegionTable(self.regions[:index] + self.regions[index + 1 :]), known
        raise VhostError(f"region {describe(region)} was never added")

    def holds_user_range(self, user_addr: int, size: int) -> bool:
        """Return whether one region holds all of `size` bytes from `user_addr`, a user address."""
        return any(
            0 <= user_addr - region.user_addr <= region.size - size for region in self.regions
        )


def describe(region: Region) -> str:
    """Return `region` as logs show it."""
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
        raise VhostError(f"region {describe(region)}: the offset is not page-aligned")


def _overlap(start: int, size: int, other_start: int, other_size: int) -> bool:
    return start < other_start + other_size and other_start < start + size


__all__ = ["MAX_REGIONS", "Region", "RegionTable", "describe"]
