"""The supervisor's side of the fork server: asks it for workers, hears of their ends."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

from appliance.protos.control_pb2 import Envelope, Spawn
from appliance.session.channel import channel_pair
from appliance.supervisor.link import Link, LinkClosedError

_LOG = logging.getLogger(__name__)

_BACK_OFF_S: Final = 0.05
_BACK_OFF_LIMIT_S: Final = 2.0


def next_back_off_s(back_off_s: float) -> float:
    """Return how long to wait after one more failure, if the wait was `back_off_s` before it."""
    return min(max(_BACK_OFF_S, 2 * back_off_s), _BACK_OFF_LIMIT_S)


class CannotSpawnError(LinkClosedError):
    """There is no descriptor, or no process, for a worker now; the text says which."""


class StartedWorker(NamedTuple):
    """A worker that was just started; the socket is the receiver's."""

    pid: int
    sock: socket.socket
    """Our end of its control channel."""
    exit: "asyncio.Future[WorkerExit]"


class WorkerExit(NamedTuple):
    """How a worker ended."""

    status: int
    """Its exit status, or minus the number of the signal that killed it."""
    is_orphan: bool = False
    """Whether it was killed because its fork server ended."""


class Forker:
    """Spawns workers through a fork server, which is started anew should it die.

    The fork server and its workers log as the arguments say. No worker has a process id that LMDB
    takes for another process in the environment at `store_path`, if that is given.
    """

    def __init__(
        self, log_level: str = "INFO", *, log_json: bool = False, store_path: Path | None = None
    ) -> None:
        self._words = (log_level, "json" if log_json else "plain", store_path or "")
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._exits: dict[int, asyncio.Future[WorkerExit]] = {}
        # Grows while fork servers end before they have spawned anything.
        self._back_off_s = 0.0
        self._has_spawned = False

    async def spawn(self, label: str = "") -> StartedWorker:
        """Start a worker, whose log lines are said to come from `label`.

        Raises:
            LinkClosedError: the fork server died meanwhile; call again.
            CannotSpawnError: no descriptor or process is to be had now; call again later.
        """
        if self._link is None and self._back_off_s:
            await asyncio.sleep(self._back_off_s)
        try:
            link = self._link or self._start()
            ours, theirs = channel_pair()
        except OSError as exc:
            _LOG.error("no worker can be started now: %s", exc.strerror)
            raise CannotSpawnError(f"no worker can be started: {exc.strerror}") from exc
        with theirs:
            try:
                reply = await link.request(Envelope(spawn=Spawn(label=label)), [theirs.fileno()])
                # Its end may have come with its answer: then nobody would tell of the worker's.
                if self._link is not link:
                    raise LinkClosedError
                if reply.spawned.pid < 0:
                    raise CannotSpawnError("no worker can be started: it cannot be forked")
            except LinkClosedError:
                ours.close()
                raise
        self._has_spawned = True
        return StartedWorker(reply.spawned.pid, ours, self._exit_of(reply.spawned.pid))

    async def warm_up(self) -> None:
        """Return when the fork server has imported all that workers need, and spawns them."""
        try:
            worker = await self.spawn()
        except LinkClosedError:
            return  # the next worker starts another, and says why if it cannot
        worker.sock.close()  # a worker that is told nothing ends
        await worker.exit

    async def close(self) -> None:
        """End the fork server; all workers must have been closed before."""
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)

    def _start(self) -> Link:
        ours, theirs = channel_pair()
        # A fresh interpreter, not a fork of this one: this process has threads, a loop and LMDB
        # envs. It finds modules where this process does, so it is the same program.
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",  # the working directory is not a place to import from
                    "-m",
                    "appliance.worker.forkserver",
                    str(theirs.fileno()),
                    str(os.getpid()),
                    *self._words,
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self._has_spawned = False
        self._link = Link(ours, self._on_message, self._on_closed)
        return self._link

    def _on_message(self, envelope: Envelope) -> None:
        self._exit_of(envelope.exited.pid).set_result(WorkerExit(envelope.exited.status))

    def _exit_of(self, pid: int) -> "asyncio.Future[WorkerExit]":
        # Asked for twice, by spawn() and by the exit, in either order: the second one takes it out.
        future = self._exits.pop(pid, None)
        if future is None:
            future = self._exits[pid] = asyncio.get_running_loop().create_future()
        return future

    def _on_closed(self) -> None:
        # Its workers die with it (parent-death signal) and are replaced through the next fork
        # server.
        self._link = None
        self._back_off_s = 0.0 if self._has_spawned else next_back_off_s(self._back_off_s)
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            status = process.wait()
            if status not in (0, -signal.SIGKILL):
                _LOG.error("the fork server ended with status %d", status)
        for future in self._exits.values():
            if not future.done():
                future.set_result(WorkerExit(-int(signal.SIGKILL), is_orphan=True))
        self._exits.clear()
