"""Store paths that the store lacks, and that others have: substituters, asked in order.

When a session asks for a name that the store does not have, the substituters are asked for it one
after the other. The first that has it is copied from, by `appliance copy` in a process of its own,
so that neither its traffic nor its hashing delays anything here: the path with all that it refers
to, checked whole before any of it is visible. From then on, it is a path of the store like any
other: whoever uses it keeps it, and garbage collection may take it afterwards, unless it is kept
(`Substitution.keeps`).

A substituter that fails is passed over with a log line, and one that is away is not asked again for
`_AWAY_S`. That nobody has a path, or that it could not be had, is remembered for `_REMEMBERED_S`.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from errno import EIO, ENOENT
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from appliance.castore.directory import Node
from appliance.errors import ApplianceError, ServiceUnavailableError, StoreError
from appliance.nix.store_path import StorePath, StorePathError
from appliance.resolve.resolver import Resolver, SessionGrants
from appliance.services.addresses import LmdbAddress
from appliance.services.tasks import SingleFlight
from appliance.session.wants import BlobWanted, RootNameWanted, Want
from appliance.store.profiles import Profile, ProfiledPath
from appliance.store.root_lists import RootLists
from appliance.system.child_environment import child_environment

_LOG: Final = logging.getLogger(__name__)

# The root (see `appliance root`) that has what is kept.
KEPT_ROOT: Final = "substituted"
_REMEMBERED_S: Final = 5.0
_REMEMBERED_MAX: Final = 4096
_AWAY_S: Final = 10.0
# Questions and copies under way at a time.
_QUESTIONS_MAX: Final = 16
_COPIES_MAX: Final = 2
# Characters of what a copy says in the end.
_TEXT_MAX: Final = 500


class Substituter(Protocol):
    """Somebody who may have store paths.

    Attributes:
        label: its name in messages.
    """

    label: str

    async def has(self, path: StorePath) -> bool:
        """Return whether it has a path that may be taken from it.

        Raises:
            ServiceUnavailableError: it cannot be reached.
            ApplianceError: its answer breaks a rule, or is not trusted.
        """

    def copy_words(self, store: str, path: StorePath) -> Sequence[str]:
        """Return the command, without the program, that copies a closure to the store at `store`.

        Args:
            store: the address of the store.
            path: the path on top.
        """

    async def close(self) -> None:
        """Disconnect."""


class Substitution(NamedTuple):
    """What an operator asks for.

    Args:
        substituters: in the order in which they are asked.
        keeps: keep what was copied from garbage collection.
    """

    substituters: Sequence[Substituter]
    keeps: bool = False


class SubstitutingResolver:
    """The resolver of a local store with substituters behind it; see `Resolver`.

    Args:
        resolver: that of the store.
        store_path: directory of the store, which this process may write to.
        substitution: the substituters, which are closed with this.
    """

    def __init__(self, resolver: Resolver, store_path: Path, substitution: Substitution) -> None:
        self._resolver = resolver
        self._store_path = store_path
        self._substituters, self._keeps = substitution
        self._flights: SingleFlight[StorePath, int] = SingleFlight()
        self._questions = asyncio.Semaphore(_QUESTIONS_MAX)
        self._copies = asyncio.Semaphore(_COPIES_MAX)
        self._remembered: OrderedDict[StorePath, tuple[float, int]] = OrderedDict()
        self._away_until_s: dict[str, float] = {}
        self._playing: set[asyncio.Task[None]] = set()

    async def resolve(self, want: Want, session: SessionGrants) -> int:
        """See `Resolver.resolve`."""
        error = await self._resolver.resolve(want, session)
        if error != ENOENT or not isinstance(want, RootNameWanted):
            return error
        # So a guest that tries names keeps no other one waiting, here as well.
        async with session.looking_up():
            error = await self.provide(want.name)
        return error or await self._resolver.resolve(want, session)

    async def provide(self, name: bytes) -> int:
        """Have a path that the store lacks copied; return 0 once it is there, else an errno.

        Args:
            name: its base name, or anything else that a guest has looked up.
        """
        try:
            path = StorePath.parse(name.decode())
        except (StorePathError, UnicodeDecodeError):
            return ENOENT
        until_s, error = self._remembered.get(path, (0.0, 0))
        if until_s > time.monotonic():
            return error
        return await self._flights.do(path, partial(self._provide, path))

    async def root_nodes(self, names: Sequence[bytes]) -> Sequence[Node]:
        """See `Resolver.root_nodes`; a path that is only listed is not copied."""
        return await self._resolver.root_nodes(names)

    async def open_blob(self, want: BlobWanted) -> int | None:
        """See `Resolver.open_blob`."""
        return await self._resolver.open_blob(want)

    def used(self, keys: Sequence[bytes]) -> None:
        """See `Resolver.used`."""
        self._resolver.used(keys)

    def play(self, _name: str, profile: Profile) -> Callable[[], None]:
        """See `Resolver.play`; the store paths that are not here are copied, in their order."""
        task = asyncio.create_task(self._provide_all(profile))
        self._playing.add(task)
        task.add_done_callback(self._playing.discard)

        def end() -> None:
            task.cancel()

        return end

    async def reap_readers(self) -> None:
        """See `Resolver.reap_readers`."""
        await self._resolver.reap_readers()

    async def close(self) -> None:
        """See `Resolver.close`; a copy that is under way is ended, which harms nothing."""
        for task in self._playing:
            task.cancel()
        await asyncio.gather(*self._playing, return_exceptions=True)
        await self._flights.close()
        for substituter in self._substituters:
            await substituter.close()
        await self._resolver.close()

    async def _provide_all(self, profile: Profile) -> None:
        for read in profile.reads:
            if isinstance(read, ProfiledPath):
                with contextlib.suppress(ApplianceError):
                    if not await self._resolver.root_nodes([read.name.encode()]):
                        await self.provide(read.name.encode())

    async def _provide(self, path: StorePath) -> int:
        error = ENOENT
        for substituter in self._substituters:
            try:
                if await self._copied(substituter, path):
                    return 0
            except ServiceUnavailableError as exc:
                self._away_until_s[substituter.label] = time.monotonic() + _AWAY_S
                _LOG.warning("substituter %s: %s", substituter.label, exc)
                error = EIO
            except ApplianceError as exc:
                _LOG.warning("substituter %s: %s", substituter.label, exc)
                error = EIO
            else:
                if self._is_away(substituter):
                    error = EIO  # it might have had the path
        self._remembered[path] = time.monotonic() + _REMEMBERED_S, error
        self._remembered.move_to_end(path)
        if len(self._remembered) > _REMEMBERED_MAX:
            self._remembered.popitem(last=False)
        return error

    def _is_away(self, substituter: Substituter) -> bool:
        return self._away_until_s.get(substituter.label, 0.0) > time.monotonic()

    async def _copied(self, substituter: Substituter, path: StorePath) -> bool:
        if self._is_away(substituter):
            return False
        async with self._questions:
            if not await substituter.has(path):
                return False
        async with self._copies:
            began_s = time.monotonic()
            await self._copy(substituter, path)
        if self._keeps:
            roots = RootLists(self._store_path)
            await asyncio.to_thread(roots.add, KEPT_ROOT, [path])
        _LOG.info(
            "%s: copied from %s in %.1f s",
            path.absolute(),
            substituter.label,
            time.monotonic() - began_s,
        )
        return True

    async def _copy(self, substituter: Substituter, path: StorePath) -> None:
        store = LmdbAddress(self._store_path).canonical()
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "appliance", *substituter.copy_words(store, path)),
            env=child_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, errors = await child.communicate()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
            raise
        if child.returncode != 0:
            lines = errors.decode(errors="replace").splitlines()
            told = "; ".join(line.removeprefix("appliance: ").strip() for line in lines if line)
            raise StoreError(f"{path.absolute()} cannot be had: {told[-_TEXT_MAX:]}")
