"""The supervisor's side of the fork server: requests workers and learns how they ended."""

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
    """Return the wait before the next attempt, in seconds, given the wait before the last one.

    The first wait is 0.05 s; each doubles the one before it, up to 2 s.
    """
    return min(max(_BACK_OFF_S, 2 * back_off_s), _BACK_OFF_LIMIT_S)


class CannotSpawnError(LinkClosedError):
    """No descriptor or process is available for a worker at the moment; the text says which."""


class StartedWorker(NamedTuple):
    """A worker process that was just started."""

    pid: int
    sock: socket.socket
    """The supervisor's end of its control channel; the caller of `spawn` owns it."""
    exit: "asyncio.Future[WorkerExit]"
    """Set when the process has ended."""


class WorkerExit(NamedTuple):
    """How a worker process ended."""

    status: int
    """The exit status, or the negated number of the signal that killed the process."""
    is_orphan: bool = False
    """Whether the process was killed because its fork server had ended."""


class Forker:
    """Spawns workers through a fork server, and starts another fork server if it dies.

    Args:
        log_level: the log level of the fork server and its workers.
        log_json: whether they log JSON lines.
        store_path: an LMDB environment. No worker gets a process id that LMDB would take for
            another process in that environment.
    """

    def __init__(
        self, log_level: str = "INFO", *, log_json: bool = False, store_path: Path | None = None
    ) -> None:
        self._words = (log_level, "json" if log_json else "plain", store_path or "")
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._exits: dict[int, asyncio.Future[WorkerExit]] = {}
        # The wait before the next fork server is started. It grows as long as fork servers end
        # before they have spawned a worker.
        self._back_off_s = 0.0
        self._has_spawned = False

    async def spawn(self, label: str = "") -> StartedWorker:
        """Start a worker; `label` is the source that its log lines show.

        Raises:
            LinkClosedError: the fork server died meanwhile. The caller may try again at once.
            CannotSpawnError: no descriptor or process is available. The caller may try again later.
        """
        if self._link is None and self._back_off_s:
            await asyncio.sleep(self._back_off_s)
        try:
            link = self._link or self._start()
            ours, theirs = channel_pair()
        except OSError as exc:
            _LOG.error("cannot start a worker now: %s", exc.strerror)
            raise CannotSpawnError(f"cannot start a worker: {exc.strerror}") from exc
        with theirs:
            try:
                reply = await link.request(Envelope(spawn=Spawn(label=label)), [theirs.fileno()])
                # The fork server may have ended right after its reply. The worker then dies with
                # it, and no message about the worker's end would come.
                if self._link is not link:
                    raise LinkClosedError
                if reply.spawned.pid < 0:
                    raise CannotSpawnError("cannot start a worker: the fork server cannot fork")
            except LinkClosedError:
                ours.close()
                raise
        self._has_spawned = True
        return StartedWorker(reply.spawned.pid, ours, self._exit_of(reply.spawned.pid))

    async def warm_up(self) -> None:
        """Return when the fork server has imported everything that workers need."""
        try:
            worker = await self.spawn()
        except LinkClosedError:
            return  # the next `spawn` starts another fork server, or raises
        worker.sock.close()  # the worker ends, as its channel closes
        await worker.exit

    async def close(self) -> None:
        """End the fork server. All workers must have been closed before."""
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)

    def _start(self) -> Link:
        ours, theirs = channel_pair()
        # A new interpreter rather than a fork, because this process has threads, an event loop and
        # open LMDB environments. It has the same module search path, so it runs the same code.
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",  # do not import from the working directory
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
        # Called twice per worker, by `spawn` and for the message about its end, in either order:
        # the first call creates the future, the second removes it from the table.
        future = self._exits.pop(pid, None)
        if future is None:
            future = self._exits[pid] = asyncio.get_running_loop().create_future()
        return future

    def _on_closed(self) -> None:
        # The workers of this fork server die with it (parent-death signal). `WorkerProcess`
        # replaces them through the next fork server.
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
