"""Fetches of blobs from a service into the cache, verified before they become visible.

Small blobs are received in memory and put with others in one transaction. Large ones are received
piece by piece into a file, after the cache has reserved room for them. What a guest waits for is
fetched at once; blobs that it may want next are fetched in the background. Ranges of large blobs
are fetched by chunks (`fetch_chunks`) from services that have those.
"""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    nullcontext,
)
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, TypeVar

from blake3 import blake3

from appliance.castore.chunking import UNCHUNKED_MAX
from appliance.castore.digest import Digest
from appliance.errors import (
    ContentMissingError,
    CorruptBlobError,
    WrongDigestError,
    disk_error,
)
from appliance.services.cache_room import GRACE_S, CacheRoom, NoRoomError
from appliance.services.contracts import BlobReader, BlobService
from appliance.services.fetch_chunks import ChunkFetcher
from appliance.services.tasks import BackgroundWork, SingleFlight
from appliance.store.batch import Batch
from appliance.store.blob_cache import BlobCache
from appliance.store.fetch_claims import FetchClaims
from appliance.store.schema import INLINE_MAX

T = TypeVar("T")

# A fetch that makes no progress keeps its place, so there are more places than the bandwidth needs.
# Each holds a piece in memory.
FETCHES_MAX: Final = 64
_PIECE_SIZE: Final = 1 << 20
# Bytes fetched ahead at a time: at most this, and at most this share of the cache.
_AHEAD_BYTES_MAX: Final = 4 << 20
_AHEAD_SHARE: Final = 16
_NUM_THREADS: Final = 4


class _WrongSizeError(CorruptBlobError):
    """The blob does not have the size that the caller of this fetch stated."""

    def __init__(self, digest: Digest, stated: int, found: str) -> None:
        super().__init__(f"blob {digest}: {found}, expected {stated}")
        self.stated = stated


class _Put(NamedTuple):
    """A small blob on its way into the cache; `is_put` is false if there is no room."""

    digest: Digest
    content: bytes
    is_put: asyncio.Future[bool]


