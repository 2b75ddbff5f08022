"""A vhost-user front-end over a connected socket.

One method per request, and as strict about replies as QEMU: flags of exactly 5, the request's
number, the exact size. `tests.fakes.vmms` has the orders in which real VMMs send them.
"""

import socket
from collections.abc import Sequence
from typing import Final

from appliance.vhost._vhost_wire import (
    CONFIG_SIZE,
    HEADER_SIZE,
    INFLIGHT_SIZE,
    VRING_STATE_SIZE,
    WORD_SIZE,
    Config,
    Header,
    HeaderFlag,
    Inflight,
    MemReg,
    MemTable,
    Region,
    RequestNumber,
    VringAddr,
    VringFd,
    VringState,
    Word,
    pack_config,
    pack_header,
    pack_inflight,
    pack_mem_reg,
    pack_mem_table,
    pack_region,
    pack_vring_addr,
    pack_vring_state,
    pack_word,
    unpack_header,
    unpack_inflight,
    unpack_vring_state,
    unpack_word,
)
from tests.fakes.driver import DriverRing, GuestMemory

REPLY_FLAGS: Final = 0x5
MAX_REPLY_FDS: Final = 8


class BackendGoneError(ConnectionError):
    """The back-end closed the connection."""


class RefusedError(Exception):
    """The back-end answered with a failed ack."""


class OutOfMessagesError(Exception):
    """The front-end was told to send no more messages than it has sent."""


