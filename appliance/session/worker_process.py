"""Keeps a worker process alive on behalf of its owner: starts it, and restarts it when it dies.

Theory of operation
-------------------
A worker accesses guest memory, so it may be killed at any instruction: by a guest that makes it
fault, by an administrator, or by the kernel when memory is short. Nothing may depend on its
survival. Therefore everything that it needs is kept by its owner, in the session process or in the
supervisor of a mount, and sent again to every successor.

One task per worker, `WorkerProcess._live`, is the only code that starts a worker or sends steps to
it. It is a plain loop, and each iteration is the life of one process:

    wait             for the back-off to pass; it is 0 after the first early death in a row
    spawn            the fork server forks a worker; a dead fork server is replaced first
    configure        post the first message, with the session's descriptors
    bring up         the owner sends what this worker must know, such as the ring it is to serve
    take steps       one after another, in the order in which they were queued
    note the death   the channel has closed; the exit status says why

Other code does not use the channel directly. It calls `do` with a step, a coroutine function that
takes the channel. The loop runs one step at a time, so no locks are needed. A step that fails
because the worker died is not lost: it stays at the head of the queue and runs again in the next
life, after the owner has brought the successor up. A step must therefore describe a state to reach
("the ring is served", "the ring is stopped") rather than a change, and must be harmless when
repeated.

The caller of `do` may limit the number of lives that its step may take. A front-end that waits for
its ring then gets an error instead of waiting for ever. A successor that nobody waits for is
started again and again, with waits of up to two seconds.

If a worker does not answer within its owner's deadline, the owner kills it, and the step fails
instead of being repeated, because whatever blocked the worker (a descriptor from the front-end)
would block its successor, too.
"""

import asyncio
import collections
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, Protocol, TypeVar

from appliance.errors import ApplianceError
from appliance.protos import control_pb2 as pb
from appliance.session.link import Link, LinkClosedError, SocketEnd, close_all
from appliance.session.spawning import (
    CannotSpawnError,
    Spawner,
    StartedWorker,
    WorkerExit,
    next_back_off_s,
)
from appliance.session.wants import Want, unpack_want

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

# A worker that dies within this time has died early. The first early death in a row may have been
# caused from outside, so the next start is immediate. From the second on, the next start waits.
_STABLE_S: Final = 5.0
# How long a worker may take to end by itself after its channel was closed, before it is killed.
END_DEADLINE_S: Final = 5.0
# The number of lives for steps that must not wait for ever.
START_ATTEMPTS: Final = 5


class WorkerFailedError(ApplianceError):
    """No worker lived long enough to complete a step; the log says why they died."""


class Keeper(Protocol):
    """What provides what the workers of one session want."""

    async def resolve(self, want: Want) -> int:
        """Return 0 once the worker can have what it wants, else the errno to answer with."""

    def cache_used(self, keys: Sequence[bytes]) -> None:
        """Record that a worker read entries of the cache, by their keys."""

    def first_reads(self, reads: pb.FirstReads) -> None:
        """Record what a worker has read for the first time."""

    async def reap_readers(self) -> None:
        """Free the read transactions of killed workers."""


class WorkerOwner(Protocol):
    """What a worker process serves: a queue (`RingWorker`) or a clone (`MountWorker`)."""

    def configuration(self) -> tuple[pb.Configure, Sequence[int]]:
        """Return the first message to a new worker, and the descriptors (lent) to send with it."""

    async def bring_up(self, link: Link) -> None:
        """Send a new worker everything else that it must know to serve.

        Raises:
            LinkClosedError: the worker died meanwhile.
            ApplianceError: the worker cannot serve. It is kept, and takes steps.
        """

    def died(self) -> None:
        """Called after each death, before the next worker is started."""

    def received(self, envelope: pb.Envelope) -> None:
        """Handle a message that is neither a reply nor meant for the session."""


class _Step:
    """A step that waits for its turn, or for the next life."""

    def __init__(self, run: Callable[[Link], Awaitable[Any]], attempts: int | None) -> None:
        self.run = run
        self.attempts_left = attempts
        self.result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def fail(self, exc: Exception) -> None:
        if not self.result.done():  # the caller of `do` may have been cancelled
            self.result.set_exception(exc)

    def succeed(self, result: object) -> None:
        if not self.result.done():
            self.result.set_result(result)


