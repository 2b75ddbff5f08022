"""What all handlers have in common: bytes in, bytes out, errors to statuses."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from appliance.castore.digest import DIGEST_SIZE, Digest
from appliance.errors import InvalidRequestError
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
            with self._call():
                try:
                    return await handler(request)
                except Exception as exc:  # noqa: BLE001 - each becomes a status, bugs are logged
                    status = status_of(exc)
                request = b""
                return await _abort(context, status)

        return grpc.unary_unary_rpc_method_handler(call)

    def stream(self, handler: StreamHandler, *, has_headers: bool = False) -> Handler:
        """Serve one message with many.

        With `has_headers`, an error that comes before the first message is preceded by headers, as
        in a stream that has begun. Without, its status is in the headers (Trailers-Only in gRPC's
        specification, which has it for errors), and some clients take that for the failure of the
        call itself.
        """

        async def call(request: bytes, context: Context) -> AsyncIterator[bytes]:
            with self._call():
                has_begun = False
                status: Status | None = None
                try:
                    async with aclosing(handler(request)) as responses:
                        async for response in responses:
                            has_begun = True
                            yield response
                except Exception as exc:  # noqa: BLE001 - as above
                    status = status_of(exc)
                request = b""
                if not has_begun and (has_headers or status is None):
                    await context.send_initial_metadata(())
                if status is not None:
                    await _abort(context, status)

        return grpc.unary_stream_rpc_method_handler(call)

    def sink(self, handler: SinkHandler) -> Handler:
        """Serve many messages with one."""

        async def call(_requests: AsyncIterator[bytes], context: Context) -> bytes:
            incoming = Incoming(context, self._places)
            with self._call():
                try:
                    async with aclosing(incoming.whole()) as requests:
                        return await handler(requests)
                except Exception as exc:  # noqa: BLE001 - as above
                    status = status_of(exc)
                await incoming.drain()
                return await _abort(context, status)

        return grpc.stream_unary_rpc_method_handler(call)

    @contextmanager
    def _call(self) -> Iterator[None]:
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


async def _abort(context: Context, status: Status) -> NoReturn:
    # gRPC keeps the exception that this raises, and it keeps all that its frames, and those of an
    # exception under way, refer to, in a cycle: so it is called outside of any `except`, by frames
    # that refer to no message.
    await context.abort(*status)
