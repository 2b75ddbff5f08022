"""What all handlers have in common: bytes in, bytes out, errors to statuses."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from appliance.castore.digest import DIGEST_SIZE, Digest
from appliance.errors import InvalidRequestError
from appliance.log import set_log_source
from appliance.rpc.incoming import Context, Incoming, ReceivingPlaces
from appliance.rpc.status import Status, StatusError, status_of

M = TypeVar("M", bound=Message)

# Quoted: the class is generic in its stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"
UnaryHandler = Callable[[bytes], Awaitable[bytes]]
StreamHandler = Callable[[bytes], AsyncGenerator[bytes, None]]
SinkHandler = Callable[[AsyncIterator[bytes]], Awaitable[bytes]]


class Edge:
    """Makes gRPC handlers of functions on bytes, and knows of the calls under way."""

    def __init__(self) -> None:
        self._places = ReceivingPlaces()
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no call is under way."""
        await self._idle.wait()

    def unary(self, handler: UnaryHandler) -> Handler:
        """Serve one message with one."""

        async def call(request: bytes, context: Context) -> bytes:
            with self._call(context):
                try:
                    return await handler(request)
                except Exception as exc:  # noqa: BLE001 - each becomes a status, bugs are logged
                    status = status_of(exc)
                request = b""
                return await _abort(context, status)

        return grpc.unary_unary_rpc_method_handler(call)

    def stream(self, handler: StreamHandler) -> Handler:
        """Serve one message with many."""

        async def call(request: bytes, context: Context) -> AsyncIterator[bytes]:
            with self._call(context):
                try:
                    async with aclosing(handler(request)) as responses:
                        async for response in responses:
                            yield response
                except Exception as exc:  # noqa: BLE001 - as above
                    status = status_of(exc)
                else:
                    return
                request = b""
                await _abort(context, status)

        return grpc.unary_stream_rpc_method_handler(call)

    def sink(self, handler: SinkHandler) -> Handler:
        """Serve many messages with one."""

        async def call(_requests: AsyncIterator[bytes], context: Context) -> bytes:
            incoming = Incoming(context, self._places)
            with self._call(context):
                try:
                    async with aclosing(incoming.whole()) as requests:
                        return await handler(requests)
                except Exception as exc:  # noqa: BLE001 - as above
                    status = status_of(exc)
                await incoming.drain()
                return await _abort(context, status)

        return grpc.stream_unary_rpc_method_handler(call)

    @contextmanager
    def _call(self, context: Context) -> Iterator[None]:
        set_log_source(_host_of(context.peer()))  # each call is a task of its own
        self._num_calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_calls -= 1
            if self._num_calls == 0:
                self._idle.set()


def decode_untrusted(kind: type[M], data: bytes) -> M:
    """Read a message.

    Raises:
        InvalidRequestError: it is not of this kind.
    """
    try:
        return kind.FromString(data)
    except DecodeError as exc:
        raise InvalidRequestError(f"not a {kind.DESCRIPTOR.name} message") from exc


def digest_untrusted(value: bytes) -> Digest:
    """Read a digest.

    Raises:
        StatusError: it has another length.
    """
    if len(value) != DIGEST_SIZE:
        raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, "invalid digest length")
    return Digest(value)


def _host_of(peer: str) -> str:
    # As gRPC writes it: "ipv4:127.0.0.1:4711", "ipv6:%5B::1%5D:4711", "unix:". A client that
    # connects again has another port, and must not count as another.
    return peer.rpartition(":")[0] if peer.startswith("ipv") else "unix"


async def _abort(context: Context, status: Status) -> NoReturn:
    # gRPC keeps the exception that this raises, and it keeps all that its frames, and those of an
    # exception under way, refer to, in a cycle: so it is called outside of any `except`, by frames
    # that refer to no message.
    await context.abort(*status)
