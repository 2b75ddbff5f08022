"""The vhost-user protocol, front-end half: one method per request, over a connected socket.

It is as strict about replies as QEMU: flags of exactly 5, the request's number, the exact size.
"""

import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVar

from appliance.bench.guest_ram import GuestRam
from appliance.engine import RingLayout
from appliance.errors import BenchError
from appliance.vhost._vhost_wire import (
    HEADER_SIZE,
    VRING_STATE_SIZE,
    WORD_SIZE,
    Header,
    HeaderFlag,
    MemTable,
    Region,
    RequestNumber,
    VringAddr,
    VringFd,
    VringState,
    Word,
    pack_header,
    pack_mem_table,
    pack_region,
    pack_vring_addr,
    pack_vring_state,
    pack_word,
    unpack_header,
    unpack_vring_state,
    unpack_word,
)
from appliance.vhost.messages import ROWS

REPLY_FLAGS: Final = HeaderFlag.VERSION_1 | HeaderFlag.REPLY
_MAX_REPLY_FDS: Final = 8
_DEFAULT_TIMEOUT_S: Final = 20.0

_T = TypeVar("_T")


class BackendGoneError(BenchError):
    """The back-end closed the connection."""


class RefusedError(BenchError):
    """The back-end answered with a failed ack."""