class FrontEnd:
    """One vhost-user connection, front-end side. Owns its socket.

    Args:
        sock: connected AF_UNIX stream.
        max_messages: send so many, then raise OutOfMessagesError in place of the next.
        timeout_s: how long one reply may take.

    `acks` asks for an ack of every request that has no own reply; a failed one is a RefusedError.
    `ask_flags` are the header flags of requests that have one.
    """

    def __init__(
        self, sock: socket.socket, *, max_messages: int | None = None, timeout_s: float = 20.0
    ) -> None:
        sock.settimeout(timeout_s)
        self.sock = sock
        self.acks = False
        self.ask_flags: int = HeaderFlag.VERSION_1
        self.num_sent = 0
        self._max_messages = max_messages

    def close(self) -> None:
        self.sock.close()

    # Any message, legal or not.

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        flags: int = HeaderFlag.VERSION_1,
    ) -> None:
        """Send one message and wait for nothing."""
        if self.num_sent == self._max_messages:
            raise OutOfMessagesError
        self.num_sent += 1
        data = pack_header(Header(request, flags, len(payload))) + payload
        try:
            sent = socket.send_fds(self.sock, [data], fds)
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise BackendGoneError from exc
        assert sent == len(data)

    def receive(self, request: int, size: int) -> tuple[bytes, list[int]]:
        """Return payload and descriptors of the reply to `request`, which has `size` bytes."""
        try:
            data, fds, _flags, _address = socket.recv_fds(self.sock, HEADER_SIZE, MAX_REPLY_FDS)
        except ConnectionResetError as exc:
            raise BackendGoneError from exc
        if not data:
            raise BackendGoneError
        data += self._read(HEADER_SIZE - len(data))
        assert unpack_header(data) == Header(request, REPLY_FLAGS, size)
        return self._read(size), fds

    def ask(self, request: int, payload: bytes = b"", *, size: int) -> bytes:
        """Send a request whose own reply has `size` bytes; return them."""
        self.send(request, payload, flags=self.ask_flags)
        reply, fds = self.receive(request, size)
        assert fds == []
        return reply

    def act(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request without an own reply, and await its ack if `acks` says so."""
        if not self.acks:
            self.send(request, payload, fds)
            return
        self.send(request, payload, fds, HeaderFlag.VERSION_1 | HeaderFlag.NEED_REPLY)
        reply, reply_fds = self.receive(request, WORD_SIZE)
        assert reply_fds == []
        if unpack_word(reply).value != 0:
            raise RefusedError(request)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self.sock.recv(size - len(data))
            if not chunk:
                raise BackendGoneError
            data += chunk
        return data

    def _ask_word(self, request: int) -> int:
        return unpack_word(self.ask(request, size=WORD_SIZE)).value

    def _act_on_ring(self, request: int, ring: int, num: int) -> None:
        self.act(request, pack_vring_state(VringState(ring, num)))

    def _act_with_ring_fd(self, request: int, ring: int, fd: int | None) -> None:
        value = ring | (VringFd.NONE if fd is None else 0)
        self.act(request, pack_word(Word(value)), [] if fd is None else [fd])

    # Negotiation and device.

    def get_features(self) -> int:
        return self._ask_word(RequestNumber.GET_FEATURES)

    def set_features(self, features: int) -> None:
        self.act(RequestNumber.SET_FEATURES, pack_word(Word(features)))

    def get_protocol_features(self) -> int:
        return self._ask_word(RequestNumber.GET_PROTOCOL_FEATURES)

    def set_protocol_features(self, features: int) -> None:
        self.act(RequestNumber.SET_PROTOCOL_FEATURES, pack_word(Word(features)))

    def set_owner(self) -> None:
        self.act(RequestNumber.SET_OWNER)

    def reset_owner(self) -> None:
        self.act(RequestNumber.RESET_OWNER)

    def reset_device(self) -> None:
        self.act(RequestNumber.RESET_DEVICE)

    def get_queue_num(self) -> int:
        return self._ask_word(RequestNumber.GET_QUEUE_NUM)

    def get_config(self, offset: int, size: int, *, flags: int = 0) -> bytes:
        asked = pack_config(Config(offset, size, flags)) + bytes(size)
        reply = self.ask(RequestNumber.GET_CONFIG, asked, size=len(asked))
        assert reply[:CONFIG_SIZE] == asked[:CONFIG_SIZE]
        return reply[CONFIG_SIZE:]

    def set_config(self, offset: int, data: bytes, *, flags: int = 0) -> None:
        self.act(RequestNumber.SET_CONFIG, pack_config(Config(offset, len(data), flags)) + data)

    # Memory.

    def get_max_mem_slots(self) -> int:
        return self._ask_word(RequestNumber.GET_MAX_MEM_SLOTS)

    def set_mem_table(self, memory: GuestMemory, *, num_slots: int = 0) -> None:
        """Send every region; unused slots fill the payload up to `num_slots`."""
        regions = [Region._make(region) for region in memory.regions]
        slots = regions + [Region(0, 0, 0, 0)] * (num_slots - len(regions))
        payload = pack_mem_table(MemTable(len(regions))) + b"".join(map(pack_region, slots))
        self.act(RequestNumber.SET_MEM_TABLE, payload, [memory.fd] * len(regions))

    def add_mem_reg(self, region: Region, fd: int) -> None:
        self.act(RequestNumber.ADD_MEM_REG, pack_mem_reg(MemReg(region)), [fd])

    def rem_mem_reg(self, region: Region) -> None:
        self.act(RequestNumber.REM_MEM_REG, pack_mem_reg(MemReg(region)))

    # Rings.

    def set_vring_num(self, ring: int, num: int) -> None:
        self._act_on_ring(RequestNumber.SET_VRING_NUM, ring, num)

    def set_vring_base(self, ring: int, base: int) -> None:
        self._act_on_ring(RequestNumber.SET_VRING_BASE, ring, base)

    def set_vring_enable(self, ring: int, num: int) -> None:
        self._act_on_ring(RequestNumber.SET_VRING_ENABLE, ring, num)

    def set_vring_addr(self, ring: int, driver: DriverRing, *, log_guest_addr: int = 0) -> None:
        layout = driver.layout()
        addr = VringAddr(ring, 0, layout.desc, layout.used, layout.avail, log_guest_addr)
        self.act(RequestNumber.SET_VRING_ADDR, pack_vring_addr(addr))

    def get_vring_base(self, ring: int) -> int:
        asked = pack_vring_state(VringState(ring, 0))
        reply = unpack_vring_state(
            self.ask(RequestNumber.GET_VRING_BASE, asked, size=VRING_STATE_SIZE)
        )
        assert reply.ring == ring
        return reply.num

    def set_vring_kick(self, ring: int, fd: int | None) -> None:
        self._act_with_ring_fd(RequestNumber.SET_VRING_KICK, ring, fd)

    def set_vring_call(self, ring: int, fd: int | None) -> None:
        self._act_with_ring_fd(RequestNumber.SET_VRING_CALL, ring, fd)

    def set_vring_err(self, ring: int, fd: int | None) -> None:
        self._act_with_ring_fd(RequestNumber.SET_VRING_ERR, ring, fd)

    # Inflight buffer.

    def get_inflight_fd(self, num_queues: int, queue_size: int) -> tuple[Inflight, int]:
        """Return the buffer's description and its descriptor, which the caller owns."""
        asked = pack_inflight(Inflight(0, 0, num_queues, queue_size))
        self.send(RequestNumber.GET_INFLIGHT_FD, asked, flags=self.ask_flags)
        reply, (fd,) = self.receive(RequestNumber.GET_INFLIGHT_FD, INFLIGHT_SIZE)
        inflight = unpack_inflight(reply)
        assert inflight[2:] == (num_queues, queue_size)
        return inflight, fd

    def set_inflight_fd(self, inflight: Inflight, fd: int) -> None:
        self.act(RequestNumber.SET_INFLIGHT_FD, pack_inflight(inflight), [fd])
