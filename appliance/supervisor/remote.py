"""Services other than one local store: a thread with an event loop of its own talks to them.

What the network brings, and its hashing, must not keep the front-ends waiting.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from appliance.castore.digest import Digest
from appliance.castore.nodes import Node
from appliance.errors import StoreError
from appliance.rpc.loop_thread import LoopThread
from appliance.rpc.open_services import open_services
from appliance.session.wants import BlobWanted
from appliance.store.async_store import AsyncStore
from appliance.store.blob_cache import BlobCache
from appliance.store.blob_fetcher import BlobFetcher
from appliance.store.service_uri import LmdbAddress, ServiceAddresses
from appliance.store.store import Store
from appliance.supervisor.local_resolver import open_blob
from appliance.supervisor.remote_resolver import RemoteResolver
from appliance.supervisor.resolving import RootListing

_LOG: Final = logging.getLogger(__name__)
_CACHE_DIRECTORY: Final = "cache"


class Remote:
    """A `Resolver` called on any loop, which works on that of `thread`.

    `store` is where workers read; it is a cache if `has_cache`.
    """

    def __init__(
        self, thread: LoopThread, resolver: RemoteResolver, store: Store, *, has_cache: bool
    ) -> None:
        self._thread = thread
        self._resolver = resolver
        self.store = store
        self.has_cache = has_cache

    async def root_node(self, name: bytes) -> Node:
        """See `Resolver.root_node`."""
        return await self._thread.run(self._resolver.root_node(name))

    async def root_listing(self, generation: int) -> RootListing:  # noqa: ARG002 - there is none
        """See `Resolver.root_listing`."""
        return await self._thread.run(self._resolver.root_listing())

    async def directory(self, digest: bytes) -> None:
        """See `Resolver.directory`."""
        await self._thread.run(self._resolver.directory(Digest(digest)))

    async def blob(self, want: BlobWanted) -> None:
        """See `Resolver.blob`."""
        await self._thread.run(self._resolver.blob(Digest(want.digest), want.size))

    async def open_blob(self, want: BlobWanted) -> int | None:
        """See `Resolver.open_blob`."""
        if self.has_cache:
            await self.blob(want)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, open_blob, self.store, want)

    def used(self, keys: Sequence[bytes]) -> None:
        """See `Resolver.used`."""

        async def note() -> None:
            try:
                await self._resolver.used(keys)
            except StoreError as exc:
                _LOG.error("%s", exc)

        self._thread.spawn(note())

    async def reap_readers(self) -> None:
        """See `Resolver.reap_readers`."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.store.env.reap_readers)

    async def close(self) -> None:
        """Do nothing: `open_remote` ends what it began."""


@asynccontextmanager
async def open_remote(
    addresses: ServiceAddresses, state_dir: Path, cache_bytes: int
) -> AsyncIterator[Remote]:
    """Open the services; peers are connected to when they are first needed.

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
            # One that takes no images of directories from elsewhere is copied from.
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

        async def start() -> RemoteResolver:
            services = await inner.enter_async_context(open_services(addresses, stores=stores))
            fetcher = None
            if cache is not None:
                fetcher = BlobFetcher(services.blobs, cache)
                inner.push_async_callback(fetcher.close)
            resolver = RemoteResolver(services, store, cache, fetcher)
            inner.push_async_callback(resolver.close)
            return resolver

        resolver = await thread.run(start())
        yield Remote(thread, resolver, store, has_cache=cache is not None)
