"""A guest that breaks the rules of the ring, rule by rule."""

import os
import signal
from collections.abc import Callable

import pytest

from appliance.engine import RingLayout
from appliance.errors import RingError
from tests.fakes.driver import (
    DESC,
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    PAGE,
    DriverRing,
)
from tests.fakes.engine_rig import Rig

U64_MAX = 2**64 - 1
GOOD = 0x12000
HOLE = 0x28000
REGIONS = ((0x10000, 0x10000), (0x20000, 0x8000), (0x30000, 0x10000))


def table(rig: Rig, *descs: tuple[int, int, int, int]) -> tuple[int, int]:
    image = b"".join(DESC.pack(*desc) for desc in descs)
    rig.memory.write(GOOD + PAGE, image)
    return GOOD + PAGE, len(image)


def direct(*descs: tuple[int, int, int, int]) -> Callable[[Rig], None]:
    def build(rig: Rig) -> None:
        for index, desc in enumerate(descs):
            rig.driver.set_desc(index, *desc)
        rig.driver.offer(0)
        rig.driver.publish()

    return build


def indirect(*descs: tuple[int, int, int, int]) -> Callable[[Rig], None]:
    def build(rig: Rig) -> None:
        direct((*table(rig, *descs), DESC_INDIRECT, 0))(rig)

    return build


def offered(head: int) -> Callable[[Rig], None]:
    def build(rig: Rig) -> None:
        rig.driver.offer(head)
        rig.driver.publish()

    return build


def idx(value: int) -> Callable[[Rig], None]:
    def build(rig: Rig) -> None:
        rig.driver.avail_idx = value

    return build


LOOP_OF_TWO = ((GOOD, 8, DESC_NEXT, 1), (GOOD, 8, DESC_NEXT, 0))

HOSTILE: dict[str, tuple[Callable[[Rig], None], str]] = {
    "avail_jump": (idx(17), "avail.idx runs ahead by more than the queue size: 17"),
    "avail_backwards": (idx(0xFFFF), "avail.idx runs ahead .*: 65535"),
    "head": (offered(16), "head 16 is beyond the queue, at index 0"),
    "head_max": (offered(0xFFFF), "head 65535 is beyond the queue"),
    "next": (direct((GOOD, 8, DESC_NEXT, 16)), "next is beyond .*: 16, in the chain of head 0"),
    "next_in_table": (indirect((GOOD, 8, DESC_NEXT, 1)), "next is beyond .*: 1, in the chain"),
    "self_loop": (direct((GOOD, 8, DESC_NEXT, 0)), "chain loops .* 16 descriptors, head 0"),
    "loop": (direct(*LOOP_OF_TWO), "chain loops .* 16 descriptors, head 0"),
    "empty_loop": (direct((0, 0, DESC_NEXT, 0)), "chain loops"),
    "loop_in_table": (indirect(*LOOP_OF_TWO), "chain loops .* 2 descriptors, head 0"),
    "nested": (
        indirect((GOOD, 16, DESC_INDIRECT, 0)),
        "INDIRECT inside an indirect table: address 0x12000, head 0",
    ),
    "indirect_next": (
        direct((GOOD, 16, DESC_INDIRECT | DESC_NEXT, 1), (GOOD, 16, 0, 0)),
        "INDIRECT together with NEXT: table at 0x12000, head 0",
    ),
    "indirect_empty": (direct((GOOD, 0, DESC_INDIRECT, 0)), "bad length .*: 0x0 bytes"),
    "indirect_odd": (direct((GOOD, 24, DESC_INDIRECT, 0)), "bad length .*: 0x18 bytes"),
    "indirect_long": (direct((GOOD, 32769 * 16, DESC_INDIRECT, 0)), "bad length .*: 0x80010 bytes"),
    "indirect_hole": (direct((HOLE, 16, DESC_INDIRECT, 0)), "not guest memory: address 0x28000"),
    "indirect_wraps": (
        direct((U64_MAX - 7, 16, DESC_INDIRECT, 0)),
        "buffer wraps around the address space: 0xfffffffffffffff8",
    ),
    "wraps": (direct((U64_MAX - 3, 8, 0, 0)), "buffer wraps around .*: 0xfffffffffffffffc, head 0"),
    "last_byte": (direct((U64_MAX, 1, 0, 0)), "buffer wraps around .*: 0xffffffffffffffff, head 0"),
    "below": (direct((0xFFFF, 1, 0, 0)), "not guest memory: address 0xffff, head 0"),
    "hole": (direct((HOLE, 1, DESC_WRITE, 0)), "not guest memory: address 0x28000, head 0"),
    "into_hole": (
        direct((GOOD, 0x28001 - GOOD, DESC_WRITE, 0)),
        "not guest memory: address 0x28000, head 0",
    ),
    "over_the_end": (direct((0x3FFFF, 2, 0, 0)), "not guest memory: address 0x40000, head 0"),
    "far": (direct((1 << 62, 1, 0, 0)), "not guest memory: address 0x4000000000000000"),
    "order": (
        direct((GOOD, 8, DESC_NEXT | DESC_WRITE, 1), (GOOD + 16, 8, 0, 0)),
        "readable buffer behind a writable one: address 0x12010, head 0",
    ),
    "order_in_table": (
        indirect((GOOD, 8, DESC_NEXT | DESC_WRITE, 1), (GOOD + 16, 8, 0, 0)),
        "readable buffer behind a writable one: address 0x12010, head 0",
    ),
}


