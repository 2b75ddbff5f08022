"""Contents of files, as the store has them: views of its map, or files held open for a while."""

import logging
import os
import resource
from collections import OrderedDict
from errno import EIO
from typing import Final, NamedTuple

from appliance.castore.digest import Digest
from appliance.store.lmdb_env import ReadTransaction
from appliance.store.store import BlobFile, Store

_LOG = logging.getLogger(__name__)

OPEN_MAX: Final = 64
# What a worker has open beside them; and those that gave way count until the end of a batch.
_OTHERS_OPEN: Final = 32


class OpenBlob(NamedTuple):
    """A blob file of `size` bytes, opened; `fd` is the `Blobs`', and open until `close_evicted`."""

    fd: int
    size: int
    digest: bytes


class Blobs:
    """The blobs of one store, with up to `OPEN_MAX` of the files used last held open."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: OrderedDict[bytes, OpenBlob] = OrderedDict()
        limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._open_max = min(OPEN_MAX, max(1, (limit - _OTHERS_OPEN) // 2))
        self._evicted: list[int] = []

    def content(self, txn: ReadTransaction, digest: bytes, size: int) -> memoryview | OpenBlob:
        """Return the content of a blob, of which a Directory says that it has `size` bytes.

        Raises:
            OSError: EIO, the store does not have that many bytes of it.
        """
        opened = self._opened(digest, size)
        if opened is not None:
            return opened
        blob = self._store.blob(txn, digest)
        if blob is None:
            raise self._broken(digest, "is not in the store")
        if isinstance(blob, BlobFile):
            return self._open_file(digest, blob, size)
        if len(blob) < size:
            raise self._broken(digest, f"has {len(blob)} bytes, not {size}")
        return blob

    def close_evicted(self) -> None:
        """Close the files that gave way to others since the last call."""
        for fd in self._evicted:
            os.close(fd)
        self._evicted.clear()

    def close(self) -> None:
        """Close all files."""
        self._evicted += [blob.fd for blob in self._open.values()]
        self._open.clear()
        self.close_evicted()

    def _opened(self, digest: bytes, size: int) -> OpenBlob | None:
        # Directories may state different sizes for one blob.
        blob = self._open.get(digest)
        if blob is None or blob.size < size:
            return None
        self._open.move_to_end(digest)
        return blob

    def _open_file(self, digest: bytes, blob: BlobFile, size: int) -> OpenBlob:
        try:
            fd = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise self._broken(digest, f"cannot be opened: {exc.strerror}") from exc
        found_size = os.fstat(fd).st_size
        if found_size < size:
            os.close(fd)
            raise self._broken(digest, f"has a file of {found_size} bytes, not {size}")
        return self._hold(OpenBlob(fd, found_size, digest))

    def _hold(self, opened: OpenBlob) -> OpenBlob:
        replaced = self._open.pop(opened.digest, None)
        if replaced is not None:
            self._evicted.append(replaced.fd)
        self._open[opened.digest] = opened
        if len(self._open) > self._open_max:
            _digest, oldest = self._open.popitem(last=False)
            self._evicted.append(oldest.fd)
        return opened

    def _broken(self, digest: bytes, reason: str) -> OSError:
        _LOG.error("blob %s %s", Digest(digest), reason)
        return OSError(EIO, f"blob {Digest(digest)} {reason}")
