"""Pages that a ring writes are marked in the dirty log, and no others."""

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.dirty_log import DirtyLog
from appliance.engine import Ring
from tests.fakes.dirty_logs import LogFile, changed_pages, pages_of
from tests.fakes.driver import DESC_NEXT, DESC_WRITE, PAGE
from tests.fakes.engine_rig import Rig

# The first two touch each other, so buffers lie in both; the third begins a byte of the log later.
REGIONS = ((0x10000, 0x20000), (0x30000, 0x20000), (0x80000, 0x40000))
NUM = 1024


@pytest.fixture(params=[True, False], ids=["event-idx", "flags"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with Rig(num=NUM, event_idx=request.param, regions=REGIONS) as made:
        yield made


@pytest.fixture
def log(rig: Rig) -> Iterator[LogFile]:
    with LogFile(rig.memory) as made:
        yield made


def start_logging(rig: Rig, log: LogFile, *, with_used: bool = True) -> Ring:
    used_addr = rig.driver.used_gpa if with_used else None
    rig.ring.log = DirtyLog(log.fd, log.size, 0, used_addr)
    return rig.ring


def offer_writable(rig: Rig, first: int, buffers: list[tuple[int, int]]) -> None:
    """Publish a chain of writable buffers, (gpa, size) each, in descriptors from `first` on."""
    for number, (gpa, size) in enumerate(buffers):
        is_last = number == len(buffers) - 1
        flags = DESC_WRITE | (0 if is_last else DESC_NEXT)
        rig.driver.set_desc(first + number, gpa, size, flags, first + number + 1)
    rig.driver.offer(first)
    rig.driver.publish()


def inverted(rig: Rig, buffers: list[tuple[int, int]]) -> bytes:
    """Return other bytes than those that are there."""
    old = b"".join(rig.memory.read(gpa, size) for gpa, size in buffers)
    return bytes(byte ^ 0xFF for byte in old)


def test_exactly_the_pages_that_change_are_marked(rig: Rig, log: LogFile, tmp_path: Path) -> None:
    rng = random.Random(16)
    ring = start_logging(rig, log)
    file = tmp_path / "content"
    num_pages = 0
    for round_ in range(40):
        # Away from the areas of the ring, which are in the third region.
        buffers = [
            (rng.randrange(0x11000, 0x4C000), rng.choice((1, 2, 100, PAGE, 3 * PAGE - 1)))
            for _ in range(rng.randrange(1, 4))
        ]
        spans = [set(range(gpa, gpa + size)) for gpa, size in buffers]
        if sum(map(len, spans)) != len(set().union(*spans)):
            continue  # whoever writes a byte twice may leave it as it was
        offer_writable(rig, 8 * round_, buffers)
        reply = inverted(rig, buffers)
        length = rng.randrange(1, len(reply) + 1)
        split = rng.randrange(length + 1)
        file.write_bytes(reply)
        log.clear()
        before = rig.memory.image()

        assert ring.pop() == 1
        ring.write(0, 0, reply[:split])
        with file.open("rb") as opened:
            got = ring.read_file(0, split, opened.fileno(), split, length - split)
        assert got == length - split
        ring.complete(0, length)
        assert not ring.arm()

        changed = changed_pages(rig.memory, before, rig.memory.image())
        assert log.marked() == changed, (buffers, length, split)
        num_pages += len(changed)
    assert num_pages > 100


def test_a_used_ring_that_is_not_to_be_logged_is_not(rig: Rig, log: LogFile) -> None:
    ring = start_logging(rig, log, with_used=False)
    gpa = 0x20000 - 8
    offer_writable(rig, 0, [(gpa, 16)])
    ring.pop()
    ring.write(0, 0, b"x" * 16)
    ring.complete(0, 16)
    ring.arm()
    assert log.marked() == pages_of(gpa, 16)


def test_the_used_ring_is_marked_where_the_front_end_says(rig: Rig, log: LogFile) -> None:
    rig.ring.log = DirtyLog(log.fd, log.size, 0, 0x1000)
    offer_writable(rig, 0, [(0x20000, 16)])
    rig.ring.pop()
    rig.ring.complete(0, 0)
    assert log.marked() == pages_of(0x1000, 4)


def test_what_a_file_lacks_is_not_marked(rig: Rig, log: LogFile, tmp_path: Path) -> None:
    ring = start_logging(rig, log)
    short = tmp_path / "short"
    short.write_bytes(b"s" * PAGE)
    offer_writable(rig, 0, [(0x20000, 4 * PAGE)])
    ring.pop()
    log.clear()
    with short.open("rb") as opened:
        assert ring.read_file(0, 0, opened.fileno(), 0, 4 * PAGE) == PAGE
    assert log.marked() == pages_of(0x20000, PAGE)


def test_a_failed_read_may_have_written_anything(rig: Rig, log: LogFile) -> None:
    ring = start_logging(rig, log)
    offer_writable(rig, 0, [(0x20000, 4 * PAGE)])
    ring.pop()
    log.clear()
    directory = os.open("/", os.O_RDONLY)
    with pytest.raises(IsADirectoryError):
        ring.read_file(0, 0, directory, 0, 4 * PAGE)
    os.close(directory)
    assert log.marked() == pages_of(0x20000, 4 * PAGE)


def test_a_log_that_is_too_small_is_named_once_and_nothing_behind_it_is_written(
    rig: Rig, log: LogFile, caplog: pytest.LogCaptureFixture
) -> None:
    size = 0x20000 // PAGE // 8  # its last bit is that of the page before 0x20000
    rig.ring.log = DirtyLog(log.fd, size, 0, None)
    offer_writable(rig, 0, [(0x1F000, 2 * PAGE)])
    rig.ring.pop()
    with caplog.at_level(logging.ERROR):
        rig.ring.write(0, 0, b"x" * 2 * PAGE)
        rig.ring.write(0, 0, b"y" * 2 * PAGE)
    assert log.marked() == {0x1F}
    (record,) = caplog.records
    assert "covers guest memory up to 0x20000" in record.getMessage()


@pytest.mark.parametrize(("size", "offset"), [(1 << 20, 0), (16, PAGE), (16, 1)])
def test_a_log_that_its_file_does_not_hold_is_refused(log: LogFile, size: int, offset: int) -> None:
    with pytest.raises((OSError, ValueError)):
        DirtyLog(log.fd, size, offset, None)