@pytest.mark.parametrize(("build", "text"), HOSTILE.values(), ids=HOSTILE)
def test_a_broken_rule_is_named_and_breaks_the_ring(
    build: Callable[[Rig], None], text: str
) -> None:
    with Rig(regions=REGIONS) as rig:
        build(rig)
        before = rig.memory.image()
        with pytest.raises(RingError, match=f"^{text}"):
            rig.ring.pop()
        with pytest.raises(RingError, match=f"^ring is stopped: {text}"):
            rig.ring.pop()
        with pytest.raises(RingError, match=f"^ring is stopped: {text}"):
            rig.ring.arm()
        with pytest.raises(RingError, match=f"^ring is stopped: {text}"):
            rig.ring.complete(0, 0)
        assert rig.memory.image() == before
        assert rig.driver.calls() == 0


def test_indirect_must_have_been_negotiated() -> None:
    with Rig(regions=REGIONS, indirect=False) as rig:
        indirect((GOOD, 8, 0, 0))(rig)
        with pytest.raises(RingError, match="INDIRECT was not negotiated: table at 0x13000"):
            rig.ring.pop()


@pytest.mark.parametrize("bad_head", [9, 16], ids=["bad chain", "head beyond the queue"])
def test_the_chains_before_a_faulty_one_are_returned(bad_head: int) -> None:
    with Rig(regions=REGIONS) as rig:
        good = [rig.driver.add_chain([b"good"], [8]) for _ in range(2)]
        rig.driver.set_desc(9, HOLE, 8)
        rig.driver.offer(bad_head)
        rig.driver.add_chain([b"never seen"], [8])
        rig.driver.publish()
        assert rig.ring.pop() == 2
        assert rig.heads_in_flight() == good
        for slot in range(2):
            rig.ring.write(slot, 0, b"reply")
            rig.ring.complete(slot, 5)
        assert rig.driver.used_idx == 2
        with pytest.raises(RingError, match=f"head {bad_head}"):
            rig.ring.pop()
        assert rig.ring.in_flight == (1 if bad_head == 9 else 0)


def test_nothing_is_completed_after_a_fault() -> None:
    with Rig(regions=REGIONS) as rig:
        good = rig.driver.add_chain([b"good"], [8])
        rig.driver.publish()
        assert rig.ring.pop() == 1
        rig.driver.set_desc(9, HOLE, 8)
        rig.driver.offer(9)
        rig.driver.publish()
        with pytest.raises(RingError, match=r"address 0x28000, head 9"):
            rig.ring.pop()
        with pytest.raises(RingError, match="ring is stopped"):
            rig.ring.write(0, 0, b"x")
        with pytest.raises(RingError, match="ring is stopped"):
            rig.ring.complete(0, 0)
        assert rig.driver.used_idx == 0
        assert rig.heads_in_flight() == [good, 9], "both are on record all the same"


def test_a_parked_chain_that_turned_bad_breaks_the_ring() -> None:
    with Rig(regions=REGIONS) as rig:
        head = rig.driver.add_chain([b"good"], [])
        rig.driver.publish()
        rig.ring.pop()
        rig.driver.set_desc(head, HOLE, 8)
        with pytest.raises(RingError, match=f"address 0x28000, head {head}"):
            rig.ring.load(head)


@pytest.mark.parametrize("used_idx", [1, 2, 0x8000, 0xFFFF])
def test_a_used_idx_that_does_not_match_the_base_hurts_the_guest_only(used_idx: int) -> None:
    with Rig() as rig:
        rig.driver.used_idx = used_idx
        rig.area[:] = bytes(len(rig.area))
        rig.ring.close()
        rig.ring = rig.start()
        rig.driver.add_chain([b"x"], [8])
        rig.driver.add_chain([b"y"], [8])
        rig.driver.publish()
        assert rig.serve() == 2
        assert rig.ring.in_flight == 0
        assert rig.driver.used_idx == (used_idx + 2) & 0xFFFF


def test_a_head_offered_twice_is_two_requests() -> None:
    with Rig() as rig:
        head = rig.driver.add_chain([b"x"], [8])
        rig.driver.offer(head)
        rig.driver.publish()
        assert rig.ring.pop() == 2
        assert [rig.ring.head(0), rig.ring.head(1)] == [head, head]
        rig.ring.complete(0, 0)
        rig.ring.complete(1, 0)
        assert rig.driver.used_idx == 2
        assert rig.heads_in_flight() == []


