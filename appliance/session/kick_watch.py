"""Which queues a guest has kicked, seen without waking up for each kick.

Workers wait for kicks with edge-triggered epoll and never read the descriptors. An epoll of the
same kind that nobody waits on costs a guest next to nothing: the kernel notes the first kick, and
`kicked` returns it when it is called. `first_kick` waits for one, and is awaited only while all
queues of the device are quiet. Another epoll has the queues that have no worker yet.
"""

import asyncio
import contextlib
import os
import select
import stat
from collections.abc import Callable


class KickWatch:
    """The kick descriptors (lent) of the rings of one device.

    Raises:
        OSError: there is no free descriptor.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._unserved = select.epoll()
        self._calls: dict[int, Callable[[int], None]] = {}

    def add(self, fd: int) -> bool:
        """Watch `fd`, unless a front-end would not use such a file: looking at it might block.

        Returns:
            Whether it is watched.
        """
        mode = os.fstat(fd).st_mode
        if stat.S_IFMT(mode) == 0 or stat.S_ISSOCK(mode):  # an eventfd has no type
            with contextlib.suppress(OSError):
                self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)
                return True
        return False

    def remove(self, fd: int) -> None:
        """Stop watching `fd`, which must still be open."""
        with contextlib.suppress(OSError):  # it was not watched
            self._epoll.unregister(fd)

    def kicked(self) -> set[int]:
        """Return the descriptors that were kicked since they were added or the last call."""
        return {fd for fd, _events in self._epoll.poll(0)}

    async def first_kick(self) -> None:
        """Return when `kicked` has something to return."""
        loop = asyncio.get_running_loop()
        is_kicked = asyncio.Event()
        loop.add_reader(self._epoll.fileno(), is_kicked.set)
        try:
            await is_kicked.wait()
        finally:
            loop.remove_reader(self._epoll.fileno())

    def call_at_kicks(self, fd: int, call: Callable[[int], None]) -> None:
        """Have `call` called with the events of epoll at each kick, until `call_no_more`.

        If the descriptor was kicked before and not read, it is called for that, too. `add` has
        returned True for `fd`.

        Raises:
            OSError: it cannot be waited for.
        """
        self._unserved.register(fd, select.EPOLLIN | select.EPOLLET)
        if not self._calls:
            asyncio.get_running_loop().add_reader(self._unserved.fileno(), self._call)
        self._calls[fd] = call

    def call_no_more(self, fd: int) -> None:
        """End what `call_at_kicks` began; `fd` must still be open."""
        del self._calls[fd]
        self._unserved.unregister(fd)
        if not self._calls:
            asyncio.get_running_loop().remove_reader(self._unserved.fileno())

    def _call(self) -> None:
        for fd, events in self._unserved.poll(0):
            if fd in self._calls:
                self._calls[fd](events)

    def close(self) -> None:
        """Watch nothing any more."""
        self._epoll.close()
        self._unserved.close()
