"""The files of the blobs that are too large to be kept in LMDB.

Every file is reached through one descriptor of the store's directory, which is opened once: files
stay within reach when that directory is moved, and what is put in its place is never taken for it.
The descriptor is that of the store and not of its `blobs/`, as the latter does not exist before the
first large blob is committed, and a reader may have opened the store before that.
"""

import os
import stat
from pathlib import Path
from typing import Final, NamedTuple

from appliance.store.schema import BLOBS_DIRECTORY
from appliance.system import libc

_STORE_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC
_DIRECTORY_MODE: Final = 0o755


class BlobFile(NamedTuple):
    """A blob kept in a file of exactly `size` bytes; if the file has not, the blob is absent."""

    digest: bytes
    size: int


class BlobFiles:
    """The blob files of one open store.

    The descriptor must not cross a fork, no more than the store's LMDB environment.

    Args:
        path: directory of the store.

    Raises:
        OSError: the directory cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._store_fd = os.open(path, _STORE_FLAGS)

    def open(self, digest: bytes) -> int:
        """Open the file of a blob and return a descriptor, which becomes the caller's.

        Raises:
            FileNotFoundError: there is no such file; a blob on record may have been evicted.
            OSError: the file cannot be opened.
        """
        name = _name(digest)
        try:
            return os.open(name, _FILE_FLAGS, dir_fd=self._store_fd)
        except OSError as exc:
            raise self._located(exc, name) from exc

    def status(self, digest: bytes) -> os.stat_result:
        """Return the status of the file of a blob.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: that cannot be found out.
        """
        name = _name(digest)
        try:
            return os.stat(name, dir_fd=self._store_fd)
        except OSError as exc:
            raise self._located(exc, name) from exc

    def is_whole(self, blob: BlobFile) -> bool:
        """Whether the file of a blob is there with the size that the record states.

        Raises:
            OSError: that cannot be found out.
        """
        try:
            status = self.status(blob.digest)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == blob.size

    def place(self, digest: bytes, path: str) -> None:
        """Move the file at `path`, on the file system of the store, to the place of a blob.

        Raises:
            OSError: it was not moved.
        """
        name = _name(digest)
        try:
            os.rename(path, name, dst_dir_fd=self._store_fd)
        except FileNotFoundError:
            self._make_directory(BLOBS_DIRECTORY)
            self._make_directory(name.rpartition("/")[0])
            os.rename(path, name, dst_dir_fd=self._store_fd)

    def remove(self, digest: bytes) -> None:
        """Remove the file of a blob, if there is one; a descriptor of it stays good.

        Raises:
            OSError: it cannot be removed.
        """
        name = _name(digest)
        try:
            os.unlink(name, dir_fd=self._store_fd)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise self._located(exc, name) from exc

    def sync(self) -> None:
        """Make all files, their names and their directories durable.

        The file system commits its journal once for this; syncing each file would commit it once
        per file.

        Raises:
            OSError: the disk failed.
        """
        fd = os.open(BLOBS_DIRECTORY, _DIRECTORY_FLAGS, dir_fd=self._store_fd)
        try:
            libc.syncfs(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the descriptor; files that were opened stay open."""
        os.close(self._store_fd)

    def _make_directory(self, name: str) -> None:
        try:
            os.mkdir(name, _DIRECTORY_MODE, dir_fd=self._store_fd)
        except FileExistsError:
            return
        except OSError as exc:
            raise self._located(exc, name) from exc

    def _located(self, exc: OSError, name: str) -> OSError:
        # The same class again, as the errno decides it; only the name becomes a whole path.
        return OSError(exc.errno, exc.strerror, str(self._path / name))


def _name(digest: bytes) -> str:
    name = digest.hex()
    return f"{BLOBS_DIRECTORY}/{name[:2]}/{name}"
