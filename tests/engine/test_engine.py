import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.engine import Ring
from appliance.errors import RingError
from tests.fakes.driver import (
    AVAIL_NO_INTERRUPT,
    EVENTFD,
    PAGE,
    USED_NO_NOTIFY,
)
from tests.fakes.engine_rig import Rig

MIB = 1 << 20


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


@pytest.fixture(params=[False, True], ids=["flags", "event_idx"])
def any_rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with Rig(event_idx=request.param) as made:
        yield made


@pytest.mark.parametrize("is_indirect", [False, True])
def test_a_chain_reaches_the_device_and_its_reply_the_driver(
    any_rig: Rig,
    *,
    is_indirect: bool,
) -> None:
    rig = any_rig
    head = rig.driver.add_chain([b"header", b"argument"], [4, 100], indirect=is_indirect)
    rig.driver.publish()
    assert rig.ring.pop() == 1
    assert bytes(rig.ring.request(0)) == b"headerargument"
    assert (rig.ring.head(0), rig.ring.readable_len(0), rig.ring.writable_len(0)) == (head, 14, 104)
    rig.ring.write(0, 0, b"0123456789")
    rig.ring.complete(0, 10)
    assert rig.driver.collect() == [(head, 10, b"0123456789")]
    assert (rig.ring.pop(), rig.ring.in_flight, rig.ring.last_avail) == (0, 0, 1)


def test_direct_descriptors_may_stand_before_an_indirect_one(rig: Rig) -> None:
    driver, memory = rig.driver, rig.memory
    inner = driver.add_chain([b"inner"], [8], indirect=True)
    table = driver._chains[inner].table
    assert table is not None
    gpa = memory.alloc(5)
    memory.write(gpa, b"outer")
    driver.set_desc(5, gpa, 5, 1, 6)
    driver.set_desc(6, table.gpa, table.size, 4 | 2)
    driver.offer(5)
    driver.publish()
    assert rig.ring.pop() == 2
    assert bytes(rig.ring.request(1)) == b"outerinner"
    assert rig.ring.writable_len(1) == 8


def test_a_batch_is_answered_in_any_order(any_rig: Rig) -> None:
    driver, ring = any_rig.driver, any_rig.ring
    heads = [driver.add_chain([b"%d" % i], [16]) for i in range(8)]
    driver.publish()
    assert ring.pop() == 8
    assert [ring.head(slot) for slot in range(8)] == heads
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    for slot in order:
        ring.write(slot, 0, bytes(ring.request(slot)) * 2)
        ring.complete(slot, 2)
    assert driver.collect(8) == [(heads[i], 2, b"%d%d" % (i, i)) for i in order]


def test_a_request_view_is_read_only_and_private(rig: Rig) -> None:
    rig.driver.add_chain([b"before"], [])
    rig.driver.publish()
    rig.ring.pop()
    request = rig.ring.request(0)
    rig.memory.write(rig.driver._chains[rig.ring.head(0)].buffers[0].gpa, b"AFTER!")
    assert bytes(request) == b"before"
    with pytest.raises(TypeError):
        request[0] = 0


def test_indices_wrap_at_16_bits() -> None:
    with Rig(base=65530, num=4) as rig:
        for turn in range(20):
            rig.driver.add_chain([b"%d" % turn], [8])
            rig.driver.publish()
            assert rig.serve() == 1
            assert rig.driver.collect()[0].data == b"%d" % turn
        assert rig.ring.last_avail == (65530 + 20) % 65536


