"""Files with several names: the content of a large one is hashed and staged once."""

import os
from typing import Final, NamedTuple

from appliance.importer.root import Identity, identity_of

# What is remembered takes some 300 bytes a file; more files are forgotten, and hashed again.
_FILES_MAX: Final = 1 << 14


class _State(NamedTuple):
    """What changes when the content of a file does."""

    size: int
    mtime_ns: int
    ctime_ns: int


class Links:
    """Remembers the files with several names that were read, until `clear`."""

    def __init__(self) -> None:
        self._files: dict[Identity, tuple[_State, bytes]] = {}

    def digest(self, status: os.stat_result) -> bytes | None:
        """Return the digest of the file if it is remembered, and as it was then."""
        if status.st_nlink == 1:
            return None
        state, digest = self._files.get(identity_of(status), (None, b""))
        return digest if state == _state_of(status) else None

    def remember(self, status: os.stat_result, digest: bytes) -> None:
        """Remember a file that was read, unless it has one name."""
        if status.st_nlink == 1:
            return
        if len(self._files) >= _FILES_MAX:
            self.clear()
        self._files[identity_of(status)] = _state_of(status), digest

    def clear(self) -> None:
        """Forget all."""
        self._files.clear()


def _state_of(status: os.stat_result) -> _State:
    return _State(status.st_size, status.st_mtime_ns, status.st_ctime_ns)
