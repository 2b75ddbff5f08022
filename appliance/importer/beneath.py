"""Files below a directory that somebody else may be changing: nothing here follows a symlink.

Paths are relative to an open directory, and of any length. Whoever can write to a tree may exchange
a directory in it for a symlink at any moment, so a path below it must not be resolved by the
ordinary rules.
"""

import os
from collections.abc import Iterator
from typing import Final

from appliance._reader import ffi, lib

# Kinds of entries, as numbers.
FILE: Final = lib.READER_FILE
DIRECTORY: Final = lib.READER_DIRECTORY
SYMLINK: Final = lib.READER_SYMLINK

# What one call fills: more would be in no cache.
_LIST_SIZE: Final = 1 << 15


def open_beneath(root: int, path: bytes, flags: int) -> int:
    """Open `path` below the open directory `root`, or `root` itself if it is empty.

    Raises:
        OSError: it cannot be opened; ELOOP: it, or a directory on the way to it, is a symlink.
    """
    return _checked(lib.reader_open(root, path, flags | os.O_CLOEXEC))


def read_entries(directory: int) -> Iterator[bytes]:
    """Read an open directory, and yield its entries, in no order, some at a time.

    Each is the name, NUL, a letter for the kind (`FILE`, `DIRECTORY`, `SYMLINK`, or another one if
    it is something else or not known), and a slash.

    Raises:
        OSError: it cannot be read.
    """
    buffer = bytearray(_LIST_SIZE)
    to = ffi.from_buffer("char[]", buffer)
    while size := _checked(lib.reader_list(directory, to, len(buffer))):
        yield bytes(memoryview(buffer)[:size])


def write_sparse(fd: int, data: memoryview, offset: int) -> None:
    """Write to a new file at `offset`, a multiple of 4 KiB; aligned blocks of zeros stay holes.

    The caller sets the size of the file.

    Raises:
        OSError: the disk does not take it.
    """
    _checked(lib.reader_write_sparse(fd, ffi.from_buffer(data), len(data), offset))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