class WorkerProcess:
    """One worker process after another, each started when the one before it has died.

    The first call of `do` starts the first process. `link` is the channel to the living process, or
    None; `pid` is the id of the process started last, or 0; `restarts` counts deaths.

    Args:
        label: what logs call the worker.
        spawner: starts the processes.
        keeper: answers the workers' requests to resolve something.
        owner: knows what the workers serve.
    """

    def __init__(self, label: str, spawner: Spawner, keeper: Keeper, owner: WorkerOwner) -> None:
        self.pid = 0
        self.restarts = 0
        self.link: Link | None = None
        self._label = label
        self._spawner = spawner
        self._keeper = keeper
        self._owner = owner
        self._steps: collections.deque[_Step] = collections.deque()
        # Set when a step was queued, the channel has closed, or `begin_close` was called.
        self._wake = asyncio.Event()
        self._lives: asyncio.Task[None] | None = None
        self._is_closing = False
        self._end_deadline_s = END_DEADLINE_S
        self._started: StartedWorker | None = None
        self._started_s = 0.0
        self._num_early_deaths = 0
        self._back_off_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def do(self, step: Callable[[Link], Awaitable[T]], *, attempts: int | None = None) -> T:
        """Run `step` with a living worker and return its result.

        Args:
            step: takes the channel; may run several times, each time with another worker.
            attempts: how many workers may die, or fail to start, before the step fails; None
                means that it is repeated until it completes.

        Raises:
            LinkClosedError: this object is being closed.
            WorkerFailedError: `attempts` workers died or could not be started.
            ApplianceError: raised by the step itself.
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
        """Run `work` as a task of its own, without waiting for it."""
        # The event loop keeps only weak references to tasks.
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def kill(self) -> None:
        """Kill the living process, if any. A successor follows, unless `begin_close` was called."""
        if self.link is not None and self._started is not None:
            self._started.kill()

    def begin_close(self) -> None:
        """Close the channel and start no other process. Queued steps fail."""
        self._is_closing = True
        self._wake.set()
        if self.link is not None:
            self.link.close()

    async def close(self, deadline_s: float = END_DEADLINE_S) -> None:
        """Close the channel and return when the process is gone.

        Args:
            deadline_s: how long the process may take to end by itself, in seconds; it is killed
                after that.
        """
        self._end_deadline_s = deadline_s
        self.begin_close()
        if self._lives is not None:
            await self._lives

    # --- The loop ---

    async def _live(self) -> None:
        while not self._is_closing:
            # If a step waits for this life, its caller gets the reason when there is none.
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
            return await self._spawner.spawn(self._label)
        except CannotSpawnError:
            self._back_off_s = next_back_off_s(self._back_off_s)
            raise

    async def _live_once(self, started: StartedWorker, first: _Step | None) -> None:
        self.pid = started.pid
        self._started = started
        self._started_s = time.monotonic()
        link = self.link = Link(SocketEnd(started.sock), self._on_message, self._on_closed)
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
            self._note_death(await started.exit)
        self._started = None
        os.close(started.pidfd)

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
            self.spawn_task(self._keeper.reap_readers())
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
            raise  # the step runs again in the next life
        except Exception as exc:  # noqa: BLE001 - it is raised in `do`
            step.fail(exc)
        else:
            step.succeed(result)
        self._steps.popleft()

    # --- Deaths ---

    def _note_death(self, ended: WorkerExit) -> None:
        _LOG.warning("%s: worker %d %s; starting another", self._label, self.pid, ended.describe())
        self._owner.died()
        if time.monotonic() - self._started_s > _STABLE_S:
            self._num_early_deaths = 0
        elif ended.status is not None:
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
            reason = reason or f"{START_ATTEMPTS} workers died at startup"
            step.fail(WorkerFailedError(f"{self._label}: {reason}"))

    async def _await_end(self, started: StartedWorker) -> None:
        try:
            # asyncio.wait_for may swallow a cancellation before Python 3.12.
            async with asyncio.timeout(self._end_deadline_s):
                await asyncio.shield(started.exit)
        except TimeoutError:
            started.kill()
            await started.exit

    # --- Messages from the worker ---

    def _on_message(self, envelope: pb.Envelope, fds: list[int]) -> None:
        close_all(fds)  # workers send none
        if envelope.HasField("resolve") and not envelope.resolve.HasField("backing"):
            self.spawn_task(self._answer_resolve(envelope, self.link))
        elif envelope.HasField("cache_used"):
            self._keeper.cache_used(envelope.cache_used.keys)
        elif envelope.HasField("first_reads"):
            self._keeper.first_reads(envelope.first_reads)
        else:
            self._owner.received(envelope)

    async def _answer_resolve(self, envelope: pb.Envelope, link: Link | None) -> None:
        error = await self._keeper.resolve(unpack_want(envelope.resolve))
        if link is not None:
            link.post(pb.Envelope(id=envelope.id, resolved=pb.Resolved(errno=error)))

    def _on_closed(self) -> None:
        self.link = None
        if not self._is_closing:
            self.restarts += 1
        self._wake.set()
