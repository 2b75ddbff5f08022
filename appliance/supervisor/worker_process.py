"""A worker process as the supervisor sees it: one life after another, until it is closed.

Theory of operation
-------------------
A worker touches guest memory, so it may be killed at any instruction: by a guest that makes it
fault, by an administrator, by the kernel when memory is short. Nothing may depend on its survival.
Everything that it needs is therefore kept on this side and told to every successor again.

One task per worker, `WorkerProcess._live`, is the only code that starts a worker or talks to it. It
is a plain loop, and one turn of it is one life:

    wait as long as the back-off says     the first early death is free, later ones cost time
    spawn                                 the fork server forks; it may be restarted itself
    configure                             the first message, with the session's descriptors
    bring up                              the owner tells the worker what must be so by now
    take steps                            one after another, in the order in which they came
    notice the death                      the channel closes; the exit status says why

Others do not talk to the worker. They call `do` with a step, which is a coroutine function that
takes the channel. The loop runs one step at a time, so no locks are needed. A step that fails
because the worker died is not lost: it stays at the head of the queue and runs again in the next
life, after the owner has brought the successor up. A step must therefore say what shall be so ("the
ring is served", "the ring is stopped"), not what shall change, and must be harmless when repeated.

Someone who waits for a step may ask for a limited number of lives. A front-end that waits for its
ring is told that no worker lives, rather than left to hang; a successor that nobody waits for is
started again for ever, with waits of up to two seconds.

Two kinds of end are not deaths of the worker's own making. If the fork server ends, the kernel
kills its workers with it; they are started again without a wait. If the worker does not answer
within its owner's deadline, the owner kills it, and the step fails instead of being repeated:
whatever blocked it (a descriptor of the front-end) would block its successor too.
"""

import asyncio
import collections
import contextlib
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, Protocol, TypeVar

from appliance.errors import ApplianceError
from appliance.protos import control_pb2 as pb
from appliance.session.wants import unpack_want
from appliance.supervisor.forker import CannotSpawnError, Forker, StartedWorker, next_back_off_s
from appliance.supervisor.link import Link, LinkClosedError
from appliance.supervisor.served_session import ServedSession

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

# A worker that lived for less has died at its start. The first such death in a row may have been
# caused from outside, and the next start is immediate; from the second on, a start waits.
_STABLE_S: Final = 5.0
# How long a worker may take to end by itself after its channel was closed.
END_DEADLINE_S: Final = 5.0
# For steps that somebody waits for.
START_ATTEMPTS: Final = 5


class WorkerFailedError(ApplianceError):
    """No worker lives long enough to take a step; the log says why."""


class WorkerOwner(Protocol):
    """What a worker is there for."""

    def configuration(self) -> tuple[pb.Configure, Sequence[int]]:
        """Return the first message to a new worker, and the descriptors (lent) that go with it."""

    async def bring_up(self, link: Link) -> None:
        """Tell a new worker everything that it must know to serve.

        Raises:
            LinkClosedError: it died meanwhile.
            ApplianceError: it cannot serve; it goes on living, and takes steps.
        """

    def died(self) -> None:
        """Called after each death, before the next worker is started."""

    def received(self, envelope: pb.Envelope) -> None:
        """Handle a message that is neither a reply nor for the session."""


class _Step:
    """A step that waits for its turn, or for the next life."""

    def __init__(self, run: Callable[[Link], Awaitable[Any]], attempts: int | None) -> None:
        self.run = run
        self.attempts_left = attempts
        self.result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def fail(self, exc: Exception) -> None:
        if not self.result.done():  # whoever waited may have been cancelled
            self.result.set_exception(exc)

    def succeed(self, result: object) -> None:
        if not self.result.done():
            self.result.set_result(result)


