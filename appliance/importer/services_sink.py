"""The sink for imports into services: sends blobs first, then directories, then PathInfos."""

import asyncio
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Final

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import (
    ApplianceError,
    ServiceUnavailableError,
    StoreError,
    StoreFullError,
)
from appliance.importer.committer import PathEnd
from appliance.nix.path_info import read_path_info
from appliance.services.addresses import ServiceAddresses
from appliance.services.contracts import Buffer, Services
from appliance.services.open_services import LoopThread, open_services
from appliance.store.batch import Batch, StagedFile

# Concurrent uploads. Latency dominates the time of small blobs; large ones take memory.
_SMALL_UPLOADS_MAX: Final = 64
_LARGE_UPLOADS_MAX: Final = 8
_PIECE_SIZE: Final = 1 << 20
# After this many answers in a row that a blob is not there, the service is asked for only one in
# `_ASK_ONE_IN` small blobs, and the others are sent without asking.
_MISSING_IN_A_ROW: Final = 32
_ASK_ONE_IN: Final = 16
# Part of the error message of Tvix and Snix for a directory in the other dialect.
_WRONG_SIZE: Final = "wrong size"


@contextmanager
def open_sink(addresses: ServiceAddresses, dialect: SizeDialect) -> Iterator["ServicesSink"]:
    """Open the services in a thread, and close them at the end of the block.

    Args:
        addresses: of the services.
        dialect: how the directories of the import count their entries.

    Raises:
        StoreError: a local store among the services cannot be opened.
    """
    thread = LoopThread("services")
    try:
        stack = AsyncExitStack()
        services = thread.run_and_wait(stack.enter_async_context(open_services(addresses)))
        try:
            yield ServicesSink(thread, services, dialect)
        finally:
            thread.run_and_wait(stack.aclose())
    finally:
        thread.close()


class ContentBatch(Batch):
    """A batch whose `blobs` are contents; those of its base class are records of a store."""

    def add_blob(self, digest: bytes, content: bytes | bytearray | memoryview) -> None:
        """Add a blob; the content is copied."""
        self.blobs[digest] = bytes(content)
        self.size_bytes += len(content)


