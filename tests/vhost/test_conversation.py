"""Whole conversations: the message orders of real VMMs over a socket, on both event loops."""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Final, Self

import pytest
import uvloop

from appliance.errors import VhostError
from appliance.vhost._vhost_wire import Region
from appliance.vhost.fs_device import DeviceProperties
from appliance.vhost.session import Session, converse
from appliance.vhost.transport import Connection
from tests.fakes.driver import DriverRing, GuestMemory
from tests.fakes.frontend import BackendGoneError, FrontEnd, OutOfMessagesError, RefusedError
from tests.fakes.vmms import CloudHypervisor, Crosvm, Qemu, Uml, Vmm
from tests.vhost.session_rig import RecordingBackend, num_open_fds

DEADLINE_S: Final = 10
LOOPS: Final = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
VMMS: Final[dict[str, Callable[[FrontEnd], Vmm]]] = {
    "qemu": Qemu,
    "cloud-hypervisor": CloudHypervisor,
    "crosvm": Crosvm,
    "uml": Uml,
}
PAGE: Final = 4096


class BackEnd:
    """A session that converses in its own thread; `error` is the error that ended it, if any."""

    def __init__(self, loop_name: str) -> None:
        self.backend = RecordingBackend()
        self.error: VhostError | None = None
        self._loop_factory = LOOPS[loop_name]
        ours, self.front_end_sock = socket.socketpair()
        self._thread = threading.Thread(target=self._run, args=(ours,))
        self._thread.start()

    def _run(self, sock: socket.socket) -> None:
        session = Session(DeviceProperties(2, 1024, b"tag"), self.backend)
        with asyncio.Runner(loop_factory=self._loop_factory) as runner:
            try:
                runner.run(converse(Connection(sock), session))
            except VhostError as exc:
                self.error = exc

    def join(self) -> None:
        """Wait for the end of the conversation; the front-end must be gone."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        assert self.backend.is_closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        with contextlib.suppress(OSError):
            self.front_end_sock.shutdown(socket.SHUT_RDWR)
        self.front_end_sock.close()
        self.join()


class Guest:
    """Memory and rings that a VMM describes."""

    def __init__(self) -> None:
        self.memory = GuestMemory([(0, 16 * PAGE), (32 * PAGE, 64 * PAGE)])
        self.rings = [DriverRing(self.memory, 64, base=base) for base in (0, 0xFFFF)]

    def close(self) -> None:
        for ring in self.rings:
            ring.close()
        self.memory.close()


@pytest.fixture(name="guest")
def _guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


def is_same_eventfd(fd: int, other: int) -> bool:
    # All eventfds share one inode, so they can only be told apart by what arrives through them.
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(other)
    os.eventfd_write(fd, 7)
    return os.eventfd_read(other) == 7


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("vmm_name", VMMS)
def test_each_vmm_starts_stops_and_starts_again(
    vmm_name: str, loop_name: str, guest: Guest
) -> None:
    with BackEnd(loop_name) as back_end:
        backend = back_end.backend
        vmm = VMMS[vmm_name](FrontEnd(back_end.front_end_sock))
        vmm.realize()
        vmm.start(guest.memory, guest.rings)
        vmm.front_end.get_features()  # answered after all requests before it have taken effect
        assert list(backend.regions) == [Region._make(region) for region in guest.memory.regions]
        assert [backend.running[index].base for index in (0, 1)] == [0, 0xFFFF]
        for index, ring in enumerate(guest.rings):
            running = backend.running[index]
            layout = ring.layout()
            assert (running.num, running.desc, running.avail, running.used) == layout
            assert running.features == ring.features
            assert is_same_eventfd(running.kick_fd, ring.kick_fd)
        bases = vmm.stop()
        assert bases in ([], [3, 2])
        vmm.front_end.get_features()
        assert backend.running == {}
        vmm.start(guest.memory, guest.rings, bases)
        vmm.front_end.get_features()
        assert sorted(backend.running) == [0, 1]
        assert [backend.running[index].base for index in (0, 1)] == (bases or [0, 0xFFFF])
        vmm.close()
        back_end.join()
        assert back_end.error is None


@pytest.mark.parametrize("vmm_name", VMMS)
def test_completions_reach_the_guest_through_the_call_descriptor(
    vmm_name: str, guest: Guest
) -> None:
    with BackEnd("asyncio") as back_end:
        vmm = VMMS[vmm_name](FrontEnd(back_end.front_end_sock))
        vmm.realize()
        vmm.start(guest.memory, guest.rings)
        vmm.front_end.get_features()
        for index, ring in enumerate(guest.rings):
            call_fd = back_end.backend.running[index].call_fd
            assert call_fd is not None
            os.write(call_fd, (1).to_bytes(8, "little"))
            assert ring.calls() == 1
        vmm.close()


def test_a_first_start_of_cloud_hypervisor_brings_its_inflight_buffer(guest: Guest) -> None:
    with BackEnd("asyncio") as back_end:
        vmm = CloudHypervisor(FrontEnd(back_end.front_end_sock))
        vmm.realize()
        vmm.start(guest.memory, guest.rings)
        assert vmm.inflight is not None
        assert [back_end.backend.running[index].fresh for index in (0, 1)] == [False, False]
        vmm.pause()
        assert back_end.backend.running == {}
        vmm.resume()
        assert [back_end.backend.running[index].fresh for index in (0, 1)] == [True, True]
        vmm.close()


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("vmm_name", VMMS)
def test_a_front_end_may_vanish_after_any_message(
    vmm_name: str, loop_name: str, guest: Guest
) -> None:
    before = num_open_fds()
    num_messages, is_cut = 0, True
    while is_cut:
        with BackEnd(loop_name) as back_end:
            vmm = VMMS[vmm_name](FrontEnd(back_end.front_end_sock, max_messages=num_messages))
            try:
                vmm.realize()
                vmm.start(guest.memory, guest.rings)
                vmm.stop()
                is_cut = False
            except OutOfMessagesError:
                pass
            vmm.close()
            back_end.join()
            assert back_end.error is None
            assert back_end.backend.regions == {}
        assert num_open_fds() == before
        num_messages += 1
    assert num_messages > 20


def test_a_broken_protocol_ends_the_connection_and_says_why(guest: Guest) -> None:
    with BackEnd("asyncio") as back_end:
        vmm = Qemu(FrontEnd(back_end.front_end_sock))
        vmm.realize()
        vmm.start(guest.memory, guest.rings)
        vmm.front_end.set_vring_num(7, 64)
        with pytest.raises(BackendGoneError):
            vmm.front_end.get_features()
        back_end.join()
        assert str(back_end.error) == "SET_VRING_NUM: ring 7, expected 0 to 1"
        vmm.close()


def test_a_refusal_that_is_acked_leaves_the_connection_as_it_was(guest: Guest) -> None:
    with BackEnd("asyncio") as back_end:
        vmm = CloudHypervisor(FrontEnd(back_end.front_end_sock))
        vmm.realize()
        vmm.start(guest.memory, guest.rings)
        with pytest.raises(RefusedError):
            vmm.front_end.set_vring_num(7, 64)
        with pytest.raises(RefusedError):
            vmm.front_end.set_config(0, b"tag")
        with pytest.raises(RefusedError):
            vmm.front_end.set_vring_kick(0, None)
        assert vmm.stop() == [3, 2]
        vmm.close()
