"""Fetches of parts of large blobs into the cache, chunk by chunk.

Theory of operation. A READ of a large blob wants a range of it. The service is asked once for the
chunks of the blob; those that the range touches and the cache lacks are fetched, each by a call of
its own and several at a time, and the READ waits for these and no others. Each chunk is compared
with its digest before it is written into the file of the blob, and becomes readable when the record
of the blob has its range (see `store/partial_blob.py`).

Where the service sends ranges of blobs, chunks that follow each other come by one call
(`chunk_runs`).

Reading ahead. As many bytes as lie unbroken before the wanted range, up to `_AHEAD_MAX`, are
fetched behind it, too: none for a read here and there, more and more for a reader that goes on from
the start, and the most at once for one that goes on where another one stopped. Only misses are seen
here; a reader that is faster than the service misses each chunk on its way, and moves the window
on. What is fetched ahead has places of its own, waits for no room in the cache, and its errors are
dropped. Beside another process's call for the whole blob, little is fetched ahead.

What is verified. The list of chunks is the service's word: nobody can compare it with the digest of
the blob before the whole blob is there. So the beginning of the blob is hashed as it grows, and
when the last chunk has come, the sum decides before that chunk is readable. If it is right, the
blob becomes one like any other. If not, all of it is dropped, the READ fails, and the list is not
believed again: the blob is then fetched whole, and verified before any byte of it is readable. A
blob of which some part is never read is never compared as a whole.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, TypeVar

from appliance.castore.digest import Digest
from appliance.errors import (
    ContentMissingError,
    CorruptBlobError,
    StoreError,
    WrongDigestError,
    disk_error,
)
from appliance.services.cache_room import CacheRoom
from appliance.services.chunk_runs import ChunkRuns, SendsRanges
from appliance.services.contracts import BlobReader, BlobService
from appliance.services.listed_blob import Arrived, ListedBlob, PartFile, usable_list
from appliance.services.tasks import SingleFlight
from appliance.store.blob_cache import BlobCache, charge_of
from appliance.store.blob_parts import BlobParts, OtherListError, PartLostError
from appliance.store.fetch_claims import FetchClaims
from appliance.store.partial_blob import PartialBlob

T = TypeVar("T")

_LOG: Final = logging.getLogger(__name__)

# Chunks under way at a time: those that somebody waits for, and those fetched ahead.
_WANTED_MAX: Final = 8
_AHEAD_PLACES: Final = 6
# Bytes fetched ahead of a reader: at most this, and at most this share of the cache.
_AHEAD_MAX: Final = 16 << 20
_AHEAD_SHARE: Final = 16
_PIECE_SIZE: Final = 1 << 20
# The file of a chunk begins and ends in pages that it may share with none of those that are there.
_PAGE: Final = 4096
# Blobs whose lists and files are kept at hand, and digests of those without a list to go by.
_LISTED_MAX: Final = 16
_UNLISTED_MAX: Final = 4096
# How often a blob may be evicted while one range of it is fetched.
_ATTEMPTS_MAX: Final = 16
_NUM_THREADS: Final = 3


class ChunkFetcher:
    """Fetches ranges of large blobs on one event loop; each chunk once at a time.

    Args:
        blobs: the service to read.
        cache: where the blobs are put; used in threads of this object.
        room: keeps the blobs that callers wait for.
        claims: other processes that share the cache fetch nothing that is claimed here.
    """

    def __init__(
        self, blobs: BlobService, cache: BlobCache, room: CacheRoom, claims: FetchClaims
    ) -> None:
        self._blobs = blobs
        self._cache = cache
        self._parts = BlobParts(cache)
        self._room = room
        self._claims = claims
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "chunks")
        self._wanted_places = asyncio.Semaphore(_WANTED_MAX)
        self._ahead_places = asyncio.Semaphore(_AHEAD_PLACES)
        self._ahead_max = min(_AHEAD_MAX, cache.max_bytes // _AHEAD_SHARE)
        self._beginning: SingleFlight[Digest, ListedBlob | None] = SingleFlight()
        self._fetching: SingleFlight[tuple[bytes, int], None] = SingleFlight()
        self._listed: OrderedDict[Digest, ListedBlob] = OrderedDict()
        self._unlisted: OrderedDict[Digest, None] = OrderedDict()
        # By the token of the record.
        self._runs: dict[bytes, ChunkRuns] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.received_bytes = 0
        """How many bytes of chunks have come, whatever became of them."""

    async def fetch(
        self, digest: Digest, size: int, start: int, end: int, *, is_wanted: bool = True
    ) -> bool:
        """Return when the cache has the bytes from `start` to `end` of a blob of `size` bytes.

        If nobody waits for them, `is_wanted` is false, and nothing is fetched ahead of them.

        Returns:
            False if the service has no list of chunks to go by; then nothing was done.

        Raises:
            ContentMissingError, CorruptBlobError, ServiceUnavailableError, StoreError: see
                `BlobFetcher.fetch`.
        """
        with self._room.keeping(digest):
            for _ in range(_ATTEMPTS_MAX):
                try:
                    return await self._try_to_fetch(digest, size, start, end, is_wanted=is_wanted)
                except PartLostError:
                    self._listed.pop(digest, None)
                    if await self._run(partial(self._cache.find, digest)) is not None:
                        return True
                except OtherListError as exc:
                    _LOG.warning("%s; it is fetched whole", exc)
                    self._distrust(digest)
        raise StoreError(f"blob {digest}: is evicted as fast as it is fetched")

    async def _try_to_fetch(
        self, digest: Digest, size: int, start: int, end: int, *, is_wanted: bool
    ) -> bool:
        blob = await self._begun(digest, size)
        if blob is not None:
            await self._fetch_range(blob, start, end, is_wanted=is_wanted)
        return blob is not None

    async def fetch_whole(self, digest: Digest, size: int) -> bool:
        """Return when the cache has the whole blob, compared with its digest; see `fetch`."""
        is_fetched = await self.fetch(digest, size, 0, size)
        return is_fetched and await self._run(partial(self._cache.find, digest)) is not None

    async def close(self) -> None:
        """Cancel all fetches and end the threads."""
        await self._beginning.close()
        await self._fetching.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listed.clear()
        self._threads.shutdown()

    # --- Lists of chunks ---

    async def _begun(self, digest: Digest, size: int) -> ListedBlob | None:
        blob = self._listed.get(digest)
        if blob is not None and blob.chunks.size == size:
            self._listed.move_to_end(digest)
            return blob
        if digest in self._unlisted:
            return None
        return await self._beginning.do(digest, partial(self._begin, digest, size))

    async def _begin(self, digest: Digest, size: int) -> ListedBlob | None:
        self._cache.check_size(digest, size)
        chunks = await self._blobs.stat(digest)
        if chunks is None:
            raise ContentMissingError(f"blob {digest}: the service does not have it")
        listed = usable_list(chunks, size)
        if listed is None:
            self._distrust(digest)
            return None
        record = await self._run(partial(self._parts.begin, digest, size, listed.digest))
        if record is None:
            raise PartLostError(f"blob {digest}: is there as a whole")
        file = PartFile(await self._run(partial(self._parts.open, record)))
        blob = self._listed[digest] = ListedBlob(listed, record, file)
        while len(self._listed) > _LISTED_MAX:
            self._listed.popitem(last=False)
        return blob

    def _distrust(self, digest: Digest) -> None:
        self._listed.pop(digest, None)
        self._unlisted[digest] = None
        if len(self._unlisted) > _UNLISTED_MAX:
            self._unlisted.popitem(last=False)

    # --- One range ---

    async def _fetch_range(
        self, blob: ListedBlob, start: int, end: int, *, is_wanted: bool
    ) -> None:
        self._close_removed()
        record = self._parts.find(blob.digest)
        if record is None or record.token != blob.record.token:
            raise PartLostError(f"blob {blob.digest}: was evicted")
        blob.record = record
        touched = blob.chunks.touched_by(start, end)
        wanted = [index for index in touched if not record.has(*blob.chunks.bounds(index))]
        if not wanted:
            return
        behind = self._ahead_of(blob, touched) if is_wanted else []
        ahead = await self._reserved(blob, wanted, behind)
        # Some may have come since.
        left = [index for index in wanted if not blob.record.has(*blob.chunks.bounds(index))]
        tasks = [self._begin_chunk(blob, index, is_wanted=is_wanted) for index in left]
        for index in ahead:
            if not self._is_near(blob, index):
                self._begin_chunk(blob, index, is_wanted=False)
        try:
            await asyncio.gather(*map(asyncio.shield, tasks))
        except ContentMissingError as exc:
            # The service does not serve what it lists; perhaps it has the blob as a whole.
            _LOG.warning("%s; it is fetched whole", exc)
            self._distrust(blob.digest)
            raise PartLostError(str(exc)) from exc

    def _ahead_of(self, blob: ListedBlob, touched: range) -> list[int]:
        chunks = blob.chunks
        ahead = []
        limit = chunks.bounds(touched[-1])[1] + self._behind(blob, touched.start)
        index = touched.stop
        while index < len(chunks) and chunks.bounds(index)[0] < limit:
            if not self._is_near(blob, index):
                ahead.append(index)
            index += 1
        return ahead

    def _behind(self, blob: ListedBlob, index: int) -> int:
        # Bytes before a chunk that are there or on their way, up to `_ahead_max`.
        behind = 0
        while index and behind < self._ahead_max and self._is_near(blob, index - 1):
            index -= 1
            start, end = blob.chunks.bounds(index)
            behind += end - start
        return min(behind, self._ahead_max)

    def _is_near(self, blob: ListedBlob, index: int) -> bool:
        # There, or on its way.
        is_under_way = (blob.record.token, index) in self._fetching
        return is_under_way or blob.record.has(*blob.chunks.bounds(index))

    async def _reserved(
        self, blob: ListedBlob, wanted: Sequence[int], ahead: Sequence[int]
    ) -> Sequence[int]:
        """Make room for the chunks that are not under way; return those of `ahead` it is for."""

        def attempt(indexes: Collection[int]) -> Callable[[], Awaitable[bool]]:
            new = [index for index in indexes if (record.token, index) not in self._fetching]
            bounds = map(blob.chunks.bounds, new)
            num_bytes = sum(charge_of(end - start) + _PAGE for start, end in bounds)
            return lambda: self._run(
                partial(self._parts.reserve, record, num_bytes, self._room.kept())
            )

        record = blob.record
        if ahead and await attempt([*wanted, *ahead])():
            return ahead
        await self._room.when_room(blob.digest, attempt(wanted))
        return ()

    def _close_removed(self) -> None:
        # Their space is free once no process has them open.
        for digest, blob in list(self._listed.items()):
            if blob.file.is_removed():
                del self._listed[digest]

    # --- One chunk ---

    def _begin_chunk(self, blob: ListedBlob, index: int, *, is_wanted: bool) -> asyncio.Task[None]:
        work = partial(self._fetch_chunk, blob, index, is_wanted=is_wanted)
        return self._fetching.begin((blob.record.token, index), work)

    async def _fetch_chunk(self, blob: ListedBlob, index: int, *, is_wanted: bool) -> None:
        async with self._claims.held(blob.chunks.chunk_digest(index)):
            if self._has_come(blob, index):
                return
            runs = self._runs_of(blob)
            if runs is not None and await runs.bring(index, is_wanted=is_wanted):
                return
            async with self._wanted_places if is_wanted else self._ahead_places:
                await self._store(blob, index, await self._receive(blob, index))

    def _runs_of(self, blob: ListedBlob) -> ChunkRuns | None:
        blobs = self._blobs
        if not isinstance(blobs, SendsRanges):
            return None
        token = blob.record.token
        runs = self._runs.get(token)
        if runs is None:

            def opened(start: int, end: int) -> Awaitable[BlobReader | None]:
                return blobs.open_range(blob.digest, start, end - start)

            runs = self._runs[token] = ChunkRuns(
                blob.chunks.bounds,
                opened,
                partial(self._store, blob),
                self._spawn,
                partial(self._runs.pop, token, None),
            )
        return runs

    def _has_come(self, blob: ListedBlob, index: int) -> bool:
        # Another process may have fetched it, and perhaps the rest as well.
        record = self._parts.find(blob.digest)
        if record is None or record.token != blob.record.token:
            raise PartLostError(f"blob {blob.digest}: was evicted, or has become whole")
        if record.has(*blob.chunks.bounds(index)):
            blob.record = record
            return True
        return False

    async def _store(self, blob: ListedBlob, index: int, content: bytes) -> None:
        is_stored = asyncio.get_running_loop().create_future()
        blob.arrived.append(Arrived(index, content, is_stored))
        if blob.storing is None:
            blob.storing = self._spawn(self._store_all(blob))
        await is_stored

    async def _receive(self, blob: ListedBlob, index: int) -> bytes:
        # One byte more than the chunk should have is enough to see that it is wrong.
        digest = blob.chunks.chunk_digest(index)
        start, end = blob.chunks.bounds(index)
        left = end - start + 1
        reader = await self._blobs.open_read(digest)
        if reader is None:
            raise ContentMissingError(
                f"blob {blob.digest}: the service lists chunk {digest} and does not have it"
            )
        parts = []
        try:
            while left:
                part = await reader.read(min(left, _PIECE_SIZE))
                if not part:
                    break
                parts.append(part)
                left -= len(part)
        finally:
            await reader.close()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _store_all(self, blob: ListedBlob) -> None:
        # What arrives while others are written is recorded by the next transaction.
        while blob.arrived:
            batch, blob.arrived = blob.arrived, []
            self.received_bytes += sum(len(arrived.content) for arrived in batch)
            try:
                blob.record, errors = await self._run(partial(self._write, blob, batch))
                if blob.record.is_whole:
                    await self._finish(blob)
            except Exception as exc:  # noqa: BLE001 - whatever it was, the callers must get it
                errors = dict.fromkeys((arrived.number for arrived in batch), exc)
            for arrived in batch:
                error = errors.get(arrived.number)
                if arrived.is_stored.done():
                    continue
                if error is None:
                    arrived.is_stored.set_result(None)
                else:
                    arrived.is_stored.set_exception(error)
        blob.storing = None
        self._hash_on(blob)

    def _write(
        self, blob: ListedBlob, batch: Sequence[Arrived]
    ) -> tuple[PartialBlob, dict[int, Exception]]:
        errors: dict[int, Exception] = {}
        ranges = []
        for arrived in batch:
            expected = blob.chunks.chunk_digest(arrived.number)
            actual = Digest.of(arrived.content)
            if actual != expected:
                errors[arrived.number] = WrongDigestError(
                    f"blob {blob.digest}: chunk", expected, actual
                )
                continue
            start, end = blob.chunks.bounds(arrived.number)
            try:
                blob.file.write(arrived.content, start)
            except OSError as exc:
                raise disk_error(exc, self._cache.store.path) from exc
            blob.hash_next(arrived.content, start)
            ranges.append((start, end))
        return self._parts.add_ranges(blob.record, ranges), errors

    # --- The whole blob ---

    def _hash_on(self, blob: ListedBlob) -> None:
        if blob.hashing is None and blob.hashable() > blob.hashed:
            blob.hashing = self._spawn(self._hash(blob))

    async def _hash(self, blob: ListedBlob) -> None:
        try:
            while (end := blob.hashable()) > blob.hashed:
                await self._run(partial(blob.hash_up_to, end))
        except (OSError, StoreError) as exc:
            _LOG.error("%s", exc)
            self._listed.pop(blob.digest, None)
        finally:
            blob.hashing = None

    async def _finish(self, blob: ListedBlob) -> None:
        """Compare a blob, all of which is in its file, with its digest, and make it visible.

        Raises:
            CorruptBlobError: the chunks make up another blob, which was dropped.
            PartLostError: another process was faster, or has evicted it.
            StoreError: the cache fails.
        """
        if blob.hashing is not None:
            await asyncio.wait([blob.hashing])
        await self._run(partial(blob.hash_up_to, blob.chunks.size))
        actual = Digest(blob.hasher.digest())
        if actual == blob.digest:
            await self._run(partial(self._parts.complete, blob.record))
            self._listed.pop(blob.digest, None)
            return
        self._distrust(blob.digest)
        await self._run(partial(self._cache.drop, blob.digest))
        error = CorruptBlobError(
            f"blob {blob.digest}: the chunks that the service lists make up {actual}; "
            "what was read of it was wrong"
        )
        _LOG.error("%s", error)  # perhaps nobody waits for the last chunk
        raise error

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
