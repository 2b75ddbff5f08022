"""Services other than one local store: a thread with an event loop of its own talks to them.

What the network brings, and its hashing, must not keep the front-ends waiting.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from appliance.index.node_index import NodeIndex
from appliance.index.wants import Want
from appliance.rpc.loop_thread import LoopThread
from appliance.rpc.open_services import open_services
from appliance.store.async_store import AsyncStore
from appliance.store.blob_cache import BlobCache
from appliance.store.blob_fetcher import BlobFetcher
from appliance.store.service_uri import LmdbAddress, ServiceAddresses
from appliance.store.store import Store
from appliance.supervisor.remote_resolver import RemoteResolver

_CACHE_DIRECTORY: Final = "cache"


class Remote:
    """What a supervisor has instead of a store: called on any loop, works on that of `thread`.

    `store` is where workers read blobs; it is a cache if `has_remote_blobs`.
    """

    def __init__(
        self, thread: LoopThread, resolver: RemoteResolver, store: Store, *, has_remote_blobs: bool
    ) -> None:
        self._thread = thread
        self._resolver = resolver
        self.store = store
        self.has_remote_blobs = has_remote_blobs

    async def resolve(self, want: Want) -> int:
        """See `RemoteResolver.resolve`."""
        return await self._thread.run(self._resolver.resolve(want))

    def blobs_used(self, digests: Sequence[bytes]) -> None:
        """See `RemoteResolver.blobs_used`."""
        self._thread.spawn(self._resolver.blobs_used(digests))


@asynccontextmanager
async def open_remote(
    addresses: ServiceAddresses, index: NodeIndex, state_dir: Path, cache_bytes: int
) -> AsyncIterator[Remote]:
    """Open the services; peers are connected to when they are first needed.

    Raises:
        StoreError: a store or the cache cannot be opened.
    """
    async with AsyncExitStack() as stack:
        stores = {}
        cache = None
        if isinstance(addresses.blobs, LmdbAddress):
            local = AsyncStore.open(addresses.blobs.path, create=True, or_readonly=True)
            stack.callback(local.close)
            stores[addresses.blobs.path.resolve()] = local
            store = local.store
        else:
            cache = BlobCache(state_dir / _CACHE_DIRECTORY, cache_bytes)
            stack.callback(cache.close)
            store = cache.store
        thread = LoopThread("remote")
        stack.callback(thread.close)
        inner = AsyncExitStack()

        async def close() -> None:
            await thread.run(inner.aclose())

        stack.push_async_callback(close)

        async def start() -> RemoteResolver:
            services = await inner.enter_async_context(open_services(addresses, stores=stores))
            fetcher = None
            if cache is not None:
                fetcher = BlobFetcher(services.blobs, cache)
                inner.push_async_callback(fetcher.close)
            identity = repr(addresses.path_infos).encode()
            resolver = RemoteResolver(services, fetcher, index, identity)
            inner.push_async_callback(resolver.close)
            return resolver

        resolver = await thread.run(start())
        yield Remote(thread, resolver, store, has_remote_blobs=cache is not None)
