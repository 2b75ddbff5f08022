"""Open and list files below a directory without following symlinks, by the C module.

Paths are relative to an open directory and may have any length. Anybody who can write to a tree can
replace a directory in it with a symlink at any moment. If the kernel resolved paths below it by the
ordinary rules, an import could be made to read files outside the tree.
"""

import os
from collections.abc import Iterator
from typing import Final

from appliance._reader import ffi, lib

# Kinds of directory entries: the code points of the letters in `read_entries`.
FILE: Final = lib.READER_FILE
DIRECTORY: Final = lib.READER_DIRECTORY
SYMLINK: Final = lib.READER_SYMLINK

# Bytes that one call to list a directory fills; a larger buffer would not stay in the CPU's caches.
_LIST_SIZE: Final = 1 << 15


def open_beneath(root: int, path: bytes, flags: int) -> int:
    """Open `path` below the open directory `root`, or `root` itself if `path` is empty.

    Returns:
        A close-on-exec descriptor, which the caller owns.

    Raises:
        OSError: the file cannot be opened. With ELOOP, it is a symlink, or a directory on the way
            to it is.
    """
    return _checked(lib.reader_open(root, path, flags | os.O_CLOEXEC))


def read_entries(directory: int) -> Iterator[bytes]:
    """Yield the entries of an open directory in chunks, in the order the kernel lists them.

    A chunk is a sequence of entries. Each entry is the name, a NUL, a letter for the kind and a
    slash. The letter is `FILE`, `DIRECTORY` or `SYMLINK`, or another one if the kind is different
    or if the file system does not list kinds.

    Raises:
        OSError: the directory cannot be read.
    """
    buffer = bytearray(_LIST_SIZE)
    to = ffi.from_buffer("char[]", buffer)
    while size := _checked(lib.reader_list(directory, to, len(buffer))):
        yield bytes(memoryview(buffer)[:size])


def write_sparse(fd: int, data: memoryview, offset: int) -> None:
    """Write `data` to a new file at `offset`, and leave aligned 4 KiB blocks of zeros as holes.

    Holes at the end do not extend the file, so the caller must set its size.

    Args:
        fd: a file that has no data from `offset` on.
        data: the bytes to write.
        offset: a multiple of 4 KiB.

    Raises:
        OSError: the data cannot be written.
    """
    _checked(lib.reader_write_sparse(fd, ffi.from_buffer(data), len(data), offset))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
