"""The resolver of services that may be anywhere.

Two objects share the work. `ContentLoader` loads PathInfos, Directories and blobs from the services
into the store that workers read. It lives on the event loop of a thread of its own, so that network
traffic and its hashing never delay front-ends. `RemoteResolver` is the `Resolver` that sessions
call on the supervisor's loop: it passes wants to the loader and grants what comes back.

Wants are independent: none waits for another, except that equal wants share one request. The store
is either a local store that the blobs are in already, or a `BlobCache` in the state directory.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from errno import EINVAL, ENOENT
from functools import partial
from typing import Any, Final, TypeVar

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, Node
from appliance.errors import ApplianceError, ContentMissingError, StoreError
from appliance.resolve.closure_loader import ClosureLoader
from appliance.resolve.fetch_counters import FetchCounters
from appliance.resolve.local import listed_node, open_blob, path_digest, root_node
from appliance.resolve.playback import Playbacks
from appliance.resolve.prefetch import ReadAhead
from appliance.resolve.profile_loader import ProfileLoader
from appliance.resolve.resolver import RootListing, SessionGrants, errno_of, nodes_there
from appliance.services.addresses import ServiceAddress, ServiceAddresses
from appliance.services.contracts import Services
from appliance.services.fetch import BlobFetcher
from appliance.services.open_services import LoopThread
from appliance.services.tasks import SingleFlight
from appliance.session.wants import (
    BlobWanted,
    DirectoryWanted,
    RootListWanted,
    RootNameWanted,
    Want,
)
from appliance.store.blob_cache import BlobCache
from appliance.store.profiles import Profile
from appliance.store.store import Store

T = TypeVar("T")

_LOG: Final = logging.getLogger(__name__)

# The names of the services, in the order of their addresses.
_SERVICES: Final = ("blobs", "directories", "path_infos")
# Requests for PathInfos under way at a time.
_REQUESTS_MAX: Final = 64
# Directories that come with one that is wanted may take this share of the cache, or this many bytes
# where there is none.
_CLOSURE_SHARE: Final = 4
_CLOSURE_BYTES: Final = 1 << 28
# How long a listing of the root counts as new. If making it takes long, it counts ten times as long
# as it took, so that at most a tenth of the time is spent on listings.
_FRESH_S: Final = 5.0
_FRESH_FACTOR: Final = 10
# Once there is a listing, a caller waits no longer than this for a newer one.
_LISTING_WAIT_S: Final = 1.0
# A name that the service did not have is not asked for again for this long.
_ABSENT_S: Final = 1.0
_ABSENT_MAX: Final = 4096
# A closure in which a Directory was looked for is not asked for again for this long.
_SEARCHED_S: Final = 60.0
_SEARCHED_MAX: Final = 4096


class ContentLoader:
    """Loads what workers want from `services`; used on the event loop of its thread only.

    Every method may raise an OSError with the errno to answer, or an ApplianceError.

    Args:
        services: asked for everything.
        store: the store that workers read.
        cache: the cache that `store` belongs to, or None if it is a local store with all blobs.
        fetcher: fetches blobs into the cache; None if there is no cache.
        addresses: of the services, for messages.
    """

    def __init__(
        self,
        services: Services,
        store: Store,
        cache: BlobCache | None,
        fetcher: BlobFetcher | None,
        addresses: ServiceAddresses,
    ) -> None:
        self._services = services
        self._addresses = addresses
        self._store = store
        self._cache = cache
        self._fetcher = fetcher
        self._thread = ThreadPoolExecutor(1, "images")
        self._read_ahead = ReadAhead(fetcher.ahead_bytes_max if fetcher is not None else 0)
        bytes_max = _CLOSURE_BYTES if cache is None else cache.max_bytes // _CLOSURE_SHARE
        self._closures = ClosureLoader(
            services.directories, self._put_images, self._read_ahead, bytes_max
        )
        self._playbacks: Playbacks | None = None
        if fetcher is not None and cache is not None:
            loader = ProfileLoader(
                self.find_path,
                lambda digest: self._run(lambda: self._has_image(digest)),
                self._closures,
                fetcher,
            )
            self._playbacks = Playbacks(loader, cache.max_bytes)
        self._paths: SingleFlight[bytes, Node] = SingleFlight()
        self._listings: SingleFlight[None, None] = SingleFlight()
        self._places = asyncio.Semaphore(_REQUESTS_MAX)
        self._absent_until_s: OrderedDict[bytes, float] = OrderedDict()
        self._root_nodes: dict[bytes, Node] = {}
        self._fresh_until_s = 0.0
        self._searching = asyncio.Lock()
        self._searched_until_s: OrderedDict[Digest, float] = OrderedDict()
        self._fetched = {
            kind: FetchCounters(kind, address.label())
            for kind, address in zip(_SERVICES, addresses, strict=True)
        }

    def report(self) -> dict[str, Any]:
        """Return what was asked of the services, and how full the cache is; in any thread.

        Raises:
            StoreError: LMDB failed.
        """
        report: dict[str, Any] = {
            "services": {kind: counters.report() for kind, counters in self._fetched.items()}
        }
        if self._fetcher is not None:
            report["received_bytes"] = self._fetcher.received_bytes
        if self._playbacks is not None:
            report["playbacks"] = self._playbacks.report()
        if self._cache is not None:
            report["cache_bytes"] = self._cache.charged_bytes()
            report["cache_bytes_max"] = self._cache.max_bytes
        return report

    async def find_path(self, name: bytes) -> Node:
        """Return the root node of the store path with this base name; ENOENT if there is none."""
        return await self._paths.do(name, partial(self._find_path, name))

    async def list_paths(self) -> RootListing:
        """Return all paths, from a listing that is a few seconds old at most if possible."""
        if self._fresh_until_s < time.monotonic():
            await self._list_again()
        fresh_until_ns = int(self._fresh_until_s * 1e9)
        nodes = list(self._root_nodes.values())
        return RootListing(nodes, 0, fresh_until_ns, is_complete=True)

    async def load_directory(self, digest: Digest) -> None:
        """Put the image of a Directory into the store; those below it follow."""
        try:
            with self._fetched["directories"].counting():
                await self._closures.load(digest)
        except ApplianceError as exc:
            raise _located(exc, f"directory {digest}", self._addresses.directories) from exc

    async def load_from_closures(self, digest: Digest, roots: Sequence[bytes]) -> bool:
        """Ask for closures again until one has had a Directory; return whether its image is there.

        Some services have Directories only in the closures of store paths.
        """
        async with self._searching:
            for root in map(Digest, roots):
                if await self._run(lambda: self._has_image(digest)):
                    return True
                now_s = time.monotonic()
                if self._searched_until_s.get(root, 0.0) > now_s:
                    continue
                self._searched_until_s[root] = now_s + _SEARCHED_S
                self._searched_until_s.move_to_end(root)
                if len(self._searched_until_s) > _SEARCHED_MAX:
                    self._searched_until_s.popitem(last=False)
                await self._closures.load_closure(root)
        return await self._run(lambda: self._has_image(digest))

    async def load_blob(self, want: BlobWanted) -> None:
        """Put a range of a blob into the cache, or all of it.

        Small files that are likely to be read next are fetched ahead.
        """
        fetcher = self._fetcher
        if fetcher is None:
            return
        digest, end = Digest(want.digest), want.offset + want.length
        is_under_way = fetcher.is_under_way(digest)
        # A task begins first; what is fetched ahead comes after it.
        if want.length:
            fetch = fetcher.fetch_range(digest, want.size, want.offset, end)
        else:
            fetch = fetcher.fetch(digest, want.size)
        try:
            with self._fetched["blobs"].counting():
                fetching = asyncio.create_task(fetch)
                if self._playbacks is None or not self._playbacks.foresee(digest):
                    # Nobody knows what comes next.
                    fetcher.fetch_ahead(self._read_ahead.after(digest, is_under_way=is_under_way))
                await fetching
        except ApplianceError as exc:
            place = self._read_ahead.place_of(digest)
            what = f"file {place}: blob {digest}" if place else f"blob {digest}"
            raise _located(exc, what, self._addresses.blobs) from exc

    async def touch(self, keys: Sequence[bytes]) -> None:
        """Record that entries of the cache were used; an error is logged."""
        if self._fetcher is not None:
            try:
                await self._fetcher.touch(list(keys))
            except StoreError as exc:
                _LOG.error("%s", exc)

    async def play(self, name: str, profile: Profile) -> None:
        """Fetch what a profile names for one more session, until `end_play`."""
        if self._playbacks is not None:
            await self._playbacks.begin(name, profile)

    async def end_play(self, profile: Profile) -> None:
        """Fetch what a profile names for one session less."""
        if self._playbacks is not None:
            await self._playbacks.end(profile)

    async def close(self) -> None:
        """Cancel what is under way and end the thread; `services` and `fetcher` stay open."""
        if self._playbacks is not None:
            await self._playbacks.close()
        await self._closures.close()
        await self._paths.close()
        await self._listings.close()
        self._thread.shutdown()

    # --- The root ---

    async def _find_path(self, name: bytes) -> Node:
        digest = path_digest(name)
        known = await self._run(lambda: self._known_path_info(digest))
        if known is not None:
            return await self._with_closure(root_node(name, known))
        if self._absent_until_s.get(name, 0.0) > time.monotonic():
            raise OSError(ENOENT, f"{name!r} was not there a moment ago")
        with self._fetched["path_infos"].counting():
            encoded = await self._get(self._services.path_infos.get(digest))
        if encoded is None:
            self._note_absent(name)
            raise OSError(ENOENT, f"{name!r} is not there")
        node = root_node(name, encoded)
        await self._run(lambda: self._keep_path_info(digest, encoded))
        return await self._with_closure(node)

    async def _with_closure(self, node: Node) -> Node:
        # The Directories of a path that is granted come at once, if its root is not there.
        if isinstance(node, DirectoryNode):
            digest = node.digest
            if not await self._run(lambda: self._has_image(digest)):
                self._closures.begin(digest, node.name)
        return node

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
        # The last listing stands in: its paths existed, and paths do not change.
        done, _pending = await asyncio.wait([listing], timeout=_LISTING_WAIT_S)
        if not done or listing.exception() is not None:
            self._fresh_until_s = time.monotonic() + _FRESH_S

    async def _refresh_root(self) -> None:
        began_s = time.monotonic()
        path_infos = aiter(self._services.path_infos.list())
        with self._fetched["path_infos"].counting():
            while (encoded := await self._get(anext(path_infos, None))) is not None:
                node = listed_node(encoded)
                if node is not None:
                    self._root_nodes.setdefault(node.name, node)
        now_s = time.monotonic()
        self._fresh_until_s = now_s + max(_FRESH_S, _FRESH_FACTOR * (now_s - began_s))

    async def _get(self, work: Awaitable[T]) -> T:
        async with self._places:
            return await work

    async def _put_images(self, directories: Mapping[bytes, bytes]) -> None:
        if self._cache is not None:
            await self._run(partial(self._cache.put_directories, directories))
        else:
            await self._run(partial(self._store.put_images, directories))

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # --- In the thread of the store ---

    def _has_image(self, digest: Digest) -> bool:
        with self._store.snapshot() as snapshot:
            return snapshot.image(digest) is not None

    def _known_path_info(self, path_digest: bytes) -> bytes | None:
        return None if self._cache is None else self._cache.path_info(path_digest)

    def _keep_path_info(self, path_digest: bytes, encoded: bytes) -> None:
        if self._cache is not None:
            self._cache.put_path_info(path_digest, encoded)


def _located(exc: ApplianceError, what: str, address: ServiceAddress) -> StoreError:
    """Return `exc` as an error that names what is missing and the service that was asked."""
    text = str(exc).removeprefix(f"{address.label()}: ")
    # What the text begins with, if it names the object itself.
    text = text.removeprefix(f"{what.rpartition(': ')[2]}: ")
    return StoreError(f"{what}: {address.label()}: {text}")


class RemoteResolver:
    """The `Resolver` of services; called on any event loop, loads on that of `thread`.

    Args:
        thread: the thread that `loader` lives on.
        loader: loads what is wanted into `store`.
        store: the store that workers read.
        has_cache: whether `store` is that of a cache, which has blobs only once they were wanted.
    """

    def __init__(
        self, thread: LoopThread, loader: ContentLoader, store: Store, *, has_cache: bool
    ) -> None:
        self._thread = thread
        self._loader = loader
        self.store = store
        self.has_cache = has_cache

    async def resolve(self, want: Want, session: SessionGrants) -> int:
        """See `Resolver.resolve`."""
        match want:
            case RootNameWanted(name):
                return await errno_of(want, session.add_name(name, self._find_path))
            case RootListWanted():
                return await errno_of(want, session.add_listing(self._list_paths))
            case DirectoryWanted(digest):
                return await errno_of(want, self._load_directory(digest, session))
            case BlobWanted():
                return await errno_of(want, self._load_blob(want))
            case _:
                return EINVAL

    async def root_nodes(self, names: Sequence[bytes]) -> Sequence[Node]:
        """See `Resolver.root_nodes`."""
        return await nodes_there(names, self._find_path)

    async def open_blob(self, want: BlobWanted) -> int | None:
        """See `Resolver.open_blob`."""
        if self.has_cache:
            await self._load_blob(want)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, open_blob, self.store, want)

    def used(self, keys: Sequence[bytes]) -> None:
        """See `Resolver.used`."""
        self._thread.spawn(self._loader.touch(keys))

    def play(self, name: str, profile: Profile) -> Callable[[], None]:
        """See `Resolver.play`."""
        self._thread.spawn(self._loader.play(name, profile))
        return lambda: self._thread.spawn(self._loader.end_play(profile))

    async def reap_readers(self) -> None:
        """See `Resolver.reap_readers`."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.store.env.reap_readers)

    def report(self) -> dict[str, Any]:
        """See `ContentLoader.report`."""
        return self._loader.report()

    async def close(self) -> None:
        """Do nothing: `open_remote` closes what it opened."""

    async def _find_path(self, name: bytes) -> Node:
        return await self._thread.run(self._loader.find_path(name))

    async def _list_paths(self, _generation: int) -> RootListing:
        return await self._thread.run(self._loader.list_paths())

    async def _load_directory(self, digest: bytes, session: SessionGrants) -> None:
        wanted = Digest(digest)
        try:
            await self._thread.run(self._loader.load_directory(wanted))
        except StoreError as exc:
            roots = list(session.table.directories())
            if not isinstance(exc.__cause__, ContentMissingError) or not (
                await self._thread.run(self._loader.load_from_closures(wanted, roots))
            ):
                raise

    async def _load_blob(self, want: BlobWanted) -> None:
        await self._thread.run(self._loader.load_blob(want))
