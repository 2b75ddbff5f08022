"""The supervisor's end of a control channel to a worker or the fork server, on the event loop."""

import asyncio
import collections
import contextlib
import os
import socket
from collections.abc import Callable, Sequence

from appliance.protos.control_pb2 import Envelope
from appliance.session import channel


class LinkClosedError(ConnectionError):
    """The process at the other end is gone, or the link was closed."""


class Link:
    """Sends messages and requests, and matches replies with requests. Owns its socket.

    Args:
        sock: the supervisor's end, from `channel_pair`.
        on_message: called with every message that is not a reply.
        on_closed: called once, when the peer ends or `close` is called.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_message: Callable[[Envelope], None],
        on_closed: Callable[[], None],
    ) -> None:
        sock.settimeout(0)
        self._sock = sock
        self._on_message = on_message
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._next_id = 1
        self._waiting: dict[int, asyncio.Future[Envelope]] = {}
        self._unsent: collections.deque[tuple[Envelope, list[int]]] = collections.deque()
        self._is_open = True
        self._loop.add_reader(sock, self._read)

    def post(self, envelope: Envelope, fds: Sequence[int] = ()) -> None:
        """Send a message that has no reply, now or as soon as the socket takes it.

        `fds` are lent for the duration of the call only. If the link is closed, nothing happens.
        """
        if not self._is_open:
            return
        if not self._unsent and self._try_send(envelope, fds):
            return
        if self._is_open:
            self._unsent.append((envelope, [os.dup(fd) for fd in fds]))
            self._loop.add_writer(self._sock, self._write)

    async def request(self, envelope: Envelope, fds: Sequence[int] = ()) -> Envelope:
        """Send `envelope` with a new id and return its reply; `fds` are lent as in `post`.

        Raises:
            LinkClosedError: the link was closed before the reply came.
        """
        if not self._is_open:
            raise LinkClosedError
        envelope.id = self._next_id
        self._next_id += 1
        reply: asyncio.Future[Envelope] = self._loop.create_future()
        self._waiting[envelope.id] = reply
        self.post(envelope, fds)
        return await reply

    def close(self) -> None:
        """Close the channel, upon which the peer ends. Pending requests fail."""
        if not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for _envelope, fds in self._unsent:
            _close_all(fds)
        self._unsent.clear()
        for reply in self._waiting.values():
            if not reply.done():
                reply.set_exception(LinkClosedError())
        self._waiting.clear()
        self._on_closed()

    def _read(self) -> None:
        while self._is_open:
            try:
                message = channel.receive(self._sock)
            except BlockingIOError:
                return
            except OSError:
                message = None
            if message is None:
                self.close()
                return
            envelope, fds = message
            _close_all(fds)  # nothing sends fds in this direction
            self._dispatch(envelope)

    def _dispatch(self, envelope: Envelope) -> None:
        # A worker chooses the ids of its own requests (Resolve); they are unrelated to ours.
        if envelope.id == 0 or envelope.HasField("resolve"):
            self._on_message(envelope)
            return
        reply = self._waiting.pop(envelope.id, None)
        if reply is not None and not reply.done():
            reply.set_result(envelope)

    def _try_send(self, envelope: Envelope, fds: Sequence[int]) -> bool:
        try:
            channel.send(self._sock, envelope, fds)
        except BlockingIOError:
            return False
        except OSError:
            self.close()
            return False
        return True

    def _write(self) -> None:
        while self._unsent and self._is_open:
            envelope, fds = self._unsent[0]
            if not self._try_send(envelope, fds):
                return
            self._unsent.popleft()
            _close_all(fds)
        if self._is_open:
            self._loop.remove_writer(self._sock)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
