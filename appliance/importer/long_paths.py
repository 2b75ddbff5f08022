"""Paths longer than the kernel takes in one call (PATH_MAX)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# PATH_MAX is 4096 with the final NUL.
DIRECT_MAX: Final = 4000

_STEP_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def reachable(path: bytes) -> Iterator[tuple[int | None, bytes]]:
    """Give (dir_fd, path) to use in place of `path`; the fd is closed at the end."""
    dir_fd: int | None = None
    try:
        while len(path) > DIRECT_MAX:
            cut = path.rindex(b"/", 1, DIRECT_MAX)
            step = os.open(path[:cut], _STEP_FLAGS, dir_fd=dir_fd)
            if dir_fd is not None:
                os.close(dir_fd)
            dir_fd = step
            path = path[cut:].lstrip(b"/")
        yield dir_fd, path
    finally:
        if dir_fd is not None:
            os.close(dir_fd)


def open_at(path: bytes, flags: int) -> int:
    """Open `path`, of any length."""
    if len(path) <= DIRECT_MAX:
        return os.open(path, flags)
    with reachable(path) as (dir_fd, rest):
        return os.open(rest, flags, dir_fd=dir_fd)


def readlink(path: bytes) -> bytes:
    """Return the target of the symlink `path`, of any length."""
    if len(path) <= DIRECT_MAX:
        return os.readlink(path)  # noqa: PTH115 -- a Path is no bytes
    with reachable(path) as (dir_fd, rest):
        return os.readlink(rest, dir_fd=dir_fd)
