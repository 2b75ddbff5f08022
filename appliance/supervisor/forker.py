"""The supervisor's side of the fork server: asks it for workers, hears of their ends."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys

from appliance.protos.control_pb2 import Envelope, Spawn
from appliance.session.channel import channel_pair
from appliance.supervisor.link import Link, LinkClosedError

_LOG = logging.getLogger(__name__)


class Forker:
    """Spawns workers through a fork server, which is started anew should it die."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._exits: dict[int, asyncio.Future[int]] = {}
        # Why the last attempt failed, which is logged once.
        self._reason = ""

    async def spawn(self) -> tuple[int, socket.socket, "asyncio.Future[int]"]:
        """Start a worker.

        Returns:
            Its pid, our end of its control channel, and a future of its exit code (minus the signal
            number for a killed one).

        Raises:
            LinkClosedError: the fork server died meanwhile, or no descriptor or process is to be
                had now, as its text says; call again.
        """
        try:
            link = self._link or self._start()
            ours, theirs = channel_pair()
        except OSError as exc:
            if exc.strerror != self._reason:
                _LOG.error("no worker can be started now: %s", exc.strerror)
            self._reason = exc.strerror or ""
            raise LinkClosedError(f"no worker can be started: {exc.strerror}") from exc
        self._reason = ""
        with theirs:
            try:
                reply = await link.request(Envelope(spawn=Spawn()), [theirs.fileno()])
                # Its end may have come with its answer: then nobody would tell of the worker's.
                if self._link is not link or reply.spawned.pid < 0:
                    raise LinkClosedError
            except LinkClosedError:
                ours.close()
                raise
        return reply.spawned.pid, ours, self._exit_of(reply.spawned.pid)

    async def warm_up(self) -> None:
        """Return when the fork server has imported all that workers need, and spawns them."""
        try:
            _pid, sock, exit_ = await self.spawn()
        except LinkClosedError:
            return  # the next worker starts another, and says why if it cannot
        sock.close()  # a worker that is told nothing ends
        await exit_

    async def close(self) -> None:
        """End the fork server; all workers must have been closed before."""
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)

    def _start(self) -> Link:
        ours, theirs = channel_pair()
        # A fresh interpreter, not a fork of this one: this process has threads, a loop and LMDB
        # envs.
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",  # the working directory is not a place to import from
                    "-m",
                    "appliance.worker.forkserver",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._link = Link(ours, self._on_message, self._on_closed)
        return self._link

    def _on_message(self, envelope: Envelope) -> None:
        self._exit_of(envelope.exited.pid).set_result(envelope.exited.status)

    def _exit_of(self, pid: int) -> "asyncio.Future[int]":
        # Asked for twice, by spawn() and by the exit, in either order: the second one takes it out.
        future = self._exits.pop(pid, None)
        if future is None:
            future = self._exits[pid] = asyncio.get_running_loop().create_future()
        return future

    def _on_closed(self) -> None:
        # Its workers die with it (parent-death signal) and are replaced through the next fork
        # server.
        self._link = None
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            status = process.wait()
            if status not in (0, -signal.SIGKILL):
                _LOG.error("the fork server ended with status %d", status)
        for future in self._exits.values():
            if not future.done():
                future.set_result(-int(signal.SIGKILL))
        self._exits.clear()
