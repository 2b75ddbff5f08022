"""Workers mark what they write for a front-end that moves its guest, and nothing else."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from appliance.vhost._vhost_wire import VirtioFeature
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.dirty_logs import LogFile, changed_pages, pages_of
from tests.fakes.driver import DESC_WRITE, PAGE, DriverRing
from tests.fakes.frontend import BackendGoneError
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.fakes.vmms import GUEST_FEATURES

pytestmark = pytest.mark.slow

ROOT = 1
# Of these, the used ring has pages of its own, and its end is in another page than its start.
NUM: Final = 512
READ_BYTES: Final = 5 * PAGE


@pytest.fixture(params=["c", "python"])
def appliance(
    request: pytest.FixtureRequest,
    store: tuple[Path, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[ApplianceProcess]:
    monkeypatch.setenv("APPLIANCE_ANSWERS", request.param)
    with ApplianceProcess(store[0], tmp_path) as process:
        yield process


@pytest.fixture
def guest(appliance: ApplianceProcess) -> Iterator[FakeGuest]:
    with FakeGuest(appliance.connect(), num=NUM) as made:
        made.mount()
        yield made


def start_logging(guest: FakeGuest, log: LogFile, *, with_used: bool = True) -> None:
    """Do as QEMU when a migration begins, while the rings run."""
    front_end = guest.vmm.front_end
    front_end.acks = True
    front_end.set_log_base(log.fd, log.size)
    front_end.set_features(GUEST_FEATURES | VirtioFeature.LOG_ALL)
    for queue, ring in enumerate(guest.rings):
        front_end.set_vring_log(queue, ring.layout(), ring.used_gpa, is_logged=with_used)
    front_end.acks = False


def stop_logging(guest: FakeGuest) -> None:
    front_end = guest.vmm.front_end
    front_end.acks = True
    front_end.set_features(GUEST_FEATURES)
    for queue, ring in enumerate(guest.rings):
        front_end.set_vring_log(queue, ring.layout(), 0, is_logged=False)
    front_end.acks = False


def requests(guest: FakeGuest, name: bytes) -> list[tuple[bytes, Sequence[int]]]:
    """Return requests of all kinds, with the sizes of their writable buffers in bytes."""
    top = guest.lookup(ROOT, name)
    sub = guest.lookup(top, b"sub")
    large = guest.lookup(top, b"large")
    return [
        (fuse_client.lookup(top, b"small"), [PAGE]),
        (fuse_client.lookup(ROOT, b"no-such-name"), [PAGE]),
        (fuse_client.lookup(sub, b"entry-7"), [PAGE, PAGE]),
        (fuse_client.getattr_(large), [PAGE]),
        (fuse_client.readlink(guest.lookup(top, b"link")), [PAGE]),
        (fuse_client.readdir(sub, 0, READ_BYTES), [PAGE, READ_BYTES]),
        (fuse_client.readdirplus(sub, 0, READ_BYTES), [READ_BYTES, PAGE]),
        (fuse_client.read(guest.lookup(top, b"small"), 0, PAGE), [PAGE, PAGE]),
        (fuse_client.read(large, 12345, READ_BYTES), [PAGE] * 6),
        (fuse_client.read(large, (1 << 20) - 100, READ_BYTES), [2 * PAGE, 4 * PAGE]),
        (fuse_client.open_(large), [PAGE]),
        (fuse_client.statfs(), [PAGE]),
        (fuse_client.mkdir(ROOT, b"no"), [PAGE]),
        (fuse_client.getattr_(1 << 50), [PAGE]),
        (b"\xff" * 60, [PAGE]),
        (fuse_client.forget(top), []),
        (fuse_client.init(), [PAGE]),
    ]


def offer(ring: DriverRing, request: bytes, writable: Sequence[int]) -> None:
    """Queue a chain whose writable buffers are full of what no reply consists of."""
    head = ring.add_chain([request], writable)
    for buffer in ring._chains[head].buffers:
        if buffer.flags & DESC_WRITE:
            ring.memory.write(buffer.gpa, b"\xa5" * buffer.size)


def replace(guest: FakeGuest, log: LogFile) -> None:
    """Pass a new log on, so that the former one is complete: no worker uses it any more."""
    guest.vmm.front_end.set_log_base(log.fd, log.size)


def used_pages(ring: DriverRing) -> set[int]:
    return pages_of(ring.used_gpa, 6 + 8 * ring.num)


def event_page(ring: DriverRing) -> set[int]:
    return pages_of(ring.used_gpa + 4 + 8 * ring.num, 2)


def test_each_page_that_is_written_is_marked_and_no_other(
    guest: FakeGuest, store: tuple[Path, bytes]
) -> None:
    ring = guest.rings[1]
    sent = requests(guest, store[1])
    with LogFile(guest.memory) as log, LogFile(guest.memory) as other:
        start_logging(guest, other)
        for batch in [[one] for one in sent] + [sent]:
            log.clear()
            replace(guest, log)
            for request, writable in batch:
                offer(ring, request, writable)
            before = guest.memory.image()
            ring.publish()
            num = 0
            while num < len(batch):
                num += len(ring.collect(timeout_s=DEADLINE_S))
            replace(guest, other)

            changed = changed_pages(guest.memory, before, guest.memory.image())
            changed -= pages_of(ring.avail_gpa, 6 + 2 * ring.num)  # the driver's
            # Asking for a kick again may write what is there.
            events = event_page(ring) | event_page(guest.rings[0])
            assert changed <= log.marked() <= changed | events
            assert used_pages(ring) & changed


def test_replies_are_marked_without_the_used_ring(
    guest: FakeGuest, store: tuple[Path, bytes]
) -> None:
    ring = guest.rings[1]
    with LogFile(guest.memory) as log:
        start_logging(guest, log, with_used=False)
        guest.ask(fuse_client.lookup(ROOT, store[1]))
        assert log.marked()
        assert not log.marked() & used_pages(ring)


def test_nothing_is_marked_when_logging_is_off(guest: FakeGuest, store: tuple[Path, bytes]) -> None:
    with LogFile(guest.memory) as log:
        guest.vmm.front_end.set_log_base(log.fd, log.size)
        guest.lookup(ROOT, store[1])
        assert log.marked() == set()
        start_logging(guest, log)
        guest.lookup(ROOT, store[1])
        assert log.marked()
        stop_logging(guest)
        log.clear()
        for request, writable in requests(guest, store[1]):
            offer(guest.rings[1], request, writable)
            guest.rings[1].publish()
            guest.rings[1].collect(timeout_s=DEADLINE_S)
        assert log.marked() == set()


def test_logging_goes_on_with_the_successor_of_a_killed_worker(
    appliance: ApplianceProcess, guest: FakeGuest, store: tuple[Path, bytes]
) -> None:
    ring = guest.rings[1]
    large = guest.lookup(guest.lookup(ROOT, store[1]), b"large")
    with LogFile(guest.memory) as log, LogFile(guest.memory) as other:
        start_logging(guest, log)
        buffers = set()
        for number in range(64):
            offer(ring, fuse_client.read(large, PAGE * number, PAGE), [PAGE, PAGE])
            buffers |= {buffer.gpa for chain in ring._chains.values() for buffer in chain.buffers}
        before = guest.memory.image()
        ring.publish()
        os.kill(worker_of(appliance, 1), signal.SIGKILL)
        num = 0
        while num < 64:
            num += len(ring.collect(timeout_s=DEADLINE_S))
        replace(guest, other)
        changed = changed_pages(guest.memory, before, guest.memory.image())
        changed -= pages_of(ring.avail_gpa, 6 + 2 * ring.num)
        assert len(changed) >= 128
        assert changed <= log.marked()


def test_a_log_that_its_file_does_not_hold_ends_the_connection(
    appliance: ApplianceProcess, guest: FakeGuest
) -> None:
    with LogFile(guest.memory) as log, pytest.raises(BackendGoneError):
        guest.vmm.front_end.set_log_base(log.fd, log.size + 1)
    for _ in every_event(DEADLINE_S):
        if "dirty log: its file has" in appliance.log():
            break
    else:
        raise AssertionError(appliance.log())


def worker_of(appliance: ApplianceProcess, queue: int) -> int:
    for _ in every_event(DEADLINE_S):
        for session in appliance.status():
            for worker in session["workers"]:
                if worker["queues"] == [queue]:
                    return int(worker["pid"])
    raise AssertionError("no worker")
