"""The blob service of an object store; `object_layout` says where what is.

A chunk is one request, so whoever wants a part of a large blob asks for its list and then for
chunks, as with any other peer (see `fetch_chunks`). A reader of a whole blob fetches a few chunks
ahead.
"""

import asyncio
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from itertools import accumulate
from typing import Final, TypeVar

from blake3 import blake3

from appliance.castore.chunking import BlobChunk, Chunker, unpack
from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.errors import ContentMissingError, CorruptBlobError
from appliance.services.contracts import BlobReader, BlobWriter, Buffer
from appliance.services.lmdb_blobs import ContentReader
from appliance.services.object_bucket import Bucket
from appliance.services.object_layout import (
    CHUNK_OBJECT_MAX,
    LIST_OBJECT_MAX,
    chunk_key,
    compress_chunk,
    decode_list_untrusted,
    decompress_chunk_untrusted,
    encode_list,
    list_key,
)

T = TypeVar("T")

# Chunks of one blob under way at a time: fetched ahead of a reader, or put by a writer.
_FETCHED_AHEAD: Final = 6
_PUT_AT_A_TIME: Final = 8
# Lists that are kept, as whoever asks for one will read the blob.
_LISTS_MAX: Final = 256
# Objects that are known to be there, and for how long that is believed: a store may be tidied.
_KNOWN_MAX: Final = 1 << 17
_KNOWN_S: Final = 600.0
# A chunk of fewer bytes is put without asking whether it is there: that costs about the same.
_ASK_MIN: Final = 64 << 10
# What is handed to a writer is cut in slices of this size, in bytes, to bound its memory.
_SLICE: Final = 1 << 20
# Smaller writes, in bytes, cost less than handing them to another thread.
_THREAD_MIN: Final = 32 << 10


