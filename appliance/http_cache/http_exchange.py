"""What the handlers of the HTTP server have in common: bodies, ranges, and answers to errors."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Final, TypeVar

from aiohttp import ClientError, web

from appliance.errors import (
    AlreadyExistsError,
    ApplianceError,
    ContentMissingError,
    InvalidRequestError,
    NarError,
    ProtocolError,
    ReadOnlyStoreError,
    ServiceLimitError,
    ServiceUnavailableError,
    StoreError,
    StoreFullError,
)
from appliance.http_cache.server_metrics import ServerMetrics, kind_of
from appliance.log import set_log_source
from appliance.metrics.program_figures import ProgramFigures
from appliance.nix.store_path import decode_base32
from appliance.system.http_connections import CountedConnection, busy
from appliance.system.tracing import is_tracing, serving

_LOG = logging.getLogger(__name__)

# A client that takes or gives nothing for this long is cut off.
STALL_S: Final = 120.0
# In bytes. What is gathered of an upload before a thread takes it.
_RECEIVED_SIZE: Final = 1 << 19

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


METRICS: Final = web.AppKey("metrics", ServerMetrics)
FIGURES: Final = web.AppKey("figures", ProgramFigures)


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer errors with their text, and keep count of requests."""
    set_log_source(request.remote or "a local client")
    status = 500
    name = f"{request.method} {kind_of(request.path)}" if is_tracing() else ""
    with busy(request.transport), serving(lambda: dict(request.headers), name):
        try:
            response = await _answered(request, handler)
            status = response.status
        except web.HTTPException as exc:
            status = exc.status
            raise
        else:
            return response
        finally:
            request.app[METRICS].count(request.method, request.path, status)


def connection_of(request: web.Request) -> CountedConnection | None:
    """Return the connection that a request came on, unless it is lost."""
    protocol = None if request.transport is None else request.transport.get_protocol()
    return protocol if isinstance(protocol, CountedConnection) else None


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApplianceError as exc:
        status = _status_of(exc)
        log = _LOG.error if status >= 500 else _LOG.info
        log("%s %s: %s", request.method, request.path[:200], exc)
        return web.Response(status=status, text=f"{exc}\n")


_STATUSES: Final[Sequence[tuple[type[ApplianceError], int]]] = (
    (AlreadyExistsError, 409),
    (ProtocolError, 400),
    (ContentMissingError, 404),
    (ReadOnlyStoreError, 403),
    (StoreFullError, 507),
    (ServiceUnavailableError, 503),
    (ServiceLimitError, 503),
)


def _status_of(exc: ApplianceError) -> int:
    return next((status for kind, status in _STATUSES if isinstance(exc, kind)), 500)


async def send(
    request: web.Request, response: web.StreamResponse, pieces: AsyncGenerator[bytes, None]
) -> web.StreamResponse:
    """Send a body; the connection is cut off if it turns out to be wrong, or nobody reads it."""
    async with aclosing(pieces):
        if request.method == "HEAD":
            await response.prepare(request)
            return response
        try:
            # The first piece may be an error that can still be answered.
            first = await anext(pieces, b"")
            await response.prepare(request)
            await _write(request, response, first)
            async for piece in pieces:
                await _write(request, response, piece)
            async with asyncio.timeout(STALL_S):
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
    return response


async def _write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    request.app[METRICS].num_sent_bytes += len(data)
    async with asyncio.timeout(STALL_S):
        await response.write(data)


def abort(request: web.Request) -> None:
    """Cut the connection of a request off."""
    if request.transport is not None:
        request.transport.abort()


async def body_of(request: web.Request) -> AsyncGenerator[bytes, None]:
    """Yield the body in pieces.

    Raises:
        InvalidRequestError: it ends too early, or nothing comes for a while.
    """
    gathered = bytearray()
    while True:
        try:
            async with asyncio.timeout(STALL_S):
                data = await request.content.readany()
        except TimeoutError as exc:
            raise InvalidRequestError(f"nothing was sent for {STALL_S:.0f} s") from exc
        except (OSError, ClientError, web.RequestPayloadError) as exc:
            raise InvalidRequestError(f"the body ends too early: {exc}") from exc
        gathered += data
        request.app[METRICS].num_received_bytes += len(data)
        if gathered and (not data or len(gathered) >= _RECEIVED_SIZE):
            yield bytes(gathered)
            gathered.clear()
        if not data:
            return


async def in_thread(work: Callable[[], T], executor: ThreadPoolExecutor | None = None) -> T:
    """Run `work` in a thread; it has ended when this returns, also when this is cancelled.

    Args:
        work: what to run.
        executor: has the thread; None for that of the event loop.
    """
    future = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        raise


def digest_of(request: web.Request) -> bytes:
    """Return the digest of the store path that the URL names."""
    try:
        return decode_base32(request.match_info["digest"])
    except ValueError as exc:
        raise web.HTTPNotFound(text=f"{exc}\n") from exc


def range_of(request: web.Request, size: int) -> tuple[int, int, int]:
    """Return start and end of what is wanted of `size` bytes, and the status.

    Several ranges at once are answered with the whole, as a server may.
    """
    text = request.headers.get("Range", "")
    if not text.startswith("bytes=") or "," in text:
        return 0, size, 200
    first, dash, last = text.removeprefix("bytes=").strip().partition("-")
    if not dash or not (first or last) or not all(_is_number(part) for part in (first, last)):
        return 0, size, 200
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last or size) + 1, size)
        if last and int(last) < start:
            return 0, size, 200
    if start >= end:
        raise web.HTTPRequestRangeNotSatisfiable(
            headers={"Content-Range": f"bytes */{size}"}, text="nothing is in this range\n"
        )
    return start, end, 206


def _is_number(text: str) -> bool:
    return not text or (text.isascii() and text.isdecimal() and len(text) <= 19)


def accepts_zstd(request: web.Request) -> bool:
    """Whether the client takes a body that is compressed with zstd."""
    for item in listed(request.headers.get("Accept-Encoding")):
        coding, _, parameters = item.partition(";")
        if coding.strip().lower() == "zstd":
            quality = parameters.strip().lower().removeprefix("q=")
            return quality.strip("0.") != "" or not parameters
    return False


def listed(value: str | None) -> list[str]:
    """Return the items of a header that is a list."""
    return [item.strip() for item in value.split(",")] if value else []
