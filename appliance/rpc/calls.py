"""What all gRPC handlers share: functions on bytes in, statuses out, and limits on clients.

`Edge` turns a function on bytes into a gRPC handler, translates errors to statuses and limits how
many calls are under way. `Incoming` receives the messages of a call that sends many, and limits
how many messages are in memory at a time.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Final, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from appliance.castore.digest import DIGEST_SIZE, Digest
from appliance.errors import InvalidRequestError
from appliance.log import set_log_source
from appliance.rpc.call_counters import count_received, note_abort
from appliance.services.grpc_messages import CONTENT_MAX
from appliance.services.grpc_status import Status, StatusError, status_of
from appliance.system.tracing import serving

M = TypeVar("M", bound=Message)

# Quoted, as the classes are generic in their stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
UnaryHandler = Callable[[bytes], Awaitable[bytes]]
StreamHandler = Callable[[bytes], AsyncGenerator[bytes, None]]
SinkHandler = Callable[[AsyncIterator[bytes]], Awaitable[bytes]]
ExchangeHandler = Callable[[AsyncIterator[bytes]], AsyncGenerator[bytes, None]]

# Calls that do work, and calls that wait for something to happen. More of either kind are refused,
# as each may hold a request in memory. They are counted apart: waiting must not keep work out.
CALLS_MAX: Final = 1024
WATCHES_MAX: Final = 1024
_FULL: Final = Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls are under way")

# Messages that all calls together hold in memory while receiving. Each has up to `MESSAGE_MAX`
# bytes, three times while gRPC hands it over. With eight, a flood of large ones took 460 MiB; with
# two, calls that send nothing delayed others for too long.
_NUM_PLACES: Final = 3
# The same for calls with many objects in a message. A place is for the copies, too, that are made
# of what is in the message.
_NUM_BULK_PLACES: Final = 3
# A call to which no message arrives for this long loses its place and receives all the same. Large
# messages take their time. Clients that send small ones, or have been slow before, get less.
_PATIENCE_S: Final = 1.0
_SHORT_PATIENCE_S: Final = 0.1
# Messages of at least this many bytes count as large.
_LARGE_MIN: Final = 2 * CONTENT_MAX
# How long the rest of a refused stream is received: in all, and while nothing arrives.
_DRAIN_S: Final = 30.0
_DRAIN_IDLE_S: Final = 2.0


# --- Handlers ---


class Edge:
    """Makes gRPC handlers of functions on bytes, and counts the calls under way."""

    def __init__(self) -> None:
        self._places = ReceivingPlaces(_NUM_PLACES)
        self._bulk_places = ReceivingPlaces(_NUM_BULK_PLACES)
        self._work = _Room(CALLS_MAX)
        self._questions = _Room(CALLS_MAX)
        self._watches = _Room(WATCHES_MAX)

    async def wait_idle(self) -> None:
        """Wait until no work is under way."""
        await self._work.wait_empty()

    def unary(
        self,
        handler: UnaryHandler,
        *,
        is_work: bool = True,
        variant: tuple[tuple[str, str], UnaryHandler] | None = None,
    ) -> Handler:
        """Answer one message with one.

        Args:
            handler: returns the answer.
            is_work: without it, the call is answered even if the limit of work is reached, and
                `wait_idle` does not wait for it.
            variant: another handler, for calls with these metadata.
        """
        room = self._work if is_work else self._questions

        def chosen(context: Context) -> UnaryHandler:
            if variant is not None and variant[0] in (context.invocation_metadata() or ()):
                return variant[1]
            return handler

        async def call(request: bytes, context: Context) -> bytes:
            with room.taken(context) as refusal:
                status = refusal
                if status is None:
                    try:
                        return await chosen(context)(request)
                    except Exception as exc:  # noqa: BLE001 - each becomes a status, bugs are logged
                        status = status_of(exc)
                request = b""
                return await _abort(context, status)

        return grpc.unary_unary_rpc_method_handler(call)

    def stream(
        self, handler: StreamHandler, *, has_headers: bool = False, is_watch: bool = False
    ) -> Handler:
        """Answer one message with many.

        Args:
            handler: yields the answers.
            has_headers: send headers before the status of an error that precedes the first message,
                as in a stream that has begun. Without them, the status is in the headers
                (Trailers-Only in the gRPC specification), and some clients take that for a failure
                of the call itself.
            is_watch: the call lasts as long as its client wants, and is no work.
        """
        room = self._watches if is_watch else self._work

        async def call(request: bytes, context: Context) -> AsyncIterator[bytes]:
            with room.taken(context) as refusal:
                has_begun = False
                status = refusal
                if status is None:
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

    def sink(self, handler: SinkHandler, *, is_bulk: bool = False) -> Handler:
        """Answer many messages with one; with `is_bulk`, each message has many objects."""
        places = self._bulk_places if is_bulk else self._places

        async def call(_requests: AsyncIterator[bytes], context: Context) -> bytes:
            with self._work.taken(context) as refusal:
                if refusal is not None:
                    return await _abort(context, refusal)
                incoming = Incoming(context, places)
                try:
                    async with aclosing(incoming.whole()) as requests:
                        return await handler(requests)
                except Exception as exc:  # noqa: BLE001 - as above
                    status = status_of(exc)
                await incoming.drain()
                return await _abort(context, status)

        return grpc.stream_unary_rpc_method_handler(call)

    def exchange(self, handler: ExchangeHandler) -> Handler:
        """Answer many messages with many, as long as the client wants: the call is a watch."""

        async def call(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            with self._watches.taken(context) as refusal:
                status = refusal
                if status is None:
                    try:
                        async with aclosing(handler(requests)) as responses:
                            async for response in responses:
                                yield response
                    except Exception as exc:  # noqa: BLE001 - as above
                        status = status_of(exc)
                if status is not None:
                    await _abort(context, status)

        return grpc.stream_stream_rpc_method_handler(call)


class _Room:
    """A limit on concurrent calls of one kind; created and used on one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_calls = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def taken(self, context: Context) -> Iterator[Status | None]:
        """Count a call during the block; yield the status to refuse it with if there is no room."""
        set_log_source(_host_of(context.peer()))  # for this call only, which is a task of its own
        if self._num_calls >= self._limit:
            yield _FULL
            return
        self._num_calls += 1
        self._empty.clear()
        try:
            with serving(lambda: _texts(context.invocation_metadata())):
                yield None
        finally:
            self._num_calls -= 1
            if self._num_calls == 0:
                self._empty.set()

    async def wait_empty(self) -> None:
        """Wait until no call is under way."""
        await self._empty.wait()


