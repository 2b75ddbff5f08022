"""The blob service of a store in LMDB."""

import errno
import os
from collections.abc import Sequence
from io import FileIO
from typing import TYPE_CHECKING, BinaryIO, Final

from blake3 import blake3

from appliance.castore.chunking import UNCHUNKED_MAX, BlobChunk, Chunker, unpack
from appliance.castore.digest import Digest
from appliance.errors import (
    CorruptBlobError,
    ServiceLimitError,
    StoreError,
    WrongDigestError,
    disk_error,
)
from appliance.services.contracts import BlobReader, BlobWriter, Buffer
from appliance.services.lmdb_many_blobs import LmdbManyBlobs
from appliance.services.many_blobs import ManyBlobs
from appliance.store.batch import Batch
from appliance.store.blob_files import BlobFile
from appliance.store.schema import INLINE_MAX
from appliance.store.writer import AsyncStore

if TYPE_CHECKING:
    from pathlib import Path

# Smaller writes, in bytes, cost less than handing them to another thread.
_THREAD_MIN: Final = 32 * 1024
# No descriptor is left: for this process, or in the whole system.
_TOO_MANY_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE})


class LmdbBlobService:
    """The blobs of an open store.

    A blob is absent if its file is gone or does not have the recorded size. Of a blob that an
    earlier release put, no chunks are known: it is answered as one that is not cut.
    """

    def __init__(self, shared: AsyncStore) -> None:
        self._shared = shared

    async def has(self, digest: Digest) -> bool:
        """See `BlobService.has`."""
        return await self._shared.run(lambda: self._has(digest))

    async def stat(self, digest: Digest) -> Sequence[BlobChunk] | None:
        """See `BlobService.stat`."""
        return await self._shared.run(lambda: self._chunks(digest))

    async def open_read(self, digest: Digest) -> BlobReader | None:
        """See `BlobService.open_read`."""
        found = await self._shared.run(lambda: self._open(digest))
        return ContentReader(found) if isinstance(found, bytes) else found

    async def size_of(self, digest: Digest) -> int | None:
        """See `path_info_checks.KnowsSizes`."""
        return await self._shared.run(lambda: self._size_of(digest))

    async def many(self) -> ManyBlobs:
        """See `many_blobs.OffersMany`."""
        return LmdbManyBlobs(self._shared)

    async def open_write(self) -> BlobWriter:
        """Begin a new blob."""
        return _LmdbBlobWriter(self._shared)

    async def open_write_of(self, digest: Digest) -> BlobWriter:
        """See `many_blobs.WritesExpected`."""
        return _LmdbBlobWriter(self._shared, digest)

    def _has(self, digest: bytes) -> bool:
        store = self._shared.store
        try:
            with store.snapshot() as snapshot:
                return snapshot.has_blob(digest)
        except OSError as exc:
            raise disk_error(exc, store.path) from exc

    def _chunks(self, digest: Digest) -> Sequence[BlobChunk] | None:
        if self._has(digest):
            return tuple(unpack(self._shared.store.chunks_of(digest) or b""))
        store = self._shared.store
        return () if any(self._has(place.blob) for place in store.places_of_chunk(digest)) else None

    def _size_of(self, digest: Digest) -> int | None:
        with self._shared.store.snapshot() as snapshot:
            blob = snapshot.blob(digest)
            return blob.size if isinstance(blob, BlobFile) else None if blob is None else len(blob)

    # The reader owns its file from the start: a caller that is cancelled never receives the reader.
    def _open(self, digest: Digest) -> "bytes | _FileReader | None":
        with self._shared.store.snapshot() as snapshot:
            found = snapshot.blob(digest)
            if isinstance(found, memoryview):
                return bytes(found)
        file = None if found is None else self._open_file(found)
        if found is None or file is None:
            return self._open_chunk(digest)
        return _FileReader(self._shared, digest, file, 0, found.size)

    def _open_chunk(self, digest: Digest) -> "_FileReader | None":
        store = self._shared.store
        for place in store.places_of_chunk(digest):
            with store.snapshot() as snapshot:
                blob = snapshot.blob(place.blob)
            file = self._open_file(blob) if isinstance(blob, BlobFile) else None
            if file is not None:
                return _FileReader(self._shared, digest, file, place.offset, place.size)
        return None

    def _open_file(self, blob: BlobFile) -> FileIO | None:
        try:
            fd = self._shared.store.open_blob(blob)
        except FileNotFoundError:
            return None
        except OSError as exc:
            kind = ServiceLimitError if exc.errno in _TOO_MANY_ERRNOS else StoreError
            raise kind(f"blob {Digest(blob.digest)}: {exc.filename}: {exc.strerror}") from exc
        if os.fstat(fd).st_size != blob.size:
            os.close(fd)
            return None
        return FileIO(fd)