class ObjectBlobService:
    """The blobs in a bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._known = _KnownObjects()
        self._lists: OrderedDict[Digest, Sequence[BlobChunk]] = OrderedDict()

    async def has(self, digest: Digest) -> bool:
        """See `BlobService.has`."""
        return digest == EMPTY_DIGEST or await self._has_object(list_key(digest))

    async def stat(self, digest: Digest) -> Sequence[BlobChunk] | None:
        """See `BlobService.stat`."""
        chunks = await self._listed(digest)
        if chunks is not None or digest == EMPTY_DIGEST:
            return chunks or ()
        return () if await self._has_object(chunk_key(digest)) else None

    async def size_of(self, digest: Digest) -> int | None:
        """See `path_info_checks.KnowsSizes`."""
        chunks = await self._listed(digest)
        if chunks or digest == EMPTY_DIGEST:
            return sum(chunk.size for chunk in chunks or ())
        content = None if chunks is None else await self._chunk(digest)
        return None if content is None else len(content)

    async def open_read(self, digest: Digest) -> BlobReader | None:
        """See `BlobService.open_read`; a small blob is in memory when this returns."""
        if digest == EMPTY_DIGEST:
            return ContentReader(b"")
        if digest not in self._lists:
            content = await self._chunk(digest)
            if content is not None:
                return ContentReader(content)
        chunks = await self._listed(digest)
        return _ChunkedReader(self._present_chunk, digest, chunks) if chunks else None

    async def open_write(self) -> BlobWriter:
        """Begin a new blob."""
        return _ObjectBlobWriter(self._bucket, self._known)

    async def _has_object(self, key: str) -> bool:
        if key in self._known:
            return True
        is_there = await self._bucket.has(key)
        if is_there:
            self._known.add(key)
        return is_there

    async def _listed(self, digest: Digest) -> Sequence[BlobChunk] | None:
        chunks = self._lists.get(digest)
        if chunks is not None:
            return chunks
        key = list_key(digest)
        encoded = await self._bucket.get(key, LIST_OBJECT_MAX)
        if encoded is None:
            return None
        try:
            chunks = decode_list_untrusted(encoded)
        except CorruptBlobError as exc:
            raise CorruptBlobError(f"{self._bucket.name}: {key}: {exc}") from exc
        if chunks:
            self._lists[digest] = chunks
            while len(self._lists) > _LISTS_MAX:
                self._lists.popitem(last=False)
        return chunks

    async def _chunk(self, digest: Digest, size: int | None = None) -> bytes | None:
        key = chunk_key(digest)
        compressed = await self._bucket.get(key, CHUNK_OBJECT_MAX)
        if compressed is None:
            return None
        decompress = partial(decompress_chunk_untrusted, compressed)
        try:
            return await _in_thread(decompress if size is None else partial(decompress, size))
        except CorruptBlobError as exc:
            raise CorruptBlobError(f"{self._bucket.name}: {key}: {exc}") from exc

    async def _present_chunk(self, blob: Digest, chunk: BlobChunk) -> bytes:
        content = await self._chunk(chunk.digest, chunk.size)
        if content is None:
            raise ContentMissingError(
                f"{self._bucket.name}: blob {blob}: its chunk {chunk.digest} is missing"
            )
        if len(content) != chunk.size:
            raise CorruptBlobError(
                f"{self._bucket.name}: blob {blob}: its chunk {chunk.digest} does not have "
                f"{chunk.size} bytes"
            )
        return content


async def _in_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, work)


class _KnownObjects:
    """The names of objects that were there a short while ago."""

    def __init__(self) -> None:
        self._until_s: OrderedDict[str, float] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return self._until_s.get(key, 0.0) > time.monotonic()

    def add(self, key: str) -> None:
        self._until_s[key] = time.monotonic() + _KNOWN_S
        self._until_s.move_to_end(key)
        if len(self._until_s) > _KNOWN_MAX:
            self._until_s.popitem(last=False)


class _ChunkedReader:
    """Reads a blob by its chunks, of which it fetches the next ones ahead while they are wanted."""

    def __init__(
        self,
        fetch: Callable[[Digest, BlobChunk], Coroutine[None, None, bytes]],
        digest: Digest,
        chunks: Sequence[BlobChunk],
    ) -> None:
        self._fetch = fetch
        self._digest = digest
        self._chunks = chunks
        self._starts = [0, *accumulate(chunk.size for chunk in chunks)]
        self._offset = 0
        self._tasks: dict[int, asyncio.Task[bytes]] = {}
        # The chunk that was read last; a reader begins at the start and is taken to go on.
        self._index = -1

    async def read(self, size: int) -> bytes:
        parts = []
        left = min(size, self._starts[-1] - self._offset)
        while left > 0:
            index = bisect_right(self._starts, self._offset) - 1
            content = await self._content(index)
            start = self._offset - self._starts[index]
            part = content[start : start + left]
            parts.append(part)
            left -= len(part)
            self._offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def seek(self, offset: int) -> None:
        self._offset = offset

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    async def _content(self, index: int) -> bytes:
        goes_on = self._index <= index <= self._index + 1
        self._index = index
        end = min(index + (_FETCHED_AHEAD if goes_on else 1), len(self._chunks))
        for old in [number for number in self._tasks if not index <= number < end]:
            self._tasks.pop(old).cancel()
        for number in range(index, end):
            if number not in self._tasks:
                work = self._fetch(self._digest, self._chunks[number])
                self._tasks[number] = asyncio.create_task(work)
                self._tasks[number].add_done_callback(_retrieve)
        task = self._tasks[index]
        try:
            return await asyncio.shield(task)
        except BaseException:
            self._tasks.pop(index, None)  # whoever reads on asks anew
            task.cancel()
            raise


def _retrieve(task: "asyncio.Task[bytes] | asyncio.Task[None]") -> None:
    # Or asyncio logs the error of one that nobody came to wait for.
    if not task.cancelled():
        task.exception()


class _ObjectBlobWriter:
    """Cuts a blob, puts its chunks as they end, and its list when all of them are there."""

    def __init__(self, bucket: Bucket, known: _KnownObjects) -> None:
        self._bucket = bucket
        self._known = known
        self._hasher = blake3()
        self._chunker = Chunker()
        # What has not been put: it belongs to chunks that have not ended.
        self._unput = bytearray()
        self._chunks: list[BlobChunk] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def write(self, data: Buffer) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _SLICE):
            # A copy, as a thread may work on it even when the caller is cancelled.
            part = bytes(view[start : start + _SLICE])
            if len(part) < _THREAD_MIN:
                packed = self._take(part)
            else:
                packed = await _in_thread(partial(self._take, part))
            await self._put_chunks(packed)

    async def close(self) -> Digest:
        try:
            return await self._close()
        except BaseException:
            await self.abort()
            raise

    async def abort(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _close(self) -> Digest:
        await self._put_chunks(self._chunker.finish())
        await self._wait(0)
        digest = Digest(self._hasher.digest())
        key = list_key(digest)
        if key not in self._known:
            if not await self._bucket.has(key):
                await self._bucket.put(key, encode_list(self._chunks))
            self._known.add(key)
        return digest

    def _take(self, part: bytes) -> bytes:
        self._hasher.update(part)
        self._chunker.update(part)
        self._unput += part
        return self._chunker.take_packed()

    async def _put_chunks(self, packed: bytes) -> None:
        at = 0
        for chunk in unpack(packed):
            content = bytes(self._unput[at : at + chunk.size])
            at += chunk.size
            self._chunks.append(chunk)
            await self._wait(_PUT_AT_A_TIME - 1)
            task = asyncio.create_task(self._put_chunk(chunk, content))
            task.add_done_callback(_retrieve)
            self._tasks.add(task)
        del self._unput[:at]

    async def _put_chunk(self, chunk: BlobChunk, content: bytes) -> None:
        key = chunk_key(chunk.digest)
        if key in self._known:
            return
        if chunk.size < _ASK_MIN or not await self._bucket.has(key):
            await self._bucket.put(key, await _in_thread(partial(compress_chunk, content)))
        self._known.add(key)

    async def _wait(self, num_left: int) -> None:
        # Until no more than that many are under way; the first error is raised.
        while len(self._tasks) > num_left:
            done, self._tasks = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
