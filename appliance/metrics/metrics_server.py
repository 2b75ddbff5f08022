"""`--metrics`: the numbers of a program, over HTTP, in the format that the client asks for.

Requests are answered on the program's loop. Reading files and making the text, which takes two to
three milliseconds for each virtual machine of a supervisor, happen in threads, for one client at a
time.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from appliance.system.http_connections import (
    ConnectionCount,
    CountedConnection,
    busy,
    log_bad_requests_in_a_line,
)
from appliance.system.listening import ListeningSocket

Gather = Callable[[], Awaitable[dict[str, Any]]]
Render = Callable[[dict[str, Any], str], tuple[bytes, str]]

_LOG: Final = logging.getLogger(__name__)

# Front-ends need the descriptors more.
_CONNECTIONS_MAX: Final = 16
_BACKLOG: Final = 16
_CLOSE_DEADLINE_S: Final = 1.0
_INDEX: Final = "metrics of appliance are under /metrics\n"


class _MetricsServer:
    def __init__(self, gather: Gather, render: Render) -> None:
        self._gather = gather
        self._render = render
        self._turn = asyncio.Lock()

    async def metrics(self, request: web.Request) -> web.Response:
        with busy(request.transport):
            async with self._turn:
                report = await self._gather()
                accept = request.headers.get("Accept", "")
                body, content_type = await asyncio.to_thread(self._render, report, accept)
        return web.Response(body=body, headers={"Content-Type": content_type})


async def _index(_request: web.Request) -> web.Response:
    return web.Response(text=_INDEX)


@contextlib.asynccontextmanager
async def serving_metrics(
    listening: ListeningSocket, gather: Gather, render: Render
) -> AsyncIterator[None]:
    """Serve metrics for a block.

    Args:
        listening: the socket (lent).
        gather: returns the figures; called on this loop.
        render: returns their text and its content type, for a header Accept; called in a thread.
    """
    log_bad_requests_in_a_line()
    application = web.Application()
    application.router.add_get("/", _index)
    application.router.add_get("/metrics", _MetricsServer(gather, render).metrics)
    runner = web.AppRunner(
        application, handle_signals=False, access_log=None, shutdown_timeout=_CLOSE_DEADLINE_S
    )
    await runner.setup()
    server = runner.server
    assert server is not None  # noqa: S101 - it is set up
    connections = ConnectionCount(_CONNECTIONS_MAX)
    loop = asyncio.get_running_loop()
    is_unix = listening.socket.family == socket.AF_UNIX
    create = loop.create_unix_server if is_unix else loop.create_server
    try:
        accepting = await create(
            lambda: CountedConnection(connections, server),
            sock=listening.socket,
            backlog=_BACKLOG,
        )
        _LOG.info("metrics are on %s", listening.label)
        try:
            yield
        finally:
            accepting.close()
    finally:
        await runner.cleanup()
