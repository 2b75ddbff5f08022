"""The supervisor's side of a session process: grants, what its workers want, and its status."""

import asyncio
import logging
import os
import socket
from collections.abc import Coroutine
from typing import Final

from appliance.bounds import WANTS_MAX
from appliance.protos import control_pb2 as pb
from appliance.session.link import Link, LinkClosedError, close_all
from appliance.session.spawning import CannotSpawnError, WorkerExit, kill
from appliance.session.uplink import UpperEnd
from appliance.session.wants import unpack_want
from appliance.supervisor.forker import Forker
from appliance.supervisor.served_session import ServedSession
from appliance.supervisor.session_mailbox import SessionMailbox

_LOG = logging.getLogger(__name__)
# How long a session process may take to end when it is asked to: more than its workers may take.
_END_DEADLINE_S: Final = 8.0
# How long to wait before retrying when there is no descriptor or process for a fork server.
_ATTACH_AGAIN_S: Final = 1.0


class AttachedSession:
    """A session process that was started or taken over.

    Args:
        record: what the next supervisor will have to know.
        pidfd: of the process, owned.
        end: this side of the channel to it, owned.
        exit_: set when the process has ended.
        served: its grants and session memory, owned.
        mailbox: where the next supervisor finds the process itself, owned.
        goes_on: whether a saved session that had store paths which are missing now is restored
            without them.
    """

    def __init__(
        self,
        record: pb.SessionRecord,
        pidfd: int,
        end: UpperEnd,
        exit_: "asyncio.Future[WorkerExit]",
        served: ServedSession,
        mailbox: SessionMailbox,
        *,
        goes_on: bool,
    ) -> None:
        self.label = record.place.label
        self.pid = record.pid
        self._record = record
        self._pidfd = pidfd
        self._exit = exit_
        self._served = served
        self._mailbox = mailbox
        self._restoration = served.restoration(self.label, goes_on=goes_on)
        self._workers: list[pb.WorkerStatus] = []
        self._num_wants = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._link = Link(end, self._on_message, self._on_closed)

    async def start(self, sock: socket.socket, start: pb.StartSession) -> None:
        """Pass the connection `sock` (lent) on; return when the process has it.

        No byte of it is read before this returns, so another process can have it after an error.

        Raises:
            LinkClosedError: the process has ended.
        """
        found_by = self._mailbox.take_fds(self._served.lease)
        fds = [sock.fileno(), *self._served.fds, *found_by]
        try:
            await self._link.request(pb.Envelope(start_session=start), fds)
        finally:
            close_all(found_by)

    def report(self) -> dict[str, object]:
        """Return what `appliance status` shows of it."""
        return {
            "socket": self.label,
            "pid": self.pid,
            "workers": [
                {"pid": worker.pid, "queues": [worker.queue], "restarts": worker.restarts}
                for worker in self._workers
            ],
            **self._served.statistics(),
            "holds": self._served.holdings(),
        }

    async def attach(self, forker: Forker) -> None:
        """Give the process another fork server, because its own one has ended."""
        while not self._exit.done():
            try:
                fds = await forker.attach(self._record, self._pidfd, self._served.kept_fds)
            except CannotSpawnError:
                await asyncio.sleep(_ATTACH_AGAIN_S)
            except LinkClosedError:
                continue  # that one has ended, too
            else:
                self._link.post(pb.Envelope(new_peer=pb.NewPeer()), fds)
                close_all(fds)
                return

    async def wait(self) -> None:
        """Return when the process has ended."""
        ended = await asyncio.shield(self._exit)
        if ended.status:
            _LOG.error("%s: session process %d %s", self.label, self.pid, ended.describe())

    async def ends_within(self, seconds: float) -> bool:
        """Return whether the process ends within a number of seconds."""
        done, _pending = await asyncio.wait([self._exit], timeout=seconds)
        return bool(done)

    async def end(self) -> None:
        """Ask the process to end, and return when it has; kill it if it takes too long."""
        self._link.post(pb.Envelope(end_session=pb.EndSession()))
        try:
            async with asyncio.timeout(_END_DEADLINE_S):
                await asyncio.shield(self._exit)
        except TimeoutError:
            kill(self._pidfd)
            await asyncio.shield(self._exit)

    def close(self, *, lives_on: bool = False) -> None:
        """Close everything here; the process lives on if `lives_on`, and otherwise has ended."""
        for task in self._tasks:
            task.cancel()
        self._link.close()
        self._served.close(lives_on=lives_on)
        if not lives_on:
            self._mailbox.remove()
        os.close(self._pidfd)

    # --- Messages ---

    def _on_message(self, envelope: pb.Envelope, _fds: list[int]) -> None:
        match envelope.WhichOneof("body"):
            case "resolve" if self._num_wants < WANTS_MAX:
                self._num_wants += 1
                self._spawn_task(self._resolve(envelope))
            case "restore" if self._num_wants < WANTS_MAX:
                self._num_wants += 1
                self._spawn_task(self._restore(envelope))
            case "resolve" | "restore":
                _LOG.error("%s: session process %d wants too much", self.label, self.pid)
                kill(self._pidfd)
            case "cache_used":
                self._served.cache_used(envelope.cache_used.keys)
            case "first_reads":
                self._served.first_reads(envelope.first_reads)
            case "worker_died":
                self._spawn_task(self._served.reap_readers())
            case "start_apart":
                self._served.grants.start_apart()
                self._link.post(pb.Envelope(id=envelope.id, done=pb.Done()))
            case "session_status":
                self._workers = list(envelope.session_status.workers)

    async def _resolve(self, envelope: pb.Envelope) -> None:
        try:
            error = await self._served.resolve(unpack_want(envelope.resolve))
        finally:
            self._num_wants -= 1
        self._link.post(pb.Envelope(id=envelope.id, resolved=pb.Resolved(errno=error)))

    async def _restore(self, envelope: pb.Envelope) -> None:
        try:
            error = await self._restoration.take(envelope.restore)
        finally:
            self._num_wants -= 1
        self._link.post(pb.Envelope(id=envelope.id, done=pb.Done(error=error)))

    def _on_closed(self) -> None:
        self._workers = []

    def _spawn_task(self, work: Coroutine[None, None, None]) -> None:
        # The event loop keeps only weak references to tasks.
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
