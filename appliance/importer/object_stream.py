"""The pipe from the tree process to the process that commits: headers, each with its content."""

import os
from collections.abc import Iterator
from typing import Final

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
