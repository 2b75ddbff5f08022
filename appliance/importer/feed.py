"""What the trees of one import share: whence content comes, and where objects go."""

from collections.abc import Sequence

from appliance.castore.digest import Digest
from appliance.importer.hasher import staged_path
from appliance.importer.hasher_pool import Hasher, HasherPool
from appliance.importer.object_stream import ObjectWriter
from appliance.importer.progress import Reporter
from appliance.importer.records import HashKind, HashRecord, ObjectKind

_NO_STAGED = 0


class Feed:
    """The hashing processes, the stream of objects, and the digests that have gone into it."""

    def __init__(self, hashers: Sequence[Hasher], objects: ObjectWriter) -> None:
        self.objects = objects
        self.pool = HasherPool(hashers, objects.flush)
        self.reporter = Reporter(self._report)
        # Of the paths that are complete, and of the one in hand.
        self._sent: set[bytes] = set()
        self._sent_now: set[bytes] = set()

    def keep(self, hasher: Hasher, record: HashRecord) -> None:
        """Pass on the blob whose last piece `record` is, unless it has been."""
        if record.digest in self._sent or record.digest in self._sent_now:
            self._drop(hasher, record)
            return
        self._sent_now.add(record.digest)
        if record.staged == _NO_STAGED:
            self.objects.blob(hasher.index, record)
        else:
            self.objects.file(hasher.index, record)

    def keep_directory(self, digest: Digest, encoded: bytes) -> None:
        """Pass on a directory; all it refers to has been."""
        self.objects.content(ObjectKind.DIRECTORY, encoded, digest)

    def complete(self) -> None:
        """Take note that the path in hand is complete."""
        self._sent |= self._sent_now
        self._sent_now.clear()

    def abandon(self) -> None:
        """Take back all that was asked for the path in hand, and forget what was sent."""
        while not self.pool.is_idle():
            self._drop(*self.pool.receive())
        self._sent_now.clear()

    def _drop(self, hasher: Hasher, record: HashRecord) -> None:
        self.objects.used(hasher.index, record)
        if record.staged != _NO_STAGED and record.kind == HashKind.LAST:
            staged_path(hasher.staging, record.staged).unlink()

    def _report(self, num_files: int, num_bytes: int, path: bytes) -> None:
        self.objects.content(ObjectKind.PROGRESS, path, number=num_bytes, num_files=num_files)
