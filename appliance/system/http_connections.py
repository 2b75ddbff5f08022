"""Connections of HTTP servers: how many there are, and how long one may be idle.

aiohttp parses requests and runs handlers. It limits neither the number of connections nor the time
until the first request is complete, so each of its protocols is wrapped in one that does.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, cast

from aiohttp.http import HttpProcessingError

_LOG = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 512
# Between two requests, and until the first one is complete.
IDLE_S: Final = 60.0

_TOO_MANY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"Content-Length: 21\r\nRetry-After: 5\r\nConnection: close\r\n\r\n"
    b"too many connections\n"
)


class ConnectionCount:
    """The connections of all listening sockets of one server."""

    def __init__(self, maximum: int = CONNECTIONS_MAX) -> None:
        self.num_open = 0
        self.maximum = maximum


class CountedConnection(asyncio.Protocol):
    """Passes everything to the protocol of one connection.

    The connection is refused if there are too many, and aborted when it has been idle for too long;
    it is not idle while `num_requests` is above 0 (see `busy`).
    """

    def __init__(
        self, count: ConnectionCount, new_protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        self.num_requests = 0
        self._count = count
        self._new_protocol = new_protocol
        self._protocol: asyncio.Protocol | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        # Waits until the transport has passed on what it holds; ended when it is lost, too.
        self._flushed: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._count.num_open += 1
        self._transport = cast("asyncio.Transport", transport)
        if self._count.num_open > self._count.maximum:
            _LOG.warning("%d connections, which is the limit", self._count.maximum)
            self._transport.write(_TOO_MANY)
            self._transport.close()
            return
        self._protocol = self._new_protocol()
        self._protocol.connection_made(transport)
        self.restart_timer()

    def restart_timer(self) -> None:
        """Begin to count the time in which the connection is idle."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._end_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._count.num_open -= 1
        self._end_flushing()
        if self._timer is not None:
            self._timer.cancel()
        if self._protocol is not None:
            self._protocol.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._protocol is not None:
            self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        """See `asyncio.Protocol`."""
        return None if self._protocol is None else self._protocol.eof_received()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._end_flushing()
        if self._protocol is not None:
            self._protocol.resume_writing()

    async def duplicate_socket(self) -> int:
        """Return a descriptor of the socket, once all that was written has been sent.

        It does not block, and the caller owns it. What is written to it follows what was sent, as
        long as nothing is written to the transport.

        Raises:
            ConnectionError: the connection is lost.
            OSError: there are no descriptors left.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        # Without any, the transport resumes writing when it holds nothing any more.
        transport.set_write_buffer_limits(high=0)
        try:
            while transport.get_write_buffer_size() and not transport.is_closing():
                self._flushed = asyncio.get_running_loop().create_future()
                await self._flushed
        finally:
            self._flushed = None
            transport.set_write_buffer_limits()
        if transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        return os.dup(transport.get_extra_info("socket").fileno())

    def _end_flushing(self) -> None:
        if self._flushed is not None and not self._flushed.done():
            self._flushed.set_result(None)

    def _end_if_idle(self) -> None:
        if self.num_requests == 0 and self._transport is not None:
            self._transport.abort()


@contextmanager
def busy(transport: asyncio.BaseTransport | None) -> Iterator[None]:
    """Have the connection of a request not count as idle for a block."""
    connection = None if transport is None else transport.get_protocol()
    if not isinstance(connection, CountedConnection):
        yield
        return
    connection.num_requests += 1
    try:
        yield
    finally:
        connection.num_requests -= 1
        connection.restart_timer()


def log_bad_requests_in_a_line() -> None:
    """Drop the traceback that aiohttp logs for a request that is not HTTP; a line says as much."""
    logging.getLogger("aiohttp.server").addFilter(_is_ours)


def _is_ours(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, HttpProcessingError):
        return True
    _LOG.info("not a request: %s", " ".join(error.message.split())[:200])
    return False
