"""`appliance http`: a binary cache for Nix over HTTP.

/nix-cache-info                 what kind of cache this is
/DIGEST.narinfo                 GET, HEAD and, with uploads, PUT
/DIGEST.ls                      what is in the NAR, as JSON
/nar/snix-castore/NODE          a NAR; with ranges, and compressed for those that accept zstd
/nar/HASH.nar[.EXTENSION]       PUT, with uploads
/log/DRV                        the log of a build; PUT, with uploads
/realisations/ID.doi            what a content-addressed derivation was built to; PUT, with uploads
/health                         whether the store can be read
/metrics                        counters, in the format of OpenMetrics

Every client that can connect may read all contents whose digests it knows, as with the daemon. TLS
and passwords need another server in front of this one.
"""

import asyncio
import logging
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import uvloop
from aiohttp import web

from appliance.errors import (
    InvalidRequestError,
    PathInfoError,
)
from appliance.http_cache.document_handlers import DocumentHandlers
from appliance.http_cache.documents import Documents
from appliance.http_cache.http_exchange import (
    FIGURES,
    METRICS,
    Handler,
    accepts_zstd,
    answer_errors,
    body_of,
    connection_of,
    digest_of,
    in_thread,
    listed,
    range_of,
    send,
)
from appliance.http_cache.listings import listing
from appliance.http_cache.nar_sending import send_straight
from appliance.http_cache.nar_source import NarSource
from appliance.http_cache.nar_urls import NAR_PREFIX, nar_url, node_of_url, parse_upload
from appliance.http_cache.pending_nars import NarReceiver, PendingNars
from appliance.http_cache.server_metrics import ServerMetrics
from appliance.http_cache.uploads import UploadTarget, accept
from appliance.metrics.program_figures import ProgramFigures
from appliance.nix.narinfo import narinfo_of, parse_narinfo
from appliance.nix.path_info import PathInfo, validate
from appliance.nix.signing import SecretKey
from appliance.nix.store_path import (
    BASE32_ALPHABET,
    DIGEST_SIZE,
    STORE_DIR,
    base32_size,
)
from appliance.nix.trusted_keys import TrustedKeys
from appliance.protos import pathinfo_pb2
from appliance.services.addresses import ServiceAddresses
from appliance.services.contracts import Services
from appliance.services.local_nar import keep_piece_memory
from appliance.services.nar_extent import extent_of
from appliance.services.open_services import open_services
from appliance.store.writer import AsyncStore
from appliance.system.http_connections import (
    ConnectionCount,
    CountedConnection,
    log_bad_requests_in_a_line,
)
from appliance.system.listening import (
    ListeningSocket,
    announce_ready,
    announce_status,
    announce_stopping,
    raise_descriptor_limit,
    stop_event,
)
from appliance.system.watchdog import feeding_watchdog

_LOG = logging.getLogger(__name__)

# Requests under way at the end may take so long; more than that, and they are cut off.
_GRACE_S: Final = 60.0
_BACKLOG: Final = 128
_SWEEP_INTERVAL_S: Final = 15.0
# In bytes.
_NARINFO_MAX: Final = 2 << 20
_LISTING_MAX: Final = 256 << 20
# Uploads at a time; the others wait. Each may need memory for a large dictionary of lzma.
_RECEIVERS: Final = 16
# Those of them that are decompressed at a time, which takes memory for what comes of one piece.
_RECEIVING_THREADS: Final = 4
# Where logs and realisations are, in the directory of a store.
_DOCUMENTS: Final = "http"
_IMMUTABLE: Final = "max-age=31536000, immutable"
_DIGEST: Final = f"{{digest:[{BASE32_ALPHABET}]{{{base32_size(DIGEST_SIZE)}}}}}"


class CacheConfig(NamedTuple):
    """What the cache serves, and how."""

    services: ServiceAddresses
    listen: Sequence[ListeningSocket]
    secret_keys: Sequence[SecretKey] = ()
    priority: int = 39
    allows_put: bool = False
    trusted_keys: TrustedKeys | None = None
    zstd_level: int = 3


