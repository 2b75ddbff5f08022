"""What the wants of workers come to: grants, and what a resolver puts into the workers' store."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable, Sequence
from errno import EIO
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from appliance.castore.directory import Node
from appliance.errors import ApplianceError
from appliance.session.grants import GrantTable
from appliance.session.wants import (
    BackingWanted,
    BlobWanted,
    DirectoryWanted,
    RootListWanted,
    RootNameWanted,
    Want,
)

_LOG: Final = logging.getLogger(__name__)

# Root names that one session may have looked up at a time: the next session's come after so many,
# however many names a guest tries.
_ROOT_NAMES_MAX: Final = 8
# Paths granted before the event loop does something else.
_GRANTS_AT_A_TIME: Final = 256


class RootListing(NamedTuple):
    """Nodes of store paths, by the names they have in the root.

    Args:
        nodes: what there is; of a local store what came after the generation asked for.
        generation: of the store, that this goes up to; 0 of services that have none.
        fresh_until_ns: up to when it counts as new (CLOCK_MONOTONIC), where there is no generation.
        is_complete: there is no more now.
    """

    nodes: Sequence[Node]
    generation: int
    fresh_until_ns: int
    is_complete: bool


class Resolver(Protocol):
    """Finds what sessions want. Failures are not remembered: it may be asked again at once.

    Every method may raise an OSError with the errno to answer, or an ApplianceError, which is EIO.
    """

    async def root_node(self, name: bytes) -> Node:
        """Return the root node of the store path with this base name; ENOENT if there is none."""

    async def root_listing(self, generation: int) -> RootListing:
        """Return paths that were added after `generation`, or a listing of all."""

    async def directory(self, digest: bytes) -> None:
        """Put the image of a Directory where workers read."""

    async def blob(self, want: BlobWanted) -> None:
        """Put a blob where workers read."""

    async def open_blob(self, want: BlobWanted) -> int | None:
        """Return a descriptor of the file of a blob, or None if it is not kept in one.

        None, too, if the file does not have the size that readers are told.
        """

    def used(self, keys: Sequence[bytes]) -> None:
        """Note that a worker read cache entries (see `blob_cache`)."""

    async def reap_readers(self) -> None:
        """Free what a killed worker held of the store, or its pages could not be reused."""

    async def close(self) -> None:
        """Give up what is under way."""


class SessionResolving:
    """Answers the wants of one session, in the order in which they can be answered."""

    def __init__(self, resolver: Resolver, grants: GrantTable) -> None:
        self._resolver = resolver
        self._grants = grants
        self._root_names = asyncio.Semaphore(_ROOT_NAMES_MAX)
        self._listing = asyncio.Lock()

    async def resolve(self, want: Want) -> int:
        """Return 0 when the worker can have what it wants, else the errno to answer with."""
        try:
            await self._resolve(want)
        except OSError as exc:
            return exc.errno or EIO
        except ApplianceError as exc:
            _LOG.error("%s", exc)
            return EIO
        except Exception:  # noqa: BLE001 - whatever it was, the guests must get their answers
            _LOG.exception("%s", want)
            return EIO
        return 0

    async def _resolve(self, want: Want) -> None:
        match want:
            case RootNameWanted(name):
                async with self._root_names:
                    self._grants.grant(await self._resolver.root_node(name))
            case RootListWanted():
                async with self._listing:
                    await self._grant_all()
            case DirectoryWanted(digest):
                await self._resolver.directory(digest)
            case BlobWanted():
                await self._resolver.blob(want)
            case BackingWanted():
                raise AssertionError(want)  # a mount's own affair

    async def _grant_all(self) -> None:
        grants = self._grants
        is_complete = False
        while not is_complete:
            listing = await self._resolver.root_listing(grants.root_generation)
            for start in range(0, len(listing.nodes), _GRANTS_AT_A_TIME):
                for node in listing.nodes[start : start + _GRANTS_AT_A_TIME]:
                    self._grant_if_possible(node)
                await asyncio.sleep(0)
            grants.set_root_generation(listing.generation)
            grants.set_root_fresh_until(listing.fresh_until_ns)
            is_complete = listing.is_complete

    def _grant_if_possible(self, node: Node) -> None:
        # One bad path must not keep all others from being listed.
        try:
            self._grants.grant(node)
        except OSError as exc:
            _LOG.error("a path is left out of the root's listing: %s", exc.strerror)


# --- One place where equal work is done once, however many wait for it ---

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class SingleFlight(Generic[K, T]):
    """Work under way on one event loop, by key; what has ended is forgotten, also if it failed."""

    def __init__(self) -> None:
        self._tasks: dict[K, asyncio.Task[T]] = {}

    def __contains__(self, key: K) -> bool:
        """Whether the work of `key` is under way."""
        return key in self._tasks

    async def do(self, key: K, work: Callable[[], Coroutine[None, None, T]]) -> T:
        """Return what `work` returns, or the work of `key` that is under way already.

        Cancelling one that waits does not end the work.
        """
        return await asyncio.shield(self.begin(key, work))

    def begin(self, key: K, work: Callable[[], Coroutine[None, None, T]]) -> asyncio.Task[T]:
        """Return the task of `key`, begun now unless it is under way."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(work())
            task.add_done_callback(lambda done: self._end(key, done))
        return task

    async def close(self) -> None:
        """Cancel what is under way and wait for its end."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, key: K, task: asyncio.Task[T]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # if nobody waits any more, nobody is to be told of it
