"""The resolver on the event loop: wants of all workers, in batches, on one thread of its own.

LMDB write transactions belong to a thread, and indexing a directory of 50,000 entries must not keep
other guests' front-ends waiting; so the index has one thread, and what arrives while it works makes
up its next batch.
"""

import asyncio
import errno
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from appliance.errors import ApplianceError
from appliance.index import images
from appliance.index.node_index import NodeIndex
from appliance.index.resolver import Resolver
from appliance.index.wants import BlobWanted, DirectoryWanted, RootListWanted, RootNameWanted, Want
from appliance.protos import control_pb2 as pb
from appliance.store.store import BlobFile, Store

if TYPE_CHECKING:
    from appliance.supervisor.remote import Remote  # loads gRPC, which one local store needs not

_LOG = logging.getLogger(__name__)


class ResolvingQueue:
    """Answers wants with errnos; equal wants that wait together are resolved once.

    Args:
        store: where workers read blobs.
        index: the node index.
        resolver: of what is in `store` alone, or of what may be elsewhere.
    """

    def __init__(self, store: Store, index: NodeIndex, resolver: "Resolver | Remote") -> None:
        self._store = store
        self._index = index
        self._resolver = resolver
        self._thread = ThreadPoolExecutor(1, "resolver")
        self._waiting: dict[Want, asyncio.Future[int]] = {}
        self._task: asyncio.Task[None] | None = None
        self._remote_tasks: set[asyncio.Task[None]] = set()

    async def resolve(self, message: pb.Resolve) -> int:
        """Return 0 when the index has what `message` wants, else the errno to answer with."""
        return await self._resolve(_want(message))

    def blobs_used(self, digests: Sequence[bytes]) -> None:
        """Note that a worker read blobs from the cache."""
        if not isinstance(self._resolver, Resolver):
            self._resolver.blobs_used(digests)

    async def _resolve(self, want: Want) -> int:
        future = self._waiting.get(want)
        if future is None:
            future = self._waiting[want] = asyncio.get_running_loop().create_future()
            if not isinstance(self._resolver, Resolver):
                task = asyncio.create_task(self._run_remote(self._resolver, want))
                self._remote_tasks.add(task)
                task.add_done_callback(self._remote_tasks.discard)
            elif self._task is None:
                self._task = asyncio.create_task(self._run(self._resolver))
        return await asyncio.shield(future)

    async def open_content(self, number: int) -> int | None:
        """Return a descriptor of the blob file of content `number`, or None if there is none.

        None, too, if the file does not have the size that readers are told.
        """
        loop = asyncio.get_running_loop()
        try:
            blob = await loop.run_in_executor(self._thread, self._blob_of, number)
            if blob is not None and self._has_cache():
                await self._resolve(blob)
            return await loop.run_in_executor(self._thread, self._open_blob, blob)
        except ApplianceError as exc:
            _LOG.error("opening content %d: %s", number, exc)
            return None

    def _has_cache(self) -> bool:
        return not isinstance(self._resolver, Resolver) and self._resolver.has_remote_blobs

    def _blob_of(self, number: int) -> BlobWanted | None:
        with self._index.read() as txn:
            content = self._index.record(txn, number)
            if content is None:
                return None
            return BlobWanted(bytes(images.digest_of(content)), images.size_of(content))

    def _open_blob(self, wanted: BlobWanted | None) -> int | None:
        if wanted is None:
            return None
        size = wanted.size
        with self._store.read() as txn:
            blob = self._store.blob(txn, wanted.digest)
        if not isinstance(blob, BlobFile) or blob.size != size:
            return None
        try:
            fd = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None  # a worker says so when it is read
        if os.fstat(fd).st_size == size:
            return fd
        os.close(fd)
        return None

    async def reap_readers(self) -> None:
        """Free what a killed worker held of the envs, or their pages could not be reused."""
        loop = asyncio.get_running_loop()
        for env in (self._store.env, self._index):
            await loop.run_in_executor(self._thread, env.reap_readers)

    def close(self) -> None:
        """Wait for the batch in progress and end the thread."""
        for task in self._remote_tasks:
            task.cancel()
        self._thread.shutdown(cancel_futures=True)

    async def _run_remote(self, remote: "Remote", want: Want) -> None:
        error = await remote.resolve(want)
        self._waiting.pop(want).set_result(error)

    async def _run(self, resolver: Resolver) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, {}
            try:
                errors = await loop.run_in_executor(self._thread, resolver.resolve, list(batch))
            except Exception:  # noqa: BLE001 - whatever it was, the guests must get their answers
                _LOG.exception("resolving %d wants failed", len(batch))
                errors = [errno.EIO] * len(batch)
            for future, error in zip(batch.values(), errors, strict=True):
                future.set_result(error)
        self._task = None


def _want(message: pb.Resolve) -> Want:
    match message.WhichOneof("want"):
        case "directory":
            return DirectoryWanted(message.directory)
        case "root_name":
            return RootNameWanted(message.root_name)
        case "blob":
            return BlobWanted(message.blob.digest, message.blob.size)
        case _:
            return RootListWanted()
