"""Ownership of the file descriptors that a front-end passes.

A descriptor always has an owner from the moment that recvmsg returns it: `ReceivedFds` while its
message is handled; then the caller that took it from there, or an `FdHolder` as long as a vring
uses it. What is never taken is closed with its message.

Spec: vhost-user: Communication.
"""

import mmap
import os
from collections.abc import Iterable
from typing import Final

from appliance.errors import VhostError

_SIZE_MAX: Final = (1 << 63) - 1


class ReceivedFds:
    """Owns the descriptors that came with one message until they are taken or closed."""

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds: list[int | None] = list(fds)

    def __len__(self) -> int:
        """Return how many descriptors came, whether or not they were taken."""
        return len(self._fds)

    def extend(self, fds: Iterable[int]) -> None:
        """Take ownership of `fds`, which get the next indices."""
        self._fds.extend(fds)

    def take(self, index: int) -> int:
        """Return the descriptor at `index`; the caller owns it from now on.

        Raises:
            LookupError: there is no descriptor at `index`, or it has been taken.
        """
        fd = self._fds[index]
        if fd is None:
            raise LookupError(f"descriptor {index} has been taken")
        self._fds[index] = None
        return fd

    def close(self) -> None:
        """Close every descriptor that was not taken."""
        for index, fd in enumerate(self._fds):
            if fd is not None:
                self._fds[index] = None
                os.close(fd)


class FdHolder:
    """Owns at most one descriptor."""

    def __init__(self) -> None:
        self.fd: int | None = None

    def replace(self, fd: int | None) -> None:
        """Take ownership of `fd`, if it is not None, and close the previous descriptor."""
        previous, self.fd = self.fd, fd
        if previous is not None:
            os.close(previous)

    def close(self) -> None:
        """Close the descriptor, if there is one."""
        self.replace(None)


def check_file_size(name: str, fd: int, offset: int, size: int) -> None:
    """Check that a file can be mapped from `offset` on for `size` bytes.

    An access beyond the end of its file raises SIGBUS.

    Raises:
        VhostError: it cannot; the text begins with `name`.
    """
    if not 0 < size <= _SIZE_MAX - offset or offset % mmap.PAGESIZE:
        raise VhostError(
            f"{name}: {size} bytes at 0x{offset:x}, expected at least one, at a multiple of "
            f"{mmap.PAGESIZE}"
        )
    file_size = os.fstat(fd).st_size
    if file_size < offset + size:
        raise VhostError(
            f"{name}: its file has {file_size} bytes, expected at least {offset + size}"
        )
