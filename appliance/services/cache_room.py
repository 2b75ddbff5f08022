"""Room in a cache for what is being fetched, beside what callers are about to read."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

from appliance.castore.digest import Digest
from appliance.errors import StoreError

# A fetched blob is not evicted for this long after its callers were answered: they open it now. Two
# blobs that do not fit together would otherwise evict each other in turns for ever.
GRACE_S: Final = 0.25


class NoRoomError(StoreError):
    """The cache has no room for a blob that no caller waits for."""


class CacheRoom:
    """Which blobs callers wait for, or waited for a moment ago; on one event loop.

    Args:
        grace_s: a blob is kept for this long after the last caller was answered.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s
        # How many callers keep a blob: it is not evicted.
        self._kept: Counter[bytes] = Counter()
        # Set, and replaced, whenever a caller stops keeping a blob.
        self._released = asyncio.Event()

    def kept(self) -> frozenset[bytes]:
        """Return the digests of the blobs that must not be evicted."""
        return frozenset(self._kept)

    @contextmanager
    def keeping(self, digest: Digest) -> Iterator[None]:
        """Keep a blob inside the block and `grace_s` longer."""
        self._kept[digest] += 1
        try:
            yield
        finally:
            asyncio.get_running_loop().call_later(self._grace_s, self._release, digest)

    async def when_room(self, digest: Digest, attempt: Callable[[], Awaitable[bool]]) -> None:
        """Call `attempt` whenever there may be room, until it returns True.

        Raises:
            NoRoomError: there is none, and nobody waits for the blob.
        """
        released = self._released
        while not await attempt():
            if digest not in self._kept:
                raise NoRoomError(f"blob {digest}: no room in the cache")
            await released.wait()
            released = self._released

    def _release(self, digest: Digest) -> None:
        self._kept[digest] -= 1
        if not self._kept[digest]:
            del self._kept[digest]
        self._released.set()
        self._released = asyncio.Event()
