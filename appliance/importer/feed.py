"""What the trees of one import share: whence content comes, and where objects go."""

import time
from collections.abc import Callable, Sequence
from typing import Final

from appliance.importer.hasher_pool import Hasher, HasherPool
from appliance.importer.object_stream import ObjectWriter
from appliance.importer.records import ObjectKind

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
