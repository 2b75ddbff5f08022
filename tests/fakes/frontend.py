"""The front-end of the product, and what only tests send: every other message, legal or not.

`tests.fakes.vmms` has the orders in which real VMMs send them.
"""

import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Final

from appliance.bench import front_end
from appliance.bench.front_end import BackendGoneError, RefusedError
from appliance.engine import RingLayout
from appliance.vhost._vhost_wire import (
    CONFIG_SIZE,
    INFLIGHT_SIZE,
    WORD_SIZE,
    Config,
    HeaderFlag,
    Inflight,
    Log,
    MemReg,
    Region,
    RequestNumber,
    StateDirection,
    StateTransfer,
    VringAddr,
    VringFlag,
    pack_config,
    pack_inflight,
    pack_log,
    pack_mem_reg,
    pack_state_transfer,
    pack_vring_addr,
    unpack_inflight,
    unpack_word,
)

_NO_FD: Final = 0x100

__all__ = ["BackendGoneError", "FrontEnd", "OutOfMessagesError", "RefusedError"]


class OutOfMessagesError(Exception):
    """The front-end was told to send no more messages than it has sent."""


class FrontEnd(front_end.FrontEnd):
    """One vhost-user connection, front-end side. Owns its socket.

    Args:
        sock: connected AF_UNIX stream.
        max_messages: send so many, then raise OutOfMessagesError in place of the next.
        timeout_s: how long one reply may take.
    """

    def __init__(
        self, sock: socket.socket, *, max_messages: int | None = None, timeout_s: float = 20.0
    ) -> None:
        super().__init__(sock, timeout_s=timeout_s)
        self.num_sent = 0
        self._max_messages = max_messages

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        flags: int = HeaderFlag.VERSION_1,
    ) -> None:
        if self.num_sent == self._max_messages:
            raise OutOfMessagesError
        self.num_sent += 1
        super().send(request, payload, fds, flags)

    # Device.

    def reset_owner(self) -> None:
        self.act(RequestNumber.RESET_OWNER)

    def reset_device(self) -> None:
        self.act(RequestNumber.RESET_DEVICE)

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

    def add_mem_reg(self, region: Region, fd: int) -> None:
        self.act(RequestNumber.ADD_MEM_REG, pack_mem_reg(MemReg(region)), [fd])

    def rem_mem_reg(self, region: Region) -> None:
        self.act(RequestNumber.REM_MEM_REG, pack_mem_reg(MemReg(region)))

    # Rings.

    def set_vring_log(
        self, ring: int, layout: RingLayout, used_gpa: int, *, is_logged: bool
    ) -> None:
        """Set the addresses of a ring, with or without the flag that asks to log its used ring."""
        flags = VringFlag.LOG if is_logged else 0
        addr = VringAddr(ring, flags, layout.desc, layout.used, layout.avail, used_gpa)
        self.act(RequestNumber.SET_VRING_ADDR, pack_vring_addr(addr))

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

    # Saving and moving.

    def set_log_base(self, fd: int, size: int, offset: int = 0) -> None:
        payload = pack_log(Log(size, offset))
        self.send(RequestNumber.SET_LOG_BASE, payload, [fd], flags=self.ask_flags)
        reply, fds = self.receive(RequestNumber.SET_LOG_BASE, len(payload))
        assert (reply, fds) == (payload, [])

    def set_device_state_fd(self, fd: int, direction: int, phase: int = 0) -> int:
        """Return the reply, 0x100 for success."""
        payload = pack_state_transfer(StateTransfer(direction, phase))
        self.send(RequestNumber.SET_DEVICE_STATE_FD, payload, [fd], flags=self.ask_flags)
        reply, fds = self.receive(RequestNumber.SET_DEVICE_STATE_FD, WORD_SIZE)
        assert fds == []
        return unpack_word(reply).value

    def check_device_state(self) -> int:
        """Return the reply, 0 for success."""
        return self._ask_word(RequestNumber.CHECK_DEVICE_STATE)

    def save_state(self) -> bytes:
        """Return the session's state, as QEMU asks for it: through a pipe."""
        reading, writing = os.pipe()
        assert self.set_device_state_fd(writing, StateDirection.SAVE) == _NO_FD
        os.close(writing)
        with open(reading, "rb") as pipe:  # noqa: PTH123 - a descriptor has no path
            state = pipe.read()
        assert self.check_device_state() == 0
        return state

    def load_state(self, state: bytes) -> int:
        """Pass the state on as QEMU does; return what the check says, 0 for success."""
        reading, writing = os.pipe()
        assert self.set_device_state_fd(reading, StateDirection.LOAD) == _NO_FD
        os.close(reading)
        # A back-end that has read enough closes its end.
        with contextlib.suppress(BrokenPipeError), open(writing, "wb") as pipe:  # noqa: PTH123
            pipe.write(state)
        return self.check_device_state()