class FrontEnd:
    """One vhost-user connection, front-end side. Owns its socket.

    `acks` asks for an ack of every request that has no reply of its own; a failed one is a
    RefusedError. `ask_flags` are the header flags of requests that have a reply.

    Every method may raise BackendGoneError, or BenchError for a reply that does not come within
    the timeout or breaks a rule.

    Args:
        sock: connected AF_UNIX stream.
        timeout_s: how long sending a request, or waiting for the next part of a reply, may take.
    """

    def __init__(self, sock: socket.socket, *, timeout_s: float = _DEFAULT_TIMEOUT_S) -> None:
        sock.settimeout(timeout_s)
        self.sock = sock
        self.acks = False
        self.ask_flags: int = HeaderFlag.VERSION_1
        self._timeout_s = timeout_s

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()

    # --- Messages of any kind ---

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        flags: int = HeaderFlag.VERSION_1,
    ) -> None:
        """Send one message and wait for nothing; `fds` stay the caller's."""
        data = pack_header(Header(request, flags, len(payload))) + payload
        sent = self._within_timeout(request, lambda: socket.send_fds(self.sock, [data], fds))
        if sent != len(data):
            raise BenchError(f"{_name(request)}: only {sent} of {len(data)} bytes could be sent")

    def receive(self, request: int, size: int) -> tuple[bytes, list[int]]:
        """Return the reply to `request`, which has `size` bytes, and its descriptors.

        The caller owns the descriptors.
        """
        data, fds, _flags, _address = self._within_timeout(
            request, lambda: socket.recv_fds(self.sock, HEADER_SIZE, _MAX_REPLY_FDS)
        )
        if not data:
            raise _gone(request)
        data += self._read(request, HEADER_SIZE - len(data))
        header = unpack_header(data)
        wanted = Header(request, REPLY_FLAGS, size)
        if header != wanted:
            raise BenchError(f"{_name(request)}: the reply's header is {header}, not {wanted}")
        return self._read(request, size), fds

    def ask(self, request: int, payload: bytes = b"", *, size: int) -> bytes:
        """Send a request whose reply has `size` bytes and no descriptors; return them."""
        self.send(request, payload, flags=self.ask_flags)
        return self._receive_plain(request, size)

    def act(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request without a reply of its own; await its ack if `acks` is set."""
        if not self.acks:
            self.send(request, payload, fds)
            return
        self.send(request, payload, fds, HeaderFlag.VERSION_1 | HeaderFlag.NEED_REPLY)
        value = unpack_word(self._receive_plain(request, WORD_SIZE)).value
        if value != 0:
            raise RefusedError(f"{_name(request)}: the back-end refused it with {value}")

    def _receive_plain(self, request: int, size: int) -> bytes:
        reply, fds = self.receive(request, size)
        if fds:
            raise BenchError(f"{_name(request)}: the reply has {len(fds)} descriptors, expected 0")
        return reply

    def _read(self, request: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            receive = partial(self.sock.recv, size - len(data))
            chunk = self._within_timeout(request, receive)
            if not chunk:
                raise _gone(request)
            data += chunk
        return data

    def _within_timeout(self, request: int, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except TimeoutError as exc:
            raise BenchError(
                f"{_name(request)}: no answer from the back-end in {self._timeout_s:g} s"
            ) from exc
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise _gone(request) from exc

    def _ask_word(self, request: int) -> int:
        return unpack_word(self.ask(request, size=WORD_SIZE)).value

    def _act_on_ring(self, request: int, ring: int, num: int) -> None:
        self.act(request, pack_vring_state(VringState(ring, num)))

    def _act_with_ring_fd(self, request: int, ring: int, fd: int | None) -> None:
        value = ring | (VringFd.NONE if fd is None else 0)
        self.act(request, pack_word(Word(value)), [] if fd is None else [fd])

    # --- Negotiation ---

    def get_features(self) -> int:
        """Return the virtio features that the back-end offers."""
        return self._ask_word(RequestNumber.GET_FEATURES)

    def set_features(self, features: int) -> None:
        """Agree on virtio features."""
        self.act(RequestNumber.SET_FEATURES, pack_word(Word(features)))

    def get_protocol_features(self) -> int:
        """Return the vhost-user features that the back-end offers."""
        return self._ask_word(RequestNumber.GET_PROTOCOL_FEATURES)

    def set_protocol_features(self, features: int) -> None:
        """Agree on vhost-user features."""
        self.act(RequestNumber.SET_PROTOCOL_FEATURES, pack_word(Word(features)))

    def set_owner(self) -> None:
        """Claim the session."""
        self.act(RequestNumber.SET_OWNER)

    def get_queue_num(self) -> int:
        """Return how many queues the back-end has at most; needs the MQ feature."""
        return self._ask_word(RequestNumber.GET_QUEUE_NUM)

    # --- Memory ---

    def set_mem_table(self, memory: GuestRam, *, num_slots: int = 0) -> None:
        """Share every region; unused slots fill the payload up to `num_slots`."""
        regions = [Region._make(region) for region in memory.regions]
        slots = regions + [Region(0, 0, 0, 0)] * (num_slots - len(regions))
        payload = pack_mem_table(MemTable(len(regions))) + b"".join(map(pack_region, slots))
        self.act(RequestNumber.SET_MEM_TABLE, payload, [memory.fd] * len(regions))

    # --- Rings ---

    def set_vring_num(self, ring: int, num: int) -> None:
        """Set the number of entries."""
        self._act_on_ring(RequestNumber.SET_VRING_NUM, ring, num)

    def set_vring_base(self, ring: int, base: int) -> None:
        """Set the index of the available ring to start at."""
        self._act_on_ring(RequestNumber.SET_VRING_BASE, ring, base)

    def set_vring_enable(self, ring: int, num: int) -> None:
        """Enable (1) or disable (0) a ring."""
        self._act_on_ring(RequestNumber.SET_VRING_ENABLE, ring, num)

    def set_vring_addr(self, ring: int, layout: RingLayout, *, log_guest_addr: int = 0) -> None:
        """Set where the three areas of a ring are."""
        addr = VringAddr(ring, 0, layout.desc, layout.used, layout.avail, log_guest_addr)
        self.act(RequestNumber.SET_VRING_ADDR, pack_vring_addr(addr))

    def get_vring_base(self, ring: int) -> int:
        """Stop a ring and return the index of the available ring that it has reached."""
        request = RequestNumber.GET_VRING_BASE
        asked = pack_vring_state(VringState(ring, 0))
        reply = unpack_vring_state(self.ask(request, asked, size=VRING_STATE_SIZE))
        if reply.ring != ring:
            raise BenchError(f"{_name(request)}: the reply is for ring {reply.ring}, not {ring}")
        return reply.num

    def set_vring_kick(self, ring: int, fd: int | None) -> None:
        """Pass the descriptor that is signalled for the back-end; None for polling."""
        self._act_with_ring_fd(RequestNumber.SET_VRING_KICK, ring, fd)

    def set_vring_call(self, ring: int, fd: int | None) -> None:
        """Pass the descriptor that the back-end signals; None for polling."""
        self._act_with_ring_fd(RequestNumber.SET_VRING_CALL, ring, fd)


def _name(request: int) -> str:
    row = ROWS.get(request)
    return row.name if row else f"request {request}"


def _gone(request: int) -> BackendGoneError:
    return BackendGoneError(f"{_name(request)}: the back-end closed the connection")