@pytest.mark.slow
def test_a_ring_goes_round_more_than_65536_times(rig: Rig) -> None:
    # Two free slots keep the ring's index out of step with its size.
    for _ in range(65536 // 14 + 2):
        for _ in range(14):
            rig.driver.add_chain([b"x"], [])
        rig.driver.publish()
        assert rig.serve() == 14
        assert len(rig.driver.collect(14)) == 14


def test_limit_leaves_the_rest_in_the_ring(rig: Rig) -> None:
    for _ in range(10):
        rig.driver.add_chain([b"x"], [])
    rig.driver.publish()
    assert [rig.ring.pop(4), rig.ring.pop(4), rig.ring.pop(4), rig.ring.pop(4)] == [4, 4, 2, 0]


def test_requests_beyond_the_limit_are_counted_but_not_copied() -> None:
    with Rig(num=256, regions=((0, 0x800000),)) as rig:
        big = bytes(range(256)) * 64
        for _ in range(100):
            rig.driver.add_chain([big[:5000], big[5000:]], [])
        rig.driver.publish()
        total = 0
        while count := rig.ring.pop(64):
            assert count <= 32, "256 KiB of scratch hold 32 requests of 8 KiB"
            for slot in range(count):
                assert rig.ring.request(slot) == big[: Ring.REQUEST_MAX]
                assert rig.ring.readable_len(slot) == len(big)
                rig.ring.complete(slot, 0)
            total += count
        assert total == 100


def test_zero_length_descriptors_are_skipped(rig: Rig) -> None:
    # A bad address in an empty buffer is nobody's.
    rig.driver.set_desc(0, 0xFFFF_FFFF_FFFF_FFFF, 0, 1, 1)
    gpa = rig.memory.alloc(16)
    rig.memory.write(gpa, b"abc")
    rig.driver.set_desc(1, gpa, 3, 1, 2)
    rig.driver.set_desc(2, 0, 0, 1 | 2, 3)
    rig.driver.set_desc(3, gpa, 4, 2, 0)
    rig.driver.offer(0)
    rig.driver.publish()
    assert rig.ring.pop() == 1
    assert bytes(rig.ring.request(0)) == b"abc"
    assert rig.ring.writable_len(0) == 4


def test_a_buffer_may_span_regions_that_touch() -> None:
    regions = ((0x10000, 0x10000), (0x20000, PAGE), (0x20000 + PAGE, 0x10000))
    with Rig(regions=regions) as rig:
        start = 0x20000 - 10
        rig.memory.write(start, b"r" * 8)
        rig.driver.set_desc(0, start, 8, 1, 1)
        rig.driver.set_desc(1, start, PAGE + 20, 2)
        rig.driver.offer(0)
        rig.driver.publish()
        rig.ring.pop()
        assert bytes(rig.ring.request(0)) == b"r" * 8
        reply = os.urandom(PAGE + 20)
        rig.ring.write(0, 0, reply)
        assert rig.memory.read(start, PAGE + 20) == reply
        rig.ring.write(0, 9, b"XYZ")
        assert rig.memory.read(start + 8, 5) == reply[8:9] + b"XYZ" + reply[12:13]


def test_an_indirect_table_may_span_regions_that_touch() -> None:
    with Rig(regions=((0x10000, 0x10000), (0x20000, 0x10000)), ring_region=0) as rig:
        assert rig.memory.alloc(64) == 0x20000
        chain = rig.driver._chains[rig.driver.add_chain([b"abc", b"def"], [5], indirect=True)]
        assert chain.table is not None
        table = rig.memory.read(chain.table.gpa, chain.table.size)
        # 24 bytes before the border: the second descriptor is cut in two.
        rig.memory.write(0x20000 - 24, table)
        rig.driver.set_desc(chain.descs[0], 0x20000 - 24, len(table), 4)
        rig.driver.publish()
        assert rig.ring.pop() == 1
        assert bytes(rig.ring.request(0)) == b"abcdef"
        assert rig.ring.writable_len(0) == 5


def test_ring_and_buffers_may_be_in_different_regions() -> None:
    regions = tuple((0x100000 * i, 4 * PAGE) for i in range(1, 200))
    with Rig(regions=regions, ring_region=77) as rig:
        gpas = [rig.memory.alloc(16, region=i) for i in range(0, 199, 14)]
        for index, gpa in enumerate(gpas):
            rig.memory.write(gpa, b"%03d" % index)
            rig.driver.set_desc(index, gpa, 3, 1, index + 1)
        rig.driver.set_desc(len(gpas), rig.memory.alloc(16, region=198), 16, 2)
        rig.driver.offer(0)
        rig.driver.publish()
        rig.ring.pop()
        assert bytes(rig.ring.request(0)) == b"".join(b"%03d" % i for i in range(len(gpas)))


@pytest.fixture
def megabyte_file(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    content = os.urandom(MIB + 5000)
    path = tmp_path / "blob"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    yield fd, content
    os.close(fd)


def scattered_rig(pages: int) -> Rig:
    """A chain whose pages are in descending order, so that no two of them can be merged."""
    rig = Rig(num=1024, regions=((0, 0x1000000),))
    gpas = [rig.memory.alloc(PAGE) for _ in range(pages)]
    for gpa in gpas:
        rig.memory.free(gpa, PAGE)
    rig.memory._free[PAGE] = gpas[::-1]
    rig.driver.add_chain([b"read"], [16, *[PAGE] * pages], indirect=True)
    rig.driver.publish()
    return rig


@pytest.mark.parametrize("pages", [256, 1020, 3000])
def test_a_file_is_read_straight_into_scattered_pages(
    pages: int, megabyte_file: tuple[int, bytes]
) -> None:
    fd, content = megabyte_file
    with scattered_rig(pages) as rig:
        assert rig.ring.pop() == 1
        size = min(pages * PAGE, MIB)
        assert rig.ring._ring.iov_num[0] == pages + 1
        assert rig.ring.read_file(0, 16, fd, 4096, size) == size
        rig.ring.write(0, 0, b"h" * 16)
        rig.ring.complete(0, 16 + size)
        assert rig.driver.collect()[0].data == b"h" * 16 + content[4096 : 4096 + size]


def test_a_read_crosses_the_iov_max_border(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(os.urandom(3000 * PAGE))
    with scattered_rig(3000) as rig, path.open("rb") as file:
        rig.ring.pop()
        size = 3000 * PAGE
        assert rig.ring.read_file(0, 16, file.fileno(), 0, size) == size
        rig.ring.complete(0, 16 + size)
        assert rig.driver.collect()[0].data[16:] == path.read_bytes()


def test_a_read_stops_at_the_end_of_the_file(rig: Rig, megabyte_file: tuple[int, bytes]) -> None:
    fd, content = megabyte_file
    rig.driver.add_chain([], [PAGE])
    rig.driver.publish()
    rig.ring.pop()
    end = len(content)
    assert rig.ring.read_file(0, 0, fd, end - 100, PAGE) == 100
    assert rig.ring.read_file(0, 0, fd, end, PAGE) == 0
    assert rig.ring.read_file(0, 0, fd, 0, 0) == 0
    directory = os.open("/", os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            rig.ring.read_file(0, 0, directory, 0, 10)
    finally:
        os.close(directory)


def test_memory_views_are_written_as_bytes_are(rig: Rig) -> None:
    rig.driver.add_chain([], [3, 3, 100])
    rig.driver.publish()
    rig.ring.pop()
    rig.ring.write(0, 1, memoryview(b"abcdefgh")[2:7])
    rig.ring.write(0, 6, memoryview(EVENTFD.pack(7)).cast("Q"))
    rig.ring.complete(0, 14)
    assert rig.driver.collect()[0].data == b"\0cdefg" + EVENTFD.pack(7)


def test_misuse_is_a_value_error_and_breaks_nothing(
    rig: Rig, megabyte_file: tuple[int, bytes]
) -> None:
    fd, _ = megabyte_file
    ring = rig.ring
    rig.driver.add_chain([], [8, 8])
    rig.driver.publish()
    ring.pop()
    for call in (
        lambda: ring.write(0, 0, b"x" * 17),
        lambda: ring.write(0, 17, b""),
        lambda: ring.write(0, 2**64 - 1, b"xx"),
        lambda: ring.write(1, 0, b"x"),
        lambda: ring.read_file(0, 10, fd, 0, 7),
        lambda: ring.read_file(0, -1, fd, 0, 7),
        lambda: ring.complete(0, 17),
        lambda: ring.complete(1, 0),
        lambda: ring.load(16),
    ):
        before = rig.memory.image()
        with pytest.raises(ValueError, match=r"chain|bytes"):
            call()
        assert rig.memory.image() == before
    ring.complete(0, 16)
    with pytest.raises(ValueError, match="completed already"):
        ring.complete(0, 16)
    with pytest.raises(ValueError, match="completed already"):
        ring.write(0, 0, b"late")
    ring.load(0)
    with pytest.raises(ValueError, match="nothing is in flight"):
        ring.complete(0, 0)


def test_a_parked_chain_is_loaded_again(rig: Rig) -> None:
    parked = rig.driver.add_chain([b"slow"], [8])
    rig.driver.add_chain([b"fast"], [8])
    rig.driver.publish()
    assert rig.ring.pop() == 2
    rig.ring.write(1, 0, b"fast")
    rig.ring.complete(1, 4)
    assert rig.ring.pop() == 0
    rig.ring.load(parked)
    assert bytes(rig.ring.request(0)) == b"slow"
    assert rig.ring.head(0) == parked
    rig.ring.write(0, 0, b"done")
    rig.ring.complete(0, 4)
    assert [used.data for used in rig.driver.collect(2)] == [b"fast", b"done"]
    assert rig.heads_in_flight() == []


def test_the_first_completion_always_signals(any_rig: Rig) -> None:
    any_rig.driver.avail_flags = AVAIL_NO_INTERRUPT
    any_rig.driver.used_event = 1000
    any_rig.driver.add_chain([], [8])
    any_rig.driver.publish()
    assert any_rig.serve() == 1
    assert any_rig.driver.calls() == 1


def test_without_event_idx_the_avail_flags_decide() -> None:
    with Rig(event_idx=False) as rig:
        calls = []
        for flags in (0, AVAIL_NO_INTERRUPT, 0):
            rig.driver.avail_flags = flags
            rig.driver.add_chain([], [8])
            rig.driver.add_chain([], [8])
            rig.driver.publish()
            rig.serve()
            calls.append(rig.driver.calls())
        assert calls == [2, 0, 2]


@pytest.mark.parametrize("base", [0, 65533])
def test_with_event_idx_used_event_decides(base: int) -> None:
    with Rig(base=base) as rig:
        signalled = []
        rig.driver.used_event = base + 3
        for _ in range(6):
            rig.driver.add_chain([], [8])
            rig.driver.publish()
            rig.serve()
            signalled.append(rig.driver.calls())
        assert signalled == [1, 0, 0, 1, 0, 0], "the first, and the one at index 3"


def test_arming_asks_for_one_kick_with_event_idx(rig: Rig) -> None:
    assert rig.ring.arm() is False
    rig.driver.add_chain([b"a"], [8])
    assert rig.driver.publish() is True
    rig.driver.add_chain([b"b"], [8])
    assert rig.driver.publish() is False, "the device has not armed again"
    assert rig.ring.arm() is True, "chains are pending"
    assert rig.serve() == 2
    assert rig.ring.arm() is False
    assert rig.driver.avail_event == 2


def test_without_event_idx_a_busy_device_wants_no_kick() -> None:
    with Rig(event_idx=False) as rig:
        rig.driver.add_chain([b"a"], [8])
        assert rig.driver.publish() is True
        assert rig.ring.pop() == 1
        assert rig.driver.used_flags == USED_NO_NOTIFY
        rig.driver.add_chain([b"b"], [8])
        assert rig.driver.publish() is False
        assert rig.ring.arm() is True
        assert rig.driver.used_flags == USED_NO_NOTIFY
        assert rig.ring.pop() == 1
        assert rig.ring.arm() is False
        assert rig.driver.used_flags == 0
        rig.driver.add_chain([b"c"], [8])
        assert rig.driver.publish() is True


def _send_for_ever(sock: socket.socket) -> None:
    while True:
        sock.send(b"x" * 65536)


def test_a_call_socket_gets_eight_bytes_and_may_be_full(rig: Rig) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(0)
        rig.ring.set_call(ours.fileno())
        assert theirs.recv(100) == EVENTFD.pack(1)
        ours.settimeout(0)
        with pytest.raises(BlockingIOError):
            _send_for_ever(ours)
        ours.settimeout(None)
        rig.driver.add_chain([], [8])
        rig.driver.publish()
        assert rig.serve() == 1
        theirs.close()
        rig.driver.used_event = 1
        rig.driver.add_chain([], [8])
        rig.driver.publish()
        assert rig.serve() == 1, "a closed peer is no error, and no SIGPIPE"


def test_a_new_call_fd_is_signalled_at_once_and_minus_one_means_none(rig: Rig) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        rig.ring.set_call(fd)
        assert os.eventfd_read(fd) == 1
        rig.ring.set_call(-1)
        rig.driver.add_chain([], [8])
        rig.driver.publish()
        assert rig.serve() == 1
        assert rig.driver.calls() == 0
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
    finally:
        os.close(fd)


def test_signal_error_reaches_the_err_fd(rig: Rig) -> None:
    rig.ring.signal_error()
    assert rig.driver.errors() == 1


def test_a_recovered_ring_knows_nothing_of_a_closed_one(rig: Rig) -> None:
    rig.ring.close()
    with pytest.raises(RingError, match="closed"):
        rig.ring.pop()
    assert rig.restart().pop() == 0
