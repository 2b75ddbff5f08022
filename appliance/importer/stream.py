"""The pipe from the tree process to the process that commits: headers, each with its content."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from appliance.importer.hasher_pool import Hasher, HasherPool
from appliance.importer.records import OBJECT_HEADER, ObjectHeader, ObjectKind

_READ_SIZE: Final = 1 << 18


class ObjectWriter:
    """Gathers objects, and writes them."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._gathered: list[bytes] = []
        self.size_bytes = 0

    def add(
        self,
        kind: ObjectKind,
        content: bytes,
        digest: bytes = b"",
        *,
        hasher: int = 0,
        num_files: int = 0,
        num_bytes: int = 0,
    ) -> None:
        """Gather an object."""
        header = OBJECT_HEADER.pack(kind, hasher, len(content), num_files, num_bytes, digest)
        self._gathered += (header, content)
        self.size_bytes += len(content)

    def take(self) -> list[bytes]:
        """Return what was gathered, for `write`, and gather anew."""
        gathered, self._gathered = self._gathered, []
        self.size_bytes = 0
        return gathered

    def write(self, last: list[bytes]) -> None:
        """Write what was gathered, and then `last`."""
        data = memoryview(b"".join([*self.take(), *last]))
        while data:
            data = data[os.write(self._fd, data) :]


def read_objects(fd: int) -> Iterator[tuple[ObjectHeader, bytes]]:
    """Yield each object, until the pipe ends; one cut short by its end is dropped."""
    data = b""
    start = 0
    while True:
        left = len(data) - start
        if left >= OBJECT_HEADER.size:
            header = ObjectHeader._make(OBJECT_HEADER.unpack_from(data, start))
            end = start + OBJECT_HEADER.size + header.size
            if end <= len(data):
                yield header, data[end - header.size : end]
                start = end
                continue
            if header.size > _READ_SIZE:
                parts = [data[end - header.size :]]
                start, data = 0, b""
                if not _read_exactly(fd, parts, header.size - len(parts[0])):
                    return
                yield header, _join(parts)
                continue
        more = os.read(fd, _READ_SIZE)
        if not more:
            return
        data = data[start:] + more
        start = 0


def _read_exactly(fd: int, parts: list[bytes], size: int) -> bool:
    """Read the rest of a large object, without joining it ever again; return False at the end."""
    while size:
        part = os.read(fd, min(size, _READ_SIZE))
        if not part:
            return False
        parts.append(part)
        size -= len(part)
    return True


def _join(parts: list[bytes]) -> bytes:
    whole = b"".join(parts)
    parts.clear()
    return whole


# --- What the trees of one import share: whence content comes, and where objects go.

_GATHERED_MAX: Final = 1 << 16
_PROGRESS_INTERVAL_S: Final = 0.1


class Feed:
    """The hashing processes, and the stream of objects.

    Objects are written after the records of all files that were received before them.
    """

    def __init__(self, hashers: Sequence[Hasher], writer: ObjectWriter) -> None:
        self.pool = HasherPool(hashers)
        self._writer = writer
        self._num_files = 0
        self._num_bytes = 0
        self._progress_due_s = 0.0
        self._has_warned = False

    def put(
        self, kind: ObjectKind, content: bytes, digest: bytes = b"", *, hasher: int = 0
    ) -> None:
        """Pass on an object; what it refers to has been received or put."""
        self._writer.add(kind, content, digest, hasher=hasher)
        if self._writer.size_bytes >= _GATHERED_MAX:
            self.pass_on()

    def pass_on(self) -> None:
        """Write what was received, of which the ring is needed no more, and the objects put."""
        objects = self._writer.take()
        for index, records in self.pool.taken():
            self._writer.add(ObjectKind.RECORDS, records, hasher=index)
        self._writer.write(objects)

    def file_done(self, size: int) -> None:
        """Count a file, and what of it was not counted piece by piece."""
        self._num_files += 1
        self._num_bytes += size

    def piece_done(self, size: int) -> None:
        """Count a piece of a file."""
        self._num_bytes += size

    def report(self, describe: Callable[[], str]) -> None:
        """Tell how far the import is, now and then; `describe` names the file in hand."""
        now_s = time.monotonic()
        if now_s >= self._progress_due_s:
            self._progress_due_s = now_s + _PROGRESS_INTERVAL_S
            self._writer.add(
                ObjectKind.PROGRESS,
                describe().encode(),
                num_files=self._num_files,
                num_bytes=self._num_bytes,
            )

    def warn_of_large_directory(self, text: str) -> None:
        """Pass on a warning; only the first one is."""
        if not self._has_warned:
            self._has_warned = True
            self._writer.add(ObjectKind.WARNING, text.encode())

    def abandon(self) -> None:
        """Take back all that was asked for the path in hand."""
        pool = self.pool
        while not pool.is_idle():
            while not pool.has_received():
                self.pass_on()
                pool.wait()
            pool.take()
        self.pass_on()
