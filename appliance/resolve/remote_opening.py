"""Opening services that may be anywhere, and the store that workers read of them."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from appliance.resolve.remote import ContentLoader, RemoteResolver
from appliance.services.addresses import LmdbAddress, ServiceAddresses
from appliance.services.fetch import BlobFetcher
from appliance.services.open_services import LoopThread, open_services
from appliance.store.blob_cache import BlobCache
from appliance.store.writer import AsyncStore

# The cache, below the state directory.
_CACHE_DIRECTORY: Final = "cache"


@asynccontextmanager
async def open_remote(
    addresses: ServiceAddresses, state_dir: Path, cache_bytes: int
) -> AsyncIterator[RemoteResolver]:
    """Open the services and the store that workers read; connect to peers when first needed.

    Raises:
        StoreError: a store or the cache cannot be opened.
    """
    async with AsyncExitStack() as stack:
        stores = {}
        store = cache = None
        if isinstance(addresses.blobs, LmdbAddress):
            local = AsyncStore.open(addresses.blobs.path, create=True, or_readonly=True)
            stack.callback(local.close)
            stores[addresses.blobs.path.resolve()] = local
            # A store that cannot take images of Directories is copied into the cache instead.
            store = local.store if local.store.is_writable else None
        if store is None:
            cache = BlobCache(state_dir / _CACHE_DIRECTORY, cache_bytes)
            stack.callback(cache.close)
            store = cache.store
        thread = LoopThread("remote")
        stack.callback(thread.close)
        inner = AsyncExitStack()

        async def close() -> None:
            await thread.run(inner.aclose())

        stack.push_async_callback(close)

        async def start() -> ContentLoader:
            services = await inner.enter_async_context(
                open_services(addresses, stores=stores, is_patient=True)
            )
            fetcher = None
            if cache is not None:
                fetcher = BlobFetcher(services.blobs, cache)
                inner.push_async_callback(fetcher.close)
            loader = ContentLoader(services, store, cache, fetcher, addresses)
            inner.push_async_callback(loader.close)
            return loader

        loader = await thread.run(start())
        yield RemoteResolver(thread, loader, store, has_cache=cache is not None)
