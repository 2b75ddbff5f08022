"""The files of blobs that are too large for LMDB.

All files are reached through a descriptor of the store's directory, opened once. So they are still
found after that directory was moved, and another directory in its old place is never mistaken for
it. The descriptor is not one of `blobs/`: the first commit of a large blob makes that directory,
and a reader may have opened the store before.
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
    """A blob kept in a file. If the file does not have exactly `size` bytes, the blob is absent."""

    digest: bytes
    size: int


class BlobFiles:
    """The blob files of one open store.

    Like the LMDB environment of the store, this must be opened after a fork. Errors name files by
    their whole paths, as they were when the store was opened.

    Args:
        path: directory of the store.

    Raises:
        OSError: the directory cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._store_fd = os.open(path, _STORE_FLAGS)

    def open(self, digest: bytes) -> int:
        """Open the file of a blob and return a descriptor, which the caller owns.

        Raises:
            FileNotFoundError: there is no such file.
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
            OSError: the file cannot be examined.
        """
        name = _name(digest)
        try:
            return os.stat(name, dir_fd=self._store_fd)
        except OSError as exc:
            raise self._located(exc, name) from exc

    def is_whole(self, blob: BlobFile) -> bool:
        """Whether the file of a blob exists with the recorded size.

        Raises:
            OSError: the file cannot be examined.
        """
        try:
            status = self.status(blob.digest)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == blob.size

    def place(self, digest: bytes, path: str) -> None:
        """Move the file at `path` to the place of a blob; it must be on the same file system.

        Raises:
            OSError: the file was not moved.
        """
        name = _name(digest)
        try:
            os.rename(path, name, dst_dir_fd=self._store_fd)
        except FileNotFoundError:
            self._make_directory(BLOBS_DIRECTORY)
            self._make_directory(name.rpartition("/")[0])
            os.rename(path, name, dst_dir_fd=self._store_fd)

    def remove(self, digest: bytes) -> None:
        """Remove the file of a blob, if there is one; descriptors of the file stay valid.

        Raises:
            OSError: the file cannot be removed.
        """
        name = _name(digest)
        try:
            os.unlink(name, dir_fd=self._store_fd)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise self._located(exc, name) from exc

    def sync(self) -> None:
        """Make all blob files durable, with their names and directories.

        This syncs the whole file system, which commits its journal once. Syncing file by file would
        commit it once per file.

        Raises:
            OSError: the disk failed.
        """
        fd = os.open(BLOBS_DIRECTORY, _DIRECTORY_FLAGS, dir_fd=self._store_fd)
        try:
            libc.syncfs(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the descriptor of the store; those of opened files are their owners' to close."""
        os.close(self._store_fd)

    def _make_directory(self, name: str) -> None:
        try:
            os.mkdir(name, _DIRECTORY_MODE, dir_fd=self._store_fd)
        except FileExistsError:
            return
        except OSError as exc:
            raise self._located(exc, name) from exc

    def _located(self, exc: OSError, name: str) -> OSError:
        # OSError picks the subclass by errno, so only the name differs from `exc`.
        return OSError(exc.errno, exc.strerror, str(self._path / name))


def _name(digest: bytes) -> str:
    name = digest.hex()
    return f"{BLOBS_DIRECTORY}/{name[:2]}/{name}"
