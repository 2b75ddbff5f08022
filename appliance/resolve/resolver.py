"""How sessions get what their workers want: the protocol of resolvers, and the grants they fill.

A worker that lacks something for a request asks for it through its control channel (a `Want`). The
supervisor hands the want to its one resolver, together with the grants of the worker's session, and
sends the errno back. A resolver answers every kind of want by itself: how it batches work, shares
it among sessions and spreads it over threads is its own affair.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from errno import EIO
from typing import Final, NamedTuple, Protocol

from appliance.bounds import ROOT_NAMES_MAX
from appliance.castore.directory import Node
from appliance.errors import ApplianceError
from appliance.session.grant_table import GrantTable
from appliance.session.wants import BlobWanted, Want
from appliance.store.leases import Lease
from appliance.store.profiles import Profile

_LOG: Final = logging.getLogger(__name__)

# Paths granted before the event loop gets another turn.
GRANTS_AT_A_TIME: Final = 256


class Resolver(Protocol):
    """Provides what sessions want."""

    async def resolve(self, want: Want, session: "SessionGrants") -> int:
        """Return 0 once the worker can have what it wants, else the errno to answer with.

        Names and listings of the root are granted to `session`. Images of Directories and blobs
        are put into the store that workers read. A `BackingWanted` is refused with EINVAL: mounts
        answer those themselves (see `backings`). Failures are logged, unless they are plain errnos,
        and not remembered: the same want may be resolved again at once.
        """

    async def root_nodes(self, names: Sequence[bytes]) -> Sequence[Node]:
        """Return the root nodes of the store paths with these base names, of those that are there.

        Raises:
            ApplianceError: the store or service failed.
        """

    async def open_blob(self, want: BlobWanted) -> int | None:
        """Return a descriptor, owned by the caller, of the file that holds a blob.

        Returns None if the blob is not kept in a file of its own, or if its file does not have the
        size that readers are told.

        Raises:
            StoreError: the blob cannot be had.
        """

    def used(self, keys: Sequence[bytes]) -> None:
        """Record that a worker read entries of the cache, by their keys (see `blob_cache`)."""

    def play(self, name: str, profile: Profile) -> Callable[[], None]:
        """Have what a profile names fetched ahead, for one session; return what ends that.

        Args:
            name: of the profile, for people.
            profile: what to fetch; sessions that give the same object share the work.
        """

    async def reap_readers(self) -> None:
        """Free the read transactions of killed workers; until then, LMDB reuses no page of them."""

    async def close(self) -> None:
        """Cancel what is under way; nothing may be asked afterwards."""


class RootListing(NamedTuple):
    """Nodes of store paths, by the names that they have in the root.

    Args:
        nodes: all paths, or those that a local store gained after the generation asked for.
        generation: the generation of the store up to which `nodes` go; 0 for services, which have
            no generations.
        fresh_until_ns: until when the listing counts as new (CLOCK_MONOTONIC); 0 for a local store.
        is_complete: whether there are no more paths now.
    """

    nodes: Sequence[Node]
    generation: int
    fresh_until_ns: int
    is_complete: bool


class SessionGrants:
    """The grants of one session, which resolvers fill, and its share of a resolver.

    Args:
        table: the grants (lent); used on one event loop.
        lease: keeps garbage collection from what is granted (lent); None if nothing is collected.

    Attributes:
        listing: held by whoever brings the listing of the root up to date.
    """

    def __init__(self, table: GrantTable, lease: Lease | None = None) -> None:
        self.table = table
        self._lease = lease
        # A guest that tries many names delays the lookups of other sessions by so many, and not by
        # all of them.
        self._root_names = asyncio.Semaphore(ROOT_NAMES_MAX)
        self.listing = asyncio.Lock()

    def looking_up(self) -> asyncio.Semaphore:
        """Return what to hold while a name in the root is looked up for this session."""
        return self._root_names

    async def add_name(self, name: bytes, find: Callable[[bytes], Awaitable[Node]]) -> None:
        """Grant the node that `find` returns for a base name in the root."""
        async with self._root_names:
            node = await find(name)
            if await self.hold([name]):
                # Again, as the path may have been removed before it was held.
                node = await find(name)
            self.table.grant(node)

    async def add_listing(self, find: Callable[[int], Awaitable[RootListing]]) -> None:
        """Grant all paths that `find` returns for the generation that was listed last."""
        async with self.listing:
            is_complete = False
            while not is_complete:
                listing = await find(self.table.root_generation)
                names = {node.name for node in listing.nodes}
                if await self.hold(names):
                    # Again, as above. What has been put meanwhile is not held; it comes next time.
                    left = await find(self.table.root_generation)
                    held = [node for node in left.nodes if node.name in names]
                    listing = listing._replace(nodes=held)
                for start in range(0, len(listing.nodes), GRANTS_AT_A_TIME):
                    self.add_if_possible(listing.nodes[start : start + GRANTS_AT_A_TIME])
                    await asyncio.sleep(0)
                self.table.set_root_generation(listing.generation)
                self.table.set_root_fresh_until(listing.fresh_until_ns)
                is_complete = listing.is_complete

    async def hold(self, names: Iterable[bytes]) -> bool:
        """Keep names from garbage collection; return whether to look again if they are there."""
        return self._lease is not None and await asyncio.to_thread(self._lease.hold, names)

    def add_if_possible(self, nodes: Sequence[Node]) -> None:
        """Grant nodes for a listing; one that cannot be granted is left out, with a log line."""
        for node in nodes:
            # One bad path must not hide all others.
            try:
                self.table.grant(node)
            except OSError as exc:
                _LOG.error("a path is left out of the root's listing: %s", exc.strerror)


async def nodes_there(
    names: Sequence[bytes], find: Callable[[bytes], Awaitable[Node]]
) -> Sequence[Node]:
    """Return what `find` returns for each of `names`, without those for which it raises an OSError.

    Raises:
        ApplianceError: the first one that `find` raises.
    """

    async def found(name: bytes) -> Node | None:
        try:
            return await find(name)
        except OSError:
            return None

    nodes = await asyncio.gather(*map(found, names))
    return [node for node in nodes if node is not None]


async def errno_of(want: Want, work: Awaitable[None]) -> int:
    """Return 0 after `work`, or the errno that answers `want` if it fails."""
    try:
        await work
    except OSError as exc:
        return exc.errno or EIO
    except ApplianceError as exc:
        _LOG.error("%s", exc)
        return EIO
    except Exception:  # noqa: BLE001 - whatever it was, the guest must get an answer
        _LOG.exception("%s", want)
        return EIO
    return 0