class BlobFetcher:
    """Fetches blobs on one event loop; each blob once at a time. Failures are not remembered.

    Args:
        blobs: the service to read; what it returns is verified here.
        cache: where the blobs are put. It is used in threads of this object, and stays open.
        grace_s: a blob is kept for this long after the last caller was answered.
    """

    def __init__(
        self,
        blobs: BlobService,
        cache: BlobCache,
        *,
        grace_s: float = GRACE_S,
    ) -> None:
        self._blobs = blobs
        self._cache = cache
        self._claims = FetchClaims(cache.store.path)
        self._room = CacheRoom(grace_s)
        self._chunks = ChunkFetcher(blobs, cache, self._room, self._claims)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "cache")
        self._places = asyncio.Semaphore(FETCHES_MAX)
        self._ahead = BackgroundWork()
        self._fetches: SingleFlight[Digest, int] = SingleFlight()
        self._unput: list[_Put] = []
        self._putting: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._received_bytes = 0
        # What is fetched ahead evicts other blobs: keep it small compared with the cache.
        self.ahead_bytes_max = min(_AHEAD_BYTES_MAX, cache.max_bytes // _AHEAD_SHARE)

    async def fetch(self, digest: Digest, size: int) -> None:
        """Return when the cache has the blob; a directory states that it has `size` bytes.

        Raises:
            ContentMissingError: the service does not have it.
            CorruptBlobError: the service sent other content, or content of another size.
            ServiceUnavailableError: the service cannot be reached, or has stopped sending.
            StoreError: the cache has no room, or fails.
        """
        with self._room.keeping(digest):
            while not await self._join(digest, size):
                pass

    async def fetch_range(self, digest: Digest, size: int, start: int, end: int) -> None:
        """Return when the cache has the bytes from `start` to `end` of a blob of `size` bytes.

        It may have more, up to the whole blob; errors are those of `fetch`.
        """
        is_whole = size <= UNCHUNKED_MAX or digest in self._fetches
        if is_whole or not await self._fetch_chunks(digest, size, start, end):
            await self.fetch(digest, size)

    def fetch_ahead(self, blobs: Iterable[tuple[Digest, int]]) -> None:
        """Fetch small blobs in the background, as room allows; errors are dropped.

        `fetch` goes first. It waits for one of these only if it wants the same blob.
        """
        self._ahead.want(
            (digest, partial(self._fetch_ahead, digest, size))
            for digest, size in blobs
            if size <= INLINE_MAX
        )

    def has_range(self, digest: Digest, start: int, end: int) -> bool:
        """Return whether the cache has the bytes from `start` to `end` of a blob."""
        return self._cache.has_range(digest, start, end)

    async def fetch_range_ahead(self, digest: Digest, size: int, start: int, end: int) -> None:
        """Do as `fetch_range`, for nobody who waits, and no longer beside what is urgent.

        What another process is fetching, or the cache has no room for, is left out.
        """
        await self._ahead.when_clear()
        is_whole = size <= UNCHUNKED_MAX or digest in self._fetches
        chunks = self._chunks
        if is_whole or not await chunks.fetch(digest, size, start, end, is_wanted=False):
            await self._fetch_ahead(digest, size)

    @property
    def received_bytes(self) -> int:
        """How many bytes of content have come, whatever became of them."""
        return self._received_bytes + self._chunks.received_bytes

    def is_under_way(self, digest: Digest) -> bool:
        """Return whether a blob is being fetched."""
        return digest in self._fetches

    async def touch(self, digests: list[bytes]) -> None:
        """Record that blobs were used just now."""
        await self._run(lambda: self._cache.touch(digests))

    async def close(self) -> None:
        """Cancel all fetches and end the threads."""
        await self._ahead.close()
        await self._chunks.close()
        await self._fetches.close()
        if self._putting is not None:
            await self._putting
        self._threads.shutdown()
        self._claims.close()

    # --- One fetch ---

    async def _fetch_chunks(self, digest: Digest, size: int, start: int, end: int) -> bool:
        with self._ahead.urgent():
            return await self._chunks.fetch(digest, size, start, end)

    async def _join(self, digest: Digest, size: int) -> bool:
        # False: the fetch that was under way failed for a reason that is not this caller's.
        priority = nullcontext() if digest in self._fetches else self._ahead.urgent()
        try:
            with priority:
                work = partial(self._fetch_claimed, digest, size, self._places)
                found_size = await self._fetches.do(digest, work)
        except NoRoomError:
            return False
        except _WrongSizeError as exc:
            if exc.stated == size:
                raise
            return False
        if found_size < size:
            raise _WrongSizeError(digest, size, f"has {found_size} bytes")
        return True

    async def _fetch_ahead(self, digest: Digest, size: int) -> None:
        # What another process fetches need not be fetched ahead here.
        if digest not in self._fetches and self._claims.take(digest):
            work = partial(self._fetch_claimed, digest, size, nullcontext())
            await self._fetches.begin(digest, work)

    async def _fetch_claimed(
        self, digest: Digest, size: int, place: AbstractAsyncContextManager[None]
    ) -> int:
        async with self._claims.held(digest):
            return await self._fetch(digest, size, place)

    async def _fetch(
        self, digest: Digest, size: int, place: AbstractAsyncContextManager[None]
    ) -> int:
        if self._cache.has(digest):
            found_size = await self._run(lambda: self._cache.find(digest))
            if found_size is not None:
                return found_size
        self._cache.check_size(digest, size)
        if self._cache.has_part(digest) and await self._chunks.fetch_whole(digest, size):
            return size
        async with place:
            if size <= INLINE_MAX:
                content = await self._receive_inline(digest, size)
                await self._room.when_room(digest, lambda: self._put(digest, content))
            else:
                await self._fetch_file(digest, size)
        return size

    async def _receive_inline(self, digest: Digest, size: int) -> bytes:
        reader = await self._open(digest)
        try:
            content = await reader.read(size + 1)
        finally:
            await reader.close()
        self._received_bytes += len(content)
        _verify(digest, size, len(content), blake3(content))
        return content

    async def _fetch_file(self, digest: Digest, size: int) -> None:
        # Room is made after something arrived, so that a missing blob evicts nothing.
        reader = await self._open(digest)
        try:
            async with self._reserved(digest, size):
                await self._receive_file(reader, digest, size)
        finally:
            await reader.close()

    async def _open(self, digest: Digest) -> BlobReader:
        reader = await self._blobs.open_read(digest)
        if reader is None:
            raise ContentMissingError(f"blob {digest}: the service does not have it")
        return reader

    async def _receive_file(self, reader: BlobReader, digest: Digest, size: int) -> None:
        pieces = _verified(lambda: reader.read(_PIECE_SIZE), digest, size)
        batch = Batch()
        path = self._cache.temp_path / str(next(self._numbers))
        batch.add_file(digest, path, size)
        try:
            with path.open("xb", buffering=0) as file:
                async for piece in pieces:
                    self._received_bytes += len(piece)
                    await self._write(file, path, piece)
        except BaseException:
            batch.discard()
            raise
        await self._run(lambda: self._cache.commit(digest, size, batch))

    async def _write(self, file: BinaryIO, path: Path, piece: bytes) -> None:
        def work() -> None:
            left = memoryview(piece)
            while left:
                left = left[os.write(file.fileno(), left) :]

        try:
            await self._run(work)
        except OSError as exc:
            raise disk_error(exc, path) from exc

    # --- Small blobs, put together ---

    async def _put(self, digest: Digest, content: bytes) -> bool:
        # What arrives while others are put makes up the next transaction.
        put = _Put(digest, content, asyncio.get_running_loop().create_future())
        self._unput.append(put)
        if self._putting is None:
            self._putting = asyncio.create_task(self._put_all())
        return await put.is_put

    async def _put_all(self) -> None:
        while self._unput:
            puts, self._unput = self._unput, []
            blobs = [(put.digest, put.content) for put in puts]
            keep = self._room.kept()
            try:
                are_put = await self._run(partial(self._cache.put_inline, blobs, keep))
            except Exception as exc:  # noqa: BLE001 - whatever it was, the callers must get it
                for put in puts:
                    if not put.is_put.done():
                        put.is_put.set_exception(exc)
            else:
                for put, is_put in zip(puts, are_put, strict=True):
                    if not put.is_put.done():
                        put.is_put.set_result(is_put)
        self._putting = None

    # --- Room in the cache ---

    @asynccontextmanager
    async def _reserved(self, digest: Digest, size: int) -> AsyncIterator[None]:
        with self._room.keeping(digest):
            await self._room.when_room(
                digest,
                lambda: self._run(partial(self._cache.reserve, digest, size, self._room.kept())),
            )
            try:
                yield
            except BaseException:
                await self._run(lambda: self._cache.drop(digest))
                raise

    # --- In the threads ---

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


async def _verified(
    read: Callable[[], Awaitable[bytes]], digest: Digest, size: int
) -> AsyncIterator[bytes]:
    # No more is taken than was stated; the caller makes nothing visible before this has ended.
    hasher = blake3()
    received = 0
    while piece := await read():
        received += len(piece)
        if received > size:
            break
        hasher.update(piece)
        yield piece
    _verify(digest, size, received, hasher)


def _verify(digest: Digest, size: int, received: int, hasher: blake3) -> None:
    if received > size:
        raise _WrongSizeError(digest, size, f"has more than {size} bytes")
    if received < size:
        raise _WrongSizeError(digest, size, f"has {received} bytes")
    if (actual := Digest(hasher.digest())) != digest:
        raise WrongDigestError("blob", digest, actual)
