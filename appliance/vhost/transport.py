"""vhost-user messages over a stream socket, with their descriptors; the only module with sockets.

The descriptors of a message travel with its first byte.

Spec: vhost-user: Communication; Header.
"""

import asyncio
import socket
import struct
from typing import Final

from appliance.bounds import MESSAGE_FDS_MAX
from appliance.errors import VhostError
from appliance.vhost._vhost_wire import HEADER_SIZE
from appliance.vhost.fds import ReceivedFds
from appliance.vhost.messages import (
    Message,
    MessageReply,
    decode_header_untrusted,
    decode_untrusted,
    encode_reply,
)

_FD: Final = struct.Struct("i")
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(_FD.size * MESSAGE_FDS_MAX)


class Connection:
    """The connection to one front-end. Owns its socket, an AF_UNIX stream socket.

    `receive` and `send` must be called by one task only; `close` may be called by any.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(0)
        self._sock = sock
        self._waiter: asyncio.Future[None] | None = None

    async def receive(self) -> Message | None:
        """Return the next request, or None at the end of the stream.

        The caller must close the message, which owns the descriptors that came with it.

        Raises:
            VhostError: the stream ends within a message, or the received bytes are not a message.
        """
        fds = ReceivedFds()
        try:
            message = await self._receive(fds)
        except BaseException:
            fds.close()
            raise
        if message is None:
            fds.close()
        return message

    async def send(self, reply: MessageReply) -> None:
        """Send `reply`. Its descriptors are lent.

        Raises:
            VhostError: the peer is gone.
        """
        data = memoryview(encode_reply(reply))
        ancillary = [
            (socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(_FD.pack(fd) for fd in reply.fds))
        ]
        while data:
            try:
                sent = self._sock.sendmsg([data], ancillary if reply.fds else [])
            except BlockingIOError:
                await self._wait(is_writing=True)
            except OSError as exc:
                raise VhostError(f"the front-end is gone: {exc}") from exc
            else:
                data = data[sent:]
                ancillary = []

    def close(self) -> None:
        """Close the socket; a task that waits in `receive` gets None."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._stop_watching()
        self._sock.close()

    async def _receive(self, fds: ReceivedFds) -> Message | None:
        data = b""
        while len(data) < HEADER_SIZE:
            chunk = await self._receive_header_part(HEADER_SIZE - len(data), fds)
            if not chunk and not data:
                return None
            data += self._not_eof(chunk)
        header = decode_header_untrusted(data)
        payload = b""
        while len(payload) < header.size:
            payload += self._not_eof(await self._receive_bytes(header.size - len(payload)))
        return decode_untrusted(header, payload, fds)

    async def _receive_header_part(self, size: int, fds: ReceivedFds) -> bytes:
        while True:
            try:
                data, ancillary, flags, _address = self._sock.recvmsg(
                    size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await self._wait(is_writing=False)
                continue
            except OSError:  # reset by the peer, or closed by `close`
                return b""
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    whole = len(content) - len(content) % _FD.size
                    fds.extend(fd for (fd,) in _FD.iter_unpack(content[:whole]))
            if flags & socket.MSG_CTRUNC:
                raise VhostError(
                    f"descriptors were lost: more than {MESSAGE_FDS_MAX} came, or RLIMIT_NOFILE is "
                    "too low"
                )
            return data

    async def _receive_bytes(self, size: int) -> bytes:
        while True:
            try:
                # Without a control buffer, the kernel closes descriptors that come with these
                # bytes, where they are not allowed.
                return self._sock.recv(size)
            except BlockingIOError:
                await self._wait(is_writing=False)
            except OSError:
                return b""

    def _not_eof(self, data: bytes) -> bytes:
        if not data:
            raise VhostError("the connection ended within a message")
        return data

    async def _wait(self, *, is_writing: bool) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        watch = loop.add_writer if is_writing else loop.add_reader
        watch(self._sock.fileno(), _wake, self._waiter)
        try:
            await self._waiter
        finally:
            self._stop_watching()

    def _stop_watching(self) -> None:
        if self._waiter is not None:
            self._waiter = None
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sock.fileno())
            loop.remove_writer(self._sock.fileno())


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
