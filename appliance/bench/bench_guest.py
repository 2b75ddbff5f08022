"""A guest without a machine: it connects to a back-end, shares memory, sets up rings and mounts."""

import contextlib
import os
import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from appliance.bench import fuse_requests
from appliance.bench.front_end import FrontEnd
from appliance.bench.fuse_requests import ParsedReply
from appliance.bench.generator import ROOM_MAX, GeneratorRing, ring_memory_size
from appliance.bench.guest_ram import PAGE, GuestRam
from appliance.errors import BenchError
from appliance.fuse_proto._fuse_wire import INIT_OUT_SIZE, InitFlag, InitOut
from appliance.vhost._vhost_wire import ProtocolFeature, VirtioFeature

# An indirect table may not be longer than its queue: a READ of 1 MiB takes 259 descriptors.
_QUEUE_SIZE: Final = 1024
_NUM_HIPRIO_SLOTS: Final = 1
_HIPRIO_ROOM: Final = PAGE
_WANTED: Final = VirtioFeature.VERSION_1 | VirtioFeature.INDIRECT_DESC
# The pages of one READ if the back-end does not agree to MAX_PAGES (linux fs/fuse/fuse_i.h).
_DEFAULT_MAX_PAGES: Final = 32


class BenchGuest:
    """A mounted guest: its memory, its rings and its connection, which it owns.

    Args:
        path: the vhost-user socket of the back-end.
        num_queues: request queues to use; each has one driver at a time.
        depth: requests that can be in flight in each.
        timeout_s: how long any single answer may take.
        may_event_idx: agree to VIRTIO_F_EVENT_IDX if it is offered, as Linux does.

    Raises:
        BenchError: the back-end does not answer, or not as the protocols say.
    """

    def __init__(
        self,
        path: Path,
        *,
        num_queues: int,
        depth: int,
        timeout_s: float,
        may_event_idx: bool = True,
    ) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self._num_queues = num_queues
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(_connect(path, timeout_s))
            self.peer_pid = _peer_pid(sock)
            self._front_end = FrontEnd(sock, timeout_s=timeout_s)
            self.features = self._negotiate(may_event_idx=may_event_idx)
            size = ring_memory_size(_QUEUE_SIZE, depth, ROOM_MAX) * num_queues
            size += ring_memory_size(_QUEUE_SIZE, _NUM_HIPRIO_SLOTS, _HIPRIO_ROOM)
            self._memory = stack.enter_context(GuestRam([(0, -(-size // PAGE) * PAGE)]))
            rooms = [(_NUM_HIPRIO_SLOTS, _HIPRIO_ROOM), *[(depth, ROOM_MAX)] * num_queues]
            rings = [self._ring(sock, num_slots, room) for num_slots, room in rooms]
            for ring in rings:
                stack.callback(ring.close)
            self._start(rings)
            self.rings = rings[1:]
            self.agreed = self._mount()
            self._closing = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            with contextlib.suppress(BenchError):  # nothing is lost where it cannot be unmounted
                self._unmount()
        self.close()

    def close(self) -> None:
        """Disconnect, and release everything that no thread uses any more."""
        with contextlib.suppress(OSError):  # the back-end may have gone first
            self._front_end.sock.shutdown(socket.SHUT_RDWR)
        # A thread that does not end keeps its ring, and with it the memory.
        with contextlib.suppress(TimeoutError, BufferError):
            self._closing.close()

    @property
    def has_readdirplus(self) -> bool:
        """Whether the back-end agreed to READDIRPLUS."""
        return bool(self.agreed.flags & InitFlag.DO_READDIRPLUS)

    @property
    def max_read(self) -> int:
        """The most bytes that Linux would ask for in one READ."""
        has_max_pages = self.agreed.flags & InitFlag.MAX_PAGES
        return (self.agreed.max_pages if has_max_pages else _DEFAULT_MAX_PAGES) * PAGE

    def ask(self, request: bytes, *, room: int = PAGE) -> ParsedReply:
        """Send one request through the first request queue and return its reply.

        Raises:
            BenchError: the reply does not come in time or breaks a rule of FUSE.
        """
        return self.rings[0].ask(request, room=room, timeout_s=self.timeout_s)

    def _negotiate(self, *, may_event_idx: bool) -> int:
        front_end = self._front_end
        front_end.set_owner()
        offered = front_end.get_features()
        if _WANTED & ~offered:
            raise BenchError(f"{self.path}: the back-end does not offer {_WANTED & ~offered!r}")
        features = _WANTED | (offered & VirtioFeature.PROTOCOL_FEATURES)
        if may_event_idx:
            features |= offered & VirtioFeature.EVENT_IDX
        if features & VirtioFeature.PROTOCOL_FEATURES:
            self._negotiate_protocol()
        elif self._num_queues > 1:
            raise BenchError(f"{self.path}: the back-end has only 1 request queue")
        front_end.set_features(features)
        return features

    def _negotiate_protocol(self) -> None:
        front_end = self._front_end
        agreed = front_end.get_protocol_features()
        agreed &= ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK
        front_end.set_protocol_features(agreed)
        front_end.acks = bool(agreed & ProtocolFeature.REPLY_ACK)
        num_queues = front_end.get_queue_num() if agreed & ProtocolFeature.MQ else 2
        if num_queues < 1 + self._num_queues:
            raise BenchError(
                f"{self.path}: the back-end has {num_queues - 1} request queues, "
                f"{self._num_queues} are asked for"
            )

    def _ring(self, sock: socket.socket, num_slots: int, room_max: int) -> GeneratorRing:
        return GeneratorRing(
            self._memory,
            num=_QUEUE_SIZE,
            num_slots=num_slots,
            room_max=room_max,
            is_event_idx=bool(self.features & VirtioFeature.EVENT_IDX),
            back_end_fd=sock.fileno(),
        )

    def _start(self, rings: list[GeneratorRing]) -> None:
        front_end = self._front_end
        front_end.set_mem_table(self._memory)
        for index, ring in enumerate(rings):
            front_end.set_vring_num(index, ring.num)
            front_end.set_vring_base(index, 0)
            front_end.set_vring_addr(index, ring.layout())
            front_end.set_vring_call(index, ring.call_fd)
            front_end.set_vring_kick(index, ring.kick_fd)
        if self.features & VirtioFeature.PROTOCOL_FEATURES:
            for index in range(len(rings)):
                front_end.set_vring_enable(index, 1)

    def _mount(self) -> InitOut:
        reply = self.ask(fuse_requests.init(), room=INIT_OUT_SIZE)
        if reply.error:
            raise BenchError(f"INIT: {os.strerror(reply.error)}")
        try:
            return fuse_requests.parse_init(reply.body)
        except ValueError as exc:
            raise BenchError(f"INIT: {exc}") from exc

    def _unmount(self) -> None:
        self.ask(fuse_requests.destroy())
        for index in range(1 + self._num_queues):
            self._front_end.get_vring_base(index)


def _connect(path: Path, timeout_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(os.fspath(path))
    except OSError as exc:  # a TimeoutError is one; a path that is too long has no errno
        sock.close()
        raise BenchError(f"{path}: cannot connect: {exc.strerror or exc}") from exc
    return sock


def _peer_pid(sock: socket.socket) -> int:
    credentials = struct.Struct("3i")  # pid, uid, gid (unix(7)); the pid is 0 if it is not visible
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    pid, _uid, _gid = credentials.unpack(data)
    return int(pid)
