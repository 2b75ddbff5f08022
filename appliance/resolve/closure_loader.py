"""Directories that come from a service, each with all below it, in one answer.

A guest that looks up a store path will enter its directories one after the other, and would wait
for a round trip at each. So when a path is granted, the closure of its root is asked for, and when
a Directory is wanted which no closure on its way contains, the closure of that. What arrives is put
where workers read in batches: whatever came while the last one was put makes up the next. What is
known for reading ahead grows with it, by doubling.

A service may look through the whole closure before it sends anything, and may refuse one of which
something is missing. So a Directory that a guest wants, and that has not come with its closure
within `_WAIT_S`, is asked for alone as well. At most `directories_max` and `bytes_max` are taken of
one closure; the rest comes when it is wanted.

An object store has closures of store paths and nothing else (see `services.object_directories`), so
a Directory inside one cannot be asked for alone once its closure is forgotten there. The closures
of what the session was granted are then asked for again (`load_closure`).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from functools import partial
from typing import Final

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory
from appliance.errors import (
    ApplianceError,
    ContentMissingError,
    CorruptBlobError,
    ServiceUnavailableError,
)
from appliance.resolve.prefetch import ReadAhead
from appliance.services.contracts import DirectoryService
from appliance.services.tasks import SingleFlight

PutImages = Callable[[Mapping[bytes, bytes]], Awaitable[None]]

_WAIT_S: Final = 1.0
# A want for a Directory that was put more recently than this crossed with the image.
_CROSSED_S: Final = 1.0
_JUST_PUT_MAX: Final = 1 << 13
# Closures on their way that nobody waits for; more are not begun.
_AHEAD_MAX: Final = 16
_DIRECTORIES_MAX: Final = 1 << 16
# Entries of a closure that are remembered until its end, for reading ahead.
_REMEMBERED_MAX: Final = 1 << 17


class _Closure:
    """A closure on its way: `expected` is known to come, or has come and is not put yet."""

    def __init__(self, root: Digest, name: bytes) -> None:
        self.root = root
        self.name = name
        self.expected: set[bytes] = {root}
        self.received: dict[Digest, Directory] = {}
        self._announced: set[bytes] = {root}
        self.num_directories = 0
        self.num_bytes = 0
        self._num_remembered = 0
        self._grown_at = 1
        self._unput: dict[bytes, bytes] = {}

    def take(self, directory: Directory) -> None:
        digest = directory.digest()
        encoded = directory.to_bytes()
        self._unput[digest] = encoded
        self.num_directories += 1
        self.num_bytes += len(encoded)
        new = {node.digest for node in directory.directories} - self._announced
        self._announced |= new
        self.expected |= new
        self._num_remembered += len(directory)
        if self._num_remembered <= _REMEMBERED_MAX:
            self.received[digest] = directory

    def has_grown(self) -> bool:
        """Return whether twice as much was received as when this was last so."""
        if len(self.received) < self._grown_at:
            return False
        self._grown_at = 2 * len(self.received)
        return True

    def take_unput(self) -> dict[bytes, bytes]:
        unput, self._unput = self._unput, {}
        return unput


class ClosureLoader:
    """Puts the images of Directories where workers read; used on one event loop.

    Args:
        directories: the service.
        put_images: makes the images of Directories, given by digest in canonical encoding.
        read_ahead: is told what is below a path, once it is known.
        bytes_max: the most bytes of Directories that are taken of one closure.
    """

    def __init__(
        self,
        directories: DirectoryService,
        put_images: PutImages,
        read_ahead: ReadAhead,
        bytes_max: int,
    ) -> None:
        self._directories = directories
        self._put_images = put_images
        self._read_ahead = read_ahead
        self._bytes_max = bytes_max
        self._streams: SingleFlight[Digest, None] = SingleFlight()
        self._singles: SingleFlight[Digest, None] = SingleFlight()
        self._closures: dict[Digest, _Closure] = {}
        # Resolved when the image has been put, or with the error that ends the closure.
        self._waiting: dict[bytes, asyncio.Future[None]] = {}
        # When images were put, oldest first; those that a want has crossed with are taken out.
        self._just_put: dict[bytes, float] = {}

    def begin(self, root: Digest, name: bytes) -> None:
        """Have a path's Directories come, unless enough others do; errors are dropped."""
        if len(self._closures) < _AHEAD_MAX:
            self._begin(root, name)

    async def load(self, digest: Digest) -> None:
        """Return when the image of a Directory is there.

        Raises:
            ContentMissingError: the service does not have it.
            CorruptBlobError: the service sent something else.
            StoreError: it cannot be had, or not be put.
        """
        put_at_s = self._just_put.pop(digest, None)
        if put_at_s is not None and time.monotonic() - put_at_s < _CROSSED_S:
            return  # whoever still misses it will say so again
        if not any(digest in closure.expected for closure in self._closures.values()):
            self._begin(digest, b"")
        waiting = self._waiting.get(digest)
        if waiting is None:
            waiting = self._waiting[digest] = asyncio.get_running_loop().create_future()
        await asyncio.wait([waiting], timeout=_WAIT_S)
        if not waiting.done() or _may_be_asked_for_alone(waiting.exception()):
            alone = self._singles.begin(digest, partial(self._load_alone, digest))
            if not waiting.done():
                await asyncio.wait([alone, waiting], return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done() or waiting.exception() is not None:
                # It says more than the failure of a closure.
                await asyncio.shield(alone)
                return
        waiting.result()

    async def load_closure(self, root: Digest) -> None:
        """Return when a closure, or what could be had of it, has been put; errors are dropped."""
        self._begin(root, b"")
        work = partial(self._load_closure, self._closures[root])
        await asyncio.wait([self._streams.begin(root, work)])

    async def join_closure(self, root: Digest) -> None:
        """Return when a closure, if it is on its way, has been put; errors are dropped."""
        if root in self._closures:
            await self.load_closure(root)

    async def close(self) -> None:
        """Cancel what is under way."""
        await self._streams.close()
        await self._singles.close()

    def _begin(self, root: Digest, name: bytes) -> None:
        if root not in self._closures:
            closure = self._closures[root] = _Closure(root, name)
            self._streams.begin(root, partial(self._load_closure, closure))

    async def _load_closure(self, closure: _Closure) -> None:
        error: ApplianceError | None = None
        try:
            await self._receive(closure)
        except ApplianceError as exc:
            error = exc
        finally:
            del self._closures[closure.root]
            for digest in closure.expected:
                self._end_waiting(
                    digest,
                    error or ContentMissingError(f"directory {Digest(digest)}: did not come"),
                )
        if closure.received:
            self._read_ahead.add(closure.root, closure.name, closure.received)

    async def _receive(self, closure: _Closure) -> None:
        putting: asyncio.Task[None] | None = None
        directories = self._directories.get_recursive(closure.root)
        try:
            async for directory in directories:
                closure.take(directory)
                if putting is None or putting.done():
                    putting = asyncio.create_task(self._put(closure))
                if closure.num_bytes > self._bytes_max or (
                    closure.num_directories >= _DIRECTORIES_MAX
                ):
                    break
        finally:
            if isinstance(directories, AsyncGenerator):
                await directories.aclose()
            if putting is not None:
                await putting
            await self._put(closure)

    async def _put(self, closure: _Closure) -> None:
        while unput := closure.take_unput():
            if closure.has_grown():
                self._read_ahead.add(closure.root, closure.name, closure.received)
            await self._put_images(unput)
            closure.expected -= unput.keys()
            now_s = time.monotonic()
            for digest in unput:
                self._just_put[digest] = now_s
                self._end_waiting(digest)
            while len(self._just_put) > _JUST_PUT_MAX:
                del self._just_put[next(iter(self._just_put))]

    async def _load_alone(self, digest: Digest) -> None:
        try:
            directory = await self._directories.get(digest)
            if directory is None:
                raise ContentMissingError(f"directory {digest}: the service does not have it")
            await self._put_images({digest: directory.to_bytes()})
        except ApplianceError as exc:
            self._end_waiting(digest, exc)
            raise
        self._end_waiting(digest)

    def _end_waiting(self, digest: bytes, error: ApplianceError | None = None) -> None:
        waiting = self._waiting.pop(digest, None)
        if waiting is None or waiting.done():
            return
        if error is None:
            waiting.set_result(None)
        else:
            waiting.set_exception(error)
            waiting.exception()  # retrieved, as nobody may wait any more


def _may_be_asked_for_alone(error: BaseException | None) -> bool:
    # After any other error, the answer would be the same.
    return isinstance(error, ApplianceError) and not isinstance(
        error, CorruptBlobError | ServiceUnavailableError
    )
