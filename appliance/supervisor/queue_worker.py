"""One virtqueue's worker, kept alive: what it must serve is told to every successor."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Final, TypeVar

from appliance.control.channel import MAX_FDS
from appliance.control.session_memory import InflightMemory, SessionMemory
from appliance.errors import VhostError
from appliance.protos import control_pb2 as pb
from appliance.supervisor.forker import Forker
from appliance.supervisor.link import Link, LinkClosedError
from appliance.supervisor.resolving import ResolvingQueue
from appliance.vhost.backend import VringConfig
from appliance.vhost.memory import Region

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

# A worker that dies again within this time waits before its next start, doubling up to the limit.
_STABLE_S: Final = 5.0
_BACK_OFF_S: Final = 0.05
_BACK_OFF_LIMIT_S: Final = 2.0
_END_DEADLINE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What every worker of a supervisor is told first."""

    store_path: str
    index_path: str
    is_root_listable: bool
    log_level: str
    log_json: bool


class QueueWorker:
    """The worker of one queue of one device.

    The worker may die at any time. Every operation here starts it if need be, tells it everything
    it must know, and does not return before the living worker has done what was asked.
    """

    def __init__(
        self,
        queue: int,
        label: str,
        forker: Forker,
        settings: WorkerSettings,
        session: SessionMemory,
        regions: dict[Region, int],
        resolving: ResolvingQueue,
    ) -> None:
        self.queue = queue
        self.pid = 0
        self.restarts = 0
        self._label = label
        self._forker = forker
        self._settings = settings
        self._session = session
        self._regions = regions
        self._resolving = resolving
        self._link: Link | None = None
        self._exit: asyncio.Future[int] | None = None
        self._ring: tuple[VringConfig, InflightMemory] | None = None
        self._lock = asyncio.Lock()
        self._last_avail = 0
        self._is_serving = False
        self._is_closing = False
        self._started_s = 0.0
        self._back_off_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_alive(self) -> bool:
        """Whether there is a process, as far as is known."""
        return self._link is not None

    async def start_ring(self, config: VringConfig, inflight: InflightMemory) -> None:
        """Start serving the ring; fds and memory are lent for as long as it runs.

        Raises:
            VhostError: the worker could not map the ring or guest memory.
        """
        async with self._lock:
            self._ring = (config, inflight)
            try:
                await self._persist(self._ensure_serving)
            except VhostError:
                self._ring = None
                raise

    async def stop_ring(self) -> int:
        """Return the next avail index, once everything popped has been returned to the guest."""
        async with self._lock:
            if self._ring is not None:
                self._last_avail = await self._persist(self._stop)
                self._ring = None
            return self._last_avail

    async def update_memory(self) -> None:
        """Return when the worker uses the device's present memory table.

        Raises:
            VhostError: the worker could not map it.
        """
        async with self._lock:
            if self._link is not None:
                await self._persist(self._send_memory)

    async def set_call(self, fd: int | None) -> None:
        """Make the worker signal `fd` (lent) from now on."""
        async with self._lock:
            if self._ring is None:
                return
            config, inflight = self._ring
            self._ring = (config._replace(call_fd=fd), inflight)
            if self._link is not None and self._is_serving:
                self._link.post(pb.Envelope(set_call=pb.SetCall()), [] if fd is None else [fd])

    async def close(self) -> None:
        """End the worker; when this returns it can touch guest memory no more."""
        self._is_closing = True
        if self._link is not None:
            self._link.close()  # whoever awaits it now fails and lets go of the lock
        async with self._lock:
            await self._end()

    async def _end(self) -> None:
        if self._link is not None:
            self._link.close()
        if self._exit is not None:
            try:
                # Not wait_for: until Python 3.12 it may swallow a cancellation.
                async with asyncio.timeout(_END_DEADLINE_S):
                    await asyncio.shield(self._exit)
            except TimeoutError:
                os.kill(self.pid, signal.SIGKILL)
                await self._exit

    # Steps. Each may raise LinkClosedError when the worker dies in the middle; _persist starts
    # over.

    async def _persist(self, step: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await step()
            except LinkClosedError:
                if self._is_closing:
                    raise

    async def _ensure_alive(self) -> Link:
        if self._link is not None:
            return self._link
        if self._is_closing:
            raise LinkClosedError
        await asyncio.sleep(self._back_off_s)
        try:
            self.pid, sock, self._exit = await self._forker.spawn()
        except LinkClosedError:
            self._grow_back_off()
            raise
        self._started_s = time.monotonic()
        self._is_serving = False
        link = self._link = Link(sock, self._on_message, self._on_closed)
        settings = self._settings
        link.post(
            pb.Envelope(
                configure=pb.Configure(
                    store_path=settings.store_path,
                    index_path=settings.index_path,
                    list_root=settings.is_root_listable,
                    log_level=settings.log_level,
                    log_json=settings.log_json,
                    queue=self.queue,
                )
            ),
            [self._session.fd],
        )
        await self._send_memory()
        return link

    async def _ensure_serving(self) -> Link:
        link = await self._ensure_alive()
        if self._ring is not None and not self._is_serving:
            await self._send_start(link, *self._ring)
            self._is_serving = True
        return link

    async def _stop(self) -> int:
        link = await self._ensure_serving()
        reply = await link.request(pb.Envelope(stop_ring=pb.StopRing()))
        self._is_serving = False
        return reply.ring_stopped.last_avail

    async def _send_memory(self) -> None:
        link = await self._ensure_alive() if self._link is None else self._link
        table = list(self._regions.items())
        while len(table) > MAX_FDS:
            part, table = table[:MAX_FDS], table[MAX_FDS:]
            link.post(_memory_message(part, is_last=False), [fd for _region, fd in part])
        reply = await link.request(
            _memory_message(table, is_last=True), [fd for _region, fd in table]
        )
        _check(reply)

    async def _send_start(self, link: Link, config: VringConfig, inflight: InflightMemory) -> None:
        optional = [fd for fd in (config.call_fd, config.err_fd) if fd is not None]
        reply = await link.request(
            pb.Envelope(
                start_ring=pb.StartRing(
                    num=config.num,
                    desc=config.desc,
                    avail=config.avail,
                    used=config.used,
                    base=config.base,
                    features=config.features,
                    inflight_offset=inflight.offset,
                    inflight_num_queues=inflight.num_queues,
                    inflight_queue_size=inflight.queue_size,
                    has_call=config.call_fd is not None,
                    has_err=config.err_fd is not None,
                )
            ),
            [inflight.fd, config.kick_fd, *optional],
        )
        _check(reply)

    # Events.

    def _on_message(self, envelope: pb.Envelope) -> None:
        if envelope.HasField("resolve"):
            self._spawn_task(self._answer_resolve(envelope, self._link))
        elif envelope.HasField("ring_broken"):
            _LOG.error("%s queue %d: %s", self._label, self.queue, envelope.ring_broken.reason)
            self._last_avail = envelope.ring_broken.last_avail
            self._ring = None
            self._is_serving = False

    async def _answer_resolve(self, envelope: pb.Envelope, link: Link | None) -> None:
        error = await self._resolving.resolve(envelope.resolve)
        if link is not None:
            link.post(pb.Envelope(id=envelope.id, resolved=pb.Resolved(errno=error)))

    def _on_closed(self) -> None:
        self._link = None
        self._is_serving = False
        if self._is_closing:
            return
        self.restarts += 1
        if time.monotonic() - self._started_s > _STABLE_S:
            self._back_off_s = 0.0
        else:
            self._grow_back_off()
        self._spawn_task(self._revive(self.pid, self._exit))

    def _grow_back_off(self) -> None:
        self._back_off_s = min(max(_BACK_OFF_S, 2 * self._back_off_s), _BACK_OFF_LIMIT_S)

    async def _revive(self, pid: int, exit_: "asyncio.Future[int] | None") -> None:
        status = await exit_ if exit_ is not None else 0
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        _LOG.warning(
            "%s queue %d: worker %d %s; starting another", self._label, self.queue, pid, how
        )
        async with self._lock:
            try:
                await self._persist(self._ensure_serving)
            except LinkClosedError:
                return  # closing
            except VhostError as exc:
                _LOG.error("%s queue %d: %s", self._label, self.queue, exc)
                self._ring = None
        await self._resolving.reap_readers()

    def _spawn_task(self, work: Coroutine[None, None, None]) -> None:
        # The loop keeps only weak references to tasks.
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _memory_message(table: list[tuple[Region, int]], *, is_last: bool) -> pb.Envelope:
    regions = [
        pb.Region(
            gpa=region.gpa,
            size=region.size,
            user_addr=region.user_addr,
            mmap_offset=region.mmap_offset,
        )
        for region, _fd in table
    ]
    return pb.Envelope(set_memory=pb.SetMemory(regions=regions, last=is_last))


def _check(reply: pb.Envelope) -> None:
    if reply.done.error:
        raise VhostError(reply.done.error)
