"""The target of a copy: a store of this machine, or services (`services_target`)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from appliance.castore.size_dialect import SizeDialect
from appliance.copier.ingest import Staging
from appliance.errors import CorruptBlobError, PathInfoError, ReadOnlyStoreError
from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.services.addresses import ServiceAddresses
from appliance.store.batch import Batch
from appliance.store.leases import Lease, LeaseKind
from appliance.store.temp_directory import TempDirectory
from appliance.store.writer import AsyncStore


class CopyTarget(Protocol):
    """Commits batches; its methods may be called from several threads at the same time."""

    staging: Staging
    dialect: SizeDialect

    def known(self, path: StorePath) -> pathinfo_pb2.PathInfo | None:
        """Return the PathInfo of `path`, or None if the target does not have the path.

        Raises:
            StoreError: the target fails.
        """

    def known_among(self, paths: Sequence[StorePath]) -> dict[StorePath, pathinfo_pb2.PathInfo]:
        """Return the PathInfos of those of `paths` that the target has.

        Raises:
            StoreError: the target fails.
        """

    def new_batch(self) -> Batch:
        """Return an empty batch for `commit`."""

    def commit(self, batch: Batch) -> None:
        """Make all of `batch` durable and visible; takes over its files in any case.

        The batch is one of `new_batch`. It has blobs only, or one checked path with all its
        Directories.

        Raises:
            AlreadyExistsError, PathInfoError: the path is refused.
            StoreFullError, ServiceUnavailableError: the target takes no other path either.
            StoreError: it cannot be put.
        """

    def interrupt(self) -> None:
        """Cancel commits to remote services, which then fail with some error."""


class LocalCopyTarget:
    """A store of this machine, without an event loop."""

    def __init__(
        self, store: AsyncStore, staging: Staging, dialect: SizeDialect, lease: Lease
    ) -> None:
        self.staging = staging
        self.dialect = dialect
        self._store = store
        self._lease = lease

    def known(self, path: StorePath) -> pathinfo_pb2.PathInfo | None:
        """See `CopyTarget.known`."""
        return self.known_among([path]).get(path)

    def known_among(self, paths: Sequence[StorePath]) -> dict[StorePath, pathinfo_pb2.PathInfo]:
        """See `CopyTarget.known_among`."""
        self._lease.hold(path.basename().encode() for path in paths)
        with self._store.store.snapshot() as snapshot:
            encoded = {path: snapshot.path_info(path.digest) for path in paths}
        known = {}
        for path, found in encoded.items():
            if found is not None and _path_of(path, found) == path:
                known[path] = pathinfo_pb2.PathInfo.FromString(found)
        return known

    def new_batch(self) -> Batch:
        """See `CopyTarget.new_batch`."""
        return Batch()

    def commit(self, batch: Batch) -> None:
        """See `CopyTarget.commit`."""
        self._store.commit_and_wait(batch)

    def interrupt(self) -> None:
        """Do nothing: a commit takes no time to speak of."""


def _path_of(path: StorePath, encoded: bytes) -> StorePath:
    try:
        return read_path_info(encoded).path
    except PathInfoError as exc:
        raise CorruptBlobError(f"PathInfo {path.digest.hex()}: {exc}") from exc


@contextmanager
def open_target(
    addresses: ServiceAddresses, dialect: SizeDialect, stores: dict[Path, AsyncStore]
) -> Iterator[CopyTarget]:
    """Open the services for writing.

    A store that is opened here is added to `stores`, because it may be the source as well.

    Raises:
        StoreError: a local one cannot be opened.
    """
    from appliance.importer.staging import user_staging_directory

    store_path = addresses.one_store()
    with ExitStack() as stack:
        temp = stack.enter_context(TempDirectory(store_path or user_staging_directory()))
        staging = Staging(temp.path)
        if store_path is None:
            from appliance.copier.services_target import open_services_target

            yield stack.enter_context(open_services_target(addresses, staging, dialect, stores))
            return
        store = AsyncStore.open(store_path, create=True, or_readonly=True)
        stack.callback(store.close)
        if not store.store.is_writable:
            raise ReadOnlyStoreError(f"{store_path}: cannot be written by this user")
        # What is copied stays until all of the copy is there, and so does what need not be.
        lease = Lease.begin(store_path, LeaseKind.IMPORT)
        stack.callback(lease.close)
        stores[store_path] = store
        yield LocalCopyTarget(store, staging, dialect, lease)
