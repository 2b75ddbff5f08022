"""Recordings: profiles that grow while sessions read.

A recording is a file `.NAME.recording` beside the profiles. Each read is appended as one line, by
one write(2), so a process that is killed leaves whole lines, and perhaps one that is cut off. Lines
of different workers may be out of order by a moment; their times say what the order is. At the end,
the recording becomes the profile NAME, in place of what had that name before.

Whoever records holds a flock on the file, which the kernel drops when the process ends. So a
recording that nobody holds was left by a process that was killed, and counts as the profile.
"""

import errno
import fcntl
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Self

from appliance.bounds import RECORDED_BYTES_MAX, RECORDED_MAX
from appliance.castore.chunking import UNCHUNKED_MAX
from appliance.castore.digest import DIGEST_SIZE, Digest
from appliance.errors import StoreError, disk_error
from appliance.nix.store_path import StorePath, StorePathError
from appliance.store.profiles import (
    AT_MS_MAX,
    HEAD,
    ProfiledBlob,
    ProfiledDirectory,
    ProfiledPath,
    Profiles,
    Read,
    whole_lines,
)

_NS_IN_MS: Final = 1_000_000
_SIZE_MAX: Final = 2**63 - 1


class Recording:
    """A recording under way; owns its descriptor.

    Args:
        profiles: where it is.
        name: the name of the profile that it becomes.
        fd: of the file, locked; taken.
        reads: what it has already.
    """

    def __init__(self, profiles: Profiles, name: str, fd: int, reads: Sequence[Read]) -> None:
        self.name = name
        self._profiles = profiles
        self._fd = fd
        self._seen = {_key_of(read) for read in reads}
        self._num_bytes = sum(
            read.end - read.start for read in reads if isinstance(read, ProfiledBlob)
        )
        last_ms = max((read.at_ms for read in reads), default=0)
        self._began_ns = time.monotonic_ns() - last_ms * _NS_IN_MS

    @classmethod
    def begin(cls, profiles: Profiles, name: str, *, goes_on: bool) -> Self:
        """Begin a recording.

        What a killed process has left of one becomes the profile first; if `goes_on`, because the
        session that was recorded lives on, this recording continues it instead.

        Raises:
            ConfigError: no profile may have that name.
            StoreError: another process records it, this user may not write there, or the disk
                failed.
        """
        path = profiles.recording_path(name)
        try:
            profiles.directory.mkdir(parents=True, exist_ok=True)
            if not goes_on:
                finish_left(profiles, name)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.fstat(fd).st_nlink:
                    raise BlockingIOError  # it became the profile just now
                reads, length = whole_lines(path)
                os.ftruncate(fd, length)
                if not length:
                    os.write(fd, HEAD.encode())
            except BaseException:
                os.close(fd)
                raise
        except BlockingIOError as exc:
            raise StoreError(f"profile {name}: another process records it") from exc
        except OSError as exc:
            raise disk_error(exc, path) from exc
        return cls(profiles, name, fd, reads.reads)

    def note_path(self, name: bytes) -> None:
        """Record that a name in the root was granted; one that is no store path's is left out."""
        try:
            path = StorePath.parse(name)
        except StorePathError:
            return
        self._add(ProfiledPath(self._at_ms(time.monotonic_ns()), path.basename()))

    def note_directory(self, digest: bytes, read_ns: int) -> None:
        """Record that a Directory was read; one without a digest is left out."""
        if len(digest) == DIGEST_SIZE:
            self._add(ProfiledDirectory(self._at_ms(read_ns), Digest(digest)))

    def note_blob(self, digest: bytes, size: int, start: int, end: int, read_ns: int) -> None:
        """Record that a range of a blob was read; one that cannot be is left out.

        A blob of up to 1 MiB is recorded as a whole, as it has no chunks.
        """
        if size <= UNCHUNKED_MAX:
            start, end = 0, size
        end = min(end, size)
        if len(digest) == DIGEST_SIZE and 0 <= start < end <= size <= _SIZE_MAX:
            self._add(ProfiledBlob(self._at_ms(read_ns), Digest(digest), size, start, end))

    def finish(self) -> None:
        """Make the recording the profile, unless it has nothing, and close it.

        Raises:
            StoreError: the disk failed. What was recorded stays, and counts as the profile.
        """
        try:
            _become_profile(self._profiles, self.name)
        finally:
            self.leave()

    def leave(self) -> None:
        """Close the recording for another process to go on with."""
        os.close(self._fd)

    def _add(self, read: Read) -> None:
        key = _key_of(read)
        if key in self._seen or len(self._seen) >= RECORDED_MAX:
            return
        num_bytes = read.end - read.start if isinstance(read, ProfiledBlob) else 0
        if self._num_bytes + num_bytes > RECORDED_BYTES_MAX:
            return
        self._append(read.to_line().encode())
        self._seen.add(key)
        self._num_bytes += num_bytes

    def _append(self, line: bytes) -> None:
        length = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as exc:
            # The next line must not follow half of this one.
            with suppress(OSError):
                os.ftruncate(self._fd, length)
            raise disk_error(exc, self._profiles.recording_path(self.name)) from exc

    def _at_ms(self, read_ns: int) -> int:
        latest_ns = time.monotonic_ns()
        since_ns = max(0, min(read_ns, latest_ns) - self._began_ns)
        return min(since_ns // _NS_IN_MS, AT_MS_MAX)


def finish_left(profiles: Profiles, name: str) -> None:
    """Make what a killed process has left of a recording the profile, if there is anything.

    Raises:
        OSError: another process records it (BlockingIOError), or it cannot be opened.
        StoreError: the disk failed, or it breaks a rule.
    """
    path = profiles.recording_path(name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _become_profile(profiles, name)
    finally:
        os.close(fd)


def _become_profile(profiles: Profiles, name: str) -> None:
    path = profiles.recording_path(name)
    try:
        profile, _length = whole_lines(path)
        if profile.reads:
            profiles.write(name, profile)
        path.unlink()
    except OSError as exc:
        raise disk_error(exc, path) from exc


def _key_of(read: Read) -> tuple[object, ...]:
    match read:
        case ProfiledPath(_at_ms, name):
            return (name,)
        case ProfiledDirectory(_at_ms, digest):
            return (digest,)
        case ProfiledBlob(_at_ms, digest, _size, start, _end):
            return (digest, start)
