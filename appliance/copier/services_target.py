"""Services as the target of a copy.

The commits of several paths run at the same time, each with a sink of its own, since most of a
commit is waiting for answers. The sink sends many small blobs in one call where the service can.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Final

from appliance.castore.size_dialect import SizeDialect
from appliance.copier.ingest import Staging
from appliance.importer.services_sink import ContentBatch, ServicesSink
from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.services.addresses import ServiceAddresses
from appliance.services.contracts import Services
from appliance.services.open_services import LoopThread, open_services
from appliance.store.batch import Batch
from appliance.store.writer import AsyncStore

_LOOKUPS_AT_A_TIME: Final = 64


class ServicesCopyTarget:
    """Services that are open on the loop of `thread`."""

    def __init__(
        self, thread: LoopThread, services: Services, staging: Staging, dialect: SizeDialect
    ) -> None:
        self.staging = staging
        self.dialect = dialect
        self._thread: Final = thread
        self._services = services
        # Sinks that are committing: one for each commit, as a batch has all that it refers to.
        self._sinks: set[ServicesSink] = set()
        self._is_interrupted = False

    def known(self, path: StorePath) -> pathinfo_pb2.PathInfo | None:
        """See `CopyTarget.known`."""
        return self.known_among([path]).get(path)

    def known_among(self, paths: Sequence[StorePath]) -> dict[StorePath, pathinfo_pb2.PathInfo]:
        """See `CopyTarget.known_among`."""
        encoded = self._thread.run_and_wait(self._path_infos(paths))
        return {
            path: pathinfo_pb2.PathInfo.FromString(found)
            for path, found in zip(paths, encoded, strict=True)
            if found is not None and read_path_info(found).path == path
        }

    async def _path_infos(self, paths: Sequence[StorePath]) -> list[bytes | None]:
        places = asyncio.Semaphore(_LOOKUPS_AT_A_TIME)

        async def get(path: StorePath) -> bytes | None:
            async with places:
                return await self._services.path_infos.get(path.digest)

        return await asyncio.gather(*map(get, paths))

    def new_batch(self) -> Batch:
        """See `CopyTarget.new_batch`."""
        return ContentBatch()

    def commit(self, batch: Batch) -> None:
        """See `CopyTarget.commit`."""
        sink = ServicesSink(self._thread, self._services, self.dialect)
        self._sinks.add(sink)
        if self._is_interrupted:
            sink.interrupt()
        try:
            for end in sink.commit(batch):
                if end.refusal is not None:
                    raise end.refusal
        finally:
            self._sinks.discard(sink)

    def interrupt(self) -> None:
        """See `CopyTarget.interrupt`."""
        self._is_interrupted = True
        for sink in self._sinks.copy():
            sink.interrupt()


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
