"""Staging: copies of large contents, as sparse files that a commit moves or removes.

A hashing process writes a `StagingFile` for each large content, and asks `Holes` which parts of the
file that it reads need not be read. The files of a hashing process have consecutive numbers in a
directory of its own, below `tmp/` of a local store or below `user_staging_directory`.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Final

from appliance.errors import FULL_ERRNOS, StoreError
from appliance.importer.beneath import write_sparse
from appliance.importer.records import HashKind
from appliance.store.temp_directory import sweep
from appliance.system import libc
from appliance.system.clones import clone_file

# Bytes of the unit that `st_blocks` counts.
_BLOCK_SIZE: Final = 512
_CREATE_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class StagingError(Exception):
    """Content could not be written to the staging directory; `kind` is FULL or FAILED."""

    def __init__(self, path: str, cause: OSError) -> None:
        super().__init__(f"{path}: {cause.strerror}")
        self.kind = HashKind.FULL if cause.errno in FULL_ERRNOS else HashKind.FAILED


class StagingFile:
    """A file that is being staged; blocks of zeros become holes.

    Args:
        directory: an existing directory.
        number: names the file in it.

    Raises:
        StagingError: the file cannot be created. `write` and `finish` raise it as well.
    """

    def __init__(self, directory: str, number: int) -> None:
        self.number = number
        self._path = staged_path(directory, number)
        self._size = 0
        self._is_clone = False
        try:
            self._fd = os.open(self._path, _CREATE_FLAGS, 0o444)
        except OSError as exc:
            raise StagingError(self._path, exc) from exc

    def clone(self, fd: int, size: int) -> int | None:
        """Make the file a clone of another one, where the file system can.

        From then on, `write` and `skip` only count. The content is to be read from the clone, which
        does not change while it is read, as the original may.

        Args:
            fd: the file to clone; it stays the caller's.
            size: the size in bytes that it must have.

        Returns:
            The descriptor of the clone, which stays this object's; None if there is no clone.
        """
        try:
            if not clone_file(fd, self._fd):
                return None
            if os.fstat(self._fd).st_size != size:
                os.ftruncate(self._fd, 0)
                return None
        except OSError as exc:
            raise StagingError(self._path, exc) from exc
        self._is_clone = True
        return self._fd

    def write(self, data: memoryview) -> None:
        """Append `data`; the sizes of all parts but the last must be multiples of 4 KiB."""
        if self._is_clone:
            self._size += len(data)
            return
        try:
            write_sparse(self._fd, data, self._size)
        except OSError as exc:
            raise StagingError(self._path, exc) from exc
        self._size += len(data)

    def skip(self, size: int) -> None:
        """Append `size` zeros as a hole; the rule for sizes is that of `write`."""
        self._size += size

    def finish(self) -> None:
        """Set the size of the file, and start writing it to the disk."""
        try:
            os.ftruncate(self._fd, self._size)
        except OSError as exc:
            raise StagingError(self._path, exc) from exc
        # The commit waits until the data is on the disk, so writing it begins now. Failures can be
        # ignored, because the commit sees them.
        libc.start_writeback(self._fd)

    def remove(self) -> None:
        """Remove the file."""
        os.unlink(self._path)  # noqa: PTH108 -- no Path is made for a file

    def close(self) -> None:
        """Close the descriptor; the file stays."""
        os.close(self._fd)


class Holes:
    """Finds the holes of an open file, from its start to its end.

    Args:
        fd: the file; it stays the caller's.
        status: its status.
    """

    def __init__(self, fd: int, status: os.stat_result) -> None:
        self._fd = fd
        self._size = status.st_size
        # A file that occupies at least its size on the disk has no holes to be looked for.
        self._is_sparse = status.st_blocks * _BLOCK_SIZE < status.st_size
        # The offset of the next data at or after the last offset that was looked up.
        self._data_at = 0

    def have(self, start: int, end: int) -> bool:
        """Return whether the bytes from `start` to `end` are known to be a hole.

        `start` must not decrease from call to call.
        """
        if self._is_sparse and self._data_at <= start:
            self._data_at = self._find_data(start)
        return self._data_at >= end

    def _find_data(self, start: int) -> int:
        try:
            return os.lseek(self._fd, start, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return self._size
            self._is_sparse = False  # the file system does not support SEEK_DATA
            return start


# --- Where files are staged ---


def staged_path(directory: str, number: int) -> str:
    """Return the path of the staged file `number` in the `directory` of a hashing process."""
    return f"{directory}/{number}"


def user_staging_directory() -> Path:
    """Return the directory to stage in when there is no local store to stage in.

    It is created if it does not exist. What imports that were killed have left there is removed.

    Raises:
        StoreError: the directory cannot be created, or others than this user can write to it.
    """
    import tempfile  # noqa: PLC0415 - slow to import, and not needed for a local store

    # The name is predictable, so that what a killed import has left can be found. Since others can
    # write to its parent, too, owner and mode are checked.
    path = Path(tempfile.gettempdir()) / f"appliance-import-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as exc:
        raise StoreError(f"{path}: {exc.strerror}") from exc
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise StoreError(f"{path}: not a directory that only this user can write to")
    sweep(path)
    return path
