"""The loop in C over a /dev/fuse descriptor: what it answers, and what it leaves."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.worker.device_delivery import REQUEST_BYTES, DeviceEndedError, FuseDevice
from tests.worker.plain_tree import PLAIN, REPLY_BYTES, requests_of
from tests.worker.twins import Twins


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel.settimeout(10)
    for end in (ours, kernel):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    yield ours, kernel
    ours.close()
    kernel.close()


def test_a_device_is_served_until_a_request_is_not_plain(
    twins: Twins, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, kernel = ends
    requests = requests_of(twins)
    for request in requests:
        kernel.send(request)
    device = FuseDevice(ours.fileno(), twins.plain)
    left = []
    for _ in range(len(PLAIN) - sum(PLAIN)):
        request_left = device.receive()
        assert request_left is not None
        left.append(bytes(request_left))
    ours.setblocking(False)  # noqa: FBT003
    assert device.receive() is None, "what came after them is answered"
    assert left == [one for one, is_plain in zip(requests, PLAIN, strict=True) if not is_plain]
    for request, is_plain in zip(requests, PLAIN, strict=True):
        if is_plain and request != requests[3]:
            assert kernel.recv(REPLY_BYTES) == twins.python(request)


def test_a_device_is_left_now_and_then(
    twins: Twins, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, kernel = ends
    for _ in range(40):
        kernel.send(requests_of(twins)[3])
    device = FuseDevice(ours.fileno(), twins.plain)
    ours.setblocking(False)  # noqa: FBT003
    assert device.receive() is None
    assert os.read(ours.fileno(), REQUEST_BYTES) == requests_of(twins)[3], "after 32 of them"
    while device.receive() is not None:
        pass


def test_a_device_that_is_gone(twins: Twins, tmp_path: Path) -> None:
    device = FuseDevice(os.open(tmp_path, os.O_RDONLY), twins.plain)
    with pytest.raises(IsADirectoryError):
        device.receive()
    os.close(device.fd)
    fuse = Path("/dev/fuse")
    if os.access(fuse, os.R_OK):
        device = FuseDevice(os.open(fuse, os.O_RDWR), twins.plain)
        with pytest.raises((DeviceEndedError, PermissionError)):
            device.receive()
        os.close(device.fd)
