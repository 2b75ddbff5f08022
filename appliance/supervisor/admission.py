"""Front-ends that must wait: for descriptors, or for the front-end that is served on their socket.

`DescriptorRoom` sets descriptors aside for each front-end before it is served, so that a front-end
is not let in only to fail half-way. `WaitingFrontEnds` keeps account
of front-ends that connected to a socket on which another one is still served.
"""

import asyncio
import contextlib
import logging
import resource
import select
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

_LOG = logging.getLogger(__name__)

# Per front-end: session memory and its mapping, three of the grants, the channel and the uplink to
# its session process, and its pidfd. What the front-end sends is held by that process.
_EACH_FRONT_END: Final = 8
# Per listener: its socket, and a connection that was accepted and waits.
_EACH_LISTENER: Final = 2
# Short-lived ones: those of a session process being started, of a client of `status`.
_TRANSIENT: Final = 8
# How often to look whether the limit has been raised.
_LOOK_AGAIN_S: Final = 1.0
# struct ucred (unix(7)): pid, uid, gid.
_UCRED: Final = struct.Struct("=iII")


# --- Waiting for descriptors ---


class DescriptorRoom:
    """Sets descriptors aside for each front-end that is served; others wait for their turn.

    If no front-end is served, the next one is always let in: a limit that is too low for the
    estimate may still be enough for a small front-end.
    """

    def __init__(self, *, num_open: int) -> None:
        """Count the descriptors that are open now, except for listeners.

        Args:
            num_open: the listeners that are open already; they are still to be added.
        """
        self._others = len(list(Path("/proc/self/fd").iterdir())) - num_open + _TRANSIENT
        self._num_served = 0
        self._turn = asyncio.Lock()
        self._left = asyncio.Event()

    def add_listener(self) -> None:
        """Set aside what a listener takes."""
        self._others += _EACH_LISTENER

    def remove_listener(self) -> None:
        """Use what a listener has taken for others."""
        self._others -= _EACH_LISTENER

    @contextlib.asynccontextmanager
    async def place(self, label: str) -> AsyncIterator[None]:
        """Wait until there is room for the front-end on socket `label`; keep it for the block."""
        async with self._turn:
            await self._wait(label)
            self._num_served += 1
        try:
            yield
        finally:
            self._num_served -= 1
            self._left.set()

    async def _wait(self, label: str) -> None:
        is_logged = False
        while self._needed() > _limit():
            if not is_logged:
                is_logged = True
                _LOG.warning(
                    "%s: RLIMIT_NOFILE is %d, but %d descriptors are needed to serve %d front-ends"
                    " and this one%s",
                    label,
                    _limit(),
                    self._needed(),
                    self._num_served,
                    "; it waits for one to leave" if self._num_served else "",
                )
            if not self._num_served:
                return
            self._left.clear()
            with contextlib.suppress(TimeoutError):  # look whether the limit has been raised
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await self._left.wait()

    def _needed(self) -> int:
        return self._others + _EACH_FRONT_END * (self._num_served + 1)


def _limit() -> int:
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft


# --- Waiting for the front-end on the same socket ---


class WaitingFrontEnds:
    """Front-ends that wait for the one served on their socket to leave, at most one per socket.

    The connections are lent: the caller of `add` closes them.
    """

    def __init__(self) -> None:
        self._socks: dict[str, socket.socket] = {}

    def add(self, label: str, sock: socket.socket) -> None:
        """Note and log that the front-end connected through `sock` waits on socket `label`."""
        self._socks[label] = sock
        _LOG.warning(
            "%s: a second front-end, process %d, waits until the one that is served leaves",
            label,
            _peer_pid(sock),
        )

    def remove(self, label: str) -> None:
        """Note that no front-end waits on socket `label` any more."""
        self._socks.pop(label, None)

    def report(self) -> list[dict[str, object]]:
        """Return the socket and pid of each front-end that waits and has not hung up."""
        return [
            {"socket": label, "pid": _peer_pid(sock)}
            for label, sock in self._socks.items()
            if not has_hung_up(sock)
        ]


def has_hung_up(sock: socket.socket) -> bool:
    """Return whether the front-end has closed its end of `sock`, or `sock` itself is closed."""
    if sock.fileno() < 0:
        return True
    poller = select.poll()
    poller.register(sock, 0)  # POLLHUP is reported even when no event is asked for
    return bool(poller.poll(0))


def _peer_pid(sock: socket.socket) -> int:
    pid, _uid, _gid = _UCRED.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    return int(pid)
