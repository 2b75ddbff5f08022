"""The session process's side of one virtqueue: its ring, memory table, and worker process.

The state that a worker needs is kept here and sent again to every successor.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from appliance.errors import VhostError
from appliance.protos import control_pb2 as pb
from appliance.protos.device_state_pb2 import DeviceState
from appliance.session.channel import MAX_FDS
from appliance.session.link import Link
from appliance.session.session_memory import InflightMemory, SessionMemory
from appliance.session.spawning import Spawner
from appliance.session.worker_process import (
    START_ATTEMPTS,
    Keeper,
    WorkerFailedError,
    WorkerProcess,
)
from appliance.vhost._vhost_wire import Region
from appliance.vhost.backend import RingLog, VringConfig

_LOG = logging.getLogger(__name__)
# How long a worker may take to answer. This is more than it may take to drain its ring.
_ANSWER_DEADLINE_S = 15.0


class _WorkerStuckError(VhostError):
    """The worker did not answer in time and was killed; a successor will be started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceServices:
    """What a device needs besides its front-end; the caller keeps ownership of all of it."""

    spawner: Spawner
    keeper: Keeper
    start_apart: Callable[[], Awaitable[None]]
    """See `GrantTable.start_apart`; raises VhostError if that is impossible."""
    restore: Callable[[DeviceState], Awaitable[None]]
    """See `SupervisorClient.restore`."""
    changed: Callable[[], None]
    """Called when a worker has started or died."""
    memory: SessionMemory
    fds: Sequence[int]
    """Session memory and grants, which every worker gets first."""
    configure: pb.Configure
    """The part of the first message that is the same for every worker."""

    @property
    def grants_fd(self) -> int:
        """The descriptor of the grants, read-only."""
        return self.fds[1]

    def configure_for(self, queue: int) -> pb.Configure:
        """Return the first message to the worker of `queue`."""
        configure = pb.Configure(queue=queue)
        configure.MergeFrom(self.configure)
        return configure


