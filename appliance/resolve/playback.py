"""Playing profiles: what a session is known to read is fetched before it asks for it.

Theory of operation. A profile is a source of wants that nobody waits for yet. They are fetched in
its order, by the fetchers that serve guests, as work in the background (see `prefetch` for what
that means): nothing begins beside a fetch that a guest waits for, equal fetches are one, and what
another process on this host fetches is left to it. `BackgroundPace` keeps as much under way as the
link carries without a queue, so that a guest that wants something else finds the link free.

Of a store path, all Directories come as one closure, as they do when a guest looks it up. Of blobs,
the ranges come that were read.

One playback serves all sessions that have the same profile, and ends with the last of them. What
the cache has is passed over, so playing again costs a look at each entry. What the service does not
have any more is passed over, too, and counted. A playback takes up to half of the cache, so it does
not evict what it fetched itself.

What is fetched is checked as always, and only is in the cache then: a profile grants nothing.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, Final, Protocol

from appliance.castore.digest import Digest
from appliance.errors import ApplianceError, ServiceUnavailableError
from appliance.services.background_pace import BackgroundPace
from appliance.store.profiles import Profile, ProfiledBlob, ProfiledDirectory, ProfiledPath, Read

_LOG: Final = logging.getLogger(__name__)
_CACHE_SHARE: Final = 2
# Paths, each with its closure, and Directories, that come at a time.
_PATHS_MAX: Final = 8
_DIRECTORIES_MAX: Final = 8
# Playbacks without sessions that are shown.
_ENDED_MAX: Final = 16


class Loader(Protocol):
    """What playbacks ask for content; nothing may delay what a guest waits for.

    `load` methods raise an OSError or ApplianceError if it cannot be had.
    """

    async def load_path(self, name: bytes) -> bool:
        """Have the PathInfo and the Directories of a store path; return False if they are there."""

    async def load_directory(self, digest: Digest) -> bool:
        """Have the image of a Directory; return False if it is there."""

    def has_range(self, read: ProfiledBlob) -> bool:
        """Return whether the cache has a range of a blob."""

    async def load_range(self, read: ProfiledBlob) -> None:
        """Have a range of a blob in the cache, or leave it to another process that fetches it."""


class Playback:
    """One profile that is played, once; `num_sessions` is for the caller.

    Args:
        name: of the profile, for people.
        profile: what to fetch.
        loader: fetches it.
        pace: how much may be under way, with other playbacks.
        bytes_max: the most content that is fetched.
    """

    def __init__(
        self, name: str, profile: Profile, loader: Loader, pace: BackgroundPace, bytes_max: int
    ) -> None:
        self.name = name
        self.num_sessions = 0
        self._is_ended = False
        self._reads = profile.reads
        self._loader = loader
        self._bytes_left = bytes_max
        self._pace = pace
        self._counts = dict.fromkeys(("fetched", "there", "missing", "failed", "left_out"), 0)
        self._fetched_bytes = 0
        self._paths = asyncio.Semaphore(_PATHS_MAX)
        self._directories = asyncio.Semaphore(_DIRECTORIES_MAX)
        self._closures: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._digests = {read.digest for read in self._reads if isinstance(read, ProfiledBlob)}
        self._playing = asyncio.create_task(self._play())

    @property
    def is_playing(self) -> bool:
        """Whether there is something left to fetch."""
        return not self._is_ended and not self._playing.done()

    def foresees(self, digest: Digest) -> bool:
        """Return whether a blob is one of those that are fetched in any case."""
        return self.is_playing and digest in self._digests

    def report(self) -> dict[str, object]:
        """Return what `appliance status` shows of it; in any thread."""
        return {
            "profile": self.name,
            "sessions": self.num_sessions,
            "is_playing": self.is_playing,
            "reads": len(self._reads),
            "fetched_bytes": self._fetched_bytes,
            **self._counts,
        }

    async def end(self) -> None:
        """Fetch nothing more."""
        self._is_ended = True
        tasks = [self._playing, *self._closures, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _play(self) -> None:
        self._spawn(self._tasks, self._play_directories())
        for read in self._reads:
            if isinstance(read, ProfiledPath):
                await self._paths.acquire()
                self._spawn(self._closures, self._play_path(read))
            elif isinstance(read, ProfiledBlob):
                await self._begin_blob(read)
        while left := self._tasks | self._closures:
            await asyncio.wait(left)
        counts = ", ".join(f"{num} {what}" for what, num in self._counts.items() if num)
        _LOG.info(
            "profile %s was played: %s; %d bytes of content fetched",
            self.name,
            counts.replace("_", " ") or "it is empty",
            self._fetched_bytes,
        )

    async def _play_path(self, read: ProfiledPath) -> None:
        try:
            await self._count(read, self._loader.load_path(read.name.encode()))
        finally:
            self._paths.release()

    async def _play_directories(self) -> None:
        for read in self._reads:
            if isinstance(read, ProfiledDirectory):
                # It comes with the closure of its path, which was read before it.
                if self._closures:
                    await asyncio.wait(self._closures)
                await self._directories.acquire()
                self._spawn(self._tasks, self._play_directory(read))

    async def _play_directory(self, read: ProfiledDirectory) -> None:
        try:
            await self._count(read, self._loader.load_directory(read.digest))
        finally:
            self._directories.release()

    async def _begin_blob(self, read: ProfiledBlob) -> None:
        if self._loader.has_range(read):
            self._counts["there"] += 1
            return
        num_bytes = read.end - read.start
        if num_bytes > self._bytes_left:
            self._counts["left_out"] += 1
            return
        self._bytes_left -= num_bytes
        await self._pace.enter(num_bytes)
        self._spawn(self._tasks, self._play_blob(read))

    async def _play_blob(self, read: ProfiledBlob) -> None:
        num_bytes = read.end - read.start
        began_s = time.monotonic()
        is_fetched = False
        try:
            is_fetched = await self._count(read, self._load_range(read))
        finally:
            self._pace.leave(num_bytes, time.monotonic() - began_s if is_fetched else None)

    async def _load_range(self, read: ProfiledBlob) -> bool:
        await self._loader.load_range(read)
        self._fetched_bytes += read.end - read.start
        return True

    async def _count(self, read: Read, work: Coroutine[Any, Any, bool]) -> bool:
        is_fetched = False
        try:
            is_fetched = await work
        except ServiceUnavailableError:
            self._counts["failed"] += 1
        except (ApplianceError, OSError) as exc:
            _LOG.debug("profile %s: %s: %s", self.name, read.to_line().strip(), exc)
            self._counts["missing"] += 1
        else:
            self._counts["fetched" if is_fetched else "there"] += 1
        return is_fetched

    @staticmethod
    def _spawn(tasks: "set[asyncio.Task[None]]", work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)


class Playbacks:
    """The playbacks of one loader; used on its event loop.

    Args:
        loader: fetches.
        cache_bytes: the size of the cache that it fetches into.
    """

    def __init__(self, loader: Loader, cache_bytes: int) -> None:
        self._loader = loader
        self._bytes_max = cache_bytes // _CACHE_SHARE
        self._pace = BackgroundPace()
        # By the identity of the profile, which its playback keeps.
        self._playbacks: dict[int, tuple[Profile, Playback]] = {}

    async def begin(self, name: str, profile: Profile) -> None:
        """Play a profile for one more session, which must `end` it."""
        _profile, playback = self._playbacks.get(id(profile), (profile, None))
        num_sessions = 0 if playback is None else playback.num_sessions
        if playback is None or not playback.is_playing:
            # Again, as some of it may have been evicted.
            playback = Playback(name, profile, self._loader, self._pace, self._bytes_max)
            self._playbacks[id(profile)] = (profile, playback)
        playback.num_sessions = num_sessions + 1

    async def end(self, profile: Profile) -> None:
        """Play a profile for one session less."""
        _profile, playback = self._playbacks[id(profile)]
        playback.num_sessions -= 1
        if not playback.num_sessions:
            await playback.end()
            unused = [key for key, (_, one) in self._playbacks.items() if not one.num_sessions]
            for key in unused[:-_ENDED_MAX]:
                del self._playbacks[key]

    def foresee(self, digest: Digest) -> bool:
        """Return whether a blob is fetched ahead in any case."""
        return any(playback.foresees(digest) for _, playback in self._playbacks.values())

    def report(self) -> list[dict[str, object]]:
        """Return what `appliance status` shows; in any thread."""
        return [playback.report() for _, playback in list(self._playbacks.values())]

    async def close(self) -> None:
        """End all."""
        for _profile, playback in list(self._playbacks.values()):
            await playback.end()
