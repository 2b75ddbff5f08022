"""Who owns a file descriptor that a front-end passed.

A descriptor is owned from the moment recvmsg returned it: by `ReceivedFds` while its message is
handled, by whoever took it from there, or by an `FdHolder` for as long as a vring uses it.
"""

import os
from collections.abc import Iterable


class ReceivedFds:
    """The descriptors that came with one message; what nobody takes is closed with it."""

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds: list[int | None] = list(fds)

    def __len__(self) -> int:
        """Return how many descriptors came, taken or not."""
        return len(self._fds)

    def extend(self, fds: Iterable[int]) -> None:
        """Own `fds` too, numbered after those that are here."""
        self._fds.extend(fds)

    def take(self, index: int) -> int:
        """Return descriptor `index`; the caller owns it from here on.

        Raises:
            LookupError: there is no such descriptor, or it was taken before.
        """
        fd = self._fds[index]
        if fd is None:
            raise LookupError(f"descriptor {index} was taken before")
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
        """Own `fd` instead of the present descriptor, which is closed."""
        previous, self.fd = self.fd, fd
        if previous is not None:
            os.close(previous)

    def close(self) -> None:
        """Close the descriptor, if there is one."""
        self.replace(None)
