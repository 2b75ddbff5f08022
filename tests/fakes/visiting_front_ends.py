"""Front-ends that come, send a descriptor somewhere, and leave, over and over, in another process.

Hostile ones send what blocks whoever closes, reads or stats it, or memory that shrinks. Polite ones
make the same and send an eventfd, or leave their memory as it is. So a neighbour can be measured
beside either, with the same work for the CPUs.
"""

import contextlib
import itertools
import multiprocessing
import os
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.errors import BenchError
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.frontend import BackendGoneError, FrontEnd, RefusedError
from tests.fakes.vmms import Qemu
from tests.supervisor.test_foreign_descriptors import KINDS, LINGER_S, PLACES

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

NUM_SOCKETS: Final = 12
# A visitor stays so long after it has sent its descriptor, unless the measurement ends before.
_STAY_S: Final = 0.02
_TIMEOUT_S: Final = 1.0

Kind = Callable[[Path], contextlib.AbstractContextManager[int]]


@contextlib.contextmanager
def _an_eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def _abandon(
    appliance: ApplianceProcess, index: int, place_at: int, over: Event, *, is_hostile: bool
) -> None:
    """Leave the last descriptor of a TCP socket that lingers to whoever received it.

    The kernel makes no process wait that closes it as it ends.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock = socket.create_connection(server.getsockname())
        peer, _address = server.accept()
    with peer:
        sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(bytes(1 << 16))
        sock.settimeout(None)
        linger = struct.pack("ii", 1, LINGER_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.read(reading, 1)  # that the parent has closed its own
                _send(appliance, index, place_at, sock.fileno() if is_hostile else os.eventfd(0))
            finally:
                os._exit(0)
        sock.close()
        os.write(writing, b"x")
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)
        over.wait(_STAY_S)


def _send(appliance: ApplianceProcess, index: int, place_at: int, fd: int) -> FrontEnd:
    front_end = appliance.connect(index)
    front_end.sock.settimeout(_TIMEOUT_S)
    with contextlib.suppress(BackendGoneError, RefusedError, BenchError, OSError):
        if place_at:  # the first place is before any message
            Qemu(front_end).realize()
        PLACES[place_at](front_end, fd)
    return front_end


def _visit(
    appliance: ApplianceProcess,
    index: int,
    kind: Kind,
    place_at: int,
    over: Event,
    *,
    is_hostile: bool,
) -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        kind(Path(directory)) as fd,
        _an_eventfd() as eventfd,
    ):
        front_end = _send(appliance, index, place_at, fd if is_hostile else eventfd)
        over.wait(_STAY_S)
        front_end.close()


def _shrink_memory(
    appliance: ApplianceProcess, index: int, over: Event, *, is_hostile: bool
) -> None:
    front_end = appliance.connect(index)
    front_end.sock.settimeout(_TIMEOUT_S)
    with (
        contextlib.closing(front_end),
        contextlib.suppress(BackendGoneError, RefusedError, BenchError),
    ):
        guest = FakeGuest(front_end)
        guest.mount()
        os.ftruncate(guest.memory.fd, 0 if is_hostile else guest.memory.size)
        guest.rings[1].kick()
        over.wait(_STAY_S)
        guest.close()


def _visit_until(
    appliance: ApplianceProcess, *, is_hostile: bool, num_visits: "Synchronized[int]", over: Event
) -> None:
    visits = itertools.cycle(itertools.product(range(len(PLACES)), KINDS.values()))
    for number, (place_at, kind) in enumerate(visits):
        if over.is_set():
            return
        index = 1 + number % NUM_SOCKETS
        with contextlib.suppress(OSError):  # the last visitor there may still hang
            if number % 8 == 0:
                _shrink_memory(appliance, index, over, is_hostile=is_hostile)
            elif number % 8 == 4:
                _abandon(appliance, index, place_at, over, is_hostile=is_hostile)
            else:
                _visit(appliance, index, kind, place_at, over, is_hostile=is_hostile)
        with num_visits.get_lock():
            num_visits.value += 1


@contextlib.contextmanager
def visitors(appliance: ApplianceProcess, *, is_hostile: bool) -> Iterator["Synchronized[int]"]:
    """Have front-ends come and go on the sockets from the second on, within the block.

    Yields the number of those that have come and gone.
    """
    num_visits, over = multiprocessing.Value("I"), multiprocessing.Event()
    process = multiprocessing.get_context("fork").Process(
        target=_visit_until,
        args=(appliance,),
        kwargs={"is_hostile": is_hostile, "num_visits": num_visits, "over": over},
    )
    process.start()
    try:
        yield num_visits
    finally:
        over.set()
        process.join()


def p99_us(
    guest: FakeGuest, top: int, name: bytes, visits: "Synchronized[int]", num_visits: int
) -> float:
    """Return the p99 of a lookup at a time during the next `num_visits` visits, in microseconds."""
    took = []
    end = visits.value + num_visits
    while visits.value < end:
        began_s = time.perf_counter()
        guest.ask(fuse_client.lookup(top, name))
        took.append(time.perf_counter() - began_s)
    return statistics.quantiles(took, n=100)[98] * 1e6
