import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.engine import GuestMap, MappedRegion
from appliance.errors import RingError, VhostError
from tests.fakes.driver import PAGE, GuestMemory
from tests.fakes.engine_rig import Rig

U64 = 2**64


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def guest_map() -> Iterator[GuestMap]:
    made = GuestMap()
    yield made
    made.close()


def mapped_lines(fd: int) -> int:
    inode = f" {os.fstat(fd).st_ino} "
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(inode)


@pytest.mark.parametrize(
    ("region", "rule"),
    [
        (MappedRegion(0, 0, 0, 0), "above 0"),
        (MappedRegion(U64 - PAGE, PAGE, 0, 0), "gpa plus size"),
        (MappedRegion(0, PAGE, U64 - PAGE, 0), "user_addr plus size"),
        (MappedRegion(0, PAGE, 0, U64 - PAGE), "mmap_offset plus size"),
        (MappedRegion(0, U64 - 1, 1, 0), "user_addr plus size"),
        (MappedRegion(0, PAGE, 0, 512), "not a multiple of 0x1000"),
        (MappedRegion(0x90000, 17 * PAGE, 0x90000, 0), "the file ends at 0x10000, before 0x11000"),
        (MappedRegion(0, PAGE, 0, 16 * PAGE), "the file ends at 0x10000"),
        (MappedRegion(0x1FFF, PAGE, 0x90000, 0), "overlaps region gpa=0x2000 size=0x2000"),
        (MappedRegion(0x3FFF, 1, 0x90000, 0), "overlaps region gpa=0x2000"),
        (MappedRegion(0x90000, PAGE, 0x73000, 0), "overlaps region gpa=0x2000"),
        (MappedRegion(0, 16 * PAGE, 0x100000, 0), "overlaps region gpa=0x2000"),
    ],
)
def test_a_bad_region_is_refused_by_name(
    guest_map: GuestMap, memfd: int, region: MappedRegion, rule: str
) -> None:
    first = MappedRegion(0x2000, 0x2000, 0x72000, PAGE)
    guest_map.add(memfd, first)
    with pytest.raises(VhostError, match=rule) as caught:
        guest_map.add(memfd, region)
    assert f"gpa={region.gpa:#x}" in str(caught.value)
    assert guest_map.regions == (first,)
    assert mapped_lines(memfd) == 1


def test_a_file_that_cannot_be_mapped_is_a_vhost_error(guest_map: GuestMap) -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(VhostError, match="cannot map it"):
            guest_map.add(reading, MappedRegion(0, PAGE, 0, 0))
    finally:
        os.close(reading)
        os.close(writing)


def test_509_regions_fit_and_one_more_does_not(guest_map: GuestMap, memfd: int) -> None:
    # Descending and interleaved: the map sorts.
    order = [*range(508, -1, -2), *range(1, 509, 2)]
    regions = [MappedRegion(i * 2 * PAGE, PAGE, i * 2 * PAGE, 0) for i in order]
    for region in regions:
        guest_map.add(memfd, region)
    with pytest.raises(VhostError, match="509 regions are mapped already"):
        guest_map.add(memfd, MappedRegion(U64 >> 1, PAGE, U64 >> 1, 0))
    assert guest_map.regions == tuple(regions)
    assert mapped_lines(memfd) == 509
    for region in regions[::3]:
        guest_map.remove(region)
    assert mapped_lines(memfd) == 509 - len(regions[::3])
    guest_map.close()
    assert mapped_lines(memfd) == 0


def test_an_unknown_region_cannot_be_removed(guest_map: GuestMap, memfd: int) -> None:
    region = MappedRegion(0, PAGE, 0, 0)
    guest_map.add(memfd, region)
    with pytest.raises(VhostError, match=r"size=0x2000 .* not mapped"):
        guest_map.remove(region._replace(size=2 * PAGE))


def test_guest_memory_stays_out_of_core_dumps(guest_map: GuestMap, memfd: int) -> None:
    guest_map.add(memfd, MappedRegion(0, PAGE, 0, 0))
    inode = f" {os.fstat(memfd).st_ino} "
    _, _, behind = Path("/proc/self/smaps").read_text(encoding="utf-8").partition(inode)
    flags = next(line for line in behind.splitlines() if line.startswith("VmFlags:"))
    assert {"dd", "sh", "nr"} <= set(flags.split())


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_the_caller_keeps_its_fd(guest_map: GuestMap) -> None:
    before = open_fds()
    with GuestMemory(((0, PAGE),)) as memory:
        memory.map_into(guest_map)
        assert open_fds() == before + 2, "the memfd, and its copy in python's mapping"
    assert open_fds() == before
    assert len(guest_map.regions) == 1


def test_a_ring_must_be_translated_after_an_unmapping() -> None:
    with Rig(regions=((0x10000, 0x10000), (0x40000, 0x10000))) as rig:
        rig.driver.add_chain([b"abc"], [8])
        rig.driver.publish()
        assert rig.ring.pop() == 1
        rig.map.remove(rig.memory.regions[0])
        for call in (
            rig.ring.pop,
            rig.ring.arm,
            lambda: rig.ring.write(0, 0, b"x"),
            lambda: rig.ring.complete(0, 0),
            lambda: rig.ring.load(0),
        ):
            with pytest.raises(ValueError, match="translate"):
                call()
        rig.map.add(rig.memory.fd, rig.memory.regions[0])
        rig.ring.translate()
        rig.ring.load(rig.heads_in_flight()[0])
        assert bytes(rig.ring.request(0)) == b"abc"
        rig.ring.write(0, 0, b"defg")
        rig.ring.complete(0, 4)
        assert rig.driver.collect()[0].data == b"defg"


def test_a_ring_whose_memory_is_gone_is_broken() -> None:
    with Rig() as rig:
        rig.map.remove(rig.memory.regions[0])
        with pytest.raises(RingError, match="descriptor table"):
            rig.ring.translate()
        with pytest.raises(RingError, match="ring is stopped: descriptor table"):
            rig.ring.pop()