class WorkerProcess:
    """Keeps a worker alive for its owner, under one label in the logs.

    It is started by the first step. `link` is the channel to the living worker, if there is one.
    """

    def __init__(
        self, label: str, forker: Forker, session: ServedSession, owner: WorkerOwner
    ) -> None:
        self.pid = 0
        self.restarts = 0
        self.link: Link | None = None
        self._label = label
        self._forker = forker
        self._session = session
        self._owner = owner
        self._steps: collections.deque[_Step] = collections.deque()
        # Set when there is a step, the channel has closed, or the worker is to be closed.
        self._wake = asyncio.Event()
        self._lives: asyncio.Task[None] | None = None
        self._is_closing = False
        self._end_deadline_s = END_DEADLINE_S
        self._started_s = 0.0
        self._num_early_deaths = 0
        self._back_off_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def do(self, step: Callable[[Link], Awaitable[T]], *, attempts: int | None = None) -> T:
        """Return what `step` returns, after as many lives as that takes, or `attempts` at most.

        Raises:
            LinkClosedError: the worker is being closed.
            WorkerFailedError: `attempts` workers died, or could not be started.
            ApplianceError: the step's own error.
        """
        if self._is_closing:
            raise LinkClosedError
        waiting = _Step(step, attempts)
        self._steps.append(waiting)
        self._wake.set()
        if self._lives is None:
            self._lives = asyncio.create_task(self._live())
        result: T = await waiting.result
        return result

    def spawn_task(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` beside everything else."""
        # The loop keeps only weak references to tasks.
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def kill(self) -> None:
        """Kill the process if it lives; a successor follows, unless this is being closed."""
        if self.link is not None:
            _kill(self.pid)

    def begin_close(self) -> None:
        """Close the channel for good. Steps that wait fail, and no other worker is started."""
        self._is_closing = True
        self._wake.set()
        if self.link is not None:
            self.link.close()

    async def close(self, deadline_s: float = END_DEADLINE_S) -> None:
        """Return when the process is gone: it ends as its channel closes, or is killed."""
        self._end_deadline_s = deadline_s
        self.begin_close()
        if self._lives is not None:
            await self._lives

    # --- The loop ---

    async def _live(self) -> None:
        while not self._is_closing:
            # The step that waits for this life, if one does, learns why there is none.
            first = self._steps[0] if self._steps else None
            try:
                started = await self._start()
            except LinkClosedError as exc:
                self._count_attempt(first, str(exc))
                continue
            if started is not None:
                await self._live_once(started, first)
        while self._steps:
            self._steps.popleft().fail(LinkClosedError())

    async def _start(self) -> StartedWorker | None:
        deadline_s = time.monotonic() + self._back_off_s
        while not self._is_closing and (left_s := deadline_s - time.monotonic()) > 0:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._wake.wait()
        if self._is_closing:
            return None
        try:
            return await self._forker.spawn(self._label)
        except CannotSpawnError:
            self._back_off_s = next_back_off_s(self._back_off_s)
            raise

    async def _live_once(self, started: StartedWorker, first: _Step | None) -> None:
        self.pid = started.pid
        self._started_s = time.monotonic()
        link = self.link = Link(started.sock, self._on_message, self._on_closed)
        if self._is_closing:
            link.close()
        try:
            await self._serve(link, first)
        except LinkClosedError:
            pass
        except Exception:  # noqa: BLE001 - a bug in one step must not leave the guest without a worker
            _LOG.exception("%s", self._label)
            link.close()
        if self._is_closing:
            await self._await_end(started)
        else:
            await self._note_death(started)

    async def _serve(self, link: Link, first: _Step | None) -> None:
        configure, fds = self._owner.configuration()
        link.post(pb.Envelope(configure=configure), fds)
        try:
            await self._owner.bring_up(link)
        except ApplianceError as exc:
            if first is None or first not in self._steps:
                _LOG.error("%s: %s", self._label, exc)
            else:
                self._steps.remove(first)
                first.fail(exc)
        if self.restarts:
            self.spawn_task(self._session.reap_readers())
        while True:
            while self._steps:
                await self._take(self._steps[0], link)
            self._wake.clear()
            if self.link is None:
                raise LinkClosedError
            await self._wake.wait()

    async def _take(self, step: _Step, link: Link) -> None:
        try:
            result = await step.run(link)
        except LinkClosedError:
            raise  # it runs again in the next life
        except Exception as exc:  # noqa: BLE001 - it is raised where somebody waits for it
            step.fail(exc)
        else:
            step.succeed(result)
        self._steps.popleft()

    # --- Deaths ---

    async def _note_death(self, started: StartedWorker) -> None:
        ended = await started.exit
        status = ended.status
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        _LOG.warning("%s: worker %d %s; starting another", self._label, self.pid, how)
        self._owner.died()
        if time.monotonic() - self._started_s > _STABLE_S:
            self._num_early_deaths = 0
        elif not ended.is_orphan:
            self._num_early_deaths += 1
        is_first = self._num_early_deaths <= 1
        self._back_off_s = 0.0 if is_first else next_back_off_s(self._back_off_s)
        if self._steps:
            self._count_attempt(self._steps[0], "")

    def _count_attempt(self, step: _Step | None, reason: str) -> None:
        if step is None or step.attempts_left is None:
            return
        step.attempts_left -= 1
        if step.attempts_left == 0:
            self._steps.remove(step)
            reason = reason or f"{START_ATTEMPTS} workers died at their start"
            step.fail(WorkerFailedError(f"{self._label}: {reason}"))

    async def _await_end(self, started: StartedWorker) -> None:
        try:
            # Not wait_for: until Python 3.12 it may swallow a cancellation.
            async with asyncio.timeout(self._end_deadline_s):
                await asyncio.shield(started.exit)
        except TimeoutError:
            _kill(started.pid)
            await started.exit

    # --- What comes from the worker ---

    def _on_message(self, envelope: pb.Envelope) -> None:
        if envelope.HasField("resolve") and not envelope.resolve.HasField("backing"):
            self.spawn_task(self._answer_resolve(envelope, self.link))
        elif envelope.HasField("cache_used"):
            self._session.cache_used(envelope.cache_used.keys)
        else:
            self._owner.received(envelope)

    async def _answer_resolve(self, envelope: pb.Envelope, link: Link | None) -> None:
        error = await self._session.resolve(unpack_want(envelope.resolve))
        if link is not None:
            link.post(pb.Envelope(id=envelope.id, resolved=pb.Resolved(errno=error)))

    def _on_closed(self) -> None:
        self.link = None
        if not self._is_closing:
            self.restarts += 1
        self._wake.set()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended this moment
        os.kill(pid, signal.SIGKILL)
