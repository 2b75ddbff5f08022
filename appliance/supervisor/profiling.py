"""Profiles of sessions: which one each session records, and which are played for it.

A session plays the profile that its socket names (`--profile`), or else the one that has the name
of its view or of the store path that is its root. When a session is granted a store path, the
profile of that name is played, too, if there is one.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

from appliance.errors import ApplianceError, ConfigError, StoreError
from appliance.protos import control_pb2 as pb
from appliance.resolve.exports import Exported
from appliance.resolve.resolver import Resolver
from appliance.session.first_reads import SEGMENT_SIZE, unpack_reads
from appliance.store.profiles import Profile, Profiles
from appliance.store.recording import Recording

_LOG = logging.getLogger(__name__)


class Profiling(NamedTuple):
    """What an operator asks for.

    Args:
        play: the name of the profile that is played; None: that of the view or root.
        record: the name of the profile that is recorded; None: none.
    """

    play: str | None = None
    record: str | None = None


NO_PROFILING: Final = Profiling()


@dataclass(slots=True)
class _Recorded:
    """A recording and the number of its sessions; None once it could not be written."""

    recording: Recording | None
    num_sessions: int = 0


class SessionProfile:
    """The profiles of one session.

    Args:
        owner: where recordings and profiles are.
        recorded: what the session records, or None.
    """

    def __init__(self, owner: "SessionProfiles", recorded: _Recorded | None) -> None:
        self._owner = owner
        self._recorded = recorded
        self._ends: list[Callable[[], None]] = []
        self._played: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_ended = False

    def play(self, name: str) -> None:
        """Have a profile played until the session ends; one that is not there is passed over."""
        if name not in self._played:
            self._played.add(name)
            task = asyncio.create_task(self._play(name))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def granted(self, name: bytes) -> None:
        """Note that the session was granted a name in the root."""
        self._write(lambda recording: recording.note_path(name))
        with suppress(ConfigError, UnicodeDecodeError):
            text = name.decode("ascii")
            if text not in self._played and self._owner.has(text):
                self.play(text)

    def first_reads(self, message: pb.FirstReads) -> None:
        """Record what a worker of the session has read."""

        def write(recording: Recording) -> None:
            for read in unpack_reads(message):
                if read.size is None:
                    recording.note_directory(read.digest, read.read_ns)
                else:
                    start = read.segment * SEGMENT_SIZE
                    end = start + SEGMENT_SIZE
                    recording.note_blob(read.digest, read.size, start, end, read.read_ns)

        self._write(write)

    def end(self, *, lives_on: bool) -> None:
        """End what is played, and the recording unless the session lives on."""
        self._is_ended = True
        for task in self._tasks:
            task.cancel()
        for end in self._ends:
            end()
        self._ends.clear()
        if self._recorded is not None:
            self._owner.end_recording(self._recorded, lives_on=lives_on)

    async def _play(self, name: str) -> None:
        try:
            profile = await self._owner.read(name)
        except ApplianceError as exc:
            _LOG.warning("%s; nothing is fetched ahead", exc)
            return
        if not self._is_ended:
            self._ends.append(self._owner.resolver.play(name, profile))

    def _write(self, write: Callable[[Recording], None]) -> None:
        recording = None if self._recorded is None else self._recorded.recording
        if self._recorded is None or recording is None:
            return
        try:
            write(recording)
        except StoreError as exc:
            _LOG.error("%s; profile %s is recorded no further", exc, recording.name)
            self._recorded.recording = None
            self._owner.drop(self._recorded)
            recording.leave()  # what it has counts


class SessionProfiles:
    """The profiles of all sessions of one supervisor; used on one event loop.

    Args:
        profiles: where they are.
        resolver: plays them.
    """

    def __init__(self, profiles: Profiles, resolver: Resolver) -> None:
        self.resolver = resolver
        self._profiles = profiles
        self._recorded: dict[str, _Recorded] = {}
        self._read: dict[str, tuple[object, Profile]] = {}

    def begin(
        self, exported: Exported, profiling: Profiling, *, goes_on: bool = False
    ) -> SessionProfile:
        """Begin what is due for a session; the caller ends it.

        A recording that cannot be begun is logged, and the session is not recorded.

        Args:
            exported: what the session sees.
            profiling: what its socket or mount asks for.
            goes_on: whether another supervisor has begun the session.
        """
        recorded = None
        if profiling.record is not None:
            recorded = self._begin_recording(profiling.record, goes_on=goes_on)
        session = SessionProfile(self, recorded)
        if exported.root is not None:
            session.granted(exported.root.encode())
        if profiling.play is not None:
            session.play(profiling.play)
        elif exported.view is not None and self.has(exported.view):
            session.play(exported.view)
        return session

    def has(self, name: str) -> bool:
        """Return whether there is a profile of this name.

        Raises:
            ConfigError: there cannot be any.
        """
        return self._profiles.seen(name) is not None

    async def read(self, name: str) -> Profile:
        """Return a profile, the same object as long as it does not change.

        Raises:
            ApplianceError: there is none, or it breaks a rule.
        """
        seen = self._profiles.seen(name)
        known = self._read.get(name)
        if known is None or known[0] != seen:
            known = seen, await asyncio.to_thread(self._profiles.read, name)
            self._read[name] = known
        return known[1]

    def drop(self, recorded: _Recorded) -> None:
        """Have the next session that records this profile begin anew."""
        self._recorded = {name: one for name, one in self._recorded.items() if one is not recorded}

    def end_recording(self, recorded: _Recorded, *, lives_on: bool) -> None:
        """End a recording for one session; with the last one, it becomes the profile.

        If `lives_on`, the next supervisor goes on with it.
        """
        recorded.num_sessions -= 1
        recording = recorded.recording
        if recorded.num_sessions or recording is None:
            return
        self.drop(recorded)
        if lives_on:
            recording.leave()
            return
        try:
            recording.finish()
        except StoreError as exc:
            _LOG.error("profile %s: %s", recording.name, exc)
        else:
            _LOG.info("profile %s was recorded", recording.name)

    def _begin_recording(self, name: str, *, goes_on: bool) -> _Recorded | None:
        recorded = self._recorded.get(name)
        if recorded is None:
            try:
                recording = Recording.begin(self._profiles, name, goes_on=goes_on)
            except ApplianceError as exc:
                _LOG.error("%s; nothing is recorded", exc)
                return None
            recorded = self._recorded[name] = _Recorded(recording)
        recorded.num_sessions += 1
        return recorded
