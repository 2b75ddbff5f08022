"""The message orders that real VMMs send, over `tests.fakes.frontend`.

Each drives a `FrontEnd` with the memory and rings of `tests.fakes.driver`. Observed with QEMU 7.2
and UML 6.1; cloud-hypervisor and crosvm as their sources of 2026 send.
"""

import os
import socket
from collections.abc import Sequence
from typing import Final, Protocol

from appliance.vhost._vhost_wire import HeaderFlag, Inflight, ProtocolFeature, Region, VirtioFeature
from tests.fakes.driver import DriverRing, GuestMemory
from tests.fakes.frontend import FrontEnd

TAG_BYTES: Final = 36
FS_CONFIG_BYTES: Final = 40


class Vmm(Protocol):
    """A VMM's use of its front-end: `realize` once, `start` and `stop` in turn, `close`."""

    front_end: FrontEnd

    def realize(self) -> None: ...

    def start(
        self, memory: GuestMemory, rings: Sequence[DriverRing], bases: Sequence[int] = ()
    ) -> None:
        """Start a ring per queue, at its `base` unless `bases` says otherwise."""

    def stop(self) -> list[int]:
        """Stop every started ring; return the bases to go on from, none if the VMM does not ask."""

    def close(self) -> None: ...


def _bases(rings: Sequence[DriverRing], bases: Sequence[int]) -> Sequence[int]:
    return bases or [ring.base for ring in rings]


GUEST_FEATURES: Final = (
    VirtioFeature.VERSION_1
    | VirtioFeature.EVENT_IDX
    | VirtioFeature.INDIRECT_DESC
    | VirtioFeature.PROTOCOL_FEATURES
)


class Qemu:
    """QEMU 7.2, vhost-user-fs-pci."""

    _KNOWN = (
        ProtocolFeature.MQ
        | ProtocolFeature.LOG_SHMFD
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.INFLIGHT_SHMFD
        | ProtocolFeature.RESET_DEVICE
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
    )

    def __init__(self, front_end: FrontEnd, num_queues: int = 2) -> None:
        self.front_end = front_end
        self._num_queues = num_queues
        self._features = 0
        self._num_started = 0
        self._known_regions: list[Region] = []
        self._masked_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._err_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def realize(self) -> None:
        fe = self.front_end
        fe.get_features()
        protocol = fe.get_protocol_features() & self._KNOWN
        fe.set_protocol_features(protocol)
        assert protocol & ProtocolFeature.MQ
        assert protocol & ProtocolFeature.CONFIGURE_MEM_SLOTS
        assert fe.get_queue_num() >= self._num_queues
        assert fe.get_max_mem_slots() >= 32
        fe.set_owner()
        self._features = fe.get_features() & GUEST_FEATURES
        for queue in range(self._num_queues):
            fe.set_vring_call(queue, self._masked_fd)
            fe.set_vring_err(queue, self._err_fd)

    def start(
        self, memory: GuestMemory, rings: Sequence[DriverRing], bases: Sequence[int] = ()
    ) -> None:
        fe = self.front_end
        self._num_started = len(rings)
        for queue in range(len(rings)):
            fe.set_vring_call(queue, self._masked_fd)
        fe.set_features(self._features)
        self._update_memory(memory)
        for queue, (ring, base) in enumerate(zip(rings, _bases(rings, bases), strict=True)):
            fe.set_vring_num(queue, ring.num)
            fe.set_vring_base(queue, base)
            fe.set_vring_addr(queue, ring.layout())
            fe.set_vring_kick(queue, ring.kick_fd)
        for queue in range(len(rings)):
            fe.set_vring_enable(queue, 1)
        for queue, ring in enumerate(rings):
            fe.set_vring_call(queue, ring.call_fd)

    def _update_memory(self, memory: GuestMemory) -> None:
        # Only what changed since the last start, and each message acked.
        regions = [Region._make(region) for region in memory.regions]
        self.front_end.acks = True
        for region in self._known_regions:
            if region not in regions:
                self.front_end.rem_mem_reg(region)
        for region in regions:
            if region not in self._known_regions:
                self.front_end.add_mem_reg(region, memory.fd)
        self.front_end.acks = False
        self._known_regions = regions

    def stop(self) -> list[int]:
        fe = self.front_end
        queues = range(self._num_started)
        for queue in queues:
            fe.set_vring_enable(queue, 0)
        bases = [fe.get_vring_base(queue) for queue in queues]
        for queue in queues:
            fe.set_vring_call(queue, self._masked_fd)
        return bases

    def unplug(self) -> None:
        """Remove the stopped device and keep the connection, as device_del does."""
        os.close(self._masked_fd)
        os.close(self._err_fd)

    def close(self) -> None:
        self.unplug()
        self.front_end.close()


