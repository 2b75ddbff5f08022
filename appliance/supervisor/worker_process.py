"""A worker process kept alive: started when needed, started again whenever it dies."""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Final, Protocol, TypeVar

from appliance.errors import ApplianceError
from appliance.protos import control_pb2 as pb
from appliance.session.wants import unpack_want
from appliance.supervisor.forker import CannotSpawnError, Forker, WorkerExit, next_back_off_s
from appliance.supervisor.link import Link, LinkClosedError
from appliance.supervisor.served_session import ServedSession

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

# A worker that lived for less has died at its start. The first such death in a row may have come
# from outside, and the next start is at once; from the second on, a start waits, ever longer.
_STABLE_S: Final = 5.0
_END_DEADLINE_S: Final = 5.0
# For work that somebody waits for.
START_ATTEMPTS: Final = 5


class WorkerFailedError(ApplianceError):
    """No worker lives long enough to do what it is there for; the log says why."""


class Duty(Protocol):
    """What a worker is kept for."""

    def configuration(self) -> tuple[pb.Configure, Sequence[int]]:
        """Return the first message to a new worker, and the fds (lent) that go with it."""

    async def instruct(self, link: Link) -> None:
        """Tell a worker that was just started what it must know before it serves."""

    async def resume(self) -> None:
        """Bring up a successor: the worker died."""

    def heard(self, envelope: pb.Envelope) -> None:
        """Take a message that is neither a reply nor for the session."""


class KeptWorker:
    """The process behind one duty, under one label in the logs.

    It may die at any time: steps that talk to it raise LinkClosedError then, and `persist` starts
    them over with a successor.
    """

    def __init__(self, label: str, forker: Forker, session: ServedSession, duty: Duty) -> None:
        self.pid = 0
        self.restarts = 0
        self.link: Link | None = None
        self._label = label
        self._forker = forker
        self._session = session
        self._duty = duty
        self._exit: asyncio.Future[WorkerExit] | None = None
        self._is_closing = False
        self._started_s = 0.0
        self._lived_s = 0.0
        self._num_early_deaths = 0
        self._back_off_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def persist(self, step: Callable[[], Awaitable[T]], *, attempts: int | None = None) -> T:
        """Return what `step` returns, however many workers that takes, or `attempts` at most.

        Raises:
            LinkClosedError: the worker is being closed.
            WorkerFailedError: as many as `attempts` workers died.
        """
        for attempt in itertools.count(1):
            try:
                return await step()
            except LinkClosedError as exc:
                if self._is_closing:
                    raise
                if attempt == attempts:
                    reason = str(exc) or f"{attempts} workers died at their start"
                    raise WorkerFailedError(f"{self._label}: {reason}") from exc
        raise AssertionError("an endless count ended")

    async def ensure_alive(self) -> Link:
        """Return the channel to the living worker, started and instructed if need be.

        Raises:
            LinkClosedError: it died meanwhile, or is being closed.
        """
        if self.link is not None:
            return self.link
        if self._is_closing:
            raise LinkClosedError
        await self._learn_from_death()
        await asyncio.sleep(self._back_off_s)
        try:
            self.pid, sock, self._exit = await self._forker.spawn(self._label)
        except CannotSpawnError:
            self._back_off_s = next_back_off_s(self._back_off_s)
            raise
        self._started_s = time.monotonic()
        link = self.link = Link(sock, self._on_message, self._on_closed)
        configure, fds = self._duty.configuration()
        link.post(pb.Envelope(configure=configure), fds)
        await self._duty.instruct(link)
        return link

    def kill(self) -> None:
        """Kill the process if it lives; a successor follows, unless this is being closed."""
        if self.link is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def begin_close(self) -> None:
        """Close the channel, for good; whoever awaits the worker fails."""
        self._is_closing = True
        if self.link is not None:
            self.link.close()

    async def end(self, deadline_s: float = _END_DEADLINE_S) -> None:
        """Return when the process is gone: it ends as its channel is closed, or is killed."""
        if self.link is not None:
            self.link.close()
        if self._exit is None:
            return
        try:
            # Not wait_for: until Python 3.12 it may swallow a cancellation.
            async with asyncio.timeout(deadline_s):
                await asyncio.shield(self._exit)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):  # it ended this moment
                os.kill(self.pid, signal.SIGKILL)
            await self._exit

    def _on_message(self, envelope: pb.Envelope) -> None:
        if envelope.HasField("resolve") and not envelope.resolve.HasField("backing"):
            self.spawn_task(self._answer_resolve(envelope, self.link))
        elif envelope.HasField("cache_used"):
            self._session.cache_used(envelope.cache_used.keys)
        else:
            self._duty.heard(envelope)

    async def _answer_resolve(self, envelope: pb.Envelope, link: Link | None) -> None:
        error = await self._session.resolve(unpack_want(envelope.resolve))
        if link is not None:
            link.post(pb.Envelope(id=envelope.id, resolved=pb.Resolved(errno=error)))

    def _on_closed(self) -> None:
        self.link = None
        if self._is_closing:
            return
        self.restarts += 1
        self._lived_s = time.monotonic() - self._started_s
        self.spawn_task(self._revive(self.pid, self._exit))

    async def _learn_from_death(self) -> None:
        # Once for each death, before the next start.
        exit_ = self._exit
        if exit_ is None:
            return
        is_orphan = (await asyncio.shield(exit_)).is_orphan
        if self._exit is not exit_:
            return
        self._exit = None
        if self._lived_s > _STABLE_S:
            self._num_early_deaths = 0
        elif not is_orphan:
            self._num_early_deaths += 1
        is_first = self._num_early_deaths <= 1
        self._back_off_s = 0.0 if is_first else next_back_off_s(self._back_off_s)

    async def _revive(self, pid: int, exit_: "asyncio.Future[WorkerExit] | None") -> None:
        status = (await exit_).status if exit_ is not None else 0
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        _LOG.warning("%s: worker %d %s; starting another", self._label, pid, how)
        await self._duty.resume()
        await self._session.reap_readers()

    def spawn_task(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` beside everything else."""
        # The loop keeps only weak references to tasks.
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
