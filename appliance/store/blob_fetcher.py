"""Blobs of a service, fetched whole into the cache when somebody wants to read them."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.errors import (
    ContentMissingError,
    CorruptBlobError,
    ServiceUnavailableError,
    StoreError,
    StoreFullError,
)
from appliance.store.batch import Batch
from appliance.store.blob_cache import BlobCache
from appliance.store.lmdb_env import FULL_ERRNOS
from appliance.store.schema import INLINE_MAX
from appliance.store.services import BlobReader, BlobService

T = TypeVar("T")

# Fetches that make no progress keep their places, so there are more than bandwidth needs. Each
# holds a piece in memory.
FETCHES_MAX: Final = 64
_PIECE_SIZE: Final = 1 << 20
# Without a piece of that blob.
PROGRESS_TIMEOUT_S: Final = 30.0
# What was fetched is not evicted before those who waited for it had time to open it: or two large
# blobs could evict each other in turns for ever.
GRACE_S: Final = 0.25
_NUM_THREADS: Final = 4


class BlobFetcher:
    """Fetches on one event loop; of one blob once at a time, and failures are not remembered."""

    def __init__(
        self,
        blobs: BlobService,
        cache: BlobCache,
        *,
        progress_timeout_s: float = PROGRESS_TIMEOUT_S,
        grace_s: float = GRACE_S,
    ) -> None:
        self._blobs = blobs
        self._cache = cache
        self._progress_timeout_s = progress_timeout_s
        self._grace_s = grace_s
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "cache")
        self._places = asyncio.Semaphore(FETCHES_MAX)
        self._fetches: dict[Digest, asyncio.Task[int]] = {}
        self._kept: set[bytes] = set()
        # Done when the next of those kept is kept no longer.
        self._released = asyncio.Event()
        self._numbers = itertools.count()

    async def fetch(self, digest: Digest, size: int) -> None:
        """Return when the cache has the blob, of which somebody says that it has `size` bytes.

        Raises:
            ContentMissingError: the service does not have it.
            CorruptBlobError: what the service has is something else, or not as long.
            ServiceUnavailableError: the service cannot be reached, or does not go on.
            StoreError: the cache has no room, or fails.
        """
        task = self._fetches.get(digest)
        if task is None:
            task = asyncio.create_task(self._fetch(digest, size))
            self._fetches[digest] = task
            task.add_done_callback(lambda _task: self._fetches.pop(digest))
        found_size = await asyncio.shield(task)
        if found_size < size:
            raise CorruptBlobError(f"blob {digest}: has {found_size} bytes, not {size}")

    async def touch(self, digests: list[bytes]) -> None:
        """Note that blobs were used just now."""
        await self._run(lambda: self._cache.touch(digests))

    async def close(self) -> None:
        """Give up what is under way."""
        tasks = list(self._fetches.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown()

    async def _fetch(self, digest: Digest, size: int) -> int:
        if self._cache.has(digest):
            found_size = await self._run(lambda: self._cache.find(digest))
            if found_size is not None:
                self._keep_for_a_while(digest)
                return found_size
        async with self._places:
            reader = await self._in_time(self._blobs.open_read(digest), digest)
            if reader is None:
                raise ContentMissingError(f"blob {digest}: the service does not have it")
            # Room is made when something came: what is not there shall evict nothing.
            try:
                if size <= INLINE_MAX:
                    await self._receive_inline(reader, digest, size)
                else:
                    async with self._reserved(digest, size):
                        await self._receive_file(reader, digest, size)
            finally:
                await reader.close()
        return size

    async def _receive_inline(self, reader: BlobReader, digest: Digest, size: int) -> None:
        content = b"".join([piece async for piece in self._pieces(reader, digest, size)])
        await self._when_room(lambda: self._cache.put_inline(digest, content, self._kept.copy()))
        self._keep_for_a_while(digest)

    async def _receive_file(self, reader: BlobReader, digest: Digest, size: int) -> None:
        batch = Batch()
        path = self._cache.temp_path / str(next(self._numbers))
        batch.add_file(digest, path, size)
        try:
            with path.open("xb", buffering=0) as file:
                async for piece in self._pieces(reader, digest, size):
                    await self._write(file, path, piece)
        except BaseException:
            batch.discard()
            raise
        await self._run(lambda: self._cache.commit(digest, size, batch))

    @asynccontextmanager
    async def _reserved(self, digest: Digest, size: int) -> AsyncIterator[None]:
        self._kept.add(digest)
        try:
            await self._when_room(lambda: self._cache.reserve(digest, size, self._kept.copy()))
            try:
                yield
            except BaseException:
                await self._run(lambda: self._cache.drop(digest))
                raise
        except BaseException:
            self._release(digest)
            raise
        self._keep_for_a_while(digest)

    async def _when_room(self, attempt: Callable[[], bool]) -> None:
        released = self._released
        while not await self._run(attempt):
            await released.wait()
            released = self._released

    async def _pieces(self, reader: BlobReader, digest: Digest, size: int) -> AsyncIterator[bytes]:
        # No more is taken than was announced, and none of it is visible before it is checked.
        hasher = blake3()
        received = 0
        while piece := await self._in_time(reader.read(_PIECE_SIZE), digest):
            received += len(piece)
            if received > size:
                raise CorruptBlobError(f"blob {digest}: has more than {size} bytes")
            hasher.update(piece)
            yield piece
        if received < size:
            raise CorruptBlobError(f"blob {digest}: has {received} bytes, not {size}")
        if hasher.digest() != digest:
            raise CorruptBlobError(f"blob {digest}: the content has another digest")

    async def _write(self, file: BinaryIO, path: Path, piece: bytes) -> None:
        def work() -> None:
            left = memoryview(piece)
            while left:
                left = left[os.write(file.fileno(), left) :]

        try:
            await self._run(work)
        except OSError as exc:
            kind = StoreFullError if exc.errno in FULL_ERRNOS else StoreError
            raise kind(f"{path}: {exc.strerror}") from exc

    async def _in_time(self, work: Awaitable[T], digest: Digest) -> T:
        try:
            async with asyncio.timeout(self._progress_timeout_s):
                return await work
        except TimeoutError as exc:
            raise ServiceUnavailableError(
                f"blob {digest}: nothing came for {self._progress_timeout_s:.0f} s"
            ) from exc

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _keep_for_a_while(self, digest: Digest) -> None:
        self._kept.add(digest)
        asyncio.get_running_loop().call_later(self._grace_s, self._release, digest)

    def _release(self, digest: Digest) -> None:
        self._kept.discard(digest)
        self._released.set()
        self._released = asyncio.Event()
