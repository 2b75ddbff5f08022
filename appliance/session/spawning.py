"""What those who need processes of a fork server have in common, wherever they are."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
from typing import Final, NamedTuple, Protocol

from appliance.protos import control_pb2 as pb
from appliance.session.link import LinkClosedError, close_all
from appliance.system.system_calls import describe_call

_BACK_OFF_S: Final = 0.05
_BACK_OFF_LIMIT_S: Final = 2.0


def next_back_off_s(back_off_s: float) -> float:
    """Return the wait before the next attempt, in seconds, given the wait before the last one.

    The first wait is 0.05 s; each doubles the one before it, up to 2 s.
    """
    return min(max(_BACK_OFF_S, 2 * back_off_s), _BACK_OFF_LIMIT_S)


class CannotSpawnError(LinkClosedError):
    """No descriptor or process is available for a worker at the moment; the text says which."""


def check_spawned(spawned: pb.Spawned, fds: list[int], num_fds: int) -> None:
    """Check an answer of a fork server that should have brought `num_fds` descriptors.

    Raises:
        CannotSpawnError: it could not fork, or there were too few free descriptors here. `fds` are
            closed.
    """
    if spawned.pid >= 0 and len(fds) == num_fds:
        return
    close_all(fds)
    reason = spawned.reason or os.strerror(errno.EMFILE)
    raise CannotSpawnError(f"cannot start a worker: {reason}")


class WorkerExit(NamedTuple):
    """How a process ended."""

    status: int | None
    """The exit status, or the negated number of the signal that killed the process; None if the
    fork server, which would know, has ended."""
    system_call: int | None = None
    """The number of the system call that its sandbox refused, if that ended it and it is known."""

    def describe(self) -> str:
        """Return the end of a sentence that begins with what the process is."""
        if self.status is None:
            return "has ended"
        if self.status == -signal.SIGSYS:
            refused = "a system call"
            if self.system_call is not None:
                refused = f"a use of system call {describe_call(self.system_call)}"
            return f"was killed by SIGSYS, for {refused} that its sandbox forbids"
        if self.status < 0:
            return f"was killed by signal {-self.status}"
        return f"ended with status {self.status}"


class StartedWorker(NamedTuple):
    """A worker process that was just started. The caller of `spawn` owns it."""

    pid: int
    pidfd: int
    sock: socket.socket
    """The owner's end of its control channel."""
    exit: "asyncio.Future[WorkerExit]"
    """Set when the process has ended."""

    def kill(self) -> None:
        """Kill the process, if it still runs."""
        kill(self.pidfd)


class Spawner(Protocol):
    """Starts worker processes."""

    async def spawn(self, label: str) -> StartedWorker:
        """Start a worker; `label` is the source that its log lines show.

        Raises:
            LinkClosedError: the fork server died meanwhile. The caller may try again at once.
            CannotSpawnError: no descriptor or process is available. The caller may try again later.
        """


class Exits:
    """How the processes that a fork server has started end."""

    def __init__(self) -> None:
        self._futures: dict[int, asyncio.Future[WorkerExit]] = {}
        self._pidfds: dict[int, int] = {}
        self._watching: set[asyncio.Task[None]] = set()

    def expect(self, pid: int, pidfd: int) -> "asyncio.Future[WorkerExit]":
        """Return the future of a new process; `pidfd` is lent until it is set."""
        future = self._futures.pop(pid, None)
        if future is None:  # else it has ended already
            future = self._futures[pid] = asyncio.get_running_loop().create_future()
            self._pidfds[pid] = pidfd
        return future

    def told(self, exited: pb.Exited) -> None:
        """Note what the fork server says."""
        future = self._futures.pop(exited.pid, None)
        self._pidfds.pop(exited.pid, None)
        if future is None:
            future = self._futures[exited.pid] = asyncio.get_running_loop().create_future()
        if not future.done():
            call = exited.system_call if exited.HasField("system_call") else None
            future.set_result(WorkerExit(exited.status, call))

    def watch_all(self) -> None:
        """Find out by their pidfds when they end, because the fork server has ended."""
        for pid, pidfd in self._pidfds.items():
            task = asyncio.create_task(_watch(pidfd, self._futures.pop(pid)))
            self._watching.add(task)
            task.add_done_callback(self._watching.discard)
        self._pidfds.clear()
        self._futures.clear()


async def _watch(pidfd: int, future: "asyncio.Future[WorkerExit]") -> None:
    await ended(pidfd)
    if not future.done():
        future.set_result(WorkerExit(None))


def kill(pidfd: int) -> None:
    """Kill the process of a pidfd, if it still runs."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


async def ended(pidfd: int) -> None:
    """Return when the process of a pidfd (lent) has ended."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()

    def note() -> None:
        if not over.done():
            over.set_result(None)

    loop.add_reader(pidfd, note)
    try:
        await over
    finally:
        loop.remove_reader(pidfd)
