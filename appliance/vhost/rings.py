"""The ring state machine: which rings run, and how each message changes that.

A ring is stopped or started (it has a kick descriptor), and disabled or enabled. It runs while it
is started and enabled. Only `_settle` makes a ring run, and only `_stop` ends that:

    SET_VRING_KICK            the ring is started; a running ring is stopped and started again
    GET_VRING_BASE            the ring is drained and stopped; its kick and call descriptors are
                              closed
    SET_VRING_ENABLE 1 | 0    the ring is enabled | drained and disabled
    SET_VRING_ADDR            a running ring is restarted if its addresses change, but not for the
                              place at which its used ring is logged
    SET_VRING_ERR             a running ring is restarted
    SET_FEATURES              without PROTOCOL_FEATURES, all rings are enabled; running rings are
                              restarted if the features change, but for LOG_ALL
    SET_LOG_BASE              no change
    RESET_DEVICE, RESET_OWNER all rings are drained and disabled
    SET_OWNER again           all rings are drained, and are then as on a new connection

A stop always drains the ring, and the index that it reached becomes the base of the next start.

While LOG_ALL is negotiated and there is a log, whatever is written for a ring is marked there, and
writes to its used ring if the flags of its addresses say so. That begins or ends, for a ring that
runs, before the message is answered that asks for it.

Spec: vhost-user: Ring states; Multiple queue support; Migration; Front-end message types.
"""

from appliance.errors import VhostError
from appliance.vhost._vhost_wire import (
    Inflight,
    Log,
    VirtioFeature,
    VringAddr,
    VringFlag,
    VringState,
)
from appliance.vhost.backend import Backend, RingLog
from appliance.vhost.fds import FdHolder, check_file_size
from appliance.vhost.fs_device import DeviceProperties, is_queue_size
from appliance.vhost.guest_memory import RegionTable
from appliance.vhost.vring import Vring, check_addr_untrusted

_MAX_BASE = 0xFFFF  # the index of a split ring has 16 bits


