"""NARs from a local store to clients, past the buffers of the event loop."""

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from appliance.errors import NarError, StoreError
from appliance.http_cache.http_exchange import METRICS, STALL_S, abort, in_thread
from appliance.services.nar_sender import NarSender
from appliance.system.http_connections import CountedConnection

_LOG = logging.getLogger(__name__)


async def send_straight(
    request: web.Request,
    response: web.StreamResponse,
    connection: CountedConnection,
    sender: NarSender,
    executor: ThreadPoolExecutor,
) -> web.StreamResponse:
    """Send what `sender` has; the connection is cut off if it is wrong, or nobody reads it.

    Args:
        request: is answered.
        response: states the length of what is sent.
        connection: of the request.
        sender: is closed at the end.
        executor: has the threads that send.

    Raises:
        StoreError, NarError: content is missing or wrong, and nothing was sent.
    """
    try:
        await in_thread(sender.check, executor)
        await response.prepare(request)
        async with asyncio.timeout(STALL_S):
            fd = await connection.duplicate_socket()
        try:
            while not await in_thread(lambda: sender.send(fd), executor):
                async with asyncio.timeout(STALL_S):
                    await _writable(fd)
        finally:
            os.close(fd)
        await response.write_eof()
    except (StoreError, NarError) as exc:
        if not response.prepared:
            raise
        _LOG.error("%s: cut off: %s", request.path[:200], exc)
        abort(request)
    except TimeoutError:
        _LOG.info("%s: cut off: nothing was read for %d s", request.path[:200], STALL_S)
        abort(request)
    except ConnectionError as exc:
        _LOG.debug("%s: the client is gone: %s", request.path[:200], exc)
        abort(request)
    except OSError as exc:
        _LOG.error("%s: cut off: %s", request.path[:200], exc)
        abort(request)
    finally:
        request.app[METRICS].num_sent_bytes += sender.num_sent
        sender.close()
    return response


async def _writable(fd: int) -> None:
    """Wait until `fd` can be written, or its peer is gone."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, _end, future)
    try:
        await future
    finally:
        loop.remove_writer(fd)


def _end(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
