"""The sink for imports into services: sends blobs first, then directories, then PathInfos."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Final, TypeVar

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
from appliance.services.contracts import Services
from appliance.services.many_blobs import missing_of, put_missing, put_one
from appliance.services.open_services import LoopThread, open_services
from appliance.services.retry import Patience, persevere
from appliance.store.batch import Batch, StagedFile

T = TypeVar("T")

# Large blobs under way at a time; each takes memory.
_LARGE_UPLOADS_MAX: Final = 8
# Paths whose directories are under way at a time.
_CLOSURES_MAX: Final = 8
_PIECE_SIZE: Final = 1 << 20
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
        # The closures of the paths of this batch, by their PathInfos.
        self._closures: dict[bytes, asyncio.Task[None]] = {}
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
            self._thread.run_and_wait(self._end_closures())
            batch.discard()

    def interrupt(self) -> None:
        """See `Sink.interrupt`."""
        self._thread.run_and_wait(self._cancel())

    async def _cancel(self) -> None:
        self._is_interrupted = True
        if self._task is not None:
            self._task.cancel()

    async def _end_closures(self) -> None:
        # Those that are left after an error.
        for task in self._closures.values():
            task.cancel()
        await asyncio.gather(*self._closures.values(), return_exceptions=True)
        self._closures.clear()

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
        places = asyncio.Semaphore(_CLOSURES_MAX)
        for path_info in batch.path_infos.values():
            node = read_path_info(path_info).node
            if isinstance(node, DirectoryNode):
                work = self._put_closure_in(places, node.digest)
                self._closures[path_info] = asyncio.create_task(work)
        if self._closures:
            # Errors are raised for each path in turn.
            await asyncio.wait(self._closures.values())

    async def _put_closure_in(self, places: asyncio.Semaphore, root: Digest) -> None:
        async with places:
            try:
                self._sent |= await _repeated(lambda: self._put_closure(root))
            except ApplianceError as exc:
                if _WRONG_SIZE not in str(exc):
                    raise
                other = self._dialect.other().option()
                raise StoreError(
                    f"{exc}; it takes what import --directory-sizes {other} writes"
                ) from exc

    async def _put_path(self, path_info: bytes) -> None:
        closure = self._closures.pop(path_info, None)
        if closure is not None:
            await closure
        # A copy has put what this refers to before, or found it there; an import refers to nothing.
        await self._services.path_infos.put(path_info, needs_references=True)

    async def _put_blobs(self, batch: Batch) -> None:
        blobs = self._services.blobs
        large = asyncio.Semaphore(_LARGE_UPLOADS_MAX)

        async def put_large(digest: Digest, file: StagedFile) -> None:
            async with large:
                await _repeated(lambda: put_one(blobs, digest, _pieces(file)))

        small = [(Digest(digest), content) for digest, content in batch.blobs.items()]
        files = [Digest(digest) for digest in batch.files]
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(put_missing(blobs, small))
                for digest in await missing_of(blobs, files):
                    group.create_task(put_large(digest, batch.files[digest]))
        except ExceptionGroup as exc:
            raise exc.exceptions[0] from None

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


async def _repeated(work: Callable[[], Awaitable[T]]) -> T:
    # What is sent as a stream cannot be repeated by the client of the service, as it is not kept.
    return await persevere(work, Patience(starts_at_failure=True))


def _pieces(file: StagedFile) -> Iterator[bytes]:
    with Path(file.path).open("rb", buffering=0) as content:
        while piece := content.read(_PIECE_SIZE):
            yield piece
