"""The target of a copy: a store of this machine, or services."""

import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Final

from appliance.castore.size_dialect import SizeDialect
from appliance.copier.ingest import Staging
from appliance.errors import ReadOnlyStoreError
from appliance.importer.services_sink import ServicesSink
from appliance.importer.staging import user_staging_directory
from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.services.addresses import ServiceAddresses
from appliance.services.contracts import Services
from appliance.services.open_services import LoopThread, open_services
from appliance.store.batch import Batch
from appliance.store.temp_directory import TempDirectory
from appliance.store.writer import AsyncStore


class CopyTarget:
    """Commits batches; its methods may be called from several threads at the same time."""

    def __init__(
        self,
        thread: LoopThread,
        services: Services,
        store: AsyncStore | None,
        staging: Staging,
        dialect: SizeDialect,
    ) -> None:
        self.thread: Final = thread
        self.staging = staging
        self.dialect = dialect
        self._services = services
        self._store = store
        self._sink = ServicesSink(thread, services, dialect)
        self._sink_lock = threading.Lock()

    def known(self, path: StorePath) -> pathinfo_pb2.PathInfo | None:
        """Return the PathInfo of `path`, or None if the target does not have the path.

        Raises:
            StoreError: the target fails.
        """
        encoded = self.thread.run_and_wait(self._services.path_infos.get(path.digest))
        if encoded is None or read_path_info(encoded).path != path:
            return None
        return pathinfo_pb2.PathInfo.FromString(encoded)

    def new_batch(self) -> Batch:
        """Return an empty batch for `commit`."""
        return self._sink.new_batch() if self._store is None else Batch()

    def commit(self, batch: Batch) -> None:
        """Make all of `batch` durable and visible; takes over its files in any case.

        The batch is one of `new_batch`. It has blobs only, or one checked path with all its
        Directories.

        Raises:
            AlreadyExistsError, PathInfoError: the path is refused.
            StoreFullError, ServiceUnavailableError: the target takes no other path either.
            StoreError: it cannot be put.
        """
        if self._store is not None:
            self.thread.run_and_wait(self._store.commit(batch))
            return
        with self._sink_lock:
            for end in self._sink.commit(batch):
                if end.refusal is not None:
                    raise end.refusal

    def interrupt(self) -> None:
        """Cancel a commit to remote services, which then fails with some error."""
        if self._store is None:
            self._sink.interrupt()


@contextmanager
def open_target(
    addresses: ServiceAddresses, dialect: SizeDialect, stores: dict[Path, AsyncStore]
) -> Iterator[CopyTarget]:
    """Open the services for writing, in a thread of their own.

    A store that is opened here is added to `stores`, because it may be the source as well.

    Raises:
        StoreError: a local one cannot be opened.
    """
    store_path = addresses.one_store()
    with ExitStack() as stack:
        temp = stack.enter_context(TempDirectory(store_path or user_staging_directory()))
        thread = LoopThread("services")
        stack.callback(thread.close)
        store = None
        if store_path is not None:
            store = AsyncStore.open(store_path, create=True, or_readonly=True)
            stack.callback(store.close)
            if not store.store.is_writable:
                raise ReadOnlyStoreError(f"{store_path}: cannot be written by this user")
            stores[store_path] = store
        services = open_in_thread(thread, addresses, stores, stack, is_readonly=False)
        yield CopyTarget(thread, services, store, Staging(temp.path), dialect)


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
