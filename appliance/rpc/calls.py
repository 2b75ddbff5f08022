"""What all handlers have in common: bytes in, bytes out, errors to statuses."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Final, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from appliance.castore.digest import DIGEST_SIZE, Digest
from appliance.errors import InvalidRequestError
from appliance.log import set_log_source
from appliance.services.grpc_messages import CONTENT_MAX
from appliance.services.grpc_status import Status, StatusError, status_of

M = TypeVar("M", bound=Message)

# Quoted: the classes are generic in their stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
UnaryHandler = Callable[[bytes], Awaitable[bytes]]
StreamHandler = Callable[[bytes], AsyncGenerator[bytes, None]]
SinkHandler = Callable[[AsyncIterator[bytes]], Awaitable[bytes]]
ExchangeHandler = Callable[[AsyncIterator[bytes]], AsyncGenerator[bytes, None]]

# Work under way, and calls that wait for something to happen: more of either are refused, as each
# may hold a request in memory. Waiting costs no more than that, and is not to keep work out.
CALLS_MAX: Final = 1024
WATCHES_MAX: Final = 1024
_FULL: Final = Status(
    grpc.StatusCode.RESOURCE_EXHAUSTED, "as many calls are under way as there may be"
)


class Edge:
    """Makes gRPC handlers of functions on bytes, and knows of the calls under way."""

    def __init__(self) -> None:
        self._places = ReceivingPlaces()
        self._work = _Room(CALLS_MAX)
        self._questions = _Room(CALLS_MAX)
        self._watches = _Room(WATCHES_MAX)

    async def wait_idle(self) -> None:
        """Wait until no work is under way."""
        await self._work.wait_empty()

    def unary(self, handler: UnaryHandler, *, is_work: bool = True) -> Handler:
        """Serve one message with one; what is no work is answered however much of it there is."""
        room = self._work if is_work else self._questions

        async def call(request: bytes, context: Context) -> bytes:
            with room.taken(context) as refusal:
                status = refusal
                if status is None:
                    try:
                        return await handler(request)
                    except Exception as exc:  # noqa: BLE001 - each becomes a status, bugs are logged
                        status = status_of(exc)
                request = b""
                return await _abort(context, status)

        return grpc.unary_unary_rpc_method_handler(call)

    def stream(
        self, handler: StreamHandler, *, has_headers: bool = False, is_watch: bool = False
    ) -> Handler:
        """Serve one message with many; a watch lasts as long as its client wants.

        With `has_headers`, an error that comes before the first message is preceded by headers, as
        in a stream that has begun. Without, its status is in the headers (Trailers-Only in gRPC's
        specification, which has it for errors), and some clients take that for the failure of the
        call itself.
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

    def sink(self, handler: SinkHandler) -> Handler:
        """Serve many messages with one."""

        async def call(_requests: AsyncIterator[bytes], context: Context) -> bytes:
            with self._work.taken(context) as refusal:
                if refusal is not None:
                    return await _abort(context, refusal)
                incoming = Incoming(context, self._places)
                try:
                    async with aclosing(incoming.whole()) as requests:
                        return await handler(requests)
                except Exception as exc:  # noqa: BLE001 - as above
                    status = status_of(exc)
                await incoming.drain()
                return await _abort(context, status)

        return grpc.stream_unary_rpc_method_handler(call)

    def exchange(self, handler: ExchangeHandler) -> Handler:
        """Serve many messages with many, as long as the client wants: like a watch."""

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
        """Have a call take room for the block; yield what to refuse it with if there is none."""
        set_log_source(_host_of(context.peer()))  # each call is a task of its own
        if self._num_calls >= self._limit:
            yield _FULL
            return
        self._num_calls += 1
        self._empty.clear()
        try:
            yield None
        finally:
            self._num_calls -= 1
            if self._num_calls == 0:
                self._empty.set()

    async def wait_empty(self) -> None:
        """Wait until there is no call."""
        await self._empty.wait()


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


# --- The messages of one call, received one at a time and when there is room for them.
#
# A message may be `MESSAGE_MAX` long, and there is no choosing who sends it: so messages have a
# limited number of places. A call takes one for each message, from before it is received until it
# is dealt with. Calls without one wait, and what is sent to them stays with their clients.

_NUM_PLACES: Final = 8
# A call to which no message comes for so long loses its place, and receives all the same: nobody
# waits for a client that sends nothing. Large messages take their time; who sends small ones, or
# has been slow before, is not waited for any longer than that.
_PATIENCE_S: Final = 1.0
_SHORT_PATIENCE_S: Final = 0.1
_LARGE_MIN: Final = 2 * CONTENT_MAX
# How long the rest of a stream that is refused is taken, in all and while nothing comes.
_DRAIN_S: Final = 30.0
_DRAIN_IDLE_S: Final = 2.0


class ReceivingPlaces:
    """The places for messages, of all calls; made and used on one event loop."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(_NUM_PLACES)

    async def take(self, patience_s: float) -> "_Place":
        """Wait for a place, first come, first served; it is had for so long, unless kept."""
        await self._free.acquire()
        return _Place(self._free, patience_s)


class _Place:
    def __init__(self, free: asyncio.Semaphore, patience_s: float) -> None:
        self._free = free
        self.is_held = True
        self._timer = asyncio.get_running_loop().call_later(patience_s, self.give_back)

    def keep(self) -> None:
        """Have the place until `give_back`: the message is there."""
        self._timer.cancel()

    def give_back(self) -> None:
        """Leave the place to another; may be called again."""
        self._timer.cancel()
        if self.is_held:
            self.is_held = False
            self._free.release()


class Incoming:
    """What the client of one call sends."""

    def __init__(self, context: Context, places: ReceivingPlaces) -> None:
        self._context = context
        self._places = places

    async def whole(self) -> AsyncGenerator[bytes, None]:
        """Yield each message; to be closed by who does not take all.

        Raises:
            StatusError: the client has gone away.
        """
        patience_s = _PATIENCE_S
        while True:
            place = await self._places.take(patience_s)
            try:
                message: object = await self._context.read()
                if not isinstance(message, bytes):
                    break
                place.keep()
                is_waited_for = place.is_held and len(message) >= _LARGE_MIN
                patience_s = _PATIENCE_S if is_waited_for else _SHORT_PATIENCE_S
                yield message
                del message  # not to be held while the next is awaited
            finally:
                place.give_back()
        # The stream of a client that has gone away, or given up, ends like one that is complete,
        # and that it is cancelled may be heard only later. But nothing can be sent to such a one.
        try:
            await self._context.send_initial_metadata(())
        except grpc.aio.BaseError as exc:
            raise StatusError(grpc.StatusCode.CANCELLED, "the client has gone away") from exc

    async def drain(self) -> None:
        """Receive the rest, for some time.

        Some clients that are still sending when the answer comes see that they could not send, and
        not the answer: so they get the chance to finish.
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
