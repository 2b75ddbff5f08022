"""Writing a blob into an object store: cut, compressed and put while it comes.

What the caller writes is hashed and cut in one call of a thread. The chunks that ended in it are
compressed in another, and are put while the next piece is hashed. All writers of a service share
one `ChunkUploads`, which bounds how much is compressed and under way at a time.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple, TypeVar

from blake3 import blake3

from appliance.castore.chunking import BlobChunk, Chunker, unpack
from appliance.castore.digest import Digest
from appliance.errors import WrongDigestError
from appliance.services.contracts import Buffer
from appliance.services.many_blobs import PresenceChecks
from appliance.services.object_bucket import Bucket
from appliance.services.object_layout import chunk_key, compress_chunks, encode_list, list_key

T = TypeVar("T")

# Objects that are known to be there, and for how long that is believed: a store may be tidied.
_KNOWN_MAX: Final = 1 << 17
_KNOWN_S: Final = 600.0
# A chunk of fewer bytes is put without asking whether it is there: that costs about the same.
_ASK_MIN: Final = 64 << 10
# What is handed to a writer is cut in slices of this size, in bytes, to bound its memory.
_SLICE: Final = 1 << 20
# Less work than this, in bytes, costs less than handing it to another thread.
_THREAD_MIN: Final = 32 << 10
# Slices whose chunks are compressed or put, of all writers together.
_SLICES_AT_A_TIME: Final = 16


class Cut(NamedTuple):
    """A chunk, and its content."""

    chunk: BlobChunk
    content: Buffer


class KnownObjects:
    """The names of objects that were there a short while ago."""

    def __init__(self) -> None:
        self._until_s: OrderedDict[str, float] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return self._until_s.get(key, 0.0) > time.monotonic()

    def add(self, key: str) -> None:
        """Note that an object is there."""
        self._until_s[key] = time.monotonic() + _KNOWN_S
        self._until_s.move_to_end(key)
        if len(self._until_s) > _KNOWN_MAX:
            self._until_s.popitem(last=False)


class ChunkUploads:
    """Puts chunks that are not there; shared by the writers of one service.

    Attributes:
        known: the objects that are known to be there.
    """

    def __init__(self, bucket: Bucket, known: KnownObjects) -> None:
        self.known = known
        self._bucket = bucket
        self._checks = PresenceChecks()
        self._places = asyncio.Semaphore(_SLICES_AT_A_TIME)

    async def begin(self, cuts: Sequence[Cut]) -> asyncio.Task[int]:
        """Return a task that puts chunks, as soon as there is room for their contents.

        Its result is how many bytes of them were there already.
        """
        await self._places.acquire()
        task = asyncio.create_task(self._put(cuts))
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[int]) -> None:
        self._places.release()
        if not task.cancelled():
            task.exception()  # retrieved, as whoever began it may be gone

    async def _put(self, cuts: Sequence[Cut]) -> int:
        # The same content may be several chunks of one blob.
        by_key = {chunk_key(cut.chunk.digest): cut for cut in cuts}
        asked = await asyncio.gather(*(self._is_there(key, cut) for key, cut in by_key.items()))
        missing = [key for key, is_there in zip(by_key, asked, strict=True) if not is_there]
        contents = [by_key[key].content for key in missing]
        compress = partial(compress_chunks, contents)
        is_little = sum(map(len, contents)) < _THREAD_MIN
        compressed = compress() if is_little else await in_thread(compress)
        async with asyncio.TaskGroup() as group:
            for key, content in zip(missing, compressed, strict=True):
                group.create_task(self._bucket.put(key, content))
        for key in by_key:
            self.known.add(key)
        return sum(cut.chunk.size for cut in cuts) - sum(map(len, contents))

    async def _is_there(self, key: str, cut: Cut) -> bool:
        if key in self.known:
            return True
        if cut.chunk.size < _ASK_MIN or not self._checks.are_worthwhile():
            return False
        is_there = await self._bucket.has(key)
        self._checks.learn(is_there=is_there)
        return is_there


class ObjectBlobWriter:
    """Cuts a blob, puts its chunks as they end, and its list when all of them are there.

    Args:
        bucket: where to.
        uploads: puts the chunks.
        expected: if given, only the blob with that digest becomes visible.

    Attributes:
        num_bytes_present: see `many_blobs.CountsPresent`.
    """

    def __init__(
        self, bucket: Bucket, uploads: ChunkUploads, expected: Digest | None = None
    ) -> None:
        self._bucket = bucket
        self._uploads = uploads
        self._expected = expected
        self._hasher = blake3()
        self._chunker = Chunker()
        # What belongs to the chunk that has not ended.
        self._uncut: list[Buffer] = []
        self._chunks: list[BlobChunk] = []
        self._tasks: set[asyncio.Task[int]] = set()
        self.num_bytes_present = 0

    async def write(self, data: Buffer) -> None:
        """See `BlobWriter.write`."""
        view = memoryview(data)
        for start in range(0, len(view), _SLICE):
            # Bytes do not change; of anything else a copy is kept, as the caller may reuse it.
            part = view[start : start + _SLICE]
            piece: Buffer = part if isinstance(data, bytes) else bytes(part)
            if len(piece) < _THREAD_MIN:
                cuts = self._take(piece)
            else:
                cuts = await in_thread(partial(self._take, piece))
            await self._put(cuts)

    async def close(self) -> Digest:
        """See `BlobWriter.close`.

        Raises:
            WrongDigestError: it is not the blob that is expected.
        """
        try:
            return await self._close()
        except BaseException:
            await self.abort()
            raise

    async def abort(self) -> None:
        """See `BlobWriter.abort`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _close(self) -> Digest:
        digest = Digest(self._hasher.digest())
        if self._expected is not None and digest != self._expected:
            raise WrongDigestError("blob", self._expected, digest)
        await self._put(self._cut(self._chunker.finish(), b""))
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._raise_failure()
        key = list_key(digest)
        if key not in self._uploads.known:
            if not await self._bucket.has(key):
                await self._bucket.put(key, encode_list(self._chunks))
            self._uploads.known.add(key)
        return digest

    def _take(self, piece: Buffer) -> list[Cut]:
        self._hasher.update(piece)
        self._chunker.update(piece)
        return self._cut(self._chunker.take_packed(), piece)

    def _cut(self, packed: bytes, piece: Buffer) -> list[Cut]:
        # The chunks in `packed` consist of what was left uncut and of what is in `piece`.
        left = memoryview(piece)
        num_uncut = sum(map(len, self._uncut))
        cuts = []
        for chunk in unpack(packed):
            content: Buffer = left[: max(chunk.size - num_uncut, 0)]
            left = left[len(content) :]
            if self._uncut:
                # The last byte is settled late, so a chunk may end before what was left uncut does.
                joined = b"".join([*self._uncut, content])
                content, rest = joined[: chunk.size], joined[chunk.size :]
                self._uncut = [rest] if rest else []
                num_uncut = len(rest)
            cuts.append(Cut(chunk, content))
            self._chunks.append(chunk)
        if left:
            self._uncut.append(left)
        return cuts

    async def _put(self, cuts: Sequence[Cut]) -> None:
        self._raise_failure()
        if cuts:
            self._tasks.add(await self._uploads.begin(cuts))

    def _raise_failure(self) -> None:
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.remove(task)
            try:
                self.num_bytes_present += task.result()
            except ExceptionGroup as exc:
                raise exc.exceptions[0] from None


async def in_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns; a thread does it."""
    return await asyncio.get_running_loop().run_in_executor(None, work)