class RingWorker:
    """Keeps a worker process serving one queue of a device. The process's `WorkerOwner`.

    Every method returns when a living worker has carried out the request.

    Args:
        queue: the number of the virtqueue.
        label: the name of the front-end's socket, for logs.
        services: where workers come from, and what they get.
        regions: the device's memory table, each region with its descriptor (lent). The device
            changes it in place, and closes a descriptor only after it has left the table.
    """

    def __init__(
        self,
        queue: int,
        label: str,
        services: DeviceServices,
        regions: dict[Region, int],
    ) -> None:
        self.queue = queue
        self._label = f"{label} queue {queue}"
        self._services = services
        self._regions = regions
        self._process = WorkerProcess(self._label, services.spawner, services.keeper, self)
        # The ring while the guest has it started; its descriptors and memory are lent.
        self._ring: tuple[VringConfig, InflightMemory] | None = None
        # The channel to the worker that serves the ring. After that worker's death it differs from
        # the channel to the successor, which does not serve the ring yet.
        self._serving: Link | None = None
        self._last_avail = 0

    @property
    def pid(self) -> int:
        """The process id of the worker started last, or 0 if none was started."""
        return self._process.pid

    @property
    def restarts(self) -> int:
        """How many workers of this queue have died."""
        return self._process.restarts

    @property
    def is_alive(self) -> bool:
        """Whether the channel to a worker is open."""
        return self._process.link is not None

    async def start_ring(self, config: VringConfig, inflight: InflightMemory) -> None:
        """Start serving the ring; descriptors and memory are lent until it is stopped.

        Raises:
            VhostError: the worker could not map the ring or guest memory, did not answer in time,
                or could not be kept alive.
        """
        self._ring = (config, inflight)
        self._serving = None  # the ring that this worker served before may have broken
        try:
            await self._process.do(self._serve_ring, attempts=START_ATTEMPTS)
        except WorkerFailedError as exc:
            self._ring = None
            raise VhostError(str(exc)) from exc
        except VhostError:
            self._ring = None
            raise

    async def stop_ring(self) -> int:
        """Stop the ring; return the next avail index once all popped requests are answered.

        Raises:
            VhostError: the worker did not answer in time. The ring is stopped nevertheless.
        """
        if self._ring is not None:
            try:
                await self._process.do(self._stop)
            finally:
                # Even after a failure: a successor must not use what was lent.
                self._ring = None
        return self._last_avail

    async def update_memory(self) -> None:
        """Return when the worker, if one lives, uses the device's current memory table.

        Raises:
            VhostError: the worker could not map it, or did not answer in time.
        """
        if self._process.link is not None:
            await self._process.do(self._send_memory)

    async def set_call(self, fd: int | None) -> None:
        """Make the worker signal completions through `fd` (lent) from now on; None: not at all."""
        if self._ring is None:
            return
        config, inflight = self._ring
        self._ring = (config._replace(call_fd=fd), inflight)
        await self._process.do(self._send_call)

    async def set_log(self, log: RingLog | None) -> None:
        """Return when the worker marks what it writes in `log`, or in none; see `Backend.set_log`.

        Raises:
            VhostError: the worker could not map it, or did not answer in time.
        """
        if self._ring is None:
            return
        config, inflight = self._ring
        self._ring = (config._replace(log=log), inflight)
        try:
            await self._process.do(self._send_log)
        except VhostError:
            if self._ring is not None:  # it may have broken meanwhile
                self._ring = (config._replace(log=None), inflight)
            raise

    async def close(self) -> None:
        """End the worker. When this returns, it can no longer access guest memory."""
        await self._process.close()

    # --- WorkerOwner ---

    def configuration(self) -> tuple[pb.Configure, Sequence[int]]:
        """See `WorkerOwner`."""
        return self._services.configure_for(self.queue), self._services.fds

    async def bring_up(self, link: Link) -> None:
        """See `WorkerOwner`."""
        self._services.changed()
        try:
            await self._send_memory(link)
            await self._serve_ring(link)
        except _WorkerStuckError:
            raise  # the ring is kept for the successor
        except VhostError:
            self._ring = None
            raise

    def died(self) -> None:
        """See `WorkerOwner`."""
        self._services.changed()

    def received(self, envelope: pb.Envelope) -> None:
        """See `WorkerOwner`."""
        if envelope.HasField("ring_broken"):
            _LOG.error("%s: %s", self._label, envelope.ring_broken.reason)
            self._last_avail = envelope.ring_broken.last_avail
            self._ring = None
            self._serving = None

    # --- Steps, each of which may be repeated with a successor ---

    async def _ask(self, link: Link, envelope: pb.Envelope, fds: Sequence[int] = ()) -> pb.Envelope:
        try:
            async with asyncio.timeout(_ANSWER_DEADLINE_S):
                return await link.request(envelope, fds)
        except TimeoutError as exc:
            # Only a descriptor from the front-end can block a worker, such as a full pipe as call
            # descriptor.
            self._process.kill()
            raise _WorkerStuckError(
                f"the worker was stuck: no answer within {_ANSWER_DEADLINE_S:.0f} s"
            ) from exc

    async def _serve_ring(self, link: Link) -> None:
        if self._ring is not None and self._serving is not link:
            await self._send_start(link, *self._ring)
            self._serving = link

    async def _stop(self, link: Link) -> None:
        if self._ring is None:
            return  # the ring broke meanwhile; `received` has noted the last avail index
        reply = await self._ask(link, pb.Envelope(stop_ring=pb.StopRing()))
        self._serving = None
        self._last_avail = reply.ring_stopped.last_avail

    async def _send_call(self, link: Link) -> None:
        if self._ring is not None and self._serving is link:
            fd = self._ring[0].call_fd
            link.post(pb.Envelope(set_call=pb.SetCall()), [] if fd is None else [fd])

    async def _send_log(self, link: Link) -> None:
        if self._ring is not None and self._serving is link:
            message, fds = _log_message(self._ring[0].log)
            _check(await self._ask(link, pb.Envelope(set_log=pb.SetLog(log=message)), fds))

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
        log, log_fds = _log_message(config.log)
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
                    log=log,
                )
            ),
            [inflight.fd, config.kick_fd, *optional, *log_fds],
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


def _log_message(log: RingLog | None) -> tuple[pb.DirtyLog | None, list[int]]:
    if log is None:
        return None, []
    return pb.DirtyLog(size=log.size, offset=log.offset, used_addr=log.used_addr), [log.fd]


def _check(reply: pb.Envelope) -> None:
    if reply.done.error:
        raise VhostError(reply.done.error)
