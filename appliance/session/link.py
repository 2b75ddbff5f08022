"""One end of a control channel on the event loop: messages, and requests with their replies."""

import asyncio
import collections
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from appliance.bounds import UNSENT_MAX
from appliance.protos.control_pb2 import Envelope
from appliance.session import channel


class LinkClosedError(ConnectionError):
    """The process at the other end is gone, or the link was closed."""


class End(Protocol):
    """What a `Link` sends and receives through; it must never block."""

    receiving_fd: int
    """Readable when there is a message."""
    sending_fd: int
    """Writable when there is room for one."""

    def send(self, envelope: Envelope, fds: Sequence[int] = ()) -> None:
        """See `channel.send`."""

    def receive(self) -> tuple[Envelope, list[int]] | None:
        """See `channel.receive`."""

    def close(self) -> None:
        """Close what this object owns."""


class SocketEnd:
    """A socket through which both sides send messages with descriptors; owns it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(0)
        self._sock = sock
        self.receiving_fd = self.sending_fd = sock.fileno()

    def send(self, envelope: Envelope, fds: Sequence[int] = ()) -> None:
        """See `channel.send`; never blocks."""
        channel.send(self._sock, envelope, fds)

    def receive(self) -> tuple[Envelope, list[int]] | None:
        """See `channel.receive`; never blocks."""
        return channel.receive(self._sock)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


class Link:
    """Sends messages and requests, and matches replies with requests. Owns its end.

    Args:
        end: this side of the channel.
        on_message: called with every message that is not a reply, and its descriptors, which it
            owns.
        on_closed: called once, when the peer ends or `close` is called.
    """

    def __init__(
        self,
        end: End,
        on_message: Callable[[Envelope, list[int]], None],
        on_closed: Callable[[], None],
    ) -> None:
        self._end = end
        self._on_message = on_message
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._next_id = 1
        self._waiting: dict[int, asyncio.Future[tuple[Envelope, list[int]]]] = {}
        self._unsent: collections.deque[tuple[Envelope, list[int]]] = collections.deque()
        self.is_open = True
        self._loop.add_reader(end.receiving_fd, self._read)

    def post(self, envelope: Envelope, fds: Sequence[int] = ()) -> None:
        """Send a message that has no reply, now or as soon as the channel takes it.

        `fds` are lent for the duration of the call only. If the link is closed, nothing happens. If
        `UNSENT_MAX` messages wait, because the peer does not read, a message that is neither a
        request nor a reply is dropped; of those there are only as many as there are requests.
        """
        if not self.is_open:
            return
        if not self._unsent and self._try_send(envelope, fds):
            return
        if not envelope.id and len(self._unsent) >= UNSENT_MAX:
            return
        if self.is_open:
            self._unsent.append((envelope, [os.dup(fd) for fd in fds]))
            self._loop.add_writer(self._end.sending_fd, self._write)

    async def request(self, envelope: Envelope, fds: Sequence[int] = ()) -> Envelope:
        """Send `envelope` with a new id and return its reply; `fds` are lent as in `post`.

        Raises:
            LinkClosedError: the link was closed before the reply came.
        """
        reply, reply_fds = await self.request_with_fds(envelope, fds)
        close_all(reply_fds)
        return reply

    async def request_with_fds(
        self, envelope: Envelope, fds: Sequence[int] = ()
    ) -> tuple[Envelope, list[int]]:
        """Do as `request`, and return the descriptors of the reply, too; the caller owns them.

        Raises:
            LinkClosedError: the link was closed before the reply came.
        """
        if not self.is_open:
            raise LinkClosedError
        envelope.id = self._next_id
        self._next_id += 1
        reply: asyncio.Future[tuple[Envelope, list[int]]] = self._loop.create_future()
        self._waiting[envelope.id] = reply
        self.post(envelope, fds)
        return await reply

    def close(self) -> None:
        """Close the channel, upon which the peer ends. Pending requests fail."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._end.receiving_fd)
        self._loop.remove_writer(self._end.sending_fd)
        self._end.close()
        for _envelope, fds in self._unsent:
            close_all(fds)
        self._unsent.clear()
        for reply in self._waiting.values():
            if not reply.done():
                reply.set_exception(LinkClosedError())
        self._waiting.clear()
        self._on_closed()

    def _read(self) -> None:
        while self.is_open:
            try:
                message = self._end.receive()
            except BlockingIOError:
                return
            except OSError:
                message = None
            if message is None:
                self.close()
                return
            self._dispatch(*message)

    def _dispatch(self, envelope: Envelope, fds: list[int]) -> None:
        # The peer chooses the ids of its own requests; they are unrelated to ours.
        if envelope.id == 0 or envelope.WhichOneof("body") in _REQUESTS_OF_PEERS:
            self._on_message(envelope, fds)
            return
        reply = self._waiting.pop(envelope.id, None)
        if reply is not None and not reply.done():
            reply.set_result((envelope, fds))
        else:
            close_all(fds)

    def _try_send(self, envelope: Envelope, fds: Sequence[int]) -> bool:
        try:
            self._end.send(envelope, fds)
        except BlockingIOError:
            return False
        except OSError:
            self.close()
            return False
        return True

    def _write(self) -> None:
        while self._unsent and self.is_open:
            envelope, fds = self._unsent[0]
            if not self._try_send(envelope, fds):
                return
            self._unsent.popleft()
            close_all(fds)
        if self.is_open:
            self._loop.remove_writer(self._end.sending_fd)


# What a worker or a session process asks whoever is above it, and a supervisor a session process.
_REQUESTS_OF_PEERS = frozenset({"resolve", "restore", "start_apart", "start_session"})


def close_all(fds: Sequence[int]) -> None:
    """Close `fds`, whatever they are."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
