"""A session process's way to its fork server, and to the next one when that has ended."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Final

from appliance.protos import control_pb2 as pb
from appliance.session.link import Link, LinkClosedError, close_all
from appliance.session.spawning import CannotSpawnError, Exits, StartedWorker, check_spawned
from appliance.session.uplink import LowerEnd

# How long to wait for the supervisor to provide another fork server.
_ABSENCE_S: Final = 30.0


class ForkClient:
    """A `Spawner`. Workers outlive the fork server that started them.

    Args:
        on_new_supervisor: called when another supervisor has taken the session over, with the
            descriptors (taken) of this side of the channel to it; see `lower_end_of`.
    """

    def __init__(self, on_new_supervisor: Callable[[list[int]], None]) -> None:
        self._on_new_supervisor = on_new_supervisor
        self._link: Link | None = None
        self._is_there = asyncio.Event()
        self._exits = Exits()

    def connect(self, end: LowerEnd) -> None:
        """Use the fork server at the other side of `end`, which is taken, from now on."""
        if self._link is not None:
            self._link.close()
        self._link = Link(end, self._on_message, self._on_closed)
        self._is_there.set()

    async def spawn(self, label: str) -> StartedWorker:
        """See `Spawner.spawn`."""
        try:
            async with asyncio.timeout(_ABSENCE_S):
                await self._is_there.wait()
        except TimeoutError as exc:
            raise CannotSpawnError("cannot start a worker: there is no fork server") from exc
        link = self._link
        if link is None:
            raise LinkClosedError
        reply, fds = await link.request_with_fds(pb.Envelope(spawn=pb.Spawn(label=label)))
        check_spawned(reply.spawned, fds, 2)
        pid, (sock_fd, pidfd) = reply.spawned.pid, fds
        exit_ = self._exits.expect(pid, pidfd)
        if self._link is not link:
            self._exits.watch_all()  # the fork server has ended right after its reply
        return StartedWorker(pid, pidfd, socket.socket(fileno=sock_fd), exit_)

    def close(self) -> None:
        """End the channel. All workers must have been closed before."""
        if self._link is not None:
            self._link.close()

    def _on_message(self, envelope: pb.Envelope, fds: list[int]) -> None:
        if envelope.HasField("exited"):
            self._exits.told(envelope.exited)
        elif envelope.HasField("new_peer") and len(fds) == 2:
            self._on_new_supervisor(fds)
            return
        close_all(fds)

    def _on_closed(self) -> None:
        self._link = None
        self._is_there.clear()
        self._exits.watch_all()


def lower_end_of(fds: list[int]) -> LowerEnd:
    """Return this side of the channel that was received as two descriptors, which it owns."""
    sock_fd, pipe_fd = fds
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(fileno=sock_fd))
        end = LowerEnd(sock, pipe_fd)
        stack.pop_all()
    return end
