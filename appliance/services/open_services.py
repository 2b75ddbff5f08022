"""Opening services by their addresses, and a thread to use them from programs with another loop.

The library for object stores has threads of its own and is slow to load, so the modules that use it
are imported when such an address is opened, which is after all forks.

gRPC needs an asyncio event loop. Programs that have another loop, or none, run one in a
`LoopThread`, which also keeps network traffic from delaying what they do themselves.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from appliance.services.addresses import (
    GrpcAddress,
    LmdbAddress,
    ObjectStoreAddress,
    ServiceAddress,
    ServiceAddresses,
)
from appliance.services.contracts import BlobService, DirectoryService, PathInfoService, Services
from appliance.services.grpc_blobs import GrpcBlobService
from appliance.services.grpc_client import Peer
from appliance.services.grpc_directories import GrpcDirectoryService
from appliance.services.grpc_path_infos import GrpcPathInfoService
from appliance.services.lmdb_blobs import LmdbBlobService
from appliance.services.lmdb_directories import LmdbDirectoryService
from appliance.services.lmdb_path_infos import LmdbPathInfoService
from appliance.services.memory_services import (
    MemoryBlobService,
    MemoryDirectoryService,
    MemoryPathInfoService,
)
from appliance.store.writer import AsyncStore
from appliance.system import libc

if TYPE_CHECKING:
    from pathlib import Path

    from appliance.services.object_bucket import Bucket

T = TypeVar("T")

# For malloc, in bytes; the first is above the size of a message with content.
_MMAP_THRESHOLD: Final = 4 << 20
_TRIM_THRESHOLD: Final = 16 << 20
_NUM_ARENAS: Final = 2


# --- Opening ---


@asynccontextmanager
async def open_services(
    addresses: ServiceAddresses,
    *,
    is_readonly: bool = False,
    stores: "Mapping[Path, AsyncStore] | None" = None,
    may_replace_paths: bool = False,
    is_patient: bool = False,
) -> AsyncIterator[Services]:
    """Open the services, for the duration of the block; connect to peers when first needed.

    Only where an address says so, its peer is connected to at once.

    A store in LMDB that this process may not write to is opened for reading only, and refuses what
    is put.

    Args:
        addresses: where the services are.
        is_readonly: open stores for reading only. Without it, missing stores are created.
        stores: stores that this process has open already, by their resolved paths; they stay open.
        may_replace_paths: in services of this process, a PathInfo that is put replaces one that it
            contradicts.
        is_patient: wait for peers that have never answered, as for those that have (see `retry`).

    Raises:
        ConfigError: a certificate or key that an address names cannot be read.
        StoreError: a store cannot be opened.
        ServiceUnavailableError: a peer that is connected to at once cannot be reached.
    """
    keep_message_memory()
    async with AsyncExitStack() as stack:
        opener = _Opener(stack, is_readonly=is_readonly, stores=stores or {}, is_patient=is_patient)
        blobs = opener.blobs(addresses.blobs)
        directories = opener.directories(addresses.directories)
        path_infos = opener.path_infos(
            addresses.path_infos, blobs, directories, may_replace=may_replace_paths
        )
        await opener.connect()
        yield Services(blobs, directories, path_infos)


class _Opener:
    """Opens each store and each peer once: a process must not open an LMDB environment twice."""

    def __init__(
        self,
        stack: AsyncExitStack,
        *,
        is_readonly: bool,
        stores: "Mapping[Path, AsyncStore]",
        is_patient: bool,
    ) -> None:
        self._stack = stack
        self._is_readonly = is_readonly
        self._stores: dict[Path, AsyncStore] = dict(stores)
        self._peers: dict[GrpcAddress, Peer] = {}
        self._buckets: dict[ObjectStoreAddress, Bucket] = {}
        self._is_patient = is_patient

    async def connect(self) -> None:
        for address, peer in self._peers.items():
            if address.waits:
                await peer.connect()

    def blobs(self, address: ServiceAddress) -> BlobService:
        match address:
            case LmdbAddress():
                return LmdbBlobService(self._store(address))
            case GrpcAddress():
                return GrpcBlobService(self._peer(address))
            case ObjectStoreAddress():
                from appliance.services.object_blobs import ObjectBlobService

                return ObjectBlobService(self._bucket(address))
            case _:
                return MemoryBlobService()

    def directories(self, address: ServiceAddress) -> DirectoryService:
        match address:
            case LmdbAddress():
                return LmdbDirectoryService(self._store(address))
            case GrpcAddress():
                return GrpcDirectoryService(self._peer(address))
            case ObjectStoreAddress():
                from appliance.services.object_directories import ObjectDirectoryService

                return ObjectDirectoryService(self._bucket(address))
            case _:
                return MemoryDirectoryService()

    def path_infos(
        self,
        address: ServiceAddress,
        blobs: BlobService,
        directories: DirectoryService,
        *,
        may_replace: bool,
    ) -> PathInfoService:
        match address:
            case LmdbAddress():
                store = self._store(address)
                return LmdbPathInfoService(store, blobs, directories, may_replace=may_replace)
            case GrpcAddress():
                return GrpcPathInfoService(self._peer(address))
            case ObjectStoreAddress():
                from appliance.services.object_path_infos import ObjectPathInfoService

                bucket = self._bucket(address)
                return ObjectPathInfoService(bucket, blobs, directories, may_replace=may_replace)
            case _:
                return MemoryPathInfoService(blobs, directories, may_replace=may_replace)

    def _store(self, address: LmdbAddress) -> AsyncStore:
        path = address.path.resolve()
        if path not in self._stores:
            store = AsyncStore.open(
                path,
                is_readonly=self._is_readonly,
                create=not self._is_readonly,
                or_readonly=True,
            )
            self._stack.callback(store.close)
            self._stores[path] = store
        return self._stores[path]

    def _peer(self, address: GrpcAddress) -> Peer:
        if address not in self._peers:
            peer = Peer(address, is_patient=self._is_patient)
            self._stack.push_async_callback(peer.close)
            self._peers[address] = peer
        return self._peers[address]

    def _bucket(self, address: ObjectStoreAddress) -> "Bucket":
        if address not in self._buckets:
            from appliance.services.object_bucket import Bucket

            bucket = Bucket(address, is_patient=self._is_patient, is_readonly=self._is_readonly)
            self._stack.push_async_callback(bucket.close)
            self._buckets[address] = bucket
        return self._buckets[address]


def keep_message_memory() -> None:
    """Have malloc keep the memory of a message for the next one; may be called again.

    By default glibc returns the memory of each message to the system and faults it in again for the
    next one: a blob of 1 GiB caused 500,000 page faults and took half as long again. The memory
    that is kept is bounded.
    """
    libc.tune_malloc(
        mmap_threshold=_MMAP_THRESHOLD, trim_threshold=_TRIM_THRESHOLD, num_arenas=_NUM_ARENAS
    )


# --- An event loop in a thread ---


class LoopThread:
    """A thread called `name` that runs an event loop until `close`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    async def run(self, work: Coroutine[None, None, T]) -> T:
        """Run `work` on that loop and wait for it on the loop of the caller."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def run_and_wait(self, work: Coroutine[None, None, T]) -> T:
        """Run `work` on that loop and block the calling thread until it is done."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` on that loop; it handles its errors itself."""
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """End the loop and the thread; no work may be left."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
