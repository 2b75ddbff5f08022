"""The supervisor's side of fork servers: starts one, requests processes, learns how they ended."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from appliance.protos.control_pb2 import (
    Attach,
    Envelope,
    SessionRecord,
    Spawn,
    SpawnSession,
    TakeOver,
)
from appliance.session.channel import VERSION, channel_pair
from appliance.session.link import Link, LinkClosedError, SocketEnd, close_all
from appliance.session.spawning import (
    CannotSpawnError,
    Exits,
    StartedWorker,
    WorkerExit,
    check_spawned,
    next_back_off_s,
)
from appliance.session.uplink import UpperEnd, uplink_pair
from appliance.supervisor.succession import SuccessorSocket

if TYPE_CHECKING:
    from collections.abc import Callable

_LOG = logging.getLogger(__name__)


class StartedSession(NamedTuple):
    """A session process that was just started. The caller of `spawn_session` owns it."""

    pid: int
    pidfd: int
    end: UpperEnd
    """The supervisor's side of its channel."""
    exit: "asyncio.Future[WorkerExit]"
    """Set when the process has ended."""


class Forker:
    """Spawns processes through a fork server, and starts another fork server if it dies.

    Args:
        log_level: the log level of the fork server and its children.
        log_json: whether they log JSON lines.
        store_path: an LMDB environment. No worker gets a process id that LMDB would take for
            another process in that environment.
        is_sandboxed: whether the fork server and its children have namespaces of their own.
        successors: where the next supervisor finds the fork server, owned; None: the fork server
            ends with this process.
    """

    def __init__(
        self,
        log_level: str = "INFO",
        *,
        log_json: bool = False,
        store_path: Path | None = None,
        is_sandboxed: bool = True,
        successors: SuccessorSocket | None = None,
    ) -> None:
        self._words = (
            log_level,
            "json" if log_json else "plain",
            store_path or "",
            "on" if is_sandboxed else "none",
        )
        self._successors = successors
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._exits = Exits()
        # The wait before the next fork server is started. It grows as long as fork servers end
        # before they have spawned a process.
        self._back_off_s = 0.0
        self._has_spawned = False
        self._is_closing = False
        self._discarded: set[asyncio.Task[None]] = set()
        self.num_started = 0
        """How many fork servers were started."""
        self._on_death: Callable[[], None] | None = None

    async def spawn(self, label: str = "") -> StartedWorker:
        """Start a worker that dies with the fork server; see `Spawner.spawn`."""
        return await self._spawn(Spawn(label=label, dies_with_fork_server=True))

    async def spawn_courier(self, label: str) -> StartedWorker:
        """Start a courier (`worker/courier.py`); see `Spawner.spawn`. `discard` ends it."""
        spawn = Spawn(label=label, dies_with_fork_server=True, is_courier=True)
        return await self._spawn(spawn)

    def discard(self, worker: StartedWorker) -> None:
        """Kill a process that is not needed any more (taken), without waiting for its end."""
        worker.kill()
        task = asyncio.create_task(_close_when_ended(worker))
        self._discarded.add(task)
        task.add_done_callback(self._discarded.discard)

    async def spawn_session(
        self, session: SessionRecord, kept_fds: Sequence[int]
    ) -> StartedSession:
        """Start a session process.

        Args:
            session: what the next supervisor will have to know, without the pid.
            kept_fds: what the next supervisor will need, lent; see `ServedSession.kept_fds`.

        Raises:
            LinkClosedError, CannotSpawnError: see `Spawner.spawn`.
        """
        try:
            pair = uplink_pair()
        except OSError as exc:
            raise _cannot_spawn(exc) from exc
        try:
            request = Envelope(spawn_session=SpawnSession(session=session))
            fds = [*pair.lower, *kept_fds]
            pid, (pidfd,) = await self._request(request, fds, 1)
        except BaseException:
            pair.upper.close()
            raise
        finally:
            pair.close_lower()
        return StartedSession(pid, pidfd, pair.upper, self._exits.expect(pid, pidfd))

    async def attach(
        self, session: SessionRecord, pidfd: int, kept_fds: Sequence[int]
    ) -> list[int]:
        """Have the fork server keep a session whose own one has died; descriptors are lent.

        Returns:
            The session process's side of a channel to the fork server: descriptors that the caller
            must send there, and close.

        Raises:
            LinkClosedError, CannotSpawnError: see `Spawner.spawn`.
        """
        request = Envelope(attach=Attach(session=session))
        _pid, fds = await self._request(request, [pidfd, *kept_fds], 2)
        return fds

    def when_it_dies(self, call: "Callable[[], None]") -> None:
        """Have `call` called after the death of each fork server that has spawned something."""
        self._on_death = call

    def start_ahead(self) -> None:
        """Start the fork server before it is needed, so that the first session need not wait."""
        if self._link is None:
            with contextlib.suppress(OSError):  # the first request tries again, and says why not
                self._start()

    def listen_for_successors(self) -> None:
        """Let the next supervisor find the fork server, which may not have been started yet.

        Raises:
            StoreError: the socket for that cannot be created in the state directory.
        """
        if self._successors is not None:
            self._successors.listen()

    async def answers(self, deadline_s: float) -> bool:
        """Return whether the fork server answers in time, should there be one."""
        link = self._link
        if link is None:
            return True
        # To hand over no session at all changes nothing.
        nothing = Envelope(take_over=TakeOver(version=VERSION))
        try:
            async with asyncio.timeout(deadline_s):
                await link.request(nothing)
        except TimeoutError:
            return False
        except LinkClosedError:
            pass  # it is being replaced
        return True

    async def warm_up(self) -> None:
        """Return when the fork server has imported everything that its children need."""
        try:
            worker = await self.spawn()
        except LinkClosedError:
            return  # the next `spawn` starts another fork server, or raises
        worker.sock.close()  # the worker ends, as its channel closes
        await worker.exit
        os.close(worker.pidfd)

    async def close(self, *, is_needed: bool = False) -> None:
        """End the channel to the fork server.

        Args:
            is_needed: whether sessions live on that still need it. Otherwise it ends.
        """
        self._is_closing = True
        if self._link is not None:
            self._link.close()
        if self._process is not None and not is_needed:
            await asyncio.to_thread(self._process.wait)
        if self._successors is not None:
            self._successors.close(is_needed=is_needed)

    async def _spawn(self, spawn: Spawn) -> StartedWorker:
        pid, (sock_fd, pidfd) = await self._request(Envelope(spawn=spawn), [], 2)
        sock = socket.socket(fileno=sock_fd)
        return StartedWorker(pid, pidfd, sock, self._exits.expect(pid, pidfd))

    async def _request(
        self, request: Envelope, fds: list[int], num_fds: int
    ) -> tuple[int, list[int]]:
        if self._link is None and self._back_off_s:
            await asyncio.sleep(self._back_off_s)
        try:
            link = self._link or self._start()
        except OSError as exc:
            raise _cannot_spawn(exc) from exc
        reply, reply_fds = await link.request_with_fds(request, fds)
        # The fork server may have ended right after its reply, and tells nothing any more.
        if self._link is not link:
            close_all(reply_fds)
            raise LinkClosedError
        check_spawned(reply.spawned, reply_fds, num_fds)
        self._has_spawned = True
        return reply.spawned.pid, reply_fds

    def _start(self) -> Link:
        ours, theirs = channel_pair()
        listener_fd = -1 if self._successors is None else self._successors.listen()
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
                    str(listener_fd),
                    *self._words,
                ],
                pass_fds=[fd for fd in (theirs.fileno(), listener_fd) if fd >= 0],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self._has_spawned = False
        self.num_started += 1
        self._link = Link(SocketEnd(ours), self._on_message, self._on_closed)
        return self._link

    def _on_message(self, envelope: Envelope, fds: list[int]) -> None:
        close_all(fds)
        if envelope.HasField("exited"):
            self._exits.told(envelope.exited)

    def _on_closed(self) -> None:
        self._link = None
        if self._is_closing:
            return  # pidfds of sessions that live on are closed by now
        self._exits.watch_all()
        self._back_off_s = 0.0 if self._has_spawned else next_back_off_s(self._back_off_s)
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            status = process.wait()
            if status not in (0, -signal.SIGKILL):
                _LOG.error("the fork server ended with status %d", status)
        if self._has_spawned and self._on_death is not None:
            self._on_death()


def _cannot_spawn(exc: OSError) -> CannotSpawnError:
    _LOG.error("cannot start a worker now: %s", exc.strerror)
    return CannotSpawnError(f"cannot start a worker: {exc.strerror}")


async def _close_when_ended(worker: StartedWorker) -> None:
    await worker.exit
    os.close(worker.pidfd)