class Rings:
    """All vrings of one session. Owns their descriptors.

    The methods raise VhostError for invalid values and for a refusal of the backend. If the backend
    refuses to start a ring, the ring keeps what the front-end set, but does not run. The next
    message that changes its state tries again.
    """

    def __init__(self, device: DeviceProperties, backend: Backend) -> None:
        self._device = device
        self._backend = backend
        self._rings = tuple(Vring(index) for index in range(device.num_queues))
        self._features = 0
        self._log = Log(0, 0)
        self._log_fd = FdHolder()
        self._is_logging = False  # LOG_ALL is negotiated
        self.memory = RegionTable()  # the session replaces it when guest memory changes

    def check_index_untrusted(self, index: int) -> None:
        """Raise VhostError if there is no ring `index`."""
        self._ring_untrusted(index)

    def running(self) -> list[int]:
        """Return the numbers of the rings that run."""
        return [ring.index for ring in self._rings if ring.is_running]

    async def set_features(self, features: int) -> None:
        """Use these virtio features; running rings are restarted if one changes but LOG_ALL."""
        was_logging, self._is_logging = self._is_logging, bool(features & VirtioFeature.LOG_ALL)
        features &= ~int(VirtioFeature.LOG_ALL)
        if features != self._features:
            self._features = features
            for ring in self._rings:
                await self._stop(ring)
                await self._settle(ring)
        elif was_logging != self._is_logging:
            await self._update_logs()

    async def set_log_base(self, fd: int, log: Log) -> None:
        """Mark written pages in the bitmap in the file `fd` from now on. Takes `fd`.

        When this returns or raises, the former bitmap is not used any more.
        """
        new = FdHolder()
        new.replace(fd)
        try:
            check_file_size("dirty log", fd, log.mmap_offset, log.mmap_size)
        except VhostError:
            new.close()
            raise
        former, self._log_fd, self._log = self._log_fd, new, log
        try:
            await self._update_logs()
        finally:
            former.close()

    async def enable_all(self) -> None:
        """Enable every ring."""
        for ring in self._rings:
            ring.is_enabled = True
            await self._settle(ring)

    async def disable_all(self) -> None:
        """Drain and disable every ring."""
        for ring in self._rings:
            ring.is_enabled = False
            await self._settle(ring)

    async def begin_again(self) -> None:
        """Drain every ring and forget all that was set, with its descriptors and guest memory."""
        for ring in self._rings:
            await self._stop(ring)
        self.close()
        self._rings = tuple(Vring(index) for index in range(self._device.num_queues))
        self._features = 0
        self._is_logging = False
        self.memory = RegionTable()

    async def set_enabled_untrusted(self, state: VringState) -> None:
        """Enable or disable one ring."""
        ring = self._ring_untrusted(state.ring)
        if state.num > 1:
            raise VhostError(f"ring {ring.index}: enable is {state.num}, expected 0 or 1")
        ring.is_enabled = bool(state.num)
        await self._settle(ring)

    def set_num_untrusted(self, state: VringState) -> None:
        """Set the number of entries of a ring that does not run."""
        ring = self._ring_untrusted(state.ring)
        if not is_queue_size(state.num, self._device.max_queue_size):
            raise VhostError(
                f"ring {ring.index}: size {state.num}, expected a power of two "
                f"up to {self._device.max_queue_size}"
            )
        if ring.is_running and state.num != ring.num:
            raise VhostError(
                f"ring {ring.index}: size {state.num} while the ring runs with {ring.num}"
            )
        ring.num = state.num

    def set_base_untrusted(self, state: VringState) -> None:
        """Set the avail index, of 16 bits, at which a ring that does not run will start."""
        ring = self._ring_untrusted(state.ring)
        if state.num > _MAX_BASE:
            raise VhostError(f"ring {ring.index}: base {state.num}, expected at most {_MAX_BASE}")
        if ring.is_running:
            raise VhostError(f"ring {ring.index}: base {state.num} while the ring runs")
        ring.base = state.num

    async def set_addr_untrusted(self, addr: VringAddr) -> None:
        """Set the user addresses of a ring; a running ring is restarted if one of them changes."""
        ring = self._ring_untrusted(addr.ring)
        check_addr_untrusted(addr)
        previous, ring.addr = ring.addr, addr
        if previous is None or (previous.desc, previous.used, previous.avail) != (
            addr.desc,
            addr.used,
            addr.avail,
        ):
            await self._stop(ring)
            await self._settle(ring)
        else:
            await self._update_log(ring)

    async def take_base_untrusted(self, index: int) -> int:
        """Stop a ring, close its kick and call descriptors, and return its next avail index."""
        ring = self._ring_untrusted(index)
        await self._stop(ring)
        ring.kick.close()
        ring.call.close()
        return ring.base

    async def set_kick(self, index: int, fd: int) -> None:
        """Start ring `index`, which the caller has checked. Takes `fd`."""
        ring = self._rings[index]
        try:
            await self._stop(ring)
        finally:
            ring.kick.replace(fd)
        await self._settle(ring)

    async def set_call(self, index: int, fd: int | None) -> None:
        """Set the call descriptor of ring `index`, which the caller has checked. Takes `fd`."""
        ring = self._rings[index]
        try:
            if ring.is_running:
                await self._backend.set_call(index, fd)
        finally:
            ring.call.replace(fd)

    async def set_err(self, index: int, fd: int | None) -> None:
        """Set the err descriptor of ring `index`, which the caller has checked. Takes `fd`.

        A running ring is restarted.
        """
        ring = self._rings[index]
        was_running = ring.is_running
        try:
            await self._stop(ring)
        finally:
            ring.err.replace(fd)
        if was_running:
            await self._settle(ring)

    def set_inflight(self, inflight: Inflight) -> None:
        """Make the next start of each ring recover from the front-end's inflight buffer.

        Spec: vhost-user: Inflight description; Inflight I/O tracking.
        """
        for ring in self._rings:
            has_area = ring.index < inflight.num_queues
            ring.recover_num = inflight.queue_size if has_area else None

    def close(self) -> None:
        """Close the descriptors of all rings; the backend must have been closed before."""
        for ring in self._rings:
            ring.is_running = False
            ring.close()
        self._log_fd.close()

    def _ring_untrusted(self, index: int) -> Vring:
        if index >= len(self._rings):
            raise VhostError(f"ring {index}, expected 0 to {len(self._rings) - 1}")
        return self._rings[index]

    async def _settle(self, ring: Vring) -> None:
        if not (ring.is_started and ring.is_enabled):
            await self._stop(ring)
        elif not ring.is_running:
            config = ring.config_untrusted(self._features, self.memory, self._log_of(ring))
            await self._backend.start_ring(ring.index, config)
            ring.log = config.log
            ring.is_running = True
            ring.recover_num = None

    async def _stop(self, ring: Vring) -> None:
        if ring.is_running:
            ring.is_running = False
            ring.base = await self._backend.stop_ring(ring.index)

    async def _update_logs(self) -> None:
        # All of them, whatever happens: no ring may go on with a log that is closed.
        error = None
        for ring in self._rings:
            try:
                await self._update_log(ring)
            except VhostError as exc:
                error = exc
        if error is not None:
            raise error

    async def _update_log(self, ring: Vring) -> None:
        log = self._log_of(ring)
        if ring.is_running and log != ring.log:
            ring.log = None
            await self._backend.set_log(ring.index, log)
            ring.log = log

    def _log_of(self, ring: Vring) -> RingLog | None:
        fd = self._log_fd.fd
        if not self._is_logging or fd is None or ring.addr is None:
            return None
        used_addr = ring.addr.log_guest_addr if ring.addr.flags & VringFlag.LOG else None
        return RingLog(fd, self._log.mmap_size, self._log.mmap_offset, used_addr)
