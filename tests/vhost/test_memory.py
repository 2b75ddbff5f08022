"""Which regions may be in one table."""

import pytest

from appliance.bounds import REGIONS_MAX
from appliance.errors import VhostError
from appliance.vhost._vhost_wire import Region
from appliance.vhost.guest_memory import RegionTable

PAGE = 0x1000
A = Region(0x10000, 0x10000, 0x7F0000010000, 0)


def table(*regions: Region) -> RegionTable:
    result = RegionTable()
    for region in regions:
        result = result.with_region_untrusted(region)
    return result


@pytest.mark.parametrize(
    "region",
    [
        A._replace(size=0),
        A._replace(gpa=2**64 - 0xFFFF),
        A._replace(user_addr=2**64 - 0xFFFF),
        A._replace(mmap_offset=2**64 - PAGE),
        A._replace(mmap_offset=PAGE - 1),
        A._replace(size=2**64 - 1),
    ],
)
def test_an_impossible_region_is_refused(region: Region) -> None:
    with pytest.raises(VhostError):
        table(region)


def test_a_region_may_end_where_the_address_space_ends() -> None:
    region = Region(2**64 - PAGE, PAGE, 2**64 - PAGE, 2**64 - PAGE)
    assert table(region).holds_user_range(2**64 - PAGE, PAGE)


@pytest.mark.parametrize("size", [1, PAGE, 0x10000, 0x20000])
def test_regions_may_touch_but_not_overlap(size: int) -> None:
    elsewhere = A.user_addr + 0x1000000
    for gpa in (A.gpa - size, A.gpa + A.size):
        table(A, Region(gpa, size, elsewhere, 0))
    for gpa in (A.gpa - size + 1, A.gpa, A.gpa + A.size - 1):
        with pytest.raises(VhostError, match="overlaps"):
            table(A, Region(gpa, size, elsewhere, 0))
    for user_addr in (A.user_addr - size + 1, A.user_addr + A.size - 1):
        with pytest.raises(VhostError, match="overlaps"):
            table(A, Region(0x1000000, size, user_addr, 0))


def test_a_table_holds_509_regions() -> None:
    regions = [Region(i * PAGE, PAGE, 0x7F0000000000 + i * PAGE, 0) for i in range(REGIONS_MAX + 1)]
    full = table(*regions[:-1])
    with pytest.raises(VhostError, match="509"):
        full.with_region_untrusted(regions[-1])


def test_removal_ignores_the_offset_and_returns_the_region_as_added() -> None:
    b = Region(0x100000, PAGE, 0x7F0000100000, 7 * PAGE)
    left, removed = table(A, b).without_region_untrusted(b._replace(mmap_offset=0))
    assert (left.regions, removed) == ((A,), b)
    for other in (b._replace(gpa=0), b._replace(size=1), b._replace(user_addr=0)):
        with pytest.raises(VhostError, match="never added"):
            table(A, b).without_region_untrusted(other)


def test_a_user_range_lies_in_one_region_or_in_none() -> None:
    b = Region(A.gpa + A.size, PAGE, A.user_addr + A.size, 0)
    both = table(A, b)
    assert both.holds_user_range(A.user_addr, A.size)
    assert both.holds_user_range(b.user_addr, b.size)
    assert not both.holds_user_range(A.user_addr, A.size + 1)
    assert not both.holds_user_range(A.user_addr - 1, 2)
    assert not both.holds_user_range(b.user_addr + b.size, 1)
    assert not both.holds_user_range(A.gpa, 1)
