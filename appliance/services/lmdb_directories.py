"""The directory service of a store in LMDB."""

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import BinaryIO, Final

from appliance.castore.closure import ClosureChecker, TopologicalOrder
from appliance.castore.digest import DIGEST_SIZE, Digest
from appliance.castore.directory import Directory
from appliance.errors import (
    ContentMissingError,
    CorruptBlobError,
    DirectoryError,
    InvalidRequestError,
    WrongDigestError,
    disk_error,
)
from appliance.services.contracts import DirectoryPutter, DirectoryService
from appliance.store.batch import Batch
from appliance.store.snapshot import Snapshot
from appliance.store.writer import AsyncStore

# What one visit to a reading thread returns at most.
_VISIT_DIRECTORIES: Final = 256
_VISIT_BYTES: Final = 1 << 20
# A closure is gathered in memory up to this size, then in a file.
_SPOOL_MEMORY_BYTES: Final = 1 << 20
# A closure is committed in pieces of this many bytes, and of this many directories, because each
# small one dirties pages of its own, and its image others.
_COMMIT_BYTES: Final = 8 << 20
_COMMIT_DIRECTORIES: Final = 2_000
# The length of a directory in the spool file, little-endian.
_LENGTH_BYTES: Final = 4
# Directories with this many entries or more are checked in another thread.
_THREAD_MIN_ENTRIES: Final = 500


class LmdbDirectoryService:
    """The directories of an open store, verified as they are read."""

    def __init__(self, shared: AsyncStore) -> None:
        self._shared = shared

    async def get(self, digest: Digest) -> Directory | None:
        """Return one directory."""
        return await self._shared.run(lambda: self._get(digest))

    async def get_recursive(self, digest: Digest) -> AsyncIterator[Directory]:
        """Yield the directory and all below it, parents first; nothing if it is missing."""
        if await self.get(digest) is None:
            return
        order = TopologicalOrder(digest)
        while await self._shared.run(lambda: self._discover(order)):
            pass
        while found := await self._shared.run(lambda: self._next_ready(order)):
            for directory in found:
                yield directory

    async def put(self, directory: Directory) -> Digest:
        """Put a directory without subdirectories."""
        return await put_one(self, directory)

    def put_multiple_start(self) -> DirectoryPutter:
        """Begin a closure."""
        return _LmdbDirectoryPutter(self._shared)

    def _get(self, digest: Digest) -> Directory | None:
        with self._shared.store.snapshot() as snapshot:
            return self._read(snapshot, digest)

    def _read(self, snapshot: Snapshot, digest: Digest) -> Directory | None:
        encoded = snapshot.directory(digest)
        if encoded is None:
            return None
        if (actual := Digest.of(encoded)) != digest:
            raise WrongDigestError("directory", digest, actual)
        try:
            return Directory.from_bytes(encoded)
        except DirectoryError as exc:
            raise CorruptBlobError(f"directory {digest}: {exc}") from exc

    def _read_present(self, snapshot: Snapshot, digest: Digest) -> Directory:
        directory = self._read(snapshot, digest)
        if directory is None:
            raise ContentMissingError(f"directory {digest} is not in the store")
        return directory

    def _discover(self, order: TopologicalOrder) -> bool:
        with self._shared.store.snapshot() as snapshot:
            return (
                sum(1 for _ in self._visit(snapshot, order.next_undiscovered, order.discover)) > 0
            )

    def _next_ready(self, order: TopologicalOrder) -> list[Directory]:
        with self._shared.store.snapshot() as snapshot:
            return list(self._visit(snapshot, order.next_ready, order.release))

    def _visit(
        self,
        snapshot: Snapshot,
        next_digest: Callable[[], Digest | None],
        take: Callable[[Directory], None],
    ) -> Iterator[Directory]:
        num_bytes = num_directories = 0
        while num_bytes < _VISIT_BYTES and num_directories < _VISIT_DIRECTORIES:
            digest = next_digest()
            if digest is None:
                return
            directory = self._read_present(snapshot, digest)
            take(directory)
            num_bytes += len(directory.to_bytes())
            num_directories += 1
            yield directory


class _LmdbDirectoryPutter:
    """Keeps a closure aside until it is complete, then commits it leaves first.

    A large closure takes several commits. Since leaves come first, everything below a visible
    directory is visible, too.
    """

    def __init__(self, shared: AsyncStore) -> None:
        self._shared = shared
        self._checker = ClosureChecker()
        self._spool: BinaryIO | None = None
        # Digests with encodings: a `Directory` takes about ten times as much.
        self._in_memory: list[tuple[Digest, bytes]] = []
        self._in_memory_bytes = 0

    async def put(self, directory: Directory) -> None:
        if len(directory) < _THREAD_MIN_ENTRIES:
            self._put(directory)
        else:
            await self._shared.run(lambda: self._put(directory))

    async def close(self) -> Digest:
        try:
            root = self._checker.finish()
            if self._spool is not None:
                self._spill()
                self._spool.seek(0)
                while not (batch := await self._shared.run(self._next_batch)).is_empty():
                    await self._shared.commit(batch)
            else:
                batch = Batch()
                for digest, encoded in self._in_memory:
                    batch.add_directory(digest, encoded)
                await self._shared.commit(batch)
            return root
        finally:
            await self.abort()

    async def abort(self) -> None:
        self._in_memory.clear()
        if self._spool is not None:
            spool, self._spool = self._spool, None
            with suppress(OSError):  # closing writes once more what a full disk has refused
                spool.close()

    def _put(self, directory: Directory) -> None:
        if self._checker.add(directory):
            encoded = directory.to_bytes()
            self._in_memory.append((directory.digest(), encoded))
            self._in_memory_bytes += len(encoded)
            if self._in_memory_bytes >= _SPOOL_MEMORY_BYTES:
                self._spill()

    def _spill(self) -> None:
        try:
            if self._spool is None:
                # A file without a name leaves nothing behind, whatever happens.
                self._spool = tempfile.TemporaryFile(dir=self._shared.temp_directory())  # noqa: SIM115 - closed by abort
            for digest, encoded in self._in_memory:
                self._spool.write(digest)
                self._spool.write(len(encoded).to_bytes(_LENGTH_BYTES, "little"))
                self._spool.write(encoded)
            self._spool.flush()
        except OSError as exc:
            raise disk_error(exc, self._shared.store.path) from exc
        self._in_memory.clear()
        self._in_memory_bytes = 0

    def _next_batch(self) -> Batch:
        assert self._spool is not None  # noqa: S101 - for the type checker
        batch = Batch()
        while batch.size_bytes < _COMMIT_BYTES and len(batch.directories) < _COMMIT_DIRECTORIES:
            digest = self._spool.read(DIGEST_SIZE)
            if not digest:
                break
            size = int.from_bytes(self._spool.read(_LENGTH_BYTES), "little")
            batch.add_directory(Digest(digest), self._spool.read(size))
        return batch


async def put_one(service: DirectoryService, directory: Directory) -> Digest:
    """Put a closure of one directory.

    Raises:
        InvalidRequestError: the directory has subdirectories.
    """
    if directory.directories:
        raise InvalidRequestError("a directory with subdirectories has to come with them")
    putter = service.put_multiple_start()
    try:
        await putter.put(directory)
        return await putter.close()
    finally:
        await putter.abort()
