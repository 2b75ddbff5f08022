"""Finding the holes of a file, so that their zeros need not be read."""

import errno
import os
from typing import Final

# What `st_blocks` counts.
_BLOCK_SIZE: Final = 512


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
