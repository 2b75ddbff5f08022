"""Digests of files with several names, so that each is read and hashed once."""

import os
from typing import Final, NamedTuple

from appliance.importer.roots import Identity, identity_of

# Files with several names to remember, at about 300 bytes each. Beyond that all are forgotten, and
# hashed again when they are met.
_LINKS_MAX: Final = 1 << 14


class _State(NamedTuple):
    """The part of a file's status that changes when its content does."""

    size: int
    mtime_ns: int
    ctime_ns: int


class HardLinks:
    """Digests of the large files with several names that were read since the last `clear`."""

    def __init__(self) -> None:
        self._files: dict[Identity, tuple[_State, bytes]] = {}

    def digest(self, status: os.stat_result) -> bytes | None:
        """Return the digest of a file if it is known, and the file has not changed since."""
        if status.st_nlink == 1:
            return None
        state, digest = self._files.get(identity_of(status), (None, b""))
        return digest if state == _state_of(status) else None

    def remember(self, status: os.stat_result, digest: bytes) -> None:
        """Remember the digest of a file, unless the file has only one name."""
        if status.st_nlink == 1:
            return
        if len(self._files) >= _LINKS_MAX:
            self.clear()
        self._files[identity_of(status)] = _state_of(status), digest

    def clear(self) -> None:
        """Forget all files."""
        self._files.clear()


def _state_of(status: os.stat_result) -> _State:
    return _State(status.st_size, status.st_mtime_ns, status.st_ctime_ns)