@pytest.mark.parametrize(("count", "is_good"), [(64, True), (65, False)])
def test_a_chain_holds_at_most_4_gib(count: int, *, is_good: bool) -> None:
    size = 1 << 26
    regions = ((0, size), (1 << 32, 16 * PAGE))
    with Rig(num=128, regions=regions) as rig:
        direct(*((0, size, DESC_WRITE | DESC_NEXT * (i < count - 1), i + 1) for i in range(count)))(
            rig
        )
        if is_good:
            assert rig.ring.pop() == 1
            assert rig.ring.writable_len(0) == 1 << 32
        else:
            with pytest.raises(RingError, match="more than 4 GiB: buffer at 0x0, head 0"):
                rig.ring.pop()


def long_table(rig: Rig, addr: int, count: int) -> None:
    image = b"".join(
        DESC.pack(addr, 4, DESC_WRITE | DESC_NEXT * (i < count - 1), (i + 1) % count)
        for i in range(count)
    )
    gpa = rig.memory.alloc(len(image))
    rig.memory.write(gpa, image)
    direct((gpa, len(image), DESC_INDIRECT, 0))(rig)


def test_the_longest_indirect_table_is_served() -> None:
    with Rig(regions=((0, 0x200000),)) as rig:
        long_table(rig, PAGE, 32768)
        assert rig.ring.pop() == 1
        assert rig.ring.writable_len(0) == 4 * 32768


def test_a_chain_in_too_many_pieces_is_refused() -> None:
    with Rig(regions=((0, 0x10000), (0x10000, 0x200000))) as rig:
        # Each buffer lies across the border, so each is two pieces.
        long_table(rig, 0x10000 - 2, 32768)
        with pytest.raises(RingError, match="more than 33792 pieces of memory, head 0"):
            rig.ring.pop()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num": 0}, "not a power of two up to 32768: 0"),
        ({"num": 12}, "not a power of two up to 32768: 12"),
        ({"desc": 8}, "descriptor table is misaligned"),
        ({"avail": 1}, "available ring is misaligned"),
        ({"used": 2}, "used ring is misaligned"),
        ({"desc": 1 << 40}, r"descriptor table .* address 0x80123400"),
        ({"avail": 0x40000}, "available ring"),
        ({"used": -(1 << 40)}, "used ring"),
    ],
)
def test_a_ring_must_lie_aligned_in_one_region(change: dict[str, int], text: str) -> None:
    with Rig() as rig:
        fields = rig.driver.layout()._asdict()
        for name, value in change.items():
            fields[name] = value if name == "num" else fields[name] + value
        rig.ring.close()

        def layout() -> RingLayout:
            return RingLayout(**fields)

        rig.driver.layout = layout  # type: ignore[method-assign]
        with pytest.raises(RingError, match=text):
            rig.start()


@pytest.mark.parametrize("area", ["desc", "avail", "used"])
def test_a_ring_area_ends_inside_its_region_with_its_event_word(area: str) -> None:
    size = {"desc": 16 * 16, "avail": 6 + 2 * 16, "used": 6 + 8 * 16}[area]
    step = {"desc": 16, "avail": 2, "used": 4}[area]
    end = 0x50000
    with Rig() as rig:
        last = (end - size) // step * step
        setattr(rig.driver, f"{area}_gpa", last)
        rig.restart()
        setattr(rig.driver, f"{area}_gpa", last + step)
        with pytest.raises(RingError, match="not in one region"):
            rig.restart()


def _scribble(driver: DriverRing) -> None:
    # Every word of a descriptor changes between good and bad, also in the middle of a pop.
    while True:
        driver.set_desc(0, GOOD, 64, DESC_NEXT, 1)
        driver.set_desc(1, GOOD, 64, DESC_WRITE, 0)
        driver.set_desc(0, HOLE, 0xFFFFFFFF, DESC_WRITE | DESC_NEXT, 0xFFFF)
        driver.set_desc(1, GOOD, 64, DESC_INDIRECT, 0xFFFF)
        driver.set_desc(0, GOOD, 0x8000, DESC_NEXT, 1)
        driver.set_desc(1, 0x30000 - 8, 16, 0, 0)


def test_descriptors_that_change_meanwhile_are_one_thing_or_the_other() -> None:
    with Rig(regions=REGIONS) as rig:
        child = os.fork()
        if not child:
            signal.alarm(60)
            _scribble(rig.driver)
        outcomes = set()
        try:
            for _ in range(2000):
                rig.area[:] = bytes(len(rig.area))
                rig.ring.close()
                rig.driver.used_idx = 0
                rig.ring = rig.start()
                rig.driver._next_avail = 0
                rig.driver.offer(0)
                rig.driver.avail_idx = 1
                outcomes.add(_pop_and_check(rig))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert len(outcomes) > 1


def _pop_and_check(rig: Rig) -> str:
    try:
        rig.ring.pop()
    except RingError as error:
        return str(error)
    length = rig.ring.writable_len(0)
    assert len(rig.ring.request(0)) == min(rig.ring.readable_len(0), rig.ring.REQUEST_MAX)
    rig.ring.write(0, 0, b"\0" * length)
    rig.ring.complete(0, length)
    return f"{length} writable"
