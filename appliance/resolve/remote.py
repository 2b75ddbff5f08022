"""The resolver for services that may be anywhere: every want on its own, none waits for another.

It lives on the event loop of its own thread (see `remote`).
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from errno import ENOENT
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Final, TypeVar

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, Node
from appliance.errors import ContentMissingError, ServiceUnavailableError, StoreError
from appliance.resolve.local import listed_node, open_blob, path_digest, root_node
from appliance.resolve.prefetch import SmallFiles
from appliance.resolve.resolver import RootListing, SingleFlight
from appliance.services.addresses import LmdbAddress, ServiceAddresses
from appliance.services.contracts import Services
from appliance.services.fetch import BackgroundWork, BlobFetcher
from appliance.services.open_services import LoopThread, open_services
from appliance.session.wants import BlobWanted
from appliance.store.blob_cache import BlobCache
from appliance.store.store import Store
from appliance.store.writer import AsyncStore

T = TypeVar("T")

# For one Directory or PathInfo, or the next PathInfo of a listing.
_ANSWER_TIMEOUT_S: Final = 30.0
_FETCHES_MAX: Final = 64
# How long a listing of the root counts as new; longer if it takes long, so that at most a tenth of
# the time is spent on it.
_FRESH_S: Final = 5.0
_FRESH_FACTOR: Final = 10
# Whoever lists it again waits no longer for a new listing.
_LISTING_WAIT_S: Final = 1.0
# Names that a service did not have are not asked of it again for a moment.
_ABSENT_S: Final = 1.0
_ABSENT_MAX: Final = 4096
# Directories that come with one that is entered, at any depth below it and beside it: a walk that
# enters it goes on to them.
_BELOW_MAX: Final = 32
_BESIDE_MAX: Final = 16
# Remembered, together; and forgotten at once.
_DIGESTS_MAX: Final = 1 << 15


class RemoteResolver:
    """Finds paths in services, and puts images and blobs where workers read.

    See `resolving.Resolver`, whose methods these are, on the loop of this object.

    Args:
        services: asked for everything.
        store: where workers read.
        cache: it, if it is a cache; None if blobs are local.
        fetcher: of blobs into the cache, if there is one.
    """

    def __init__(
        self,
        services: Services,
        store: Store,
        cache: BlobCache | None,
        fetcher: BlobFetcher | None,
    ) -> None:
        self._services = services
        self._store = store
        self._cache = cache
        self._fetcher = fetcher
        self._thread = ThreadPoolExecutor(1, "images")
        self._ahead = BackgroundWork()
        self._directories: SingleFlight[Digest, Directory] = SingleFlight()
        self._listings: SingleFlight[None, None] = SingleFlight()
        self._added: set[Digest] = set()
        self._next_directory: dict[Digest, Digest] = {}
        self._small_files = SmallFiles(fetcher.ahead_bytes_max if fetcher is not None else 0)
        self._places = asyncio.Semaphore(_FETCHES_MAX)
        self._absent_until_s: OrderedDict[bytes, float] = OrderedDict()
        self._root_nodes: dict[bytes, Node] = {}
        self._fresh_until_s = 0.0

    async def root_node(self, name: bytes) -> Node:
        """See `Resolver.root_node`."""
        digest = path_digest(name)
        known = await self._run(lambda: self._known_path_info(digest))
        if known is not None:
            return root_node(name, known)
        if self._absent_until_s.get(name, 0.0) > time.monotonic():
            raise OSError(ENOENT, f"{name!r} was not there a moment ago")
        encoded = await self._get(
            self._services.path_infos.get(digest), f"path {name.decode('latin-1')}"
        )
        if encoded is None:
            self._note_absent(name)
            raise OSError(ENOENT, f"{name!r} is not there")
        node = root_node(name, encoded)
        await self._run(lambda: self._keep_path_info(digest, encoded))
        return node

    async def root_listing(self) -> RootListing:
        """See `Resolver.root_listing`."""
        if self._fresh_until_s < time.monotonic():
            await self._list_again()
        fresh_until_ns = int(self._fresh_until_s * 1e9)
        nodes = list(self._root_nodes.values())
        return RootListing(nodes, 0, fresh_until_ns, is_complete=True)

    async def directory(self, digest: Digest) -> None:
        """See `Resolver.directory`; those that a walk comes to next are fetched after it."""
        if digest in self._directories:
            directory = await self._directories.do(digest, partial(self._add_directory, digest))
        else:
            with self._ahead.urgent():
                directory = await self._directories.do(digest, partial(self._add_directory, digest))
        beside = list(islice(self._after(digest), _BESIDE_MAX))
        self._want_directories(beside, iter(range(_BESIDE_MAX)))
        self._want_directories(self._below(directory), iter(range(_BELOW_MAX)))

    async def blob(self, digest: Digest, size: int) -> None:
        """See `Resolver.blob`; small ones that are likely to be read next are fetched after it."""
        fetcher = self._fetcher
        if fetcher is None:
            return
        is_under_way = fetcher.is_under_way(digest)
        fetching = asyncio.create_task(fetcher.fetch(digest, size))  # before what is not urgent
        fetcher.fetch_ahead(self._small_files.after(digest, is_under_way=is_under_way))
        await fetching

    async def used(self, keys: Sequence[bytes]) -> None:
        """See `Resolver.used`."""
        if self._fetcher is not None:
            await self._fetcher.touch(list(keys))

    async def close(self) -> None:
        """See `Resolver.close`."""
        await self._ahead.close()
        await self._directories.close()
        await self._listings.close()
        self._thread.shutdown()

    # --- Directories ---

    def _below(self, directory: Directory) -> list[Digest]:
        below = list(dict.fromkeys(node.digest for node in directory.directories))
        if len(self._next_directory) + len(self._added) > _DIGESTS_MAX:
            self._next_directory.clear()
            self._added.clear()
        self._next_directory.update(pairwise(below))
        return below

    def _after(self, digest: Digest) -> Iterator[Digest]:
        # Equal directories stand in several places, so this may go round in a circle.
        following = self._next_directory.get(digest)
        while following is not None:
            yield following
            following = self._next_directory.get(following)

    def _want_directories(self, digests: list[Digest], left: Iterator[int]) -> None:
        # As many as are left, of these and then of those below them.
        new = (digest for digest in digests if digest not in self._added)
        self._ahead.want(
            (digest, partial(self._directory_ahead, digest, left))
            for digest, _ in zip(new, left, strict=False)
        )

    async def _directory_ahead(self, digest: Digest, left: Iterator[int]) -> None:
        if digest not in self._directories:
            add = partial(self._add_directory, digest)
            directory = await self._directories.do(digest, add)
            self._want_directories(self._below(directory), left)

    async def _add_directory(self, digest: Digest) -> Directory:
        directory = await self._get(self._services.directories.get(digest), f"directory {digest}")
        if directory is None:
            raise ContentMissingError(f"directory {digest}: the service does not have it")
        self._small_files.add(digest, directory)
        await self._run(lambda: self._put_image(digest, directory.to_bytes()))
        self._added.add(digest)
        return directory

    # --- The root ---

    def _note_absent(self, name: bytes) -> None:
        self._absent_until_s[name] = time.monotonic() + _ABSENT_S
        self._absent_until_s.move_to_end(name)
        if len(self._absent_until_s) > _ABSENT_MAX:
            self._absent_until_s.popitem(last=False)

    async def _list_again(self) -> None:
        listing = self._listings.begin(None, self._refresh_root)
        if not self._fresh_until_s:
            await asyncio.shield(listing)
            return
        # What is known stands in: the names were there, and paths do not change.
        done, _pending = await asyncio.wait([listing], timeout=_LISTING_WAIT_S)
        if not done or listing.exception() is not None:
            self._fresh_until_s = time.monotonic() + _FRESH_S

    async def _refresh_root(self) -> None:
        began_s = time.monotonic()
        path_infos = aiter(self._services.path_infos.list())
        while (encoded := await self._get(anext(path_infos, None), "the next path")) is not None:
            node = listed_node(encoded)
            if node is not None:
                self._root_nodes.setdefault(node.name, node)
        now_s = time.monotonic()
        self._fresh_until_s = now_s + max(_FRESH_S, _FRESH_FACTOR * (now_s - began_s))

    async def _get(self, work: Awaitable[T], what: str) -> T:
        try:
            async with self._places, asyncio.timeout(_ANSWER_TIMEOUT_S):
                return await work
        except TimeoutError as exc:
            raise ServiceUnavailableError(
                f"{what}: no answer within {_ANSWER_TIMEOUT_S:.0f} s"
            ) from exc

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # In the thread.

    def _put_image(self, digest: Digest, encoded: bytes) -> None:
        if self._cache is not None:
            self._cache.put_directory(digest, encoded)
        else:
            self._store.put_images({digest: encoded})

    def _known_path_info(self, path_digest: bytes) -> bytes | None:
        return None if self._cache is None else self._cache.path_info(path_digest)

    def _keep_path_info(self, path_digest: bytes, encoded: bytes) -> None:
        if self._cache is not None:
            self._cache.put_path_info(path_digest, encoded)


# --- Services other than one local store: a thread with an event loop of its own talks to them.
#
# What the network brings, and its hashing, must not keep the front-ends waiting.

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