class NewerQemu(Qemu):
    """QEMU from 8.2 on, which saves and moves guests with vhost-user-fs."""

    _KNOWN = Qemu._KNOWN | ProtocolFeature.DEVICE_STATE

    def save(self) -> tuple[bytes, list[int]]:
        """Stop the rings and return the device's state, with the bases to go on from."""
        bases = self.stop()
        return self.front_end.save_state(), bases


class CloudHypervisor:
    """cloud-hypervisor, --fs. NEED_REPLY is on every message, own reply or not."""

    _KNOWN: Final = (
        ProtocolFeature.MQ
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.INFLIGHT_SHMFD
        | ProtocolFeature.LOG_SHMFD
        | ProtocolFeature.DEVICE_STATE
    )

    def __init__(
        self,
        front_end: FrontEnd,
        num_queues: int = 2,
        inflight: tuple[Inflight, int] | None = None,
    ) -> None:
        self.front_end = front_end
        self.inflight = inflight
        """Buffer and owned descriptor; a reconnecting VMM hands them to its next connection."""
        self._num_queues = num_queues
        self._features = 0
        self._num_started = 0

    def realize(self) -> None:
        fe = self.front_end
        fe.set_owner()
        self._features = fe.get_features() & GUEST_FEATURES
        protocol = fe.get_protocol_features() & self._KNOWN
        fe.set_protocol_features(protocol)
        assert protocol & ProtocolFeature.REPLY_ACK
        fe.acks = True
        fe.ask_flags = HeaderFlag.VERSION_1 | HeaderFlag.NEED_REPLY
        assert fe.get_queue_num() >= self._num_queues

    def start(
        self, memory: GuestMemory, rings: Sequence[DriverRing], bases: Sequence[int] = ()
    ) -> None:
        fe = self.front_end
        self._num_started = len(rings)
        fe.set_features(self._features)
        fe.set_mem_table(memory)
        for queue, ring in enumerate(rings):
            fe.set_vring_num(queue, ring.num)
        if self.inflight is None:
            self.inflight = fe.get_inflight_fd(len(rings), max(ring.num for ring in rings))
        fe.set_inflight_fd(*self.inflight)
        for queue, (ring, base) in enumerate(zip(rings, _bases(rings, bases), strict=True)):
            fe.set_vring_addr(queue, ring.layout())
            fe.set_vring_base(queue, base)
            fe.set_vring_call(queue, ring.call_fd)
            fe.set_vring_kick(queue, ring.kick_fd)
        self.resume()

    def pause(self) -> None:
        for queue in range(self._num_started):
            self.front_end.set_vring_enable(queue, 0)

    def resume(self) -> None:
        for queue in range(self._num_started):
            self.front_end.set_vring_enable(queue, 1)

    def realize_restored(self) -> None:
        """Do as for a device of a snapshot, for which everything was negotiated before."""
        fe = self.front_end
        fe.set_owner()
        self._features = fe.get_features() & GUEST_FEATURES
        fe.set_protocol_features(self._KNOWN)
        fe.acks = True
        fe.ask_flags = HeaderFlag.VERSION_1 | HeaderFlag.NEED_REPLY

    def stop(self) -> list[int]:
        self.pause()
        return [self.front_end.get_vring_base(queue) for queue in range(self._num_started)]

    def close(self) -> None:
        if self.inflight is not None:
            os.close(self.inflight[1])
        self.front_end.close()


