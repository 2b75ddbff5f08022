"""The resolver on the event loop: wants of all workers, in batches, on one thread of its own.

LMDB write transactions belong to a thread, and indexing a directory of 50,000 entries must not keep
other guests' front-ends waiting; so the index has one thread, and what arrives while it works makes
up its next batch.
"""

import asyncio
import errno
import logging
import os
from concurrent.futures import ThreadPoolExecutor

from appliance.errors import ApplianceError
from appliance.index import images
from appliance.index.node_index import NodeIndex
from appliance.index.resolver import Resolver
from appliance.index.wants import DirectoryWanted, RootListWanted, RootNameWanted, Want
from appliance.protos import control_pb2 as pb
from appliance.store.store import BlobFile, Store

_LOG = logging.getLogger(__name__)


class ResolvingQueue:
    """Answers wants with errnos; equal wants that wait together are resolved once."""

    def __init__(self, store: Store, index: NodeIndex) -> None:
        self._store = store
        self._index = index
        self._resolver = Resolver(store, index)
        self._thread = ThreadPoolExecutor(1, "resolver")
        self._waiting: dict[Want, asyncio.Future[int]] = {}
        self._task: asyncio.Task[None] | None = None

    async def resolve(self, message: pb.Resolve) -> int:
        """Return 0 when the index has what `message` wants, else the errno to answer with."""
        want = _want(message)
        future = self._waiting.get(want)
        if future is None:
            future = self._waiting[want] = asyncio.get_running_loop().create_future()
            if self._task is None:
                self._task = asyncio.create_task(self._run())
        return await asyncio.shield(future)

    async def open_content(self, number: int) -> int | None:
        """Return a descriptor of the blob file of content `number`, or None if there is none.

        None, too, if the file does not have the size that readers are told.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._open_content, number)
        except ApplianceError as exc:
            _LOG.error("opening content %d: %s", number, exc)
            return None

    def _open_content(self, number: int) -> int | None:
        with self._index.read() as txn, self._store.read() as store_txn:
            content = self._index.record(txn, number)
            if content is None:
                return None
            size = images.size_of(content)
            blob = self._store.blob(store_txn, bytes(images.digest_of(content)))
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
        self._thread.shutdown(cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, {}
            try:
                errors = await loop.run_in_executor(
                    self._thread, self._resolver.resolve, list(batch)
                )
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
        case _:
            return RootListWanted()
