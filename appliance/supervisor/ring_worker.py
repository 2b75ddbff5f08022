"""One virtqueue's worker: what it must serve is told to every successor."""

import asyncio
import logging
from collections.abc import Sequence

from appliance.errors import VhostError
from appliance.protos import control_pb2 as pb
from appliance.session.channel import MAX_FDS
from appliance.session.session_memory import InflightMemory
from appliance.supervisor.link import Link, LinkClosedError
from appliance.supervisor.runtime import Runtime
from appliance.supervisor.served_session import ServedSession
from appliance.supervisor.worker_process import (
    START_ATTEMPTS,
    KeptWorker,
    WorkerFailedError,
)
from appliance.vhost.backend import VringConfig
from appliance.vhost.guest_memory import Region

_LOG = logging.getLogger(__name__)
# Longer than a worker may take to drain its ring.
_ANSWER_DEADLINE_S = 15.0


class _WorkerStuckError(VhostError):
    """The worker did not answer in time and was killed: a successor will start."""


class RingWorker:
    """The worker of one queue of one device; the `Duty` of its process.

    The worker may die at any time. Every operation here starts it if need be, tells it everything
    it must know, and does not return before the living worker has done what was asked.
    """

    def __init__(
        self,
        queue: int,
        label: str,
        runtime: Runtime,
        session: ServedSession,
        regions: dict[Region, int],
    ) -> None:
        self.queue = queue
        self._label = f"{label} queue {queue}"
        self._runtime = runtime
        self._session = session
        self._regions = regions
        self._kept = KeptWorker(self._label, runtime.forker, session, self)
        self._ring: tuple[VringConfig, InflightMemory] | None = None
        self._lock = asyncio.Lock()
        self._last_avail = 0
        # The worker that serves the ring, by its channel.
        self._serving: Link | None = None

    @property
    def pid(self) -> int:
        """The process id of the last worker started, 0 if there was none."""
        return self._kept.pid

    @property
    def restarts(self) -> int:
        """How often the worker died."""
        return self._kept.restarts

    @property
    def is_alive(self) -> bool:
        """Whether there is a process, as far as is known."""
        return self._kept.link is not None

    async def start_ring(self, config: VringConfig, inflight: InflightMemory) -> None:
        """Start serving the ring; fds and memory are lent for as long as it runs.

        Raises:
            VhostError: the worker could not map the ring or guest memory.
        """
        async with self._lock:
            self._ring = (config, inflight)
            self._serving = None  # whatever it serves: the last ring may have broken as it began
            try:
                # A front-end waits: it is told, rather than left to hang, if no worker lives.
                await self._kept.persist(self._ensure_serving, attempts=START_ATTEMPTS)
            except WorkerFailedError as exc:
                self._ring = None
                raise VhostError(str(exc)) from exc
            except VhostError:
                self._ring = None
                raise

    async def stop_ring(self) -> int:
        """Return the next avail index, once everything popped has been returned to the guest."""
        async with self._lock:
            if self._ring is not None:
                try:
                    self._last_avail = await self._kept.persist(self._stop)
                finally:
                    # Even if it failed: what was lent is not to be served from any more.
                    self._ring = None
            return self._last_avail

    async def update_memory(self) -> None:
        """Return when the worker uses the device's present memory table.

        Raises:
            VhostError: the worker could not map it.
        """
        async with self._lock:
            if self._kept.link is not None:
                await self._kept.persist(self._update_memory)

    async def set_call(self, fd: int | None) -> None:
        """Make the worker signal `fd` (lent) from now on."""
        async with self._lock:
            if self._ring is None:
                return
            config, inflight = self._ring
            self._ring = (config._replace(call_fd=fd), inflight)
            link = self._kept.link
            if link is not None and self._serving is link:
                link.post(pb.Envelope(set_call=pb.SetCall()), [] if fd is None else [fd])

    async def close(self) -> None:
        """End the worker; when this returns it can touch guest memory no more."""
        self._kept.begin_close()  # whoever awaits the worker now fails and lets go of the lock
        async with self._lock:
            await self._kept.end()

    # Duty.

    def configuration(self) -> tuple[pb.Configure, Sequence[int]]:
        """See `Duty`."""
        return self._runtime.configure_for(self.queue), self._session.fds

    async def instruct(self, link: Link) -> None:
        """See `Duty`; may raise VhostError: the worker could not map guest memory."""
        await self._send_memory(link)

    async def resume(self) -> None:
        """See `Duty`."""
        async with self._lock:
            try:
                await self._kept.persist(self._ensure_serving)
            except LinkClosedError:
                return  # closing
            except _WorkerStuckError as exc:
                _LOG.error("%s: %s", self._label, exc)  # its end brings the next here
            except VhostError as exc:
                _LOG.error("%s: %s", self._label, exc)
                self._ring = None

    def heard(self, envelope: pb.Envelope) -> None:
        """See `Duty`."""
        if envelope.HasField("ring_broken"):
            _LOG.error("%s: %s", self._label, envelope.ring_broken.reason)
            self._last_avail = envelope.ring_broken.last_avail
            self._ring = None
            self._serving = None

    # Steps. Each may raise LinkClosedError when the worker dies in the middle; persist starts over.

    async def _ask(self, link: Link, envelope: pb.Envelope, fds: Sequence[int] = ()) -> pb.Envelope:
        try:
            async with asyncio.timeout(_ANSWER_DEADLINE_S):
                return await link.request(envelope, fds)
        except TimeoutError as exc:
            # Only a descriptor of the front-end can block a worker, a full pipe for its calls say.
            self._kept.kill()
            raise _WorkerStuckError(f"the worker was stuck for {_ANSWER_DEADLINE_S:.0f} s") from exc

    async def _ensure_serving(self) -> Link:
        link = await self._kept.ensure_alive()
        if self._ring is not None and self._serving is not link:
            await self._send_start(link, *self._ring)
            self._serving = link
        return link

    async def _stop(self) -> int:
        link = await self._ensure_serving()
        reply = await self._ask(link, pb.Envelope(stop_ring=pb.StopRing()))
        self._serving = None
        return reply.ring_stopped.last_avail

    async def _update_memory(self) -> None:
        await self._send_memory(await self._kept.ensure_alive())

    async def _send_memory(self, link: Link) -> None:
        table = list(self._regions.items())
        while len(table) > MAX_FDS:
            part, table = table[:MAX_FDS], table[MAX_FDS:]
            link.post(_memory_message(part, is_last=False), [fd for _region, fd in part])
        reply = await self._ask(
            link, _memory_message(table, is_last=True), [fd for _region, fd in table]
        )
        _check(reply)

    async def _send_start(self, link: Link, config: VringConfig, inflight: InflightMemory) -> None:
        optional = [fd for fd in (config.call_fd, config.err_fd) if fd is not None]
        reply = await self._ask(
            link,
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
