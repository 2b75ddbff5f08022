"""Claims of processes that share a cache: each blob is fetched by one of them at a time.

A claim is a lock on one byte of a file in the directory of the cache, at an offset made from the
digest of the blob. It belongs to an open file description (F_OFD_SETLK in fcntl(2)): it costs one
system call, leaves nothing behind, and the kernel drops it when its process ends, however that
ends. Blobs whose offsets are equal, which is next to impossible, wait for each other and nothing
worse. Within a process, claims do not exclude each other: `BlobFetcher` fetches each blob once.

A process that waits for another one looks again after a pause, as a lock that is waited for would
block a thread which nothing can interrupt.
"""

import asyncio
import fcntl
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from appliance.castore.digest import Digest
from appliance.errors import disk_error

_FILE_NAME: Final = "fetching"
# struct flock of x86-64 and every other 64-bit Linux: type, whence, padding, start, length, pid,
# padding. The pid must be 0.
_FLOCK: Final = struct.Struct("hh4xqqi4x")
_U64: Final = struct.Struct("<Q")
_OFFSET_MASK: Final = (1 << 62) - 1
# Pauses while another process fetches a blob; small ones arrive after a round trip to the peer.
_PAUSE_MIN_S: Final = 0.002
_PAUSE_MAX_S: Final = 0.1


class FetchClaims:
    """The claims of this process in the cache at `directory`; used on one event loop.

    Raises:
        StoreError: the file of the claims cannot be opened.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / _FILE_NAME
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise disk_error(exc, path) from exc

    @asynccontextmanager
    async def held(self, digest: Digest) -> AsyncIterator[None]:
        """Hold the claim to a blob in the block, after any other process has let go of it."""
        pause_s = _PAUSE_MIN_S
        while not self.take(digest):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)
        try:
            yield
        finally:
            self.release(digest)

    def take(self, digest: Digest) -> bool:
        """Claim a blob; return False if another process has claimed it."""
        try:
            self._lock(fcntl.F_WRLCK, digest)
        except BlockingIOError:
            return False
        return True

    def release(self, digest: Digest) -> None:
        """Let go of a claim of this process."""
        self._lock(fcntl.F_UNLCK, digest)

    def close(self) -> None:
        """Let go of all claims."""
        os.close(self._fd)

    def _lock(self, kind: int, digest: Digest) -> None:
        offset = _U64.unpack_from(digest)[0] & _OFFSET_MASK
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))
