"""Blobs of a service, fetched whole into the cache when somebody wants to read them, or may."""

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Hashable,
    Iterable,
    Iterator,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, TypeAlias, TypeVar

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.errors import (
    ApplianceError,
    ContentMissingError,
    CorruptBlobError,
    ServiceUnavailableError,
    StoreError,
    disk_error,
)
from appliance.services.contracts import BlobReader, BlobService
from appliance.store.batch import Batch
from appliance.store.blob_cache import BlobCache
from appliance.store.schema import INLINE_MAX

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
_AHEAD_BYTES_MAX: Final = 1 << 20
_AHEAD_SHARE: Final = 16
_NUM_THREADS: Final = 4


class _NoRoomError(StoreError):
    """The cache has no room for a blob that nobody waits for."""


class _Fetch(NamedTuple):
    size: int
    task: asyncio.Task[int]


class _Put(NamedTuple):
    digest: Digest
    content: bytes
    is_put: asyncio.Future[bool]


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
        self._ahead = BackgroundWork()
        self._fetches: dict[Digest, _Fetch] = {}
        # What is waited for, and what has been until just now: it is not evicted.
        self._kept: Counter[bytes] = Counter()
        # Done when the next of those kept is kept no longer.
        self._released = asyncio.Event()
        self._unput: list[_Put] = []
        self._putting: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        # Of what is fetched ahead at a time. It is read soon, or others were evicted for nothing.
        self.ahead_bytes_max = min(_AHEAD_BYTES_MAX, cache.max_bytes // _AHEAD_SHARE)

    async def fetch(self, digest: Digest, size: int) -> None:
        """Return when the cache has the blob, of which somebody says that it has `size` bytes.

        Raises:
            ContentMissingError: the service does not have it.
            CorruptBlobError: what the service has is something else, or not as long.
            ServiceUnavailableError: the service cannot be reached, or does not go on.
            StoreError: the cache has no room, or fails.
        """
        with self._keeping(digest):
            while not await self._join(digest, size):
                pass

    def fetch_ahead(self, blobs: Iterable[tuple[Digest, int]]) -> None:
        """Fetch small blobs some time, as room allows; nobody waits for them, or hears of errors.

        What is fetched by `fetch` goes first, and never waits for one of these but for the same.
        """
        self._ahead.want(
            (digest, partial(self._fetch_ahead, digest, size))
            for digest, size in blobs
            if size <= INLINE_MAX
        )

    def is_under_way(self, digest: Digest) -> bool:
        """Whether a blob is being fetched."""
        return digest in self._fetches

    async def touch(self, digests: list[bytes]) -> None:
        """Note that blobs were used just now."""
        await self._run(lambda: self._cache.touch(digests))

    async def close(self) -> None:
        """Give up what is under way."""
        await self._ahead.close()
        tasks = [fetch.task for fetch in self._fetches.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._putting is not None:
            await self._putting
        self._threads.shutdown()

    async def _join(self, digest: Digest, size: int) -> bool:
        # False: what was under way has failed for reasons that are not this caller's.
        joined = self._fetches.get(digest)
        if joined is None:
            with self._ahead.urgent():
                found_size = await asyncio.shield(self._begin(digest, size, self._places))
        else:
            try:
                found_size = await asyncio.shield(joined.task)
            except _NoRoomError:
                return False
            except CorruptBlobError:
                if joined.size == size:
                    raise
                return False
        if found_size < size:
            raise CorruptBlobError(f"blob {digest}: has {found_size} bytes, not {size}")
        return True

    async def _fetch_ahead(self, digest: Digest, size: int) -> None:
        if digest not in self._fetches:
            await self._begin(digest, size, nullcontext())

    def _begin(
        self, digest: Digest, size: int, place: AbstractAsyncContextManager[None]
    ) -> asyncio.Task[int]:
        task = asyncio.create_task(self._fetch(digest, size, place))
        self._fetches[digest] = _Fetch(size, task)
        task.add_done_callback(lambda _task: self._fetches.pop(digest))
        return task

    async def _fetch(
        self, digest: Digest, size: int, place: AbstractAsyncContextManager[None]
    ) -> int:
        if self._cache.has(digest):
            found_size = await self._run(lambda: self._cache.find(digest))
            if found_size is not None:
                return found_size
        self._cache.check_size(digest, size)
        async with place:
            if size <= INLINE_MAX:
                content = await self._in_time(self._receive_inline(digest, size), digest)
                await self._when_room(digest, lambda: self._put(digest, content))
            else:
                await self._fetch_file(digest, size)
        return size

    async def _receive_inline(self, digest: Digest, size: int) -> bytes:
        reader = await self._open(digest)
        try:
            content = await reader.read(size + 1)
        finally:
            await reader.close()
        _check(digest, size, len(content), blake3(content))
        return content

    async def _fetch_file(self, digest: Digest, size: int) -> None:
        # Room is made when something came: what is not there shall evict nothing.
        reader = await self._in_time(self._open(digest), digest)
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

    async def _put(self, digest: Digest, content: bytes) -> bool:
        # What comes while others are put makes up the next transaction.
        put = _Put(digest, content, asyncio.get_running_loop().create_future())
        self._unput.append(put)
        if self._putting is None:
            self._putting = asyncio.create_task(self._put_all())
        return await put.is_put

    async def _put_all(self) -> None:
        while self._unput:
            puts, self._unput = self._unput, []
            blobs = [(put.digest, put.content) for put in puts]
            keep = frozenset(self._kept)
            try:
                are_put = await self._run(partial(self._cache.put_inline, blobs, keep))
            except Exception as exc:  # noqa: BLE001 - whatever it was, those who wait must know
                for put in puts:
                    if not put.is_put.done():
                        put.is_put.set_exception(exc)
            else:
                for put, is_put in zip(puts, are_put, strict=True):
                    if not put.is_put.done():
                        put.is_put.set_result(is_put)
        self._putting = None

    async def _receive_file(self, reader: BlobReader, digest: Digest, size: int) -> None:
        def read() -> Awaitable[bytes]:
            return self._in_time(reader.read(_PIECE_SIZE), digest)

        pieces = _checked(read, digest, size)
        batch = Batch()
        path = self._cache.temp_path / str(next(self._numbers))
        batch.add_file(digest, path, size)
        try:
            with path.open("xb", buffering=0) as file:
                async for piece in pieces:
                    await self._write(file, path, piece)
        except BaseException:
            batch.discard()
            raise
        await self._run(lambda: self._cache.commit(digest, size, batch))

    @asynccontextmanager
    async def _reserved(self, digest: Digest, size: int) -> AsyncIterator[None]:
        with self._keeping(digest):
            await self._when_room(
                digest,
                lambda: self._run(
                    partial(self._cache.reserve, digest, size, frozenset(self._kept))
                ),
            )
            try:
                yield
            except BaseException:
                await self._run(lambda: self._cache.drop(digest))
                raise

    async def _when_room(self, digest: Digest, attempt: Callable[[], Awaitable[bool]]) -> None:
        released = self._released
        while not await attempt():
            if digest not in self._kept:
                raise _NoRoomError(f"blob {digest}: no room in the cache")
            await released.wait()
            released = self._released

    async def _write(self, file: BinaryIO, path: Path, piece: bytes) -> None:
        def work() -> None:
            left = memoryview(piece)
            while left:
                left = left[os.write(file.fileno(), left) :]

        try:
            await self._run(work)
        except OSError as exc:
            raise disk_error(exc, path) from exc

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

    @contextmanager
    def _keeping(self, digest: Digest) -> Iterator[None]:
        # In the block and a while longer.
        self._kept[digest] += 1
        try:
            yield
        finally:
            asyncio.get_running_loop().call_later(self._grace_s, self._release, digest)

    def _release(self, digest: Digest) -> None:
        self._kept[digest] -= 1
        if not self._kept[digest]:
            del self._kept[digest]
        self._released.set()
        self._released = asyncio.Event()


async def _checked(
    read: Callable[[], Awaitable[bytes]], digest: Digest, size: int
) -> AsyncIterator[bytes]:
    # No more is taken than was announced, and none of it is visible before it is checked.
    hasher = blake3()
    received = 0
    while piece := await read():
        received += len(piece)
        if received > size:
            break
        hasher.update(piece)
        yield piece
    _check(digest, size, received, hasher)


def _check(digest: Digest, size: int, received: int, hasher: blake3) -> None:
    if received > size:
        raise CorruptBlobError(f"blob {digest}: has more than {size} bytes")
    if received < size:
        raise CorruptBlobError(f"blob {digest}: has {received} bytes, not {size}")
    if hasher.digest() != digest:
        raise CorruptBlobError(f"blob {digest}: the content has another digest")


# --- Work that nobody waits for yet, done beside what somebody waits for and never before it.

Work: TypeAlias = Callable[[], Coroutine[None, None, object]]

# What is under way delays what is asked for meanwhile by as much; but it takes several at a time to
# keep a peer busy that is some milliseconds away.
RUNNING_MAX: Final = 16
# What is not begun by then was asked for long ago, and others have been since.
_WAITING_MAX: Final = 256
# For so long nothing is begun beside something urgent. What takes longer waits for its peer, and
# has no need of this process.
_YIELD_S: Final = 0.05


class BackgroundWork:
    """Runs work on one event loop in the order it came, each key once at a time.

    Work that fails says so nowhere: who needs it asks for it again and hears why.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, Work] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._num_urgent = 0
        self._is_clear = asyncio.Event()
        self._is_clear.set()

    def want(self, works: Iterable[tuple[Hashable, Work]]) -> None:
        """Have work done some time, by key; if there is too much, the oldest is not."""
        self._waiting.update(works)
        while len(self._waiting) > _WAITING_MAX:
            del self._waiting[next(iter(self._waiting))]
        for _ in range(min(RUNNING_MAX - len(self._running), len(self._waiting))):
            task = asyncio.create_task(self._run())
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    @contextmanager
    def urgent(self) -> Iterator[None]:
        """Begin no more work inside the block, but for so long only."""
        has_ended = False

        def end() -> None:
            nonlocal has_ended
            if not has_ended:
                has_ended = True
                self._end_urgent()

        self._num_urgent += 1
        self._is_clear.clear()
        timer = asyncio.get_running_loop().call_later(_YIELD_S, end)
        try:
            yield
        finally:
            timer.cancel()
            end()

    async def close(self) -> None:
        """Give up what is under way and forget the rest."""
        self._waiting.clear()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _end_urgent(self) -> None:
        self._num_urgent -= 1
        if self._num_urgent == 0:
            self._is_clear.set()

    async def _run(self) -> None:
        while self._waiting:
            if not self._is_clear.is_set():
                await self._is_clear.wait()
                continue
            work = self._waiting.pop(next(iter(self._waiting)))
            with suppress(ApplianceError, OSError):
                await work()
