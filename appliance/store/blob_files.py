"""The files of blobs that are too large for LMDB.

All files are reached through a descriptor of the store's directory, opened once. So they are still
found after that directory was moved, and another directory in its old place is never mistaken for
it. The descriptor is not one of `blobs/`: in a store that somebody else writes to, the first commit
of a large blob makes that directory, and a reader may have opened the store before.

A process that gives up its user goes by a descriptor of `blobs/` instead (`enter_blobs`), because
only the owner and the group of a store may search its directory. Everything below `blobs/` can be
read by everybody who gets that far, whatever the umask of the process that put it there.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from appliance.store.schema import BLOBS_DIRECTORY

_STORE_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC
_PATH_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY_MODE: Final = 0o755
_FILE_MODE: Final = 0o444
_FILE_NAME: Final = re.compile(r"[0-9a-f]{64}")
_PARTIAL_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC
_PARTIAL_MODE: Final = 0o644
_PREFIX_SIZE: Final = len(BLOBS_DIRECTORY) + 1
_OTHERS_SEARCH: Final = 0o001
_OTHERS_READ: Final = 0o004


class BlobFile(NamedTuple):
    """A blob kept in a file. If the file does not have exactly `size` bytes, the blob is absent.

    Of a blob that is there in part, `digest` is the key that names its file (see `partial_blob`).
    """

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
        self._blobs_fd: int | None = None

    def open(self, digest: bytes) -> int:
        """Open the file of a blob and return a descriptor, which the caller owns.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the file cannot be opened.
        """
        name = _name(digest)
        try:
            if self._blobs_fd is not None:
                return os.open(name[_PREFIX_SIZE:], _FILE_FLAGS, dir_fd=self._blobs_fd)
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
        os.chmod(path, _FILE_MODE)  # noqa: PTH101 -- no Path is made for a file
        try:
            os.rename(path, name, dst_dir_fd=self._store_fd)
        except FileNotFoundError:
            self._make_directory(BLOBS_DIRECTORY)
            self._make_directory(name.rpartition("/")[0])
            os.rename(path, name, dst_dir_fd=self._store_fd)

    def open_partial(self, key: bytes, size: int, *, create: bool) -> int:
        """Open the file of a blob that is there in part, and return a descriptor for writing.

        Args:
            key: names the file, see `store.partial_blob`.
            size: what the file is extended to, in bytes.
            create: make the file if it is missing.

        Returns:
            The descriptor, which the caller owns.

        Raises:
            FileNotFoundError: there is no such file, and `create` is not set.
            OSError: the file cannot be opened.
        """
        name = _name(key)
        try:
            if create:
                self._make_directory(BLOBS_DIRECTORY)
                self._make_directory(name.rpartition("/")[0])
            flags = _PARTIAL_FLAGS | os.O_CREAT if create else _PARTIAL_FLAGS
            fd = os.open(name, flags, _PARTIAL_MODE, dir_fd=self._store_fd)
        except OSError as exc:
            raise self._located(exc, name) from exc
        try:
            os.fchmod(fd, _PARTIAL_MODE)
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def complete(self, key: bytes, digest: bytes) -> None:
        """Move the file of a blob that was there in part to the place of the blob.

        Raises:
            OSError: the file was not moved.
        """
        old, new = _name(key), _name(digest)
        os.chmod(old, _FILE_MODE, dir_fd=self._store_fd)
        os.rename(old, new, src_dir_fd=self._store_fd, dst_dir_fd=self._store_fd)

    def remove(self, digest: bytes) -> bool:
        """Remove the file of a blob; descriptors of the file stay valid.

        Returns:
            Whether there was one.

        Raises:
            OSError: the file cannot be removed.
        """
        name = _name(digest)
        try:
            os.unlink(name, dir_fd=self._store_fd)
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise self._located(exc, name) from exc
        return True

    def digests(self) -> Iterator[list[bytes]]:
        """Yield the digests that files are named by, directory by directory; other names are left.

        Raises:
            OSError: a directory cannot be read.
        """
        for prefix in range(256):
            name = f"{BLOBS_DIRECTORY}/{prefix:02x}"
            try:
                fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=self._store_fd)
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise self._located(exc, name) from exc
            try:
                names = os.listdir(fd)  # noqa: PTH208 -- as above
            finally:
                os.close(fd)
            yield [bytes.fromhex(file) for file in names if _FILE_NAME.fullmatch(file)]

    def sync(self) -> None:
        """Make all blob files durable, with their names and directories.

        This syncs the whole file system, which commits its journal once. Syncing file by file would
        commit it once per file.

        Raises:
            OSError: the disk failed.
        """
        from appliance.system import libc  # noqa: PLC0415 - ctypes is slow to load

        fd = os.open(BLOBS_DIRECTORY, _DIRECTORY_FLAGS, dir_fd=self._store_fd)
        try:
            libc.syncfs(fd)
        finally:
            os.close(fd)

    def statvfs(self) -> os.statvfs_result:
        """Return the figures of the file system that the store is on.

        Raises:
            OSError: fstatvfs(3) failed.
        """
        return os.statvfs(self._store_fd)

    def close(self) -> None:
        """Close the descriptor of the store; those of opened files are their owners' to close."""
        os.close(self._store_fd)
        if self._blobs_fd is not None:
            os.close(self._blobs_fd)

    # --- Readers that give up their user ---

    def make_directory(self) -> None:
        """Make `blobs/` if it is missing, so that readers can enter it.

        Raises:
            OSError: it cannot be made.
        """
        self._make_directory(BLOBS_DIRECTORY)

    def enter_blobs(self) -> int:
        """Find files through a descriptor of `blobs/` from now on, and return it (lent).

        If there is no such directory, nothing changes, and the descriptor is that of the store.

        Raises:
            OSError: the directory cannot be opened.
        """
        if self._blobs_fd is None:
            try:
                self._blobs_fd = os.open(BLOBS_DIRECTORY, _PATH_FLAGS, dir_fd=self._store_fd)
            except FileNotFoundError:
                return self._store_fd
        return self._blobs_fd

    def directory(self) -> tuple[int, int]:
        """Return the descriptor (lent) through which files are found, for other code to use.

        The second value is the number of bytes at the start of the names that `schema` describes
        which the descriptor stands for: 0 if it is the store's directory, 6 if it is `blobs/`.
        """
        if self._blobs_fd is not None:
            return self._blobs_fd, _PREFIX_SIZE
        return self._store_fd, 0

    def private_to(self) -> tuple[int, int] | None:
        """Return the uid and gid of the owner if other users cannot read the files, else None.

        Earlier releases applied the umask to the modes. They are examined for each directory and
        for one file in it.

        Raises:
            OSError: a directory cannot be examined.
        """
        try:
            fd = os.open(BLOBS_DIRECTORY, _DIRECTORY_FLAGS, dir_fd=self._store_fd)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(fd)
            is_public = status.st_mode & _OTHERS_SEARCH and all(
                _is_public(name, fd)
                for name in os.listdir(fd)  # noqa: PTH208 -- as above
            )
        finally:
            os.close(fd)
        return None if is_public else (status.st_uid, status.st_gid)

    def _make_directory(self, name: str) -> None:
        try:
            os.mkdir(name, _DIRECTORY_MODE, dir_fd=self._store_fd)
            os.chmod(name, _DIRECTORY_MODE, dir_fd=self._store_fd)
        except FileExistsError:
            return
        except OSError as exc:
            raise self._located(exc, name) from exc

    def _located(self, exc: OSError, name: str) -> OSError:
        # OSError picks the subclass by errno, so only the name differs from `exc`.
        return OSError(exc.errno, exc.strerror, str(self._path / name))


def _is_public(name: str, blobs_fd: int) -> bool:
    fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=blobs_fd)
    try:
        if not os.fstat(fd).st_mode & _OTHERS_SEARCH:
            return False
        with os.scandir(fd) as files:
            file = next(files, None)
            return file is None or bool(file.stat().st_mode & _OTHERS_READ)
    finally:
        os.close(fd)


def _name(digest: bytes) -> str:
    name = digest.hex()
    return f"{BLOBS_DIRECTORY}/{name[:2]}/{name}"
