"""Signals to descriptors of any kind: none makes the engine wait, and none is lost."""

import contextlib
import fcntl
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.engine import signal_fd
from tests.fakes.driver import EVENTFD
from tests.fakes.engine_rig import Rig
from tests.fakes.hostile_guest import full_pipe

# Longer than any signal takes; what waits for ever is ended by it, as SIGALRM has no handler.
WAIT_S = 20
LARGEST_COUNT = 2**64 - 2


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


def counter_at_its_limit(flags: int = 0) -> tuple[int, int]:
    fd = os.eventfd(0, flags)
    os.eventfd_write(fd, LARGEST_COUNT)
    return fd, os.dup(fd)


def socket_without_room() -> tuple[int, int]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        while ours.send(bytes(1 << 16)):
            pass
    ours.settimeout(None)
    return theirs.detach(), ours.detach()


FULL: dict[str, Callable[[], tuple[int, int]]] = {
    "full pipe": full_pipe,
    "nearly full pipe": lambda: full_pipe(room=7),
    "full eventfd": counter_at_its_limit,
    "full non-blocking eventfd": lambda: counter_at_its_limit(os.EFD_NONBLOCK),
    "full socket": socket_without_room,
}


@pytest.fixture(params=sorted(FULL))
def full(request: pytest.FixtureRequest) -> Iterator[int]:
    fds = FULL[request.param]()
    signal.alarm(WAIT_S)
    yield fds[1]
    signal.alarm(0)
    for fd in fds:
        os.close(fd)


def test_a_descriptor_without_room_makes_nobody_wait(rig: Rig, full: int) -> None:
    flags = fcntl.fcntl(full, fcntl.F_GETFL)
    signal_fd(full)
    rig.ring.set_call(full)
    rig.driver.add_chain([b"request"], [16])
    rig.driver.publish()
    assert rig.serve() == 1
    assert [used.data for used in rig.driver.poll()] == [b"request"]
    assert fcntl.fcntl(full, fcntl.F_GETFL) == flags, "it is the front-end's, too"


def test_a_regular_file_as_descriptor_harms_nothing(rig: Rig, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        rig.ring.set_call(file.fileno())
        rig.driver.add_chain([b"request"], [16])
        rig.driver.publish()
        assert rig.serve() == 1
        rig.ring.set_call(-1)
    assert (tmp_path / "file").read_bytes() == 2 * EVENTFD.pack(1)


def test_a_pipe_without_a_reader_harms_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    signal_fd(writer)
    os.close(writer)


def test_a_pipe_with_room_is_signalled() -> None:
    reader, writer = os.pipe()
    signal_fd(writer)
    assert os.read(reader, 100) == EVENTFD.pack(1)
    os.close(reader)
    os.close(writer)


def test_nothing_is_signalled_before_the_caller_says_so(rig: Rig) -> None:
    for _ in range(3):
        rig.driver.add_chain([], [8])
    rig.driver.publish()
    assert rig.ring.pop() == 3
    rig.ring.complete(0, 0)
    rig.ring.complete(1, 0)
    assert rig.driver.calls() == 0
    rig.ring.signal()
    assert rig.driver.calls() == 1, "one for both"
    rig.ring.signal()
    assert rig.driver.calls() == 0
    rig.ring.complete(2, 0)
    rig.ring.signal()
    assert rig.driver.calls() == 0, "the guest has not asked for another yet"


def test_what_was_due_is_signalled_even_if_the_ring_broke_since(rig: Rig) -> None:
    rig.driver.add_chain([], [8])
    rig.driver.publish()
    assert rig.ring.pop() == 1
    rig.ring.complete(0, 0)
    rig.ring.close()
    rig.ring.signal()
    poller = select.poll()
    poller.register(rig.driver.call_fd, select.POLLIN)
    assert poller.poll(0)