class ContentReader:
    """Reads a blob that is in memory as a whole."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._offset = 0

    async def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end."""
        data = self._content[self._offset : self._offset + size]
        self._offset += len(data)
        return data

    async def seek(self, offset: int) -> None:
        """Continue at `offset`."""
        self._offset = offset

    async def close(self) -> None:
        """Do nothing."""


class _FileReader:
    """Reads a range of a file, which it owns: a whole blob, or a chunk of one."""

    def __init__(
        self, shared: AsyncStore, digest: Digest, file: FileIO, start: int, size: int
    ) -> None:
        self._shared = shared
        self._digest = digest
        self._file = file
        self._start = start
        self._size = size
        self._offset = 0

    async def read(self, size: int) -> bytes:
        wanted = max(0, min(size, self._size - self._offset))
        if wanted == 0:
            return b""
        data = await self._shared.run(lambda: self._read(wanted))
        self._offset += len(data)
        return data

    async def seek(self, offset: int) -> None:
        self._offset = offset

    async def close(self) -> None:
        self._file.close()

    def _read(self, size: int) -> bytes:
        # pread(2) may return less than asked for.
        parts = []
        end = self._start + self._offset + size
        left = size
        while left:
            try:
                part = os.pread(self._file.fileno(), left, end - left)
            except OSError as exc:
                raise StoreError(f"blob {self._digest}: {exc.strerror}") from exc
            if not part:
                raise CorruptBlobError(
                    f"blob {self._digest}: its file ends before byte {self._start + self._size}"
                )
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        self._file.close()


class _LmdbBlobWriter:
    """Keeps the content in memory while it may be inline, then in a temporary file.

    What goes into the file is cut into chunks on the way. With `expected`, only the blob with that
    digest is kept.
    """

    def __init__(self, shared: AsyncStore, expected: Digest | None = None) -> None:
        self._shared = shared
        self._expected = expected
        self._hasher = blake3()
        self._chunker = Chunker()
        self._inline = bytearray()
        self._size = 0
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    async def write(self, data: Buffer) -> None:
        if len(data) < _THREAD_MIN:
            self._write(data)
        else:
            await self._shared.run(lambda: self._write(data))

    async def close(self) -> Digest:
        digest = Digest(self._hasher.digest())
        if self._expected is not None and digest != self._expected:
            await self.abort()
            raise WrongDigestError("blob", self._expected, digest)
        batch = Batch()
        if self._path is None:
            batch.add_blob(digest, self._inline)
        else:
            self._close_file()
            chunks = self._chunker.finish() if self._size > UNCHUNKED_MAX else b""
            batch.add_file(digest, self._path, self._size, chunks)
            self._path = None  # the batch owns the file from now on
        await self._shared.commit(batch)
        return digest

    async def abort(self) -> None:
        self._close_file()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    def _write(self, data: Buffer) -> None:
        self._hasher.update(data)
        self._size += len(data)
        if self._file is None and self._size <= INLINE_MAX:
            self._inline += data
            return
        try:
            if self._file is None:
                self._path = self._shared.new_temp_path()
                self._file = self._path.open("xb", buffering=0)
                self._append(self._file, self._inline)
                self._inline.clear()
            self._append(self._file, data)
        except OSError as exc:
            raise disk_error(exc, self._path or self._shared.store.path) from exc

    def _append(self, file: BinaryIO, data: Buffer) -> None:
        self._chunker.update(data)
        _write_all(file, data)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _write_all(file: BinaryIO, data: Buffer) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
