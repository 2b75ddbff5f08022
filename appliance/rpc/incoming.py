"""The messages of one call, received one at a time and when there is room for them.

A message may be `MESSAGE_MAX` long, and there is no choosing who sends it: so messages have a
limited number of places. A call takes one for each message, from before it is received until it is
dealt with. Calls without one wait, and what is sent to them stays with their clients.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Final, TypeAlias

import grpc

from appliance.rpc.methods import CONTENT_MAX
from appliance.rpc.status import StatusError

# Quoted: the class is generic in its stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"

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
