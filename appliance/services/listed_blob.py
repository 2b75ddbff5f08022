"""A large blob that is fetched by chunks: its list, its file, and how far it is."""

import asyncio
import os
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final, NamedTuple

from blake3 import blake3

from appliance.castore.chunking import BlobChunk, pack
from appliance.castore.digest import DIGEST_SIZE, Digest
from appliance.errors import CorruptBlobError
from appliance.store.partial_blob import PartialBlob

# A chunk is in memory until it is written. A service with larger ones is asked for whole blobs.
CHUNK_MAX: Final = 4 << 20
_PIECE_SIZE: Final = 1 << 20


class ChunkList:
    """The chunks of a blob, as a service lists them; there are two at least.

    Attributes:
        digest: of the list itself.
        size: of the whole blob, in bytes.
    """

    def __init__(self, chunks: Sequence[BlobChunk]) -> None:
        packed = pack(chunks)
        self.digest = Digest.of(packed)
        self._digests = b"".join(chunk.digest for chunk in chunks)
        self._ends = array("Q", accumulate(chunk.size for chunk in chunks))
        self.size: int = self._ends[-1]

    def __len__(self) -> int:
        return len(self._ends)

    def chunk_digest(self, index: int) -> Digest:
        """Return the digest of a chunk."""
        return Digest(self._digests[index * DIGEST_SIZE : (index + 1) * DIGEST_SIZE])

    def bounds(self, index: int) -> tuple[int, int]:
        """Return where in the blob a chunk starts and ends."""
        return (self._ends[index - 1] if index else 0), self._ends[index]

    def touched_by(self, start: int, end: int) -> range:
        """Return the chunks that have some of the bytes from `start` to `end`."""
        first = bisect_right(self._ends, start)
        return range(first, min(bisect_left(self._ends, end) + 1, len(self)))


def usable_list(chunks: Sequence[BlobChunk], size: int) -> ChunkList | None:
    """Return the list of a blob of `size` bytes if it can be gone by, else None."""
    if len(chunks) < 2 or not all(0 < chunk.size <= CHUNK_MAX for chunk in chunks):
        return None
    listed = ChunkList(chunks)
    return listed if listed.size == size else None


class Arrived(NamedTuple):
    """A chunk that has not been verified and written yet."""

    number: int
    content: bytes
    is_stored: asyncio.Future[None]


class PartFile:
    """The file of a blob that is there in part, which it owns."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def is_removed(self) -> bool:
        """Whether the blob has been evicted."""
        return os.fstat(self.fd).st_nlink == 0

    def write(self, content: bytes, offset: int) -> None:
        """Write all of `content`.

        Raises:
            OSError: the disk failed.
        """
        left = memoryview(content)
        while left:
            num = os.pwrite(self.fd, left, offset)
            left, offset = left[num:], offset + num

    def __del__(self) -> None:
        # Threads may still be writing when the blob is forgotten.
        os.close(self.fd)


class ListedBlob:
    """A blob that is fetched by chunks, while it is.

    Attributes:
        digest: digest of the blob.
        chunks: the list that it is fetched by.
        record: what was there when that was last looked at.
        file: where it is written.
        arrived: chunks that are to be written.
        storing: writes those.
        hashing: hashes the beginning of the file as it grows.
        hasher: has the first `hashed` bytes.
        hashed: see `hasher`.
    """

    def __init__(self, chunks: ChunkList, record: PartialBlob, file: PartFile) -> None:
        self.digest = Digest(record.digest)
        self.chunks = chunks
        self.record = record
        self.file = file
        self.arrived: list[Arrived] = []
        self.storing: asyncio.Task[None] | None = None
        self.hashing: asyncio.Task[None] | None = None
        self.hasher = blake3()
        self.hashed = 0
        # For the last two.
        self._hashing = threading.Lock()

    def hashable(self) -> int:
        """Return up to where the blob is there from its start on."""
        bounds = self.record.bounds
        return bounds[1] if len(bounds) and bounds[0] == 0 else 0

    def hash_next(self, content: bytes, start: int) -> None:
        """Hash a chunk that was just written, if it is the next one; called in a thread."""
        if self._hashing.acquire(blocking=False):
            try:
                if start == self.hashed:
                    self.hasher.update(content)
                    self.hashed += len(content)
            finally:
                self._hashing.release()

    def hash_up_to(self, end: int) -> None:
        """Hash the next bytes of the file; called in a thread.

        Raises:
            CorruptBlobError: the file has become shorter.
            OSError: the file cannot be read.
        """
        with self._hashing:
            while self.hashed < end:
                piece = os.pread(self.file.fd, min(_PIECE_SIZE, end - self.hashed), self.hashed)
                if not piece:
                    raise CorruptBlobError(f"blob {self.digest}: its file has become shorter")
                self.hasher.update(piece)
                self.hashed += len(piece)
