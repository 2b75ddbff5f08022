"""Neighbouring chunks of a blob by one call.

A call for each chunk costs a peer and this process about as much as 2 MiB of content do. Where a
peer sends ranges of blobs, chunks that are asked for at about the same time and follow each other
come by one call, which asks for their range and nothing else. Each of them is claimed already, so
that no other process asks for it, and each is compared with its digest like any other.

A few such calls are under way at a time. Chunks that are fetched ahead wait until one has ended,
and become a longer run meanwhile.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Final, Protocol, runtime_checkable

from appliance.castore.digest import Digest
from appliance.errors import ApplianceError
from appliance.services.contracts import BlobReader

# Bytes of one call; it goes on over these for less than a chunk.
_RUN_BYTES: Final = 4 << 20
_CALLS_MAX: Final = 3
# Chunks of a call that are being written while the next one is received.
_UNWRITTEN_MAX: Final = 4


@runtime_checkable
class SendsRanges(Protocol):
    """A blob service that may send a range of a blob."""

    async def open_range(self, digest: Digest, start: int, size: int) -> BlobReader | None:
        """Open `size` bytes of a blob, from `start` on; the reader counts from there.

        Nobody can compare a range with the digest of the blob: the caller verifies what it reads by
        the list of chunks.

        Returns:
            None if the blob is not there, or the service sends no ranges.
        """


class ChunkRuns:
    """The calls for runs of one blob's chunks; lives while there are some.

    Args:
        bounds: returns where in the blob a chunk starts and ends.
        open_range: opens the bytes between two offsets, or returns None.
        store: verifies and writes a chunk, given its number and content.
        spawn: begins a task that the caller waits for or cancels at its end.
        when_idle: called when nothing is asked for and no call is under way.
    """

    def __init__(
        self,
        bounds: Callable[[int], tuple[int, int]],
        open_range: Callable[[int, int], Awaitable[BlobReader | None]],
        store: Callable[[int, bytes], Awaitable[None]],
        spawn: Callable[[Coroutine[None, None, None]], object],
        when_idle: Callable[[], object],
    ) -> None:
        self._bounds = bounds
        self._open_range = open_range
        self._store = store
        self._spawn = spawn
        self._when_idle = when_idle
        # Chunks that no call was made for yet, and whether a call has brought them.
        self._asked: dict[int, asyncio.Future[bool]] = {}
        self._num_calls = 0
        self._is_choosing = False

    async def bring(self, number: int, *, is_wanted: bool) -> bool:
        """Return whether a chunk has come with its neighbours, and is stored.

        Args:
            number: of the chunk, which is asked for once at a time.
            is_wanted: somebody waits for it, so it does not wait for the end of other calls.
        """
        if is_wanted and self._num_calls == _CALLS_MAX:
            return False
        loop = asyncio.get_running_loop()
        asked: asyncio.Future[bool] = loop.create_future()
        self._asked[number] = asked
        if not self._is_choosing:
            self._is_choosing = True
            loop.call_soon(self._choose)  # its neighbours are asked for in the same turn
        try:
            return await asked
        finally:
            self._asked.pop(number, None)

    def _choose(self) -> None:
        self._is_choosing = False
        while self._asked and self._num_calls < _CALLS_MAX:
            run = self._next_run()
            if len(run) == 1:
                # A call of its own, which asks for the chunk by its digest.
                _settle(run[0][1], is_stored=False)
                continue
            self._num_calls += 1
            self._spawn(self._receive(run))
        if not self._asked and not self._num_calls:
            self._when_idle()

    def _next_run(self) -> list[tuple[int, asyncio.Future[bool]]]:
        number = first = min(self._asked)
        run = []
        while (
            number in self._asked and self._bounds(number)[0] - self._bounds(first)[0] < _RUN_BYTES
        ):
            run.append((number, self._asked.pop(number)))
            number += 1
        return run

    async def _receive(self, run: list[tuple[int, asyncio.Future[bool]]]) -> None:
        unwritten: deque[asyncio.Task[None]] = deque()
        reader = None
        try:
            reader = await self._open_range(self._bounds(run[0][0])[0], self._bounds(run[-1][0])[1])
            if reader is None:
                return
            for number, asked in run:
                start, end = self._bounds(number)
                content = await reader.read(end - start)
                unwritten.append(asyncio.create_task(self._keep(number, content, asked)))
                if len(unwritten) > _UNWRITTEN_MAX:
                    await unwritten.popleft()
        except ApplianceError:
            pass  # what has not come is asked for by chunk, and then the error is that of the chunk
        finally:
            if reader is not None:
                await reader.close()
            await asyncio.gather(*unwritten, return_exceptions=True)
            for _, asked in run:
                _settle(asked, is_stored=False)
            self._num_calls -= 1
            self._choose()

    async def _keep(self, number: int, content: bytes, asked: asyncio.Future[bool]) -> None:
        try:
            await self._store(number, content)
        except ApplianceError:
            _settle(asked, is_stored=False)
        else:
            _settle(asked, is_stored=True)


def _settle(asked: asyncio.Future[bool], *, is_stored: bool) -> None:
    if not asked.done():
        asked.set_result(is_stored)
