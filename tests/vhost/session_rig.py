"""A session without a socket or an event loop, with a backend that records its calls."""

import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from appliance.engine import inflight_size
from appliance.errors import VhostError
from appliance.vhost._vhost_wire import (
    Header,
    HeaderFlag,
    MemReg,
    MemTable,
    Region,
    RequestNumber,
    VringAddr,
    VringFd,
    VringState,
    Word,
    pack_header,
    pack_mem_reg,
    pack_mem_table,
    pack_region,
    pack_vring_addr,
    pack_vring_state,
    pack_word,
    unpack_word,
)
from appliance.vhost.backend import RingLog, VringConfig
from appliance.vhost.fds import ReceivedFds
from appliance.vhost.fs_device import DeviceProperties
from appliance.vhost.messages import (
    Message,
    MessageReply,
    decode_header_untrusted,
    decode_untrusted,
)
from appliance.vhost.session import Session

T = TypeVar("T")

GUEST_FEATURES = 0x1_7000_0000
FILE_BYTES = 0x10000  # of each descriptor that comes with a message
REGION = Region(0x10000, 0x100000, 0x7F00_0001_0000, 0x1000)


def num_open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("the coroutine waits")


class RecordingBackend:
    """A Backend that serves no ring, owns the descriptors it takes, and checks the order of calls.

    `refuses` names methods that raise VhostError; `reached` is what stop_ring adds to the base.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.refuses: set[str] = set()
        self.reached = 3
        self.regions: dict[Region, int] = {}
        self.running: dict[int, VringConfig] = {}
        self.is_closed = False
        self.buffer_fd: int | None = None

    async def add_region(self, region: Region, fd: int, replaced: Region | None = None) -> None:
        self._own_until_accepted([fd], "add_region", region)
        if replaced is not None:
            os.close(self.regions.pop(replaced))
        assert region not in self.regions
        self.regions[region] = fd

    async def remove_region(self, region: Region) -> None:
        self._own_until_accepted([], "remove_region", region)
        os.close(self.regions.pop(region))

    async def set_regions(self, regions: list[tuple[Region, int]]) -> None:
        self._own_until_accepted(
            [fd for _region, fd in regions], "set_regions", [region for region, _fd in regions]
        )
        self._close_regions()
        self.regions = dict(regions)

    async def start_ring(self, index: int, config: VringConfig) -> None:
        self._own_until_accepted([], "start_ring", index)
        assert index not in self.running
        for fd in (config.kick_fd, config.call_fd, config.err_fd):
            assert fd is None or os.fstat(fd)
        self.running[index] = config

    async def stop_ring(self, index: int) -> int:
        config = self.running.pop(index)
        os.fstat(config.kick_fd)
        self._own_until_accepted([], "stop_ring", index)
        return (config.base + self.reached) & 0xFFFF

    async def set_call(self, index: int, fd: int | None) -> None:
        config = self.running[index]
        for lent in (config.call_fd, fd):
            assert lent is None or os.fstat(lent)
        self._own_until_accepted([], "set_call", index)
        self.running[index] = config._replace(call_fd=fd)

    async def set_log(self, index: int, log: RingLog | None) -> None:
        config = self.running[index]
        for held in (config.log, log):  # the former log is lent until the change
            assert held is None or os.fstat(held.fd)
        self.running[index] = config._replace(log=None)
        self._own_until_accepted([], "set_log", index, log and log[1:])
        self.running[index] = config._replace(log=log)

    async def save_state(self, fd: int) -> None:
        self._own_until_accepted([fd], "save_state")
        assert not self.running
        os.close(fd)

    async def load_state(self, fd: int) -> None:
        self._own_until_accepted([fd], "load_state")
        assert not self.running
        os.close(fd)

    async def finish_state(self) -> None:
        self._own_until_accepted([], "finish_state")
        assert not self.running

    async def inflight(self, num_queues: int, queue_size: int) -> tuple[int, int, int]:
        self._own_until_accepted([], "inflight", num_queues, queue_size)
        if self.buffer_fd is not None:
            os.close(self.buffer_fd)
        self.buffer_fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
        return self.buffer_fd, num_queues * inflight_size(queue_size), 0

    async def set_inflight(
        self, fd: int, mmap_size: int, mmap_offset: int, num_queues: int, queue_size: int
    ) -> None:
        self._own_until_accepted(
            [fd], "set_inflight", mmap_size, mmap_offset, num_queues, queue_size
        )
        os.close(fd)

    async def reset(self) -> None:
        self._own_until_accepted([], "reset")
        assert not self.running

    async def begin_again(self) -> None:
        self._own_until_accepted([], "begin_again")
        assert not self.running
        self._close_regions()

    async def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True
        for config in self.running.values():
            os.fstat(config.kick_fd)
        self.running.clear()
        self._close_regions()
        if self.buffer_fd is not None:
            os.close(self.buffer_fd)

    def _own_until_accepted(self, fds: Sequence[int], name: str, *values: object) -> None:
        assert not self.is_closed
        self.calls.append((name, *values))
        if name in self.refuses:
            for fd in fds:
                os.close(fd)
            raise VhostError(f"{name} refused")

    def _close_regions(self) -> None:
        for fd in self.regions.values():
            os.close(fd)
        self.regions.clear()


def _new_file() -> int:
    fd = os.memfd_create("received", os.MFD_CLOEXEC)
    os.ftruncate(fd, FILE_BYTES)
    return fd


def message(
    request: int,
    payload: bytes = b"",
    num_fds: int = 0,
    flags: int = HeaderFlag.VERSION_1,
) -> Message:
    """Return a message as the transport would, with `num_fds` newly opened descriptors."""
    fds = ReceivedFds(_new_file() for _ in range(num_fds))
    try:
        header = decode_header_untrusted(pack_header(Header(request, flags, len(payload))))
        return decode_untrusted(header, payload, fds)
    except VhostError:
        fds.close()
        raise


class Rig:
    """A session and its backend; closes the session at the end."""

    def __init__(
        self, *, num_queues: int = 2, max_queue_size: int = 1024, tag: bytes | None = b"tag"
    ) -> None:
        self.device = DeviceProperties(num_queues, max_queue_size, tag)
        self.backend = RecordingBackend()
        self.session = Session(self.device, self.backend)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        run_now(self.session.close())

    def handle(
        self, request: int, payload: bytes = b"", num_fds: int = 0, *, need_reply: bool = False
    ) -> MessageReply | None:
        flags = HeaderFlag.VERSION_1 | (HeaderFlag.NEED_REPLY if need_reply else 0)
        return run_now(self.session.handle(message(request, payload, num_fds, flags)))

    def is_acked(self, request: int, payload: bytes = b"", num_fds: int = 0) -> bool:
        """Send a request with NEED_REPLY; return whether the ack reports success."""
        reply = self.handle(request, payload, num_fds, need_reply=True)
        assert reply is not None
        assert reply.request == request
        assert reply.fds == ()
        assert len(reply.payload) == 8
        return unpack_word(reply.payload).value == 0

    def do(self, request: int, payload: bytes = b"", num_fds: int = 0) -> None:
        """Send a request that has no reply of its own and must succeed."""
        assert self.handle(request, payload, num_fds) is None

    # --- Steps of several requests ---

    def negotiate(self, features: int = GUEST_FEATURES) -> None:
        self.do(RequestNumber.SET_FEATURES, word(features))

    def add_memory(self, region: Region = REGION) -> None:
        self.do(RequestNumber.ADD_MEM_REG, memory_region(region), 1)

    def describe_ring(self, ring: int, *, num: int = 256, base: int = 0) -> None:
        self.do(RequestNumber.SET_VRING_NUM, state(ring, num))
        self.do(RequestNumber.SET_VRING_BASE, state(ring, base))
        self.do(RequestNumber.SET_VRING_ADDR, ring_addr(ring))

    def kick_ring(self, ring: int) -> None:
        self.do(RequestNumber.SET_VRING_KICK, word(ring), 1)

    def enable_ring(self, ring: int, num: int = 1) -> None:
        self.do(RequestNumber.SET_VRING_ENABLE, state(ring, num))

    def run_ring(self, ring: int, *, num: int = 256, base: int = 0) -> VringConfig:
        self.describe_ring(ring, num=num, base=base)
        self.kick_ring(ring)
        self.enable_ring(ring)
        return self.backend.running[ring]


def word(value: int) -> bytes:
    return pack_word(Word(value))


def state(ring: int, num: int) -> bytes:
    return pack_vring_state(VringState(ring, num))


def ring_addr(ring: int, *, shift: int = 0, flags: int = 0) -> bytes:
    """Return addresses in REGION that differ for each ring and `shift`."""
    start = REGION.user_addr + 0x8000 * ring + shift
    return pack_vring_addr(VringAddr(ring, flags, start, start + 0x4000, start + 0x6000, 0))


def memory_region(region: Region) -> bytes:
    """Return what adds a region, or removes it."""
    return pack_mem_reg(MemReg(region))


def mem_table(regions: Sequence[Region], *, junk: bytes = b"") -> bytes:
    return pack_mem_table(MemTable(len(regions))) + b"".join(map(pack_region, regions)) + junk


NO_FD = int(VringFd.NONE)
