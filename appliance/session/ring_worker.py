"""The session process's side of one virtqueue: its ring, memory table, and worker process.

The state that a worker needs is kept here and sent again to every successor.

A queue that its guest may never use (hiprio, and request queues beside the first) has no worker
before its first kick, if its ring is new, too; see `start_at_first_kick`. Most guests use one CPU's
queue or few, and a worker costs 5 MB.
"""

import asyncio
import contextlib
import logging
import select
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from appliance.errors import VhostError
from appliance.protos import control_pb2 as pb
from appliance.protos.device_state_pb2 import DeviceState
from appliance.session.avail_index import avail_index
from appliance.session.kick_watch import KickWatch
from appliance.session.link import Link, LinkClosedError
from appliance.session.memory_messages import difference, whole_table
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
# How long a worker may take to answer, or to say that its ring is draining, before it is replaced.
_ANSWER_DEADLINE_S = 5.0
# How long it may take to give a sign of life. With two looks before (`LOOK_S`), one that stops is
# replaced within 5 s.
_PONG_DEADLINE_S: Final = 2.5
# How often to look whether it does something.
LOOK_S: Final = 1.0
# The workers in a row that may be stuck before what was asked of them fails.
_STUCK_MAX: Final = 2


class _WorkerStuckError(VhostError):
    """Workers did not answer in time and were killed; a successor will be started."""


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
    kicks: KickWatch
    """Watches the rings that run."""
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
        # The channel to a worker, and the memory table that it has. None: no table is known.
        self._mapped: tuple[Link, dict[Region, int]] | None = None
        self._last_avail = 0
        self._answer_due: asyncio.Timeout | None = None
        self._num_stuck = 0
        self._served = services.memory.statistics(queue).requests
        self._num_served = 0  # at the last `look`
        self._may_be_awaited = False
        self._is_pinged = False
        self._awaits_kick = False

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

    def can_await_kick(self, config: VringConfig) -> bool:
        """Return whether no worker was ever needed, and nothing is in the ring of `config`."""
        is_empty = avail_index(config, self._regions) == config.base
        return is_empty and self._process.pid == 0

    def start_at_first_kick(self, config: VringConfig, inflight: InflightMemory) -> None:
        """Serve the ring from its first kick on, and start a worker only then.

        Nothing may be in the ring, or in flight. A kick for an empty ring does not count, because
        QEMU makes one when it starts a device. Kicks are not read, so the worker finds them.

        Args:
            config: as for `start_ring`. The kick descriptor is one that can be waited for without
                blocking; `KickWatch.add` says so.
            inflight: as for `start_ring`.

        Raises:
            OSError: the kick descriptor cannot be waited for.
        """
        self._services.kicks.call_at_kicks(config.kick_fd, self._kicked)
        self._awaits_kick = True
        self._ring = (config, inflight)
        self._serving = None
        self._last_avail = config.base

    def _kicked(self, events: int) -> None:
        if self._ring is None:
            return
        config, _inflight = self._ring
        # A descriptor that has failed is the worker's affair, too, and so is memory that is gone.
        if events == select.EPOLLIN and avail_index(config, self._regions) == config.base:
            return
        self._await_kick_no_more()
        self._may_be_awaited = True
        self._process.spawn_task(self._serve_from_now_on())

    def _await_kick_no_more(self) -> None:
        if self._awaits_kick and self._ring is not None:
            self._services.kicks.call_no_more(self._ring[0].kick_fd)
        self._awaits_kick = False

    async def _serve_from_now_on(self) -> None:
        # The front-end has its answer already, and nobody waits but the guest.
        try:
            await self._process.do(self._serve_ring)
        except LinkClosedError:
            pass  # the device ends
        except _WorkerStuckError as exc:
            _LOG.error("%s: %s", self._label, exc)
        except VhostError as exc:
            _LOG.error("%s: %s; the ring stops", self._label, exc)
            self._ring = None

    async def start_ring(self, config: VringConfig, inflight: InflightMemory) -> None:
        """Start serving the ring; descriptors and memory are lent until it is stopped.

        Raises:
            VhostError: the worker could not map the ring or guest memory, did not answer in time,
                or could not be kept alive.
        """
        self._await_kick_no_more()
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
        if self._awaits_kick:
            # A request that came at this instant is not lost: the next start sees it.
            self._await_kick_no_more()
            self._ring = None
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
        if not self._awaits_kick:
            await self._process.do(self._send_call)

    async def set_log(self, log: RingLog | None) -> None:
        """Return when the worker marks what it writes in `log`, or in none; see `Backend.set_log`.

        Raises:
            VhostError: the worker could not map it, or did not answer in time.
        """
        if self._ring is None:
            return
        config, inflight = self._ring
        if self._awaits_kick and log is not None:
            await self.start_ring(config, inflight)  # to see whether the log can be mapped
        self._ring = (config._replace(log=log), inflight)
        if self._awaits_kick:
            return
        try:
            await self._process.do(self._send_log)
        except VhostError:
            if self._ring is not None:  # it may have broken meanwhile
                self._ring = (config._replace(log=None), inflight)
            raise

    def look(self, *, is_kicked: bool) -> bool:
        """Have a worker replaced that gives no sign of life; called every `LOOK_S` seconds.

        A worker that has answered requests since the last call is alive. Another one is asked if
        its guest may be waiting for it.

        Args:
            is_kicked: whether the guest has kicked since the last call.

        Returns:
            Whether to look again, even if the guest does not kick.
        """
        self._may_be_awaited |= is_kicked
        before, self._num_served = self._num_served, sum(self._served)
        if self._num_served != before:
            self._may_be_awaited = True  # by a request that it took after the last answer
            self._extend_deadline()
        elif self._serving is not None and self._may_be_awaited and not self._is_pinged:
            self._is_pinged = True
            self._process.spawn_task(self._await_pong())
        return self._may_be_awaited and self._ring is not None

    async def _await_pong(self) -> None:
        try:
            with contextlib.suppress(LinkClosedError, _WorkerStuckError):
                await self._process.do(self._ping)
                self._may_be_awaited = False
        finally:
            self._is_pinged = False

    def _extend_deadline(self) -> None:
        due = self._answer_due
        if due is not None and not due.expired():
            due.reschedule(asyncio.get_running_loop().time() + _ANSWER_DEADLINE_S)

    async def close(self) -> None:
        """End the worker. When this returns, it can no longer access guest memory."""
        self._await_kick_no_more()
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
        if envelope.HasField("ring_draining"):
            self._extend_deadline()
        elif envelope.HasField("ring_broken"):
            _LOG.error("%s: %s", self._label, envelope.ring_broken.reason)
            self._last_avail = envelope.ring_broken.last_avail
            self._ring = None
            self._serving = None

    # --- Steps, each of which may be repeated with a successor ---

    async def _ask(
        self,
        link: Link,
        envelope: pb.Envelope,
        fds: Sequence[int] = (),
        deadline_s: float | None = None,
    ) -> pb.Envelope:
        deadline_s = _ANSWER_DEADLINE_S if deadline_s is None else deadline_s
        try:
            async with asyncio.timeout(deadline_s) as self._answer_due:
                reply = await link.request(envelope, fds)
        except TimeoutError as exc:
            self._process.kill()
            self._num_stuck += 1
            if self._num_stuck < _STUCK_MAX:
                _LOG.error("%s: worker %d is stuck and is replaced", self._label, self._process.pid)
                raise LinkClosedError from exc  # its successor takes the step
            # A descriptor from the front-end may block every worker, such as a full pipe as call
            # descriptor.
            raise _WorkerStuckError(
                f"{_STUCK_MAX} workers were stuck: no answer within {deadline_s:g} s"
            ) from exc
        finally:
            self._answer_due = None
        self._num_stuck = 0
        return reply

    async def _serve_ring(self, link: Link) -> None:
        if self._ring is not None and self._serving is not link:
            await self._send_start(link, *self._ring)
            self._serving = link

    async def _ping(self, link: Link) -> None:
        if self._serving is link:
            await self._ask(link, pb.Envelope(ping=pb.Ping()), deadline_s=_PONG_DEADLINE_S)

    async def _stop(self, link: Link) -> None:
        if self._ring is None:
            return  # the ring broke meanwhile; `received` has noted the last avail index
        reply = await self._ask(link, pb.Envelope(stop_ring=pb.StopRing()))
        self._serving = None
        self._last_avail = reply.ring_stopped.last_avail

    async def _send_call(self, link: Link) -> None:
        if self._ring is not None and self._serving is link:
            fd = self._ring[0].call_fd
            # Answered, so that a front-end cannot have descriptors wait here without end.
            await self._ask(link, pb.Envelope(set_call=pb.SetCall()), [] if fd is None else [fd])

    async def _send_log(self, link: Link) -> None:
        if self._ring is not None and self._serving is link:
            message, fds = _log_message(self._ring[0].log)
            _check(await self._ask(link, pb.Envelope(set_log=pb.SetLog(log=message)), fds))

    async def _send_memory(self, link: Link) -> None:
        # Mapping costs time, and a VMM may add hundreds of regions one by one; so a worker that has
        # a table is told what has changed.
        wanted = dict(self._regions)
        if self._mapped is None or self._mapped[0] is not link:
            messages = whole_table(wanted)
        elif self._mapped[1] == wanted:
            return
        else:
            messages = difference(self._mapped[1], wanted)
        self._mapped = None  # until it has answered
        *first, (last, last_fds) = messages
        for message, fds in first:
            link.post(message, fds)
        _check(await self._ask(link, last, last_fds))
        self._mapped = link, wanted

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
                    follows_used=config.follows_used,
                )
            ),
            [inflight.fd, config.kick_fd, *optional, *log_fds],
        )
        _check(reply)


def _log_message(log: RingLog | None) -> tuple[pb.DirtyLog | None, list[int]]:
    if log is None:
        return None, []
    return pb.DirtyLog(size=log.size, offset=log.offset, used_addr=log.used_addr), [log.fd]


def _check(reply: pb.Envelope) -> None:
    if reply.done.error:
        raise VhostError(reply.done.error)
