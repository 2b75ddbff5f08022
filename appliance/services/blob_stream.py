"""One call that sends a blob from its start on, for readers that go through it in order.

A call for each chunk costs a peer and this process about as much as 2 MiB of content do. Where a
reader begins at the start and goes on, one call for the whole blob brings the same chunks. It is
read only as far as chunks are asked for, so that flow control holds the peer back meanwhile.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, runtime_checkable

from appliance.castore.digest import Digest
from appliance.services.contracts import BlobReader
from appliance.services.listed_blob import ListedBlob

# Bytes that are received for nothing rather than asked for by chunk: those that are there already
# when the call begins, and those between two chunks that are asked for.
GAP_MAX: Final = 4 << 20
# A call that nobody asks for more is ended after this time.
_IDLE_S: Final = 10.0
# Chunks that are being written while the next one is received.
_UNWRITTEN_MAX: Final = 8
# A peer that sends smaller messages than this is faster by several calls at a time.
_MESSAGE_MIN: Final = 64 << 10


@runtime_checkable
class SendsMessages(Protocol):
    """A blob service that receives contents in messages.

    Attributes:
        message_bytes: size of the largest message so far, in bytes.
    """

    message_bytes: int


def is_worthwhile(blobs: object) -> bool:
    """Whether one call is as fast as several at a time."""
    return not isinstance(blobs, SendsMessages) or blobs.message_bytes >= _MESSAGE_MIN


def stream_claim(digest: Digest) -> Digest:
    """Return what to claim for a call for the whole blob.

    Other processes may fetch its chunks meanwhile, but not begin another such call.
    """
    return Digest.of(b"stream " + digest)


class BlobStream:
    """A call that sends `blob`; `run` makes it.

    Args:
        blob: the blob.
        open_read: begins the call.
        store: verifies and writes a chunk, given its number and content.
    """

    def __init__(
        self,
        blob: ListedBlob,
        open_read: Callable[[], Awaitable[BlobReader | None]],
        store: Callable[[int, bytes], Awaitable[None]],
    ) -> None:
        self._blob = blob
        self._open_read = open_read
        self._store = store
        # Chunks that are asked for, and whether they came.
        self._asked: dict[int, asyncio.Future[bool]] = {}
        # Those of them that have come and are being written.
        self._coming: set[int] = set()
        self._is_asked = asyncio.Event()
        # The next chunk to come, and the one after the last that was asked for.
        self._position = 0
        self._reach = 0
        self._is_wanted = True
        self._has_ended = False

    async def brings(self, number: int) -> bool:
        """Return whether the call has brought a chunk, which is stored then."""
        asked = self._asked.get(number)
        if asked is None:
            if self._has_ended or not self._is_on_the_way(number):
                return False
            asked = self._asked[number] = asyncio.get_running_loop().create_future()
            self._reach = max(self._reach, number + 1)
            self._is_asked.set()
        return await asyncio.shield(asked)

    def end(self) -> None:
        """End the call once it has brought what is asked for."""
        self._is_wanted = False
        self._is_asked.set()

    async def run(self) -> None:
        """Receive what is asked for, until nothing is for a while, or the call fails.

        Raises:
            ApplianceError: the call has failed; the chunks that did not come can be had by others.
        """
        unwritten: deque[asyncio.Task[None]] = deque()
        reader = None
        try:
            reader = await self._open_read()
            while reader is not None and (number := await self._next()) is not None:
                start, end = self._blob.chunks.bounds(number)
                await reader.seek(start)
                content = await reader.read(end - start)
                self._position = number + 1
                self._coming.add(number)
                unwritten.append(asyncio.create_task(self._bring(number, content)))
                if len(unwritten) > _UNWRITTEN_MAX:
                    await unwritten.popleft()
        finally:
            self._has_ended = True
            if reader is not None:
                await reader.close()
            await asyncio.gather(*unwritten, return_exceptions=True)
            for asked in self._asked.values():
                asked.set_result(False)

    async def _next(self) -> int | None:
        while self._position < len(self._blob.chunks):
            left = self._asked.keys() - self._coming
            if left:
                return min(left)
            if not self._is_wanted:
                break
            self._is_asked.clear()
            try:
                async with asyncio.timeout(_IDLE_S):
                    await self._is_asked.wait()
            except TimeoutError:
                return None
        return None

    def _is_on_the_way(self, number: int) -> bool:
        # The call has not passed it, and little would be received for nothing.
        if number < self._position or number < self._reach:
            return number >= self._position
        chunks = self._blob.chunks
        return chunks.bounds(number)[0] - chunks.bounds(self._reach)[0] <= GAP_MAX

    async def _bring(self, number: int, content: bytes) -> None:
        is_stored = False
        try:
            await self._store(number, content)
            is_stored = True
        finally:
            self._coming.remove(number)
            self._asked.pop(number).set_result(is_stored)
