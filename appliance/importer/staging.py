"""Large files: the holes of the one that is read, and of the one that is staged in its place."""

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

# What `st_blocks` counts.
_BLOCK_SIZE: Final = 512
_CREATE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class StagingError(Exception):
    """Content could not be written to the disk of the store."""

    def __init__(self, path: str, cause: OSError) -> None:
        super().__init__(f"{path}: {cause.strerror}")
        self.kind = HashKind.FULL if cause.errno in FULL_ERRNOS else HashKind.FAILED


class StagingFile:
    """A file that is being staged; runs of zeros are holes in it.

    Args:
        directory: where.
        number: of the file.

    Raises:
        StagingError: it cannot be made; so do the methods.
    """

    def __init__(self, directory: str, number: int) -> None:
        self.number = number
        self._path = staged_path(directory, number)
        self._size = 0
        try:
            self._fd = os.open(self._path, _CREATE_FLAGS, 0o444)
        except OSError as exc:
            raise StagingError(self._path, exc) from exc

    def write(self, data: memoryview) -> None:
        """Write the next part; all but the last are a multiple of 4 KiB."""
        try:
            write_sparse(self._fd, data, self._size)
        except OSError as exc:
            raise StagingError(self._path, exc) from exc
        self._size += len(data)

    def skip(self, size: int) -> None:
        """Leave out `size` zeros, the next part."""
        self._size += size

    def finish(self) -> None:
        """End the file after what was written."""
        try:
            os.ftruncate(self._fd, self._size)
        except OSError as exc:
            raise StagingError(self._path, exc) from exc
        # The commit will wait for the disk, which can begin now. A hint: failures show there.
        libc.start_writeback(self._fd)

    def remove(self) -> None:
        """Remove the file."""
        os.unlink(self._path)  # noqa: PTH108 -- no Path is made for a file

    def close(self) -> None:
        """Close it; what was written stays."""
        os.close(self._fd)


class Holes:
    """The holes of an open file, asked for from its start to its end."""

    def __init__(self, fd: int, status: os.stat_result) -> None:
        self._fd = fd
        self._size = status.st_size
        # With as much on disk as its size a file has none, and need not be asked about them.
        self._is_sparse = status.st_blocks * _BLOCK_SIZE < status.st_size
        # Where data comes next, seen from where it was asked for last.
        self._data_at = 0

    def have(self, start: int, end: int) -> bool:
        """Whether all from `start` to `end` is known to be a hole."""
        if self._is_sparse and self._data_at <= start:
            self._data_at = self._find_data(start)
        return self._data_at >= end

    def _find_data(self, start: int) -> int:
        try:
            return os.lseek(self._fd, start, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return self._size
            self._is_sparse = False  # as far as this file system tells
            return start


# --- Where the hashing processes put the content of large files ---


def staged_path(directory: str, number: int) -> str:
    """Return where the staged file `number` of one hashing process is."""
    return f"{directory}/{number}"


def user_staging_directory() -> Path:
    """Return where to stage for a store that is elsewhere; swept of what was left there.

    Raises:
        StoreError: it cannot be made, or is not this user's alone.
    """
    import tempfile  # noqa: PLC0415 - slow to load, and one local store has no need of it

    # Of a known name, so that what a killed import left is found, where others write too.
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