def serve_cache(config: CacheConfig) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; requests under way are finished then.

    Raises:
        StoreError: the store cannot be opened.
    """
    log_bad_requests_in_a_line()
    raise_descriptor_limit()  # connections, uploads, and large blobs being read take descriptors
    # gRPC needs the loop of asyncio itself; with a local store there is none.
    is_local = config.services.one_store() is not None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if is_local else None) as runner:
        runner.run(_serve(config))


async def _serve(config: CacheConfig) -> None:
    stopping = stop_event()
    async with AsyncExitStack() as stack:
        stores = _local_stores(config)
        for store in stores.values():
            stack.callback(store.close)
        opening = open_services(
            config.services, is_readonly=not config.allows_put, stores=stores or None
        )
        services = await stack.enter_async_context(opening)
        if stores:
            keep_piece_memory()
        cache = _Cache(config, services, next(iter(stores.values()), None))
        stack.callback(cache.close)
        sweeping = asyncio.create_task(cache.drop_old_nars())
        stack.callback(sweeping.cancel)
        connections = ConnectionCount()
        runner = web.AppRunner(
            cache.application(connections),
            handle_signals=False,
            access_log=None,
            shutdown_timeout=_GRACE_S,
            auto_decompress=False,
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await _listen(config, runner, connections, stack)
        where = f"serving on {', '.join(item.label for item in config.listen)}"
        announce_ready(where)
        announce_status(where)
        async with feeding_watchdog():
            await stopping.wait()
        announce_stopping()


def _local_stores(config: CacheConfig) -> dict[Path, AsyncStore]:
    path = config.services.one_store()
    if path is None:
        return {}
    is_readonly = not config.allows_put
    opened = AsyncStore.open(path, is_readonly=is_readonly, create=not is_readonly)
    return {path: opened}


async def _listen(
    config: CacheConfig, runner: web.AppRunner, count: ConnectionCount, stack: AsyncExitStack
) -> None:
    loop = asyncio.get_running_loop()
    server = runner.server
    assert server is not None  # noqa: S101 - it is set up
    for item in config.listen:
        is_unix = item.socket.family == socket.AF_UNIX
        create = loop.create_unix_server if is_unix else loop.create_server
        listening = await create(
            lambda: CountedConnection(count, server), sock=item.socket, backlog=_BACKLOG
        )
        # At the end, before anything else: another server may listen there while this one finishes.
        stack.callback(item.remove_file)
        stack.callback(listening.close)


class _Cache:
    """The handlers of requests."""

    def __init__(self, config: CacheConfig, services: Services, local: AsyncStore | None) -> None:
        self._config = config
        self._services = services
        self._local = local
        self._nars = NarSource(services, local)
        self._pending = PendingNars()
        self._figures = ProgramFigures(None if local is None else local.store)
        self._target = UploadTarget(services, local)
        self._receivers = asyncio.Semaphore(_RECEIVERS)
        self._receiving = ThreadPoolExecutor(_RECEIVING_THREADS, "receive")
        self._documents = DocumentHandlers(
            Documents(None if local is None else local.store.path / _DOCUMENTS),
            services.path_infos,
            secret_keys=config.secret_keys,
            trusted_keys=config.trusted_keys,
        )

    def close(self) -> None:
        """Drop what was uploaded in part, and end the threads."""
        self._pending.close()
        self._nars.close()
        self._receiving.shutdown()
        self._figures.close()

    async def drop_old_nars(self) -> None:
        """Drop uploaded NARs whose narinfos do not come, again and again."""
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            self._pending.drop_old()

    def application(self, connections: ConnectionCount) -> web.Application:
        """Return the routes."""
        application = web.Application(middlewares=[answer_errors])
        application[METRICS] = metrics = ServerMetrics()
        application[FIGURES] = self._figures
        metrics.add_gauge("connections", "Open connections.", lambda: connections.num_open)
        metrics.add_gauge(
            "pending_nars", "Uploaded NARs that wait for narinfos.", lambda: len(self._pending)
        )
        routes: list[tuple[str, Handler]] = [
            ("/", _index),
            ("/health", self._health),
            ("/nix-cache-info", self._cache_info),
            (f"/{_DIGEST}.narinfo", self._get_narinfo),
            (f"/{_DIGEST}.ls", self._get_listing),
            (f"/{NAR_PREFIX}{{node}}", self._get_nar),
            ("/nar/{name}", _no_upload),
            ("/log/{name}", self._documents.get_log),
            ("/realisations/{name}.doi", self._documents.get_realisation),
            ("/metrics", _metrics),
        ]
        for path, handler in routes:
            application.router.add_get(path, handler)
        # Refused before the body is sent, where the client waits for that.
        puts: list[tuple[str, Handler]] = [
            (f"/{_DIGEST}.narinfo", self._put_narinfo),
            (f"/{_DIGEST}.ls", self._put_listing),
            ("/nar/{name}", self._put_nar),
            ("/log/{name}", self._documents.put_log),
            ("/realisations/{name}.doi", self._documents.put_realisation),
        ]
        for path, handler in puts:
            application.router.add_put(path, self._allowed(handler), expect_handler=self._expect)
        return application

    # --- Reading ---

    async def _health(self, request: web.Request) -> web.Response:
        del request
        await self._services.path_infos.get(bytes(DIGEST_SIZE))
        return web.Response(text="ok\n")

    async def _cache_info(self, request: web.Request) -> web.Response:
        del request
        text = f"StoreDir: {STORE_DIR}\nWantMassQuery: 1\nPriority: {self._config.priority}\n"
        return web.Response(text=text, content_type="text/x-nix-cache-info")

    async def _get_narinfo(self, request: web.Request) -> web.Response:
        message, info = await self._path_info(request)
        try:
            narinfo = narinfo_of(message)
        except PathInfoError as exc:
            _LOG.warning("%s", exc)
            raise web.HTTPNotFound(text=f"{exc}\n") from exc
        narinfo = narinfo._replace(url=nar_url(info.node, narinfo.nar_size))
        for key in self._config.secret_keys:
            narinfo = narinfo.with_signature(key.sign(narinfo.fingerprint()))
        return web.Response(text=str(narinfo), content_type="text/x-nix-narinfo")

    async def _get_listing(self, request: web.Request) -> web.StreamResponse:
        _message, info = await self._path_info(request)
        extent = await extent_of(info.node, self._services.directories)
        if extent is not None:
            extent.check("the tree")
        response = web.StreamResponse()
        response.content_type = "application/json"
        pieces = listing(info.node, self._services.directories)
        return await send(request, response, pieces)

    async def _get_nar(self, request: web.Request) -> web.StreamResponse:
        node = node_of_url(request.match_info["node"])
        etag = f'"{request.match_info["node"]}"'
        headers = {"ETag": etag, "Cache-Control": _IMMUTABLE, "Vary": "Accept-Encoding"}
        if etag in listed(request.headers.get("If-None-Match")):
            return web.Response(status=304, headers=headers)
        nar = await self._nars.open(node)
        stated = request.query.get("narsize")
        if stated is not None and stated != str(nar.size):
            raise web.HTTPNotFound(text=f"narsize is {stated[:20]}, but the NAR has {nar.size}\n")
        is_whole = request.headers.get("If-Range", etag) != etag
        start, end, status = (0, nar.size, 200) if is_whole else range_of(request, nar.size)
        response = web.StreamResponse(status=status, headers=headers)
        response.content_type = "application/x-nix-nar"
        if status == 206:
            response.headers["Content-Range"] = f"bytes {start}-{end - 1}/{nar.size}"
        level = self._config.zstd_level
        is_compressed = status == 200 and level > 0 and accepts_zstd(request)
        if is_compressed:
            response.headers["Content-Encoding"] = "zstd"
        else:
            response.headers["Accept-Ranges"] = "bytes"
            response.content_length = end - start
        if is_compressed:
            return await send(request, response, nar.compressed(level))
        connection = connection_of(request)
        sender = None
        if request.method != "HEAD" and connection is not None:
            sender = await nar.sender(start, end)
        if sender is None or connection is None:
            return await send(request, response, nar.pieces(start, end))
        return await send_straight(request, response, connection, sender, self._nars.executor)

    async def _path_info(self, request: web.Request) -> tuple[pathinfo_pb2.PathInfo, PathInfo]:
        encoded = await self._services.path_infos.get(digest_of(request))
        if encoded is None:
            raise web.HTTPNotFound(text="no such path\n")
        message = pathinfo_pb2.PathInfo.FromString(encoded)
        return message, validate(message)

    # --- Uploads ---

    async def _expect(self, request: web.Request) -> None:
        self._check_put(request)
        if request.headers.get("Expect", "").lower() != "100-continue":
            raise web.HTTPExpectationFailed(text="unknown Expect\n")
        if request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _allowed(self, handler: Handler) -> Handler:
        async def checked(request: web.Request) -> web.StreamResponse:
            self._check_put(request)
            return await handler(request)

        return checked

    def _check_put(self, request: web.Request) -> None:
        if not self._config.allows_put:
            raise web.HTTPForbidden(text="uploads are not allowed here\n")
        if request.path.startswith("/log/"):
            return  # these are kept as they come
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise web.HTTPUnsupportedMediaType(text="Content-Encoding is not supported\n")

    async def _put_nar(self, request: web.Request) -> web.Response:
        url = f"nar/{request.match_info['name']}"
        file_hash, compression = parse_upload(url)
        async with self._receivers:
            self._pending.check_room()
            directory = None if self._local is None else self._local.temp_directory()
            receiver = NarReceiver(file_hash, compression, directory, self._pending.budget)
            try:
                async with aclosing(body_of(request)) as pieces:
                    async for data in pieces:
                        await in_thread(partial(receiver.receive, data), self._receiving)
                nar = await in_thread(receiver.finish, self._receiving)
            except BaseException:
                receiver.abort()
                raise
        self._pending.add(url, nar)
        return web.Response(status=201, text="")

    async def _put_listing(self, request: web.Request) -> web.Response:
        # Ours are made from what is in the store.
        num_bytes = 0
        async with aclosing(body_of(request)) as pieces:
            async for data in pieces:
                num_bytes += len(data)
                if num_bytes > _LISTING_MAX:
                    raise web.HTTPRequestEntityTooLarge(_LISTING_MAX, num_bytes)
        return web.Response(status=201, text="")

    async def _put_narinfo(self, request: web.Request) -> web.Response:
        body = bytearray()
        async with aclosing(body_of(request)) as pieces:
            async for data in pieces:
                body += data
                if len(body) > _NARINFO_MAX:
                    raise web.HTTPRequestEntityTooLarge(_NARINFO_MAX, len(body))
        try:
            narinfo = parse_narinfo(body.decode())
        except UnicodeDecodeError as exc:
            raise InvalidRequestError(f"narinfo: {exc}") from exc
        if narinfo.path.digest != digest_of(request):
            raise InvalidRequestError(
                f"narinfo: describes {narinfo.path.absolute()}, not this path"
            )
        await accept(narinfo, self._pending, self._target, self._config.trusted_keys)
        return web.Response(status=201, text="")


async def _index(request: web.Request) -> web.Response:
    del request
    return web.Response(text="a binary cache for Nix, by appliance\n")


async def _metrics(request: web.Request) -> web.Response:
    figures = await request.app[FIGURES].gather()
    text, content_type = request.app[METRICS].text(request.headers.get("Accept"), figures)
    return web.Response(body=text, headers={"Content-Type": content_type})


async def _no_upload(request: web.Request) -> web.Response:
    # Nix asks before it uploads a NAR, and relies on it if it is there. Until its narinfo comes,
    # it might go any moment.
    raise web.HTTPNotFound(text=f"no {request.path[:200]}\n")
