"""Which queues a guest has kicked, seen without waking up for each kick.

Workers wait for kicks with edge-triggered epoll and never read the descriptors. An epoll of the
same kind that nobody waits on costs a guest next to nothing: the kernel notes the first kick, and
`kicked` returns it when it is called. `first_kick` waits for one, and is awaited only while all
guests of the device are quiet.
"""

import asyncio
import contextlib
import os
import select
import stat


class KickWatch:
    """The kick descriptors (lent) of the rings of one device.

    Raises:
        OSError: there is no free descriptor.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()

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

    def close(self) -> None:
        """Watch nothing any more."""
        self._epoll.close()


def is_readable(fd: int) -> bool:
    """Return whether `fd`, which is watched, was kicked and not read since."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))
