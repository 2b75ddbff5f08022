"""The three services on another HTTP/2 stack than ours, as strict as that of Tvix and Snix.

It is grpclib on hyper-h2, with the rules for headers switched on, and one that neither knows: a
stream whose `:authority` is no authority is reset (RFC 9113, 8.3.1; RFC 3986, 3.2).
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from grpclib.const import Cardinality, Status
from grpclib.const import Handler as Method
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.protocol import H2Protocol
from grpclib.protocol import Stream as H2Stream
from grpclib.server import Handler, Server, Stream
from h2.errors import ErrorCodes

from appliance.castore.directory import Directory
from appliance.castore.size_dialect import SizeDialect
from appliance.rpc.blob_handlers import BlobHandlers
from appliance.rpc.directory_handlers import DirectoryHandlers
from appliance.rpc.path_info_handlers import PathInfoHandlers
from appliance.services.grpc_messages import SNIX, Family, decode_chunk_untrusted, encode_chunk
from appliance.services.grpc_status import status_of
from appliance.services.memory_services import (
    MemoryBlobService,
    MemoryDirectoryService,
    MemoryPathInfoService,
)
from appliance.services.open_services import LoopThread

# Rust's `http` takes no percent sign in it, which RFC 3986 would allow.
_AUTHORITY: Final = re.compile(r"(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]+)?")
# Of what Blob.Read sends, as Tvix and Snix do.
_PIECE_SIZE: Final = 4096
_CLOSE_S: Final = 5
# As they are logged by the library, statuses included.
logging.getLogger("grpclib").setLevel(logging.CRITICAL)

_Bytes = Stream[bytes, bytes]
_Unary = Callable[[bytes], Awaitable[bytes]]
_Streamed = Callable[[bytes], AsyncGenerator[bytes, None]]
_Sunk = Callable[[AsyncIterator[bytes]], Awaitable[bytes]]


class Peer(NamedTuple):
    """How one server is to behave."""

    family: Family = SNIX
    # Whether a refused call of many answers gets headers, then trailers, or trailers alone.
    sends_headers_first: bool = False
    # The one way of counting that it takes, or both.
    dialect: SizeDialect | None = None
    # Called before each PathInfo is put; may wait, or raise a GRPCError.
    before_path_info: Callable[[], Awaitable[None]] | None = None


class StrictServer:
    """Serves contents of its own at `unix_uri` and `tcp_uri`; `resets` has what it reset."""

    def __init__(self, directory: Path, thread: LoopThread, peer: Peer) -> None:
        self.resets: list[str] = []
        self._thread = thread
        blobs = MemoryBlobService()
        directories = MemoryDirectoryService()
        self._methods = _methods(
            peer,
            BlobHandlers(blobs),
            DirectoryHandlers(directories),
            PathInfoHandlers(MemoryPathInfoService(blobs, directories)),
        )
        path = directory / "strict.sock"
        self.unix_uri = f"grpc+unix:{path}"
        self._servers: list[_Server] = []
        self._thread.run_and_wait(self._start(path))

    async def _start(self, path: Path) -> None:
        unix, tcp = (_Server(self._methods, self.resets) for _ in range(2))
        await unix.start(path=str(path))
        await tcp.start("::1", 0)
        listening = tcp._server
        assert listening is not None
        port = listening.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        self.tcp_uri = f"grpc+http://[::1]:{port}"
        self._servers = [unix, tcp]

    def close(self) -> None:
        self._thread.run_and_wait(self._stop())

    async def _stop(self) -> None:
        for server in self._servers:
            server.close()
        # Calls whose clients are gone may be waiting to tell them so: they end with the loop.
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                for server in self._servers:
                    await server.wait_closed()


@contextmanager
def strict_server(directory: Path, peer: Peer) -> Iterator[StrictServer]:
    """Serve until the end of the block."""
    thread = LoopThread("strict")
    server = StrictServer(directory, thread, peer)
    try:
        yield server
    finally:
        server.close()
        thread.close()


class _Raw(CodecBase):
    __content_subtype__ = "proto"

    def encode(self, message: bytes, message_type: Any) -> bytes:
        del message_type
        return message

    def decode(self, data: bytes, message_type: Any) -> bytes:
        del message_type
        return bytes(data)


class _Server(Server):
    def __init__(self, methods: dict[str, Method], resets: list[str]) -> None:
        super().__init__([], codec=_Raw())
        self._mapping = methods
        self._resets = resets
        self._h2_config.validate_inbound_headers = True
        self._h2_config.validate_outbound_headers = True

    def _protocol_factory(self) -> H2Protocol:
        handler = _Handler(
            self._mapping, self._codec, self._status_details_codec, self.__dispatch__
        )
        handler.resets = self._resets
        self._handlers.add(handler)
        return H2Protocol(handler, self._config, self._h2_config)


class _Handler(Handler):
    resets: list[str]

    def accept(
        self,
        stream: H2Stream,
        headers: list[tuple[str, str]],
        release_stream: Callable[[], Any],
    ) -> None:
        authority = dict(headers).get(":authority", "")
        if not _AUTHORITY.fullmatch(authority):
            self.resets.append(authority)
            stream.reset_nowait(ErrorCodes.PROTOCOL_ERROR)
            release_stream()
            return
        super().accept(stream, headers, release_stream)


def _methods(
    peer: Peer, blobs: BlobHandlers, directories: DirectoryHandlers, path_infos: PathInfoHandlers
) -> dict[str, Method]:
    family = peer.family
    headers_first = peer.sends_headers_first
    return {
        f"/{family.blobs()}/Stat": _unary(blobs.stat),
        f"/{family.blobs()}/Read": _streamed(_in_pieces(blobs.read), headers_first=headers_first),
        f"/{family.blobs()}/Put": _sunk(blobs.put),
        f"/{family.directories()}/Get": _streamed(directories.get, headers_first=headers_first),
        f"/{family.directories()}/Put": _sunk(_in_one_dialect(directories.put, peer.dialect)),
        f"/{family.path_infos()}/Get": _unary(path_infos.get),
        f"/{family.path_infos()}/Put": _unary(_put_path_info(path_infos, peer)),
        f"/{family.path_infos()}/CalculateNAR": _unary(path_infos.calculate_nar),
        f"/{family.path_infos()}/List": _streamed(path_infos.list, headers_first=headers_first),
    }


def _unary(handler: _Unary) -> Method:
    async def call(stream: _Bytes) -> None:
        request = await stream.recv_message()
        assert request is not None
        with _answering():
            await stream.send_message(await handler(request))

    return Method(call, Cardinality.UNARY_UNARY, bytes, bytes)


def _streamed(handler: _Streamed, *, headers_first: bool) -> Method:
    async def call(stream: _Bytes) -> None:
        request = await stream.recv_message()
        assert request is not None
        if headers_first:
            await stream.send_initial_metadata()
        with _answering():
            async with aclosing(handler(request)) as answers:
                async for answer in answers:
                    await stream.send_message(answer)

    return Method(call, Cardinality.UNARY_STREAM, bytes, bytes)


def _sunk(handler: _Sunk) -> Method:
    async def call(stream: _Bytes) -> None:
        with _answering():
            await stream.send_message(await handler(stream))

    return Method(call, Cardinality.STREAM_UNARY, bytes, bytes)


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (GRPCError, StreamTerminatedError):
        raise
    except Exception as exc:
        status = status_of(exc)
        raise GRPCError(Status(status.code.value[0]), status.text) from exc


def _in_pieces(read: _Streamed) -> _Streamed:
    async def read_in_pieces(request: bytes) -> AsyncGenerator[bytes, None]:
        async with aclosing(read(request)) as messages:
            async for message in messages:
                data = decode_chunk_untrusted(message)
                for start in range(0, len(data), _PIECE_SIZE):
                    yield encode_chunk(data[start : start + _PIECE_SIZE])

    return read_in_pieces


def _put_path_info(path_infos: PathInfoHandlers, peer: Peer) -> _Unary:
    async def put(request: bytes) -> bytes:
        if peer.before_path_info is not None:
            await peer.before_path_info()
        return await path_infos._service.put(request)

    return put


def _in_one_dialect(put: _Sunk, dialect: SizeDialect | None) -> _Sunk:
    if dialect is None:
        return put

    async def checked(requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        sizes: dict[bytes, int] = {}
        async for request in requests:
            directory = Directory.from_bytes(request)
            for node in directory.directories:
                if sizes[node.digest] != node.size:
                    raise GRPCError(
                        Status.INTERNAL,
                        f"wrong size {node.size} for digest {node.digest}, expected "
                        f"{sizes[node.digest]}",
                    )
            sizes[directory.digest()] = directory.size(dialect)
            yield request

    return lambda requests: put(checked(requests))
