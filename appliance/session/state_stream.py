"""The bytes of a device state on their way through the descriptor that the front-end has sent.

QEMU sends a pipe, and writes or reads all of it before it asks for the result; others send a
socket, or a file in memory. The flags of the descriptor may be shared with the front-end and stay
as they are, so it is used only when it is ready. A file is always ready.

Spec: vhost-user: Migrating back-end state.
"""

import asyncio
import os
from typing import Final

from appliance.errors import VhostError
from appliance.session.device_state import STATE_MAX, is_whole

# What a pipe that is ready for writing takes without blocking: PIPE_BUF on Linux (pipe(7)).
_WRITE_BYTES: Final = 4096
_READ_BYTES: Final = 1 << 16
# How long a front-end may take to read or write once it has asked for the result.
_DEADLINE_S: Final = 10.0


class StateStream:
    """One transfer, which begins at once. Owns the descriptor `fd`, and closes it at the end.

    Args:
        fd: what to write to or read from.
        data: the state to write; None to read one.
    """

    def __init__(self, fd: int, data: bytes | None = None) -> None:
        self._fd = fd
        self._is_saving = data is not None
        self._unsent = memoryview(data or b"")
        self._received = bytearray()
        self._is_asked_for = False
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        watch = self._loop.add_writer if self._is_saving else self._loop.add_reader
        try:
            watch(fd, self._step)
        except PermissionError:  # epoll_ctl(2): a file
            while not self._over.done():
                self._step()

    async def finish(self) -> bytearray | None:
        """Return what was read, all of it; or None once everything is written.

        Raises:
            VhostError: the descriptor failed, or the front-end takes too long.
        """
        self._is_asked_for = True
        self._end_if_enough()
        try:
            async with asyncio.timeout(_DEADLINE_S):
                await asyncio.shield(self._over)
        except TimeoutError as exc:
            self.close()
            raise VhostError(
                f"the transfer of the device state takes more than {_DEADLINE_S:.0f} s"
            ) from exc
        except OSError as exc:
            raise VhostError(f"the device state cannot be transferred: {exc.strerror}") from exc
        return None if self._is_saving else self._received

    def close(self) -> None:
        """End the transfer, unless it has ended."""
        if not self._over.done():
            self._end(None)

    def _step(self) -> None:
        try:
            if self._is_saving:
                sent = os.write(self._fd, self._unsent[:_WRITE_BYTES])
                self._unsent = self._unsent[sent:]
                if not self._unsent:
                    self._end(None)
            else:
                self._read()
        except OSError as exc:
            self._end(exc)

    def _read(self) -> None:
        data = os.read(self._fd, _READ_BYTES)
        self._received += data
        if len(self._received) > STATE_MAX:
            self._end(VhostError(f"the device state has more than {STATE_MAX} bytes"))
        elif not data:
            self._end(None)
        else:
            self._end_if_enough()

    def _end_if_enough(self) -> None:
        # A front-end that keeps its end open has sent all of it when it asks for the result.
        is_enough = not self._is_saving and is_whole(self._received)
        if self._is_asked_for and is_enough and not self._over.done():
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        os.close(self._fd)
        if error is None:
            self._over.set_result(None)
        else:
            self._over.set_exception(error)
            self._over.exception()  # it may never be asked for
