"""One front-end's virtio-fs device: guest memory, session, and a worker per queue that is in use.

A session that was saved takes the place of the present one when the front-end asks whether it was
loaded. The workers end before that: they start anew with the next rings, and find the grants of the
session that was loaded.
"""

import asyncio
import contextlib
import os
import stat

from appliance.errors import VhostError
from appliance.protos import control_pb2 as pb
from appliance.session.device_state import parse_untrusted, save
from appliance.session.grants import Grants
from appliance.session.ring_worker import LOOK_S, DeviceServices, RingWorker
from appliance.session.session_memory import InflightMemory
from appliance.session.state_stream import StateStream
from appliance.vhost._vhost_wire import Region
from appliance.vhost.backend import RingLog, VringConfig

# The FUSE minor version that a resumed session is assumed to have negotiated: the oldest one that
# this program serves.
_RESUMED_MINOR = 28
# The queue that every guest uses; queue 0 is hiprio.
_FIRST_REQUEST_QUEUE = 1


class Device:
    """The `Backend` of one vhost-user connection.

    Owns everything of the front-end's that must outlive a worker: the descriptors of memory
    regions, and the inflight record.

    Args:
        label: the name of the front-end's socket, for logs and `status`.
        num_queues: the number of virtqueues, including hiprio.
        max_queue_size: the largest number of entries of a ring.
        services: where workers come from, and the session.

    Raises:
        OSError: there is not enough memory or no free descriptor.
    """

    def __init__(
        self,
        label: str,
        num_queues: int,
        max_queue_size: int,
        services: DeviceServices,
    ) -> None:
        self.label = label
        self._num_queues = num_queues
        self._max_queue_size = max_queue_size
        self._services = services
        self._regions: dict[Region, int] = {}
        self._inflight = InflightMemory.create(num_queues, max_queue_size)
        # The inflight buffer of each running ring. It may differ from `_inflight`, because a new
        # buffer is used only by rings that start after it came.
        self._recording: dict[int, InflightMemory] = {}
        self._ring_workers: dict[int, RingWorker] = {}
        self._kick_fds: dict[int, int] = {}  # of the rings that run, lent
        self._transfer: StateStream | None = None
        self._restored: set[int] = set()  # rings that have not started since a session was loaded

    # --- Status ---

    def workers(self) -> list[pb.WorkerStatus]:
        """Return the pid, queue and number of restarts of each living worker, for `status`."""
        return [
            pb.WorkerStatus(pid=ring_worker.pid, queue=queue, restarts=ring_worker.restarts)
            for queue, ring_worker in sorted(self._ring_workers.items())
            if ring_worker.is_alive
        ]

    async def keep_looking(self) -> None:
        """Look every `LOOK_S` seconds while the guest may wait, never while it is quiet."""
        while True:
            await self._services.kicks.first_kick()
            is_awaited = True
            while is_awaited:
                await asyncio.sleep(LOOK_S)
                is_awaited = self.look()

    def look(self) -> bool:
        """Have workers replaced that give no sign of life; see `RingWorker.look`.

        Returns:
            Whether to look again, even if the guest does not kick.
        """
        kicked = self._services.kicks.kicked()
        is_awaited = False
        for queue, ring_worker in self._ring_workers.items():
            is_awaited |= ring_worker.look(is_kicked=self._kick_fds.get(queue) in kicked)
        return is_awaited

    # --- Guest memory ---

    async def add_region(self, region: Region, fd: int, replaced: Region | None = None) -> None:
        """Add `region` to guest memory, in place of `replaced` if that is one. Takes `fd`."""
        left = dict(self._regions)
        try:
            _check_file(region, fd)
            replaced_fd = left.pop(replaced) if replaced is not None else None
            await self._change_memory({**left, region: fd})
        except VhostError:
            os.close(fd)
            raise
        if replaced_fd is not None:
            os.close(replaced_fd)

    async def remove_region(self, region: Region) -> None:
        """Remove `region` from guest memory and close its descriptor."""
        left = dict(self._regions)
        fd = left.pop(region)
        await self._change_memory(left)
        os.close(fd)

    async def set_regions(self, regions: list[tuple[Region, int]]) -> None:
        """Replace all of guest memory. Takes the descriptors."""
        unused = [fd for _region, fd in regions]
        before = list(self._regions.values())
        try:
            for region, fd in regions:
                _check_file(region, fd)
            await self._change_memory(dict(regions))
            unused = before
        finally:
            for fd in unused:
                os.close(fd)

    async def _change_memory(self, regions: dict[Region, int]) -> None:
        # If a worker cannot map the new table, every worker gets the previous one again.
        before = dict(self._regions)
        try:
            await self._set_memory(regions)
        except VhostError:
            with contextlib.suppress(VhostError):
                await self._set_memory(before)
            raise

    async def _set_memory(self, regions: dict[Region, int]) -> None:
        # Changed in place, because every RingWorker holds this dictionary.
        self._regions.clear()
        self._regions.update(regions)
        for ring_worker in self._ring_workers.values():
            await ring_worker.update_memory()

    # --- Rings ---

    async def start_ring(self, index: int, config: VringConfig) -> None:
        """Serve ring `index` with its own worker; see `Backend`.

        Raises:
            VhostError: the ring does not fit the inflight buffer, or no worker can serve it.
        """
        inflight = self._inflight
        if index >= inflight.num_queues or config.num > inflight.queue_size:
            raise VhostError(
                f"ring {index} with {config.num} entries does not fit the inflight buffer, which "
                f"has {inflight.num_queues} queues of {inflight.queue_size} entries"
            )
        if config.fresh:
            inflight.clear(index)
        ring_worker = self._ring_workers.get(index)
        if ring_worker is None:
            ring_worker = self._ring_workers[index] = RingWorker(
                index,
                self.label,
                self._services,
                self._regions,
            )
        if index in self._restored:
            self._restored.remove(index)
            config = config._replace(follows_used=True)
        self._recording[index] = inflight
        self._kick_fds[index] = config.kick_fd
        is_watched = self._services.kicks.add(config.kick_fd)
        try:
            is_unused = is_watched and self._is_unused(index, config, inflight)
            if is_unused and ring_worker.can_await_kick(config):
                ring_worker.start_at_first_kick(config, inflight)
            else:
                await ring_worker.start_ring(config, inflight)
        except OSError as exc:
            self._end_ring(index)
            raise VhostError(f"ring {index}: its kick descriptor: {exc.strerror}") from exc
        except VhostError:
            self._end_ring(index)
            raise

    def _is_unused(self, index: int, config: VringConfig, inflight: InflightMemory) -> bool:
        """Return whether a guest may never use this ring, and has not used it before."""
        # Of a ring that was used, what suppresses kicks may be out of date.
        return (
            index != _FIRST_REQUEST_QUEUE
            and config.base == 0
            and not config.follows_used
            and not self._services.memory.is_initialised
            and (config.fresh or inflight.is_blank_of(index))
        )

    async def stop_ring(self, index: int) -> int:
        """Drain ring `index` and return the avail index that it reached."""
        try:
            return await self._ring_workers[index].stop_ring()
        finally:
            self._end_ring(index)

    async def set_call(self, index: int, fd: int | None) -> None:
        """Signal completions of ring `index` through `fd` (lent)."""
        await self._ring_workers[index].set_call(fd)

    async def set_log(self, index: int, log: RingLog | None) -> None:
        """Mark what is written for ring `index` in `log`, or in none; see `Backend`."""
        await self._ring_workers[index].set_log(log)

    # --- Saving and moving ---

    async def save_state(self, fd: int) -> None:
        """Begin to write the session's state to `fd`, which is taken; see `Backend`."""
        try:
            data = save(self._services.memory, Grants(self._services.grants_fd))
        except VhostError:
            os.close(fd)
            raise
        self._begin_transfer(fd, data)

    async def load_state(self, fd: int) -> None:
        """Begin to read a session's state from `fd`, which is taken; see `Backend`."""
        self._begin_transfer(fd, None)

    async def finish_state(self) -> None:
        """Complete what was begun; see `Backend`."""
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            raise VhostError("no device state was transferred")
        data = await transfer.finish()
        if data is None:
            return
        state = parse_untrusted(data)
        await self._end_workers()
        await self._services.restore(state)
        memory = self._services.memory
        if state.HasField("init"):
            memory.start(state.init.minor, state.init.flags, state.init.max_readahead)
        else:
            memory.end()
        # Whatever had been taken from them was answered when the session was saved. But a front-end
        # may say that a ring goes on behind whatever the guest had offered by then, as
        # cloud-hypervisor does, and those requests would be lost.
        self._restored = set(range(self._num_queues))

    def _begin_transfer(self, fd: int, data: bytes | None) -> None:
        if self._transfer is not None:
            self._transfer.close()
        self._transfer = StateStream(fd, data)

    # --- Session ---

    async def inflight(self, num_queues: int, queue_size: int) -> tuple[int, int, int]:
        """Return (fd, size, offset) of a new, blank inflight buffer; `fd` is lent."""
        self._replace_inflight(InflightMemory.create(num_queues, queue_size))
        return self._inflight.fd, self._inflight.size, self._inflight.offset

    async def set_inflight(
        self, fd: int, mmap_size: int, mmap_offset: int, num_queues: int, queue_size: int
    ) -> None:
        """Use the front-end's inflight buffer for rings that start from now on. Takes `fd`."""
        try:
            memory = InflightMemory(
                fd, offset=mmap_offset, num_queues=num_queues, queue_size=queue_size
            )
        except (ValueError, OSError) as exc:
            os.close(fd)
            raise VhostError(
                f"inflight buffer of {mmap_size} bytes at {mmap_offset:#x} for {num_queues} queues "
                f"of {queue_size}: {exc}"
            ) from exc
        self._replace_inflight(memory)
        services = self._services
        if not memory.is_blank and not services.memory.is_initialised:
            # The front-end reconnects with requests of a session that another process served,
            # and the guest does not repeat INIT. Nothing that INIT negotiates changes our answers.
            # The grants of that session are gone, so its nodeids are stale here, and the guest's
            # kernel looks the paths up again.
            services.memory.start(_RESUMED_MINOR, 0, 0)
            await services.start_apart()

    def _replace_inflight(self, memory: InflightMemory) -> None:
        previous, self._inflight = self._inflight, memory
        self._close_unless_used(previous)

    def _end_ring(self, index: int) -> None:
        self._services.kicks.remove(self._kick_fds.pop(index))
        self._close_unless_used(self._recording.pop(index))

    def _close_unless_used(self, memory: InflightMemory) -> None:
        if memory is not self._inflight and memory not in self._recording.values():
            memory.close()

    async def reset(self) -> None:
        """End the FUSE session; the guest must send INIT again."""
        self._services.memory.end()
        self._restored.clear()

    async def begin_again(self) -> None:
        """Forget guest memory, inflight buffer and FUSE session; the workers stay."""
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None
        await self.set_regions([])
        self._replace_inflight(InflightMemory.create(self._num_queues, self._max_queue_size))
        self._services.memory.begin_again()
        self._restored.clear()

    async def close(self) -> None:
        """End the workers, then close guest memory and the inflight buffers."""
        if self._transfer is not None:
            self._transfer.close()
        await self._end_workers()
        for fd in self._regions.values():
            os.close(fd)
        self._regions.clear()
        for memory in {self._inflight, *self._recording.values()}:
            memory.close()
        self._recording.clear()
        for fd in self._kick_fds.values():
            self._services.kicks.remove(fd)
        self._kick_fds.clear()

    async def _end_workers(self) -> None:
        # Concurrently, because each worker may take as long as the deadline for its end.
        await asyncio.gather(*(ring_worker.close() for ring_worker in self._ring_workers.values()))
        self._ring_workers.clear()


def _check_file(region: Region, fd: int) -> None:
    # Accessing a mapping beyond the end of its file raises SIGBUS.
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_size < region.mmap_offset + region.size:
        raise VhostError(
            f"memory region at {region.gpa:#x}: its file has {status.st_size:#x} bytes, "
            f"the region needs at least {region.mmap_offset + region.size:#x}"
        )
