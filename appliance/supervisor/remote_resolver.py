"""The resolver for services that may be anywhere: every want on its own, none waits for another.

It lives on the event loop of its own thread (see `remote`), and writes the index in another.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from errno import EIO, ENOENT
from functools import partial
from itertools import islice, pairwise
from typing import Any, Final, TypeVar

from appliance.castore.digest import Digest
from appliance.castore.nodes import Directory, Node
from appliance.castore.path_info import read_path_info
from appliance.castore.store_path import StorePath, StorePathError
from appliance.errors import (
    ApplianceError,
    ContentMissingError,
    PathInfoError,
    ServiceUnavailableError,
    StoreError,
)
from appliance.index.children import Kind
from appliance.index.images import Entry
from appliance.index.node_index import NodeIndex
from appliance.index.resolver import wanted_directory
from appliance.index.wants import BlobWanted, DirectoryWanted, RootListWanted, RootNameWanted, Want
from appliance.store.ahead import Ahead
from appliance.store.blob_fetcher import BlobFetcher
from appliance.store.lmdb_env import WriteTransaction
from appliance.store.services import Services
from appliance.supervisor.siblings import SmallFiles

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

# For one Directory or PathInfo, or the next PathInfo of a listing.
_ANSWER_TIMEOUT_S: Final = 30.0
_FETCHES_MAX: Final = 64
# How long a listing of the root counts as new; longer if it takes long, so that at most a tenth of
# the time is spent on it.
_FRESH_S: Final = 5.0
_FRESH_FACTOR: Final = 10
# Who lists it again waits no longer for a new listing.
_LISTING_WAIT_S: Final = 1.0
# Directories that come with one that is entered, at any depth below it and beside it: who enters it
# goes on to them.
_BELOW_MAX: Final = 32
_BESIDE_MAX: Final = 16
# Remembered, together; and forgotten at once.
_NUMBERS_MAX: Final = 1 << 16
_ROOT_CHUNK: Final = 1024
# The same failure is logged again after so long.
_REPEAT_S: Final = 10.0
_REPORTS_MAX: Final = 1024
# Of a root that no store's generations tell the age of.
_NO_GENERATION: Final = (1 << 64) - 1


class RemoteResolver:
    """Resolves wants from services into the index, and blobs into the cache.

    Failures are not remembered: who wants the same again has it asked for again.
    """

    def __init__(
        self, services: Services, fetcher: BlobFetcher | None, index: NodeIndex, identity: bytes
    ) -> None:
        self._services = services
        self._fetcher = fetcher
        self._index = index
        self._thread = ThreadPoolExecutor(1, "index")
        self._ahead = Ahead()
        self._directories: dict[int, asyncio.Task[list[Entry]]] = {}
        self._added: set[int] = set()
        self._next_directory: dict[int, int] = {}
        self._small_files = SmallFiles(fetcher.ahead_bytes_max if fetcher is not None else 0)
        self._places = asyncio.Semaphore(_FETCHES_MAX)
        self._reports = _Reports()
        self._listing: asyncio.Task[None] | None = None
        index.write(lambda txn: index.claim_root(txn, identity, _NO_GENERATION))

    async def resolve(self, want: Want) -> int:
        """Put where it belongs what is wanted; return 0 or the errno of the answer."""
        try:
            await self._resolve(want)
        except OSError as exc:
            return exc.errno or EIO
        except ApplianceError as exc:
            self._reports.report(str(exc))
            return EIO
        except Exception:  # noqa: BLE001 - whatever it was, the guests must get their answers
            _LOG.exception("%s", want)
            return EIO
        return 0

    async def blobs_used(self, digests: Sequence[bytes]) -> None:
        """Note that blobs were read from the cache."""
        if self._fetcher is not None:
            try:
                await self._fetcher.touch(list(digests))
            except StoreError as exc:
                self._reports.report(str(exc))

    async def close(self) -> None:
        """Give up a listing under way and end the thread."""
        await self._ahead.close()
        tasks: list[asyncio.Task[Any]] = list(self._directories.values())
        if self._listing is not None:
            tasks.append(self._listing)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._thread.shutdown()

    async def _resolve(self, want: Want) -> None:
        match want:
            case DirectoryWanted(number):
                await self._directory(number)
            case RootNameWanted(name):
                await self._root_name(name)
            case RootListWanted():
                await self._root_list()
            case BlobWanted(digest, size) if self._fetcher is not None:
                await self._blob(self._fetcher, Digest(digest), size)

    async def _blob(self, fetcher: BlobFetcher, digest: Digest, size: int) -> None:
        is_under_way = fetcher.is_under_way(digest)
        fetching = asyncio.create_task(fetcher.fetch(digest, size))  # before what is not urgent
        fetcher.fetch_ahead(self._small_files.after(digest, is_under_way=is_under_way))
        await fetching

    async def _directory(self, number: int) -> None:
        task = self._directories.get(number)
        if task is not None:
            entries = await asyncio.shield(task)
        else:
            with self._ahead.urgent():
                entries = await asyncio.shield(self._begin_directory(number))
        beside = list(islice(self._after(number), _BESIDE_MAX))
        self._want_directories(beside, iter(range(_BESIDE_MAX)))
        self._want_directories(self._below(entries), iter(range(_BELOW_MAX)))

    def _below(self, entries: list[Entry]) -> list[int]:
        numbers = (entry.number for entry in entries if entry.kind == Kind.DIRECTORY)
        below = list(dict.fromkeys(numbers))
        if len(self._next_directory) + len(self._added) > _NUMBERS_MAX:
            self._next_directory.clear()
            self._added.clear()
        self._next_directory.update(pairwise(below))
        return below

    def _after(self, number: int) -> Iterator[int]:
        # Equal directories share a number, so this may go round in a circle.
        following = self._next_directory.get(number)
        while following is not None:
            yield following
            following = self._next_directory.get(following)

    def _want_directories(self, numbers: list[int], left: Iterator[int]) -> None:
        # As many as are left, of these and then of those below them.
        new = (number for number in numbers if number not in self._added)
        self._ahead.want(
            (number, partial(self._directory_ahead, number, left))
            for number, _ in zip(new, left, strict=False)
        )

    async def _directory_ahead(self, number: int, left: Iterator[int]) -> None:
        if number not in self._directories:
            self._want_directories(self._below(await self._begin_directory(number)), left)

    def _begin_directory(self, number: int) -> asyncio.Task[list[Entry]]:
        task = asyncio.create_task(self._add_directory(number))
        self._directories[number] = task
        task.add_done_callback(lambda _task: self._directories.pop(number))
        return task

    async def _add_directory(self, number: int) -> list[Entry]:
        digest = await self._run(lambda: self._wanted_directory(number))
        if digest is None:
            return []
        directory = await self._get(self._services.directories.get(digest), f"directory {digest}")
        if directory is None:
            raise ContentMissingError(f"directory {digest}: the service does not have it")
        self._small_files.add(digest, directory)
        entries = await self._run(lambda: self._write_directory(number, directory))
        self._added.add(number)
        return entries

    async def _root_name(self, name: bytes) -> None:
        try:
            path = StorePath.parse(name)
        except StorePathError as exc:
            raise OSError(ENOENT, str(exc)) from exc
        encoded = await self._get(self._services.path_infos.get(path.digest), f"path {path}")
        if encoded is None:
            raise OSError(ENOENT, f"{path} is not there")
        node = read_path_info(encoded).node
        if node.name != name:
            raise OSError(ENOENT, f"the service has {node.name!r} by that digest")
        await self._run(lambda: self._add_root([node]))

    async def _root_list(self) -> None:
        if self._listing is None:
            self._listing = asyncio.create_task(self._refresh_root())
            self._listing.add_done_callback(self._end_listing)
        listing = self._listing
        if not await self._run(self._was_listed):
            await asyncio.shield(listing)
            return
        # What is known stands in: the names were there, and paths do not change.
        done, _pending = await asyncio.wait([listing], timeout=_LISTING_WAIT_S)
        if not done or listing.exception() is not None:
            await self._run(lambda: self._set_fresh(time.monotonic() + _FRESH_S))

    def _end_listing(self, listing: asyncio.Task[None]) -> None:
        self._listing = None
        if not listing.cancelled() and (exc := listing.exception()) is not None:
            self._reports.report(f"listing the root: {exc}")

    async def _refresh_root(self) -> None:
        began_s = time.monotonic()
        await self._list_root()
        now_s = time.monotonic()
        fresh_s = max(_FRESH_S, _FRESH_FACTOR * (now_s - began_s))
        await self._run(lambda: self._set_fresh(now_s + fresh_s))

    async def _list_root(self) -> None:
        nodes: list[Node] = []
        path_infos = aiter(self._services.path_infos.list())
        while (encoded := await self._get(anext(path_infos, None), "the next path")) is not None:
            try:
                nodes.append(read_path_info(encoded).node)
            except PathInfoError as exc:
                self._reports.report(f"a path is left out of the root's listing: {exc}")
            if len(nodes) == _ROOT_CHUNK:
                await self._run(partial(self._add_root, nodes))
                nodes = []
        await self._run(partial(self._add_root, nodes))

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

    # In the index's thread.

    def _wanted_directory(self, number: int) -> Digest | None:
        with self._index.read() as txn:
            return wanted_directory(self._index, txn, number)

    def _write_directory(self, number: int, directory: Directory) -> list[Entry]:
        return self._index.write(lambda txn: self._index.add_directory(txn, number, directory))

    def _add_root(self, nodes: list[Node]) -> None:
        def work(txn: WriteTransaction) -> None:
            for node in nodes:
                self._index.add_root(txn, node)

        self._index.write(work)

    def _set_fresh(self, until_s: float) -> None:
        until_ns = int(until_s * 1e9)
        self._index.write(lambda txn: self._index.set_root_fresh_until(txn, until_ns))

    def _was_listed(self) -> bool:
        with self._index.read() as txn:
            return self._index.root_fresh_until_ns(txn) != 0


class _Reports:
    """Log lines, each text now and then only: a guest may ask for what is broken in a loop."""

    def __init__(self) -> None:
        self._reported_s: dict[str, float] = {}

    def report(self, text: str) -> None:
        now_s = time.monotonic()
        if now_s - self._reported_s.get(text, -_REPEAT_S) < _REPEAT_S:
            return
        if len(self._reported_s) >= _REPORTS_MAX:
            self._reported_s.clear()
        self._reported_s[text] = now_s
        _LOG.error("%s", text)