class ServicesSink:
    """Sends batches to services; the `Sink` of a `Committer`.

    A directory can be sent only together with all directories below it, but a long import has them
    in different batches. So directories are kept here until the path they belong to is complete.
    """

    def __init__(self, thread: LoopThread, services: Services, dialect: SizeDialect) -> None:
        self._thread = thread
        self._services = services
        self._dialect = dialect
        self._directories: dict[Digest, bytes] = {}
        # Directories sent in this batch. They are dropped only at its end, because later paths of
        # the batch may contain some of them.
        self._sent: set[Digest] = set()
        self._presence = _PresenceChecks()
        self._task: asyncio.Task[None] | None = None
        self._is_interrupted = False

    def new_batch(self) -> ContentBatch:
        """See `Sink.new_batch`."""
        return ContentBatch()

    def commit(self, batch: Batch) -> Iterator[PathEnd]:
        """See `Sink.commit`."""
        try:
            self._thread.run_and_wait(self._begun(self._put_objects(batch)))
            for digest, path_info in batch.path_infos.items():
                try:
                    self._thread.run_and_wait(self._begun(self._put_path(path_info)))
                except (ServiceUnavailableError, StoreFullError):
                    raise  # the other paths would fail for the same reason
                except ApplianceError as exc:
                    yield PathEnd(digest, exc)
                else:
                    yield PathEnd(digest, None)
            for sent in self._sent:
                self._directories.pop(sent, None)
            self._sent.clear()
        finally:
            batch.discard()

    def interrupt(self) -> None:
        """See `Sink.interrupt`."""
        self._thread.run_and_wait(self._cancel())

    async def _cancel(self) -> None:
        self._is_interrupted = True
        if self._task is not None:
            self._task.cancel()

    async def _begun(self, work: Coroutine[None, None, None]) -> None:
        self._task = asyncio.current_task()
        if self._is_interrupted:
            work.close()
            raise asyncio.CancelledError
        await work

    async def _put_objects(self, batch: Batch) -> None:
        await self._put_blobs(batch)
        self._directories.update(
            (Digest(digest), encoded) for digest, encoded in batch.directories.items()
        )

    async def _put_path(self, path_info: bytes) -> None:
        node = read_path_info(path_info).node
        if isinstance(node, DirectoryNode):
            try:
                self._sent |= await self._put_closure(node.digest)
            except ApplianceError as exc:
                if _WRONG_SIZE not in str(exc):
                    raise
                other = self._dialect.other().option()
                raise StoreError(
                    f"{exc}; it takes what import --directory-sizes {other} writes"
                ) from exc
        await self._services.path_infos.put(path_info)

    async def _put_blobs(self, batch: Batch) -> None:
        small = asyncio.Semaphore(_SMALL_UPLOADS_MAX)
        large = asyncio.Semaphore(_LARGE_UPLOADS_MAX)

        async def put_small(digest: bytes, content: bytes | memoryview) -> None:
            async with small:
                if not self._presence.are_worthwhile() or not await self._has(Digest(digest)):
                    await self._put_blob(Digest(digest), [content])

        async def put_large(digest: bytes, file: StagedFile) -> None:
            async with large:
                if not await self._has(Digest(digest)):
                    await self._put_blob(Digest(digest), _pieces(file))

        try:
            async with asyncio.TaskGroup() as group:
                for digest, content in batch.blobs.items():
                    group.create_task(put_small(digest, content))
                for digest, file in batch.files.items():
                    group.create_task(put_large(digest, file))
        except ExceptionGroup as exc:
            raise exc.exceptions[0] from None

    async def _has(self, digest: Digest) -> bool:
        is_there = await self._services.blobs.has(digest)
        self._presence.learn(is_there=is_there)
        return is_there

    async def _put_blob(self, digest: Digest, pieces: Iterable[Buffer]) -> None:
        writer = await self._services.blobs.open_write()
        try:
            for piece in pieces:
                await writer.write(piece)
        except BaseException:
            await writer.abort()
            raise
        kept = await writer.close()
        if kept != digest:
            raise StoreError(f"blob {digest}: was read again, and had digest {kept}")

    async def _put_closure(self, root: Digest) -> set[Digest]:
        putter = self._services.directories.put_multiple_start()
        sent: set[Digest] = set()
        try:
            # A directory is on the stack until those below it have been sent.
            stack = [await self._directory(root)]
            while stack:
                unsent = {node.digest for node in stack[-1].directories} - sent
                if unsent:
                    stack += [await self._directory(digest) for digest in unsent]
                    continue
                directory = stack.pop()
                if directory.digest() not in sent:
                    sent.add(directory.digest())
                    await putter.put(directory)
        except BaseException:
            await putter.abort()
            raise
        await putter.close()
        return sent

    async def _directory(self, digest: Digest) -> Directory:
        encoded = self._directories.get(digest)
        if encoded is not None:
            return Directory.from_bytes(encoded)
        # It was sent with a path of an earlier batch, or is the empty directory, which need not be
        # stored anywhere.
        directory = await self._services.directories.get(digest)
        if directory is None:
            raise StoreError(f"directory {digest}: was sent, but the service does not have it")
        return directory


class _PresenceChecks:
    """Decides whether to ask if a small blob is there; asking costs about as much as sending it."""

    def __init__(self) -> None:
        self._num_missing = 0
        self._num_unasked = 0

    def are_worthwhile(self) -> bool:
        """Return whether to ask for the next blob, judging by the answers so far."""
        if self._num_missing < _MISSING_IN_A_ROW:
            return True
        self._num_unasked = (self._num_unasked + 1) % _ASK_ONE_IN
        return self._num_unasked == 0

    def learn(self, *, is_there: bool) -> None:
        """Record an answer."""
        self._num_missing = 0 if is_there else self._num_missing + 1


def _pieces(file: StagedFile) -> Iterator[bytes]:
    with Path(file.path).open("rb", buffering=0) as content:
        while piece := content.read(_PIECE_SIZE):
            yield piece
