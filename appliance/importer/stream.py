"""The streams of the tree process: objects to the committing process, files from hashing processes.

`ObjectWriter` and `read_objects` are the two ends of the pipe to the committing process; `records`
has the format. `Feed` ties that pipe to the hashing processes: it keeps the order in which objects
and the files they refer to must arrive.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from appliance.importer.hasher_pool import Hasher, HasherPool
from appliance.importer.records import OBJECT_HEADER, ObjectHeader, ObjectKind

# Bytes read from the pipe of objects at once.
_READ_SIZE: Final = 1 << 18
# Bytes of objects to gather before they are written.
_GATHERED_MAX: Final = 1 << 16
_PROGRESS_INTERVAL_S: Final = 0.1

# --- The pipe of objects ---


class ObjectWriter:
    """Gathers objects, and writes them to a pipe."""

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
        """Add an object to those gathered; the arguments are fields of `ObjectHeader`."""
        header = OBJECT_HEADER.pack(kind, hasher, len(content), num_files, num_bytes, digest)
        self._gathered += (header, content)
        self.size_bytes += len(content)

    def take(self) -> list[bytes]:
        """Return the gathered headers and contents, to be given to `write`; none are left."""
        gathered, self._gathered = self._gathered, []
        self.size_bytes = 0
        return gathered

    def write(self, last: list[bytes]) -> None:
        """Write all gathered objects, and then `last`."""
        data = memoryview(b"".join([*self.take(), *last]))
        while data:
            data = data[os.write(self._fd, data) :]


def read_objects(fd: int) -> Iterator[tuple[ObjectHeader, bytes]]:
    """Yield the header and content of each object until the pipe ends.

    An object that is cut short by the end of the pipe is dropped.
    """
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
    """Append the rest of a large object to `parts`; return False if the pipe ends before.

    The parts are joined only once. Joining the data after each read, as for small objects, would
    take quadratic time.
    """
    while size:
        part = os.read(fd, min(size, _READ_SIZE))
        if not part:
            return False
        parts.append(part)
        size -= len(part)
    return True


def _join(parts: list[bytes]) -> bytes:
    # Frees the parts, which take as much memory as the whole, before the object is used.
    whole = b"".join(parts)
    parts.clear()
    return whole


# --- Files in, objects out ---


class Feed:
    """The hashing processes of an import, together with the pipe of objects.

    An object is written after the records of all files that were received before it was put, so
    the committing process has the files in a Directory before it has the Directory.
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
        """Queue an object; everything it refers to must have been received or put before."""
        self._writer.add(kind, content, digest, hasher=hasher)
        if self._writer.size_bytes >= _GATHERED_MAX:
            self.pass_on()

    def pass_on(self) -> None:
        """Write the records received since the last call, and then the queued objects.

        The bytes in the rings that the records use may be overwritten from here on.
        """
        objects = self._writer.take()
        for index, records in self.pool.taken():
            self._writer.add(ObjectKind.RECORDS, records, hasher=index)
        self._writer.write(objects)

    def file_done(self, size: int) -> None:
        """Count a file, and `size` bytes of it that `piece_done` has not counted."""
        self._num_files += 1
        self._num_bytes += size

    def piece_done(self, size: int) -> None:
        """Count `size` bytes of a file."""
        self._num_bytes += size

    def report(self, describe: Callable[[], str]) -> None:
        """Queue a PROGRESS object, unless there was one in the last 0.1 s.

        Args:
            describe: returns the path of the current file.
        """
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
        """Queue a warning, unless there has been one in this import."""
        if not self._has_warned:
            self._has_warned = True
            self._writer.add(ObjectKind.WARNING, text.encode())

    def abandon(self) -> None:
        """Receive and drop all files that are still requested."""
        pool = self.pool
        while not pool.is_idle():
            while not pool.has_received():
                self.pass_on()
                pool.wait()
            pool.take()
        self.pass_on()