def decode_untrusted(kind: type[M], data: bytes) -> M:
    """Decode a message.

    Raises:
        InvalidRequestError: `data` is not a message of this kind.
    """
    try:
        return kind.FromString(data)
    except DecodeError as exc:
        raise InvalidRequestError(f"not a {kind.DESCRIPTOR.name} message") from exc


def digest_untrusted(value: bytes) -> Digest:
    """Return the digest of a request.

    Raises:
        StatusError: it does not have 32 bytes.
    """
    if len(value) != DIGEST_SIZE:
        raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, "invalid digest length")
    return Digest(value)


def _texts(metadata: "grpc.aio.Metadata | None") -> dict[str, str]:
    return {key: value for key, value in metadata or () if isinstance(value, str)}


def _host_of(peer: str) -> str:
    # gRPC writes "ipv4:127.0.0.1:4711", "ipv6:%5B::1%5D:4711" or "unix:". The port is left out: a
    # client that connects again has another one.
    return peer.rpartition(":")[0] if peer.startswith("ipv") else "unix"


async def _abort(context: Context, status: Status) -> NoReturn:
    # gRPC keeps the exception that this raises in a reference cycle, with all that its frames and
    # those of an exception being handled refer to. So this is called outside of any `except` block,
    # by frames that refer to no message.
    note_abort(status.code)
    await context.abort(*status)


# --- Messages of one call, received one at a time ---
#
# A message may have `MESSAGE_MAX` bytes, and gRPC does not say how many before it has all of them.
# So the messages of all calls share a limited number of places. A call takes one for each message,
# from before it is received until the handler asks for the next. Calls without a place wait, and
# flow control leaves their messages with the clients.


class ReceivingPlaces:
    """The places for messages of many calls; created and used on one event loop."""

    def __init__(self, number: int) -> None:
        self._free = asyncio.Semaphore(number)

    async def take(self, patience_s: float) -> "_Place":
        """Wait for a place, first come, first served; it is lost after `patience_s` unless kept."""
        await self._free.acquire()
        return _Place(self._free, patience_s)


class _Place:
    """The place of one message; `is_held` until it is given back or lost."""

    def __init__(self, free: asyncio.Semaphore, patience_s: float) -> None:
        self._free = free
        self.is_held = True
        self._timer = asyncio.get_running_loop().call_later(patience_s, self.give_back)

    def keep(self) -> None:
        """Keep the place until `give_back`, as the message has arrived."""
        self._timer.cancel()

    def give_back(self) -> None:
        """Leave the place to another message; may be called again."""
        self._timer.cancel()
        if self.is_held:
            self.is_held = False
            self._free.release()


class Incoming:
    """The messages that the client of one call sends."""

    def __init__(self, context: Context, places: ReceivingPlaces) -> None:
        self._context = context
        self._places = places

    async def whole(self) -> AsyncGenerator[bytes, None]:
        """Yield each message; a caller that does not take all of them closes the generator.

        Raises:
            StatusError: the client has gone away before the end of the stream.
        """
        patience_s = _PATIENCE_S
        while True:
            place = await self._places.take(patience_s)
            try:
                message: object = await self._context.read()
                if not isinstance(message, bytes):
                    break
                place.keep()
                count_received(len(message))
                is_waited_for = place.is_held and len(message) >= _LARGE_MIN
                patience_s = _PATIENCE_S if is_waited_for else _SHORT_PATIENCE_S
                yield message
                del message  # free it before the next one is awaited
            finally:
                place.give_back()
        # The stream of a client that has gone away ends like a complete one, and the call may be
        # cancelled only later. But sending something to such a client fails at once.
        try:
            await self._context.send_initial_metadata(())
        except grpc.aio.BaseError as exc:
            raise StatusError(grpc.StatusCode.CANCELLED, "the client has gone away") from exc

    async def drain(self) -> None:
        """Receive and drop the rest, for a limited time.

        Some clients that are still sending when the answer arrives report that they could not send
        instead of the answer. This gives them the chance to finish.
        """
        with suppress(TimeoutError, grpc.aio.BaseError):
            async with asyncio.timeout(_DRAIN_S):
                while await self._drop_one():
                    pass

    async def _drop_one(self) -> bool:
        place = await self._places.take(_DRAIN_IDLE_S)
        try:
            async with asyncio.timeout(_DRAIN_IDLE_S):
                return isinstance(await self._context.read(), bytes)
        finally:
            place.give_back()
