"""The blob service of an object store; `object_layout` says where what is.

A chunk is one request, so whoever wants a part of a large blob asks for its list and then for
chunks, as with any other peer (see `fetch_chunks`). A reader of a whole blob fetches a few chunks
ahead.
"""

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from itertools import accumulate
from typing import Final

from appliance.castore.chunking import BlobChunk
from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.errors import ContentMissingError, CorruptBlobError
from appliance.services.contracts import BlobReader, BlobWriter
from appliance.services.lmdb_blobs import ContentReader
from appliance.services.object_bucket import Bucket
from appliance.services.object_layout import (
    CHUNK_OBJECT_MAX,
    LIST_OBJECT_MAX,
    chunk_key,
    decode_list_untrusted,
    decompress_chunk_untrusted,
    list_key,
)
from appliance.services.object_writer import ChunkUploads, KnownObjects, ObjectBlobWriter, in_thread

# Chunks of one blob that are fetched ahead of a reader.
_FETCHED_AHEAD: Final = 6
# Lists that are kept, as whoever asks for one will read the blob.
_LISTS_MAX: Final = 256


class ObjectBlobService:
    """The blobs in a bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._known = KnownObjects()
        self._uploads = ChunkUploads(bucket, self._known)
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
        return ObjectBlobWriter(self._bucket, self._uploads)

    async def open_write_of(self, digest: Digest) -> BlobWriter:
        """See `many_blobs.WritesExpected`."""
        return ObjectBlobWriter(self._bucket, self._uploads, digest)

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
            return await in_thread(decompress if size is None else partial(decompress, size))
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


def _retrieve(task: asyncio.Task[bytes]) -> None:
    # Or asyncio logs the error of one that nobody came to wait for.
    if not task.cancelled():
        task.exception()
