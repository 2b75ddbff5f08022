"""Contents of files from a cache: what it lacks is wanted, and what is used is told."""

import os
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from appliance.fs.blobs import Blobs, OpenBlob
from appliance.fuse_proto.operations import NotReady
from appliance.session.wants import BlobWanted
from appliance.store.lmdb_env import ReadTransaction
from appliance.store.store import BlobFile, Store

# How coarsely the cache is told: which entries were used, not when or how often.
_TELL_EVERY_S: Final = 1.0
_TELL_MAX: Final = 512


class RemoteParts(NamedTuple):
    """What a handler does not find in its store, but the resolver somewhere else.

    `used` takes the keys of cache entries (see `blob_cache`) that were read.
    """

    has_blobs: bool
    has_directories: bool
    has_root: bool
    used: Callable[[list[bytes]], None]


ALL_LOCAL: Final = RemoteParts(
    has_blobs=False, has_directories=False, has_root=False, used=lambda _keys: None
)


class Usage:
    """Tells `tell` of cache entries that were used, many at a time."""

    def __init__(self, tell: Callable[[list[bytes]], None]) -> None:
        self._tell = tell
        self._used: set[bytes] = set()
        self._told_s = 0.0

    def note(self, key: bytes) -> None:
        """Note that an entry was used."""
        self._used.add(key)
        now_s = time.monotonic()
        if len(self._used) >= _TELL_MAX or now_s - self._told_s >= _TELL_EVERY_S:
            self._told_s = now_s
            self._tell(list(self._used))
            self._used.clear()


class CachedBlobs(Blobs):
    """The blobs of a cache.

    A file that is open may be read on after it was evicted; whenever something was missing, which
    is when others are evicted, those files are closed, to free their space.
    """

    def __init__(self, store: Store, usage: Usage) -> None:
        super().__init__(store)
        self._usage = usage

    def content(self, txn: ReadTransaction, digest: bytes, size: int) -> memoryview | OpenBlob:
        """See `Blobs.content`.

        Raises:
            NotReady: the cache does not have it, or not as it should be.
            OSError: EIO, the cache cannot be read.
        """
        found: memoryview | OpenBlob | None = self._opened(digest, size)
        if found is None:
            blob = self._store.blob(txn, digest)
            found = self._try_open(digest, blob, size) if isinstance(blob, BlobFile) else blob
        if found is None or (isinstance(found, memoryview) and len(found) < size):
            self._close_unlinked()
            raise NotReady(BlobWanted(digest, size))
        self._usage.note(digest)
        return found

    def _try_open(self, digest: bytes, blob: BlobFile, size: int) -> OpenBlob | None:
        # It may have been evicted since the snapshot was taken.
        try:
            fd = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise self._broken(digest, f"cannot be opened: {exc.strerror}") from exc
        if os.fstat(fd).st_size == blob.size >= size:
            return self._hold(OpenBlob(fd, blob.size, digest))
        os.close(fd)
        return None

    def _close_unlinked(self) -> None:
        for digest, blob in list(self._open.items()):
            if os.fstat(blob.fd).st_nlink == 0:
                del self._open[digest]
                self._evicted.append(blob.fd)
