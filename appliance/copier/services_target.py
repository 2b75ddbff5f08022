"""Services as the target of a copy.

Nearly all files of a closure are small, and a call for each of them costs a millisecond of either
side's processor: 13 MB/s. So where the blob service takes many at a time, they are sent that way,
and only what it lacks. The commits of several paths run at the same time, each with a sink of its
own, since most of a commit is waiting for answers.
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Final, TypeVar

from appliance.castore.digest import Digest
from appliance.castore.size_dialect import SizeDialect
from appliance.copier.ingest import Staging
from appliance.importer.services_sink import ServicesSink
from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.services.addresses import ServiceAddresses
from appliance.services.contracts import Services, TakesSmallBlobs
from appliance.services.open_services import LoopThread, open_services
from appliance.store.batch import Batch
from appliance.store.writer import AsyncStore

T = TypeVar("T")


class ServicesCopyTarget:
    """Services that are open on the loop of `thread`."""

    def __init__(
        self, thread: LoopThread, services: Services, staging: Staging, dialect: SizeDialect
    ) -> None:
        self.staging = staging
        self.dialect = dialect
        self._thread: Final = thread
        self._services = services
        self._own = threading.local()
        self._sinks: list[ServicesSink] = []
        self._sinks_lock = threading.Lock()
        # Those that put small blobs; used on the loop only.
        self._tasks: set[asyncio.Task[object] | None] = set()

    def known(self, path: StorePath) -> pathinfo_pb2.PathInfo | None:
        """See `CopyTarget.known`."""
        encoded = self._thread.run_and_wait(self._services.path_infos.get(path.digest))
        if encoded is None or read_path_info(encoded).path != path:
            return None
        return pathinfo_pb2.PathInfo.FromString(encoded)

    def new_batch(self) -> Batch:
        """See `CopyTarget.new_batch`."""
        return self._sink().new_batch()

    def commit(self, batch: Batch) -> None:
        """See `CopyTarget.commit`."""
        try:
            self._put_small(batch)
        except BaseException:
            batch.discard()
            raise
        for end in self._sink().commit(batch):
            if end.refusal is not None:
                raise end.refusal

    def interrupt(self) -> None:
        """See `CopyTarget.interrupt`."""
        with self._sinks_lock:
            sinks = list(self._sinks)
        for sink in sinks:
            sink.interrupt()
        self._thread.run_and_wait(self._cancel())

    def _put_small(self, batch: Batch) -> None:
        """Put the small blobs of the batch, and take them out of it, if that is possible."""
        blobs = self._services.blobs
        if not batch.blobs or not isinstance(blobs, TakesSmallBlobs):
            return
        contents = {Digest(digest): bytes(content) for digest, content in batch.blobs.items()}
        if self._thread.run_and_wait(self._cancellable(blobs.put_small(contents))):
            batch.blobs.clear()

    async def _cancellable(self, work: Coroutine[None, None, T]) -> T:
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            return await work
        finally:
            self._tasks.discard(task)

    async def _cancel(self) -> None:
        for task in self._tasks:
            if task is not None:
                task.cancel()

    def _sink(self) -> ServicesSink:
        # A sink commits one batch after another, so each thread has one.
        sink: ServicesSink | None = getattr(self._own, "sink", None)
        if sink is None:
            sink = self._own.sink = ServicesSink(self._thread, self._services, self.dialect)
            with self._sinks_lock:
                self._sinks.append(sink)
        return sink


@contextmanager
def open_services_target(
    addresses: ServiceAddresses,
    staging: Staging,
    dialect: SizeDialect,
    stores: dict[Path, AsyncStore],
) -> Iterator[ServicesCopyTarget]:
    """Open services for writing, on a loop in a thread of their own; see `open_target`."""
    with ExitStack() as stack:
        thread = LoopThread("target")
        stack.callback(thread.close)
        services = open_in_thread(thread, addresses, stores, stack, is_readonly=False)
        yield ServicesCopyTarget(thread, services, staging, dialect)


def open_in_thread(
    thread: LoopThread,
    addresses: ServiceAddresses,
    stores: dict[Path, AsyncStore],
    stack: ExitStack,
    *,
    is_readonly: bool,
) -> Services:
    """Open services on the loop of `thread`, until `stack` ends.

    Raises:
        StoreError: a local one cannot be opened.
    """
    opened = AsyncExitStack()
    stack.callback(lambda: thread.run_and_wait(opened.aclose()))
    return thread.run_and_wait(
        opened.enter_async_context(open_services(addresses, is_readonly=is_readonly, stores=stores))
    )
