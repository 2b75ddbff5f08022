"""Descriptors that block whoever closes them harm nobody but the session of who sent them."""

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from appliance.system.libc import MS_NODEV, MS_NOSUID, detach_mount, mount
from appliance.vhost._vhost_wire import (
    Header,
    HeaderFlag,
    Inflight,
    Region,
    RequestNumber,
    pack_header,
)
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.frontend import BackendGoneError, FrontEnd, RefusedError
from tests.fakes.hostile_guest import ROOT, full_pipe, num_fds, open_files
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.fakes.vmms import Qemu

pytestmark = pytest.mark.slow

LINGER_S: Final = 3600


@pytest.fixture(scope="module")
def appliance(
    store: tuple[Path, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApplianceProcess]:
    directory = tmp_path_factory.mktemp("run")
    options = ("--num-request-queues=1", "--tag=t")
    sockets = [f"{number}" for number in range(40)]
    with ApplianceProcess(store[0], directory, *options, sockets=sockets) as process:
        yield process


@pytest.fixture(scope="module")
def neighbour(appliance: ApplianceProcess) -> Iterator[FakeGuest]:
    with FakeGuest(appliance.connect(0)) as guest:
        guest.mount()
        yield guest


# --- Descriptors ---


@contextlib.contextmanager
def lingering(_directory: Path) -> Iterator[int]:
    """A TCP socket with data that nobody reads, and SO_LINGER of an hour."""
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
        fd = sock.detach()
        yield fd
        # Whoever closes it last waits; not this process.
        linger = struct.pack("ii", 0, 0)
        with socket.socket(fileno=fd) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


@contextlib.contextmanager
def never_flushed(directory: Path) -> Iterator[int]:
    """A file of a FUSE server that answers LOOKUP and OPEN, but no FLUSH."""
    mountpoint = directory / "mnt"
    mountpoint.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=040000,user_id=0,group_id=0,allow_other"
    mount("test", mountpoint, "fuse", MS_NOSUID | MS_NODEV, options)
    try:
        pid = os.fork()
        if pid == 0:
            answer_until_flush(device)
        fd = os.open(mountpoint / "file", os.O_RDWR | os.O_CLOEXEC)
        yield fd
    finally:
        detach_mount(mountpoint)
        os.close(device)
        os.kill(pid, 9)  # aborts the connection, and with it every wait
        os.waitpid(pid, 0)
    with contextlib.suppress(OSError):  # the connection was aborted
        os.close(fd)


FUSE_INIT, FUSE_LOOKUP, FUSE_GETATTR, FUSE_OPEN = 26, 1, 3, 14
OUT: Final = struct.Struct("<IiQ")


def answer_until_flush(device: int) -> None:
    attr = struct.pack("<6Q10I", 2, 1 << 30, 0, 0, 0, 0, *([0] * 3), 0o100666, 1, *([0] * 5))
    bodies = {
        FUSE_INIT: struct.pack("<4I2H8I", 7, 31, 65536, 0, 16, 12, 65536, *([0] * 7)),
        FUSE_LOOKUP: struct.pack("<4Q2I", 2, 0, 3600, 3600, 0, 0) + attr,
        FUSE_GETATTR: struct.pack("<Q2I", 3600, 0, 0) + attr,
        FUSE_OPEN: struct.pack("<Q2I", 1, 0, 0),
    }
    while True:
        request = os.read(device, 1 << 17)
        _length, opcode, unique = struct.unpack_from("<IIQ", request)
        if opcode in bodies:
            body = bodies[opcode]
            os.write(device, OUT.pack(OUT.size + len(body), 0, unique) + body)


@contextlib.contextmanager
def only_a_path(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@contextlib.contextmanager
def a_directory(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@contextlib.contextmanager
def a_full_pipe(_directory: Path) -> Iterator[int]:
    reader, writer = full_pipe()
    yield writer
    os.close(reader)
    os.close(writer)


@contextlib.contextmanager
def a_huge_sparse_file(directory: Path) -> Iterator[int]:
    fd = os.open(directory / "sparse", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.ftruncate(fd, 1 << 43)
    yield fd
    os.close(fd)


KINDS: Final = {
    "a TCP socket that lingers": lingering,
    "a file that is never flushed": never_flushed,
    "a path": only_a_path,
    "a directory": a_directory,
    "a full pipe": a_full_pipe,
    "a huge sparse file": a_huge_sparse_file,
}


# --- Places ---


def in_the_queue(front_end: FrontEnd, fd: int) -> None:
    """Before a back-end has read anything, in a message that it never asks for."""
    header = pack_header(Header(RequestNumber.GET_FEATURES, HeaderFlag.VERSION_1, 0))
    socket.send_fds(front_end.sock, [header * 2], [fd] * 20)


def as_memory(front_end: FrontEnd, fd: int) -> None:
    front_end.add_mem_reg(Region(0, 4096, 1 << 40, 0), fd)


def as_kick(front_end: FrontEnd, fd: int) -> None:
    front_end.set_vring_kick(1, fd)


def as_call(front_end: FrontEnd, fd: int) -> None:
    front_end.set_vring_call(1, fd)


def as_err(front_end: FrontEnd, fd: int) -> None:
    front_end.set_vring_err(1, fd)


def as_inflight(front_end: FrontEnd, fd: int) -> None:
    front_end.set_inflight_fd(Inflight(1 << 20, 0, 2, 128), fd)


def as_channel(front_end: FrontEnd, fd: int) -> None:
    header = Header(RequestNumber.SET_BACKEND_REQ_FD, HeaderFlag.VERSION_1, 0)
    socket.send_fds(front_end.sock, [pack_header(header)], [fd])


PLACES: Final = (in_the_queue, as_memory, as_kick, as_call, as_err, as_inflight, as_channel)


@pytest.mark.parametrize("kind", KINDS)
def test_a_descriptor_harms_only_the_session_of_who_sent_it(
    appliance: ApplianceProcess, neighbour: FakeGuest, tmp_path: Path, kind: str
) -> None:
    pid = appliance.process.pid
    first = 1 + 6 * list(KINDS).index(kind) % 30
    sent = set()
    for index, place in enumerate(PLACES):
        sent.add(send_and_leave(appliance, first + index % 6, place, kind, tmp_path / f"{index}"))
        assert neighbour.ask(fuse_client.getattr_(ROOT)).error == 0
    with FakeGuest(appliance.connect(39)) as other:
        other.mount()
        assert other.ask(fuse_client.statfs()).error == 0
    for _ in every_event(DEADLINE_S):
        if len(appliance.status()) <= 2:
            break
    assert not sent & set(open_files(pid))
    assert num_fds(pid) < 200


def send_and_leave(
    appliance: ApplianceProcess,
    index: int,
    place: Callable[[FrontEnd, int], None],
    kind: str,
    directory: Path,
) -> str:
    """Return what was sent, as /proc/PID/fd names it."""
    directory.mkdir()
    with KINDS[kind](directory) as fd:
        sent = os.fspath(Path(f"/proc/self/fd/{fd}").readlink())
        front_end = appliance.connect(index)
        with contextlib.suppress(BackendGoneError, RefusedError, OSError):
            if place is not in_the_queue:
                Qemu(front_end).realize()
            place(front_end, fd)
        front_end.sock.settimeout(1)
        front_end.close()
        with FakeGuest(appliance.connect(39)) as other:
            other.mount()
    return sent