class Crosvm:
    """crosvm, --vhost-user type=fs. Never asks for an ack."""

    _KNOWN: Final = (
        ProtocolFeature.CONFIG
        | ProtocolFeature.MQ
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.DEVICE_STATE
        | ProtocolFeature.SHMEM
        | ProtocolFeature.REPLY_ACK
    )

    def __init__(self, front_end: FrontEnd) -> None:
        self.front_end = front_end
        self.config = b""
        self._features = 0
        self._sent_features: int | None = None
        self._num_started = 0

    def realize(self) -> None:
        fe = self.front_end
        fe.set_owner()
        self._features = fe.get_features() & GUEST_FEATURES
        protocol = fe.get_protocol_features() & self._KNOWN
        fe.set_protocol_features(protocol)
        num_queues = fe.get_queue_num()
        assert protocol & ProtocolFeature.CONFIG
        self.config = fe.get_config(0, FS_CONFIG_BYTES, flags=1)
        assert int.from_bytes(self.config[TAG_BYTES:], "little") == num_queues - 1

    def start(
        self, memory: GuestMemory, rings: Sequence[DriverRing], bases: Sequence[int] = ()
    ) -> None:
        fe = self.front_end
        self._num_started = len(rings)
        if self._sent_features != self._features:
            fe.set_features(self._features)
            self._sent_features = self._features
        fe.set_mem_table(memory)
        for queue, (ring, base) in enumerate(zip(rings, _bases(rings, bases), strict=True)):
            fe.set_vring_num(queue, ring.num)
            fe.set_vring_addr(queue, ring.layout())
            fe.set_vring_base(queue, base)
            fe.set_vring_call(queue, ring.call_fd)
            fe.set_vring_kick(queue, ring.kick_fd)
            fe.set_vring_enable(queue, 1)

    def stop(self) -> list[int]:
        bases = []
        for queue in range(self._num_started):
            self.front_end.set_vring_enable(queue, 0)
            bases.append(self.front_end.get_vring_base(queue))
        return bases

    def close(self) -> None:
        self.front_end.close()


class Uml:
    """User-mode Linux 6.1. Calls arrive on a stream socket, which replaces the ring's eventfd."""

    _KNOWN: Final = ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG
    _NUM_SLOTS: Final = 2  # it sends its whole structure, whatever the count

    def __init__(self, front_end: FrontEnd) -> None:
        self.front_end = front_end
        self.config = b""
        self._features = 0
        self._num_started = 0

    def realize(self) -> None:
        fe = self.front_end
        fe.set_owner()
        self._features = fe.get_features()
        protocol = fe.get_protocol_features() & self._KNOWN
        assert protocol & ProtocolFeature.REPLY_ACK
        fe.acks = True
        fe.set_protocol_features(protocol)
        fe.set_features(self._features & GUEST_FEATURES)
        tag = [fe.get_config(0, size)[-1] for size in range(1, TAG_BYTES + 1)]
        self.config = fe.get_config(0, FS_CONFIG_BYTES)
        assert bytes(tag) == self.config[:TAG_BYTES]

    def start(
        self, memory: GuestMemory, rings: Sequence[DriverRing], bases: Sequence[int] = ()
    ) -> None:
        fe = self.front_end
        self._num_started = len(rings)
        assert len(memory.regions) <= self._NUM_SLOTS
        fe.set_mem_table(memory, num_slots=self._NUM_SLOTS)
        for queue, (ring, base) in enumerate(zip(rings, _bases(rings, bases), strict=True)):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                ours.settimeout(0)
                os.dup2(ours.fileno(), ring.call_fd, inheritable=False)
                fe.set_vring_call(queue, theirs.fileno())
            fe.set_vring_num(queue, ring.num)
            fe.set_vring_base(queue, base)
            fe.set_vring_addr(queue, ring.layout(), log_guest_addr=2**64 - 1)
        for queue, ring in enumerate(rings):
            fe.set_vring_kick(queue, ring.kick_fd)
            fe.set_vring_enable(queue, 1)

    def stop(self) -> list[int]:
        for queue in reversed(range(self._num_started)):
            self.front_end.set_vring_enable(queue, 0)
        self.front_end.get_features()
        return []

    def close(self) -> None:
        self.front_end.close()
