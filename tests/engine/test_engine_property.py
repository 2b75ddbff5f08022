"""Random descriptor tables: popped or refused, and never a byte written elsewhere."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import RingError
from tests.fakes.driver import DESC, DESC_INDIRECT, DESC_WRITE, PAGE, USED_ELEM
from tests.fakes.engine_rig import Rig

NUM = 8
REGIONS = ((0x10000, PAGE), (0x11000, 2 * PAGE), (0x20000, PAGE), (0x40000, 4 * PAGE))
TABLES = 0x12000
TABLE_LEN = 6

EDGES = [start + size for start, size in REGIONS] + [start for start, _ in REGIONS]
ADDRESSES = st.one_of(
    st.builds(lambda edge, delta: edge + delta, st.sampled_from(EDGES), st.integers(-64, 64)),
    st.integers(0x10000, 0x13000),
    st.sampled_from([TABLES, TABLES + 8, 2**64 - 1, 2**64 - 16, 0]),
    st.integers(0, 2**64 - 1),
)
LENGTHS = st.one_of(
    st.integers(0, 64),
    st.sampled_from([16 * n for n in range(1, TABLE_LEN + 2)]),
    st.integers(0, 3 * PAGE),
    st.integers(0, 2**32 - 1),
)


class Desc(NamedTuple):
    addr: int
    length: int
    flags: int
    next_index: int


WILD = st.builds(Desc, ADDRESSES, LENGTHS, st.integers(0, 7), st.integers(0, NUM))
TAME = st.builds(
    Desc,
    st.integers(0x10000, 0x12000),
    st.integers(0, PAGE),
    st.sampled_from([0, 1, 2, 2, 3]),
    st.integers(0, NUM - 1),
)
TO_TABLE = st.builds(
    Desc, st.just(TABLES), st.just(16 * TABLE_LEN), st.just(DESC_INDIRECT), st.just(0)
)
ALMOST_TAME = st.one_of(TAME, TAME, TAME, TO_TABLE)


def tables(size: int) -> st.SearchStrategy[list[Desc]]:
    return st.one_of(
        *(
            st.lists(kind, min_size=size, max_size=size)
            for kind in (ALMOST_TAME, TAME, st.one_of(WILD, ALMOST_TAME))
        )
    )


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig(num=NUM, regions=REGIONS) as made:
        yield made


def reset(rig: Rig, event_idx: bool) -> None:  # noqa: FBT001 - one call, by keyword
    for region in rig.memory.regions:
        start = rig.memory.offset(region.gpa)
        rig.memory.file[start : start + region.size] = bytes(region.size)
    rig.area[:] = bytes(len(rig.area))
    rig.features = rig.features | 1 << 29 if event_idx else rig.features & ~(1 << 29)
    rig.driver._next_avail = 0
    rig.ring.close()
    rig.ring = rig.start()


def fill(rig: Rig, direct: Sequence[Desc], table: Sequence[Desc], heads: Sequence[int]) -> None:
    for index, desc in enumerate(direct):
        rig.driver.set_desc(index, *desc)
    rig.memory.write(TABLES, b"".join(DESC.pack(*desc) for desc in table))
    for head in heads:
        rig.driver.offer(head)
    rig.driver.avail_idx = len(heads)


def allowed(rig: Rig) -> set[int]:
    """File offsets of every byte that some descriptor, reachable or not, calls writable.

    An indirect table may lie anywhere: whatever memory it is in is read as descriptors.
    """
    places = [(rig.driver.desc_gpa, NUM * DESC.size)]
    descs = list(read_descs(rig, *places[0]))
    for desc in descs[:NUM]:
        if desc.flags & DESC_INDIRECT and desc.length % 16 == 0:
            descs += read_descs(rig, desc.addr, min(desc.length, 0x8000))
    return {
        offset
        for desc in descs
        if desc.flags & DESC_WRITE
        for offset in offsets(rig, desc.addr, desc.length)
    }


def read_descs(rig: Rig, gpa: int, size: int) -> Iterator[Desc]:
    for at in range(gpa, gpa + size, DESC.size):
        try:
            yield Desc(*DESC.unpack(rig.memory.read(at, DESC.size)))
        except KeyError:
            return


def offsets(rig: Rig, addr: int, length: int) -> Iterator[int]:
    for region in rig.memory.regions:
        start = max(addr, region.gpa)
        end = min(addr + length, region.gpa + region.size)
        if start < end:
            yield from range(rig.memory.offset(start), rig.memory.offset(start) + end - start)


def changed(before: bytes, after: bytes) -> set[int]:
    if before == after:
        return set()
    return {at for at, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    direct=tables(NUM),
    table=tables(TABLE_LEN),
    heads=st.one_of(
        st.lists(st.integers(0, NUM - 1), max_size=NUM),
        st.lists(st.integers(0, NUM), max_size=NUM + 1),
    ),
    event_idx=st.booleans(),
)
def test_random_tables_are_popped_or_refused_and_memory_stays_as_it_was(
    rig: Rig,
    direct: list[Desc],
    table: list[Desc],
    heads: list[int],
    event_idx: bool,  # noqa: FBT001 - hypothesis passes it by name
) -> None:
    reset(rig, event_idx=event_idx)
    fill(rig, direct, table, heads)
    writable = allowed(rig)
    used = rig.memory.offset(rig.driver.used_gpa)
    flags = set() if event_idx else {used, used + 1}
    ring_words = set(range(used + 2, used + 4 + USED_ELEM.size * NUM)) | flags
    before = rig.memory.image()
    popped = 0
    while pop_one(rig):
        popped += 1
        assert len(rig.ring.request(0)) == min(rig.ring.readable_len(0), rig.ring.REQUEST_MAX)
        length = rig.ring.writable_len(0)
        if popped == 1:
            assert changed(before, rig.memory.image()) <= flags
            # Later chains may read descriptors that this changes: only here is the set above right.
            rig.ring.write(0, 0, b"\xa5" * length)
            assert changed(before, rig.memory.image()) <= writable | flags
            before = rig.memory.image()
        rig.ring.complete(0, length)
        assert changed(before, rig.memory.image()) <= ring_words
    assert popped <= len(heads)


def pop_one(rig: Rig) -> int:
    before = rig.memory.image()
    try:
        return rig.ring.pop(1)
    except RingError:
        quiet = rig.memory.offset(rig.driver.used_gpa)
        assert changed(before, rig.memory.image()) <= {quiet, quiet + 1}
        return 0
