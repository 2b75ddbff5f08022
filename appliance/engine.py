"""Guest memory and the device side of one virtqueue, as the C module implements them.

The C functions move bytes and check that the guest follows the rules. The classes here own the
memory that the C functions use, and turn their codes into exceptions. No object here owns a
descriptor, and none may be used by several threads.
"""

import fcntl
import os
import stat
from mmap import PAGESIZE
from struct import Struct
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, NoReturn, Protocol

from appliance._engine import ffi, lib
from appliance.errors import RingError, VhostError

if TYPE_CHECKING:
    from appliance._engine import EngRing

_U64_MAX: Final = 2**64 - 1

FEATURE_INDIRECT_DESC: Final = 1 << 28
FEATURE_EVENT_IDX: Final = 1 << 29

INFLIGHT_HEADER: Final = Struct("<QHHHH")
"""features, version, desc_num, last_batch_head, used_idx (vhost-user: inflight I/O tracking)."""
INFLIGHT_ENTRY: Final = Struct("<B5xHQ")
"""inflight, next, counter: one per descriptor head."""

_RULES: Final = {
    lib.ENG_ENUM: "queue size is not a power of two up to 32768: {value}",
    lib.ENG_EDESC_AREA: "descriptor table is misaligned or not in one region: address {value:#x}",
    lib.ENG_EAVAIL_AREA: "available ring is misaligned or not in one region: address {value:#x}",
    lib.ENG_EUSED_AREA: "used ring is misaligned or not in one region: address {value:#x}",
    lib.ENG_EINFLIGHT: "inflight record names head {head}, beyond the queue",
    lib.ENG_EUSED_IDX: "used.idx does not follow from the inflight record: {value}",
    lib.ENG_EAVAIL_JUMP: "avail.idx runs ahead by more than the queue size: {value}",
    lib.ENG_EHEAD: "head {head} is beyond the queue, at index {value} of the available ring",
    lib.ENG_ENEXT: "next is beyond the descriptor table: {value}, in the chain of head {head}",
    lib.ENG_ELOOP: "chain loops or is longer than {value} descriptors, head {head}",
    lib.ENG_EINDIRECT_FEATURE: "INDIRECT was not negotiated: table at {value:#x}, head {head}",
    lib.ENG_EINDIRECT_NEXT: "INDIRECT together with NEXT: table at {value:#x}, head {head}",
    lib.ENG_EINDIRECT_NESTED: "INDIRECT inside an indirect table: address {value:#x}, head {head}",
    lib.ENG_EINDIRECT_LEN: "bad length of an indirect table: {value:#x} bytes, head {head}",
    lib.ENG_EADDR_OVERFLOW: "buffer wraps around the address space: {value:#x}, head {head}",
    lib.ENG_EADDR: "not guest memory: address {value:#x}, head {head}",
    lib.ENG_EORDER: "readable buffer behind a writable one: address {value:#x}, head {head}",
    lib.ENG_ETOTAL: "chain holds more than 4 GiB: buffer at {value:#x}, head {head}",
    lib.ENG_EFRAGMENTS: "chain falls into more than {value} pieces of memory, head {head}",
    lib.ENG_EKICK: "the kick descriptor cannot be waited for: epoll events {value:#x}",
    lib.ENG_EBROKEN: "closed",
}
_MISUSES: Final = {
    lib.ENG_ESTALE: "guest memory was unmapped: translate() comes first",
    lib.ENG_ESLOT: "no chain there, or it was completed already",
    lib.ENG_EBOUNDS: "more bytes than the chain has room for",
    lib.ENG_EIDLE: "nothing is in flight",
}

# C fills these buffers before they are read, so they need not be cleared. Pages that are never used
# take no memory.
_new_uncleared = ffi.new_allocator(should_clear_after_alloc=False)
_from_buffer = ffi.from_buffer


class MappedRegion(NamedTuple):
    """A region of guest memory, all in bytes (vhost-user: memory region description)."""

    gpa: int
    size: int
    user_addr: int
    mmap_offset: int

    def __str__(self) -> str:
        return (
            f"region gpa={self.gpa:#x} size={self.size:#x} user_addr={self.user_addr:#x}"
            f" mmap_offset={self.mmap_offset:#x}"
        )


def _check_range(region: MappedRegion, name: str, start: int) -> None:
    if not 0 <= start <= _U64_MAX or region.size > _U64_MAX - start:
        raise VhostError(f"{region}: {name} plus size does not fit in 64 bits")


def _overlaps(start: int, size: int, other_start: int, other_size: int) -> bool:
    return start < other_start + other_size and other_start < start + size


class GuestMap:
    """Guest memory that is mapped into this process.

    After a region was removed, every ring over this map refuses to work until its `translate()`.
    """

    MAX_REGIONS: ClassVar[int] = lib.ENG_REGIONS_MAX

    def __init__(self) -> None:
        self._map = ffi.new("struct eng_map *")
        self._regions: list[MappedRegion] = []

    @property
    def regions(self) -> tuple[MappedRegion, ...]:
        """The mapped regions in the order in which they were added."""
        return tuple(self._regions)

    def add(self, fd: int, region: MappedRegion) -> None:
        """Map a region of the file `fd` (lent).

        If the front-end shrinks the file while it is mapped, an access is SIGBUS.

        Raises:
            VhostError: the region is empty, overflows, is not page-aligned in the file, ends behind
                the end of the file, overlaps another region, is one too many, or cannot be mapped.
        """
        self._check(region)
        status = os.fstat(fd)
        end = region.mmap_offset + region.size
        if stat.S_ISREG(status.st_mode) and status.st_size < end:
            raise VhostError(f"{region}: the file ends at {status.st_size:#x}, before {end:#x}")
        errno = -lib.eng_map_add(self._map, fd, *region)
        if errno:
            raise VhostError(f"{region}: cannot map it: {os.strerror(errno)}")
        self._regions.append(region)

    def _check(self, region: MappedRegion) -> None:
        if not 0 < region.size <= _U64_MAX:
            raise VhostError(f"{region}: the size must be above 0 and fit in 64 bits")
        _check_range(region, "gpa", region.gpa)
        _check_range(region, "user_addr", region.user_addr)
        _check_range(region, "mmap_offset", region.mmap_offset)
        if region.mmap_offset % PAGESIZE:
            raise VhostError(f"{region}: the offset is not a multiple of {PAGESIZE:#x}")
        if len(self._regions) == self.MAX_REGIONS:
            raise VhostError(f"{region}: {self.MAX_REGIONS} regions are mapped already")
        for other in self._regions:
            if _overlaps(region.gpa, region.size, other.gpa, other.size) or _overlaps(
                region.user_addr, region.size, other.user_addr, other.size
            ):
                raise VhostError(f"{region}: overlaps {other}")

    def remove(self, region: MappedRegion) -> None:
        """Unmap a region.

        Raises:
            VhostError: `region` is not mapped.
        """
        if region not in self._regions:
            raise VhostError(f"{region}: not mapped")
        self._regions.remove(region)
        lib.eng_map_remove(self._map, region.gpa)

    def close(self) -> None:
        """Unmap everything."""
        self._regions.clear()
        lib.eng_map_deinit(self._map)


class RingLayout(NamedTuple):
    """The number of entries of a ring, and the user addresses of its areas."""

    num: int
    desc: int
    avail: int
    used: int


def inflight_size(num: int) -> int:
    """Return the size of the inflight area of a queue of `num` entries: bytes, a multiple of 64."""
    return (INFLIGHT_HEADER.size + num * INFLIGHT_ENTRY.size + 63) & ~63


def signal_fd(fd: int) -> None:
    """Signal whoever waits on the eventfd or socket `fd`; -1 means that there is none."""
    lib.eng_signal(fd, _signal_kind(fd))


def _signal_kind(fd: int) -> int:
    if fd < 0:
        return lib.ENG_SIGNAL_POLLED
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        return lib.ENG_SIGNAL_SOCKET
    # The front-end's choice, which is not changed here. Most of them make their eventfds so.
    is_nonblocking = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
    return lib.ENG_SIGNAL_NONBLOCKING if is_nonblocking else lib.ENG_SIGNAL_POLLED


class WriteLog(Protocol):
    """Told what a ring has written to guest memory, right after each write."""

    def replied(self, ring: "EngRing", slot: int, offset: int, size: int) -> None:
        """Note `size` bytes of the writable part of a chain, from byte `offset` on."""

    def completed(self, ring: "EngRing") -> None:
        """Note the used ring's newest entry, and its index."""

    def suppressed(self, ring: "EngRing") -> None:
        """Note that the guest may have been told not to kick."""

    def armed(self, ring: "EngRing") -> None:
        """Note that the guest was asked for a kick."""


class Ring:
    """The device side of one split virtqueue; owns no descriptor.

    `pop()` takes chains from the available ring into slots, and `complete()` returns them in any
    order. Every chain is recorded in the inflight area before anything else happens to it, so that
    another process can run it again. Slots are valid until the next `pop()`, `load()` or
    `translate()`. A chain that must wait longer is kept as its head index and loaded again.

    After a RingError from any method, the ring is broken and returns no more chains. Wrong use by
    the caller is a ValueError.
    """

    REQUEST_MAX: ClassVar[int] = lib.ENG_REQUEST_MAX

    recovered: list[int]
    """Heads that an earlier process popped and did not return, oldest first, to be loaded."""
    log: WriteLog | None = None
    """Told of each write of the methods here, but not of those in C loops (`cdata`)."""

    def __init__(
        self,
        memory: GuestMap,
        layout: RingLayout,
        *,
        base: int,
        features: int,
        inflight: memoryview,
        call_fd: int,
        err_fd: int,
    ) -> None:
        """Start the ring where `inflight` says, or at `base` if that area is blank (version 0).

        Args:
            memory: guest memory (lent), which must not be closed while the ring is in use.
            layout: the layout that the front-end gave.
            base: the available index to start at.
            features: the virtio feature bits that were negotiated.
            inflight: the area of this queue (lent until `close()`): `inflight_size(num)` bytes,
                writable and aligned to 8.
            call_fd: an eventfd or socket (lent) that is signalled when the guest asks for it; -1
                for none.
            err_fd: the same for `signal_error()`.

        Raises:
            RingError: an area is misaligned, is not in guest memory, or contradicts `inflight`.
        """
        if inflight.nbytes < INFLIGHT_HEADER.size + layout.num * INFLIGHT_ENTRY.size:
            raise ValueError(f"inflight area of {inflight.nbytes} bytes for {layout.num} entries")
        self._memory = memory
        self._inflight = _from_buffer("uint8_t[]", inflight, require_writable=True)
        if int(ffi.cast("uintptr_t", self._inflight)) % 8:
            raise ValueError("inflight area is not aligned to 8 bytes")
        self._scratch = _new_uncleared("uint8_t[]", lib.ENG_SCRATCH_SIZE)
        self._iov = _new_uncleared("uint8_t[]", lib.ENG_IOV_SIZE)
        self._ring = ffi.new("struct eng_ring *")
        self._fill(layout, features)
        self._make_views()
        self._err_fd = err_fd
        self._ring.call_fd = call_fd
        self._ring.call_kind = _signal_kind(call_fd)
        self.recovered = self._start(layout.num, base)

    def _start(self, num: int, base: int) -> list[int]:
        # The front-end may be able to write to the record meanwhile, so C reads each word once.
        found = _new_uncleared("struct eng_recovered[]", num)
        self._ring.recovered = found
        try:
            self.check(lib.eng_ring_start(self._ring, base))
        except RingError:
            self.close()
            raise
        finally:
            self._ring.recovered = ffi.NULL
        chains = sorted((chain.counter, chain.head) for chain in found[0 : self._ring.in_flight])
        return [head for _counter, head in chains]

    def _fill(self, layout: RingLayout, features: int) -> None:
        ring = self._ring
        ring.map = self._memory._map  # noqa: SLF001 - the two classes are one engine
        ring.inflight = ffi.cast("struct eng_inflight *", self._inflight)
        ring.scratch = self._scratch
        ring.iov = ffi.cast("struct iovec *", self._iov)
        ring.num, ring.desc_addr, ring.avail_addr, ring.used_addr = layout
        ring.is_event_idx = bool(features & FEATURE_EVENT_IDX)
        ring.is_indirect = bool(features & FEATURE_INDIRECT_DESC)

    def _make_views(self) -> None:
        # Views that last as long as the ring, because indexing them is cheaper than a cffi field.
        ring = self._ring
        self._requests = memoryview(ffi.buffer(self._scratch)).toreadonly()
        self._starts = memoryview(ffi.buffer(ring.request_start)).cast("I")
        self._ends = memoryview(ffi.buffer(ring.request_end)).cast("I")
        self._heads = memoryview(ffi.buffer(ring.head)).cast("I")
        self._readable = memoryview(ffi.buffer(ring.readable_len)).cast("Q")
        self._writable = memoryview(ffi.buffer(ring.writable_len)).cast("Q")

    @property
    def cdata(self) -> "EngRing":
        """The C structure of the ring, to be passed to other functions of the C module."""
        return self._ring

    def check(self, status: int) -> None:
        """Raise the exception for `status`, the result of a C function, if it is negative.

        Raises:
            RingError: the guest broke a rule of the ring.
        """
        if status < 0:
            self._raise(-status)

    def _raise(self, code: int) -> NoReturn:
        if code in _MISUSES:
            raise ValueError(_MISUSES[code])
        ring = self._ring
        rule = _RULES[ring.fault].format(head=ring.fault_head, value=ring.fault_value)
        raise RingError(rule if code != lib.ENG_EBROKEN else f"ring is stopped: {rule}")

    @property
    def last_avail(self) -> int:
        """The number of chains popped, modulo 2**16, from which a later ring goes on."""
        return self._ring.last_avail

    @property
    def in_flight(self) -> int:
        """The number of chains popped and not returned."""
        return self._ring.in_flight

    def pop(self, limit: int = 32) -> int:
        """Pop up to `limit` chains into slots 0 to n-1 and return n, 0 if the ring is empty.

        Chains that do not fit in the buffers stay in the ring until the next call. So does a chain
        that breaks a rule if there are good chains before it.

        Raises:
            RingError: the guest broke a rule of the ring, which the text names.
        """
        count = lib.eng_ring_pop(self._ring, limit)
        if count < 0:
            self._raise(-count)
        if self.log is not None and count:
            self.log.suppressed(self._ring)
        return count

    def load(self, head: int) -> None:
        """Walk the chain at `head`, which was popped before, again into slot 0.

        Raises:
            RingError: the guest broke a rule of the ring.
        """
        self.check(lib.eng_ring_load(self._ring, head))

    def request(self, slot: int) -> memoryview:
        """Return a private copy of the first REQUEST_MAX readable bytes.

        The view is read-only, and valid until the next `pop()` or `load()`.
        """
        return self._requests[self._starts[slot] : self._ends[slot]]

    def head(self, slot: int) -> int:
        """Return the head index of the chain, by which `load()` finds it."""
        return self._heads[slot]

    def readable_len(self, slot: int) -> int:
        """Return the number of readable bytes, which may be more than `request()` has."""
        return self._readable[slot]

    def writable_len(self, slot: int) -> int:
        """Return the number of writable bytes, which is the room for a reply."""
        return self._writable[slot]

    def write(self, slot: int, offset: int, data: bytes | memoryview) -> None:
        """Write `data` to the writable part from byte `offset` on."""
        source = data if type(data) is bytes else _from_buffer(data)
        status = lib.eng_slot_write(self._ring, slot, offset, source, len(source))
        if status:
            self._raise(-status)
        if self.log is not None:
            self.log.replied(self._ring, slot, offset, len(source))

    def read_file(self, slot: int, offset: int, fd: int, file_offset: int, size: int) -> int:
        """Read `size` bytes of a file into the writable part from byte `offset` on.

        Returns:
            The number of bytes that were read, which is less than `size` only if the file ends.

        Raises:
            OSError: the file cannot be read. The writable part may have changed.
        """
        if offset < 0 or size < 0 or offset + size > self._writable[slot]:
            raise ValueError(_MISUSES[lib.ENG_EBOUNDS])
        count = lib.eng_slot_read_file(self._ring, slot, offset, fd, file_offset, size)
        if self.log is not None:
            self.log.replied(self._ring, slot, offset, size if count < 0 else count)
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        return count

    def complete(self, slot: int, length: int) -> None:
        """Return the chain to the guest, with `length` bytes of it written, without a signal."""
        status = lib.eng_ring_complete(self._ring, slot, length)
        if status:
            self._raise(-status)
        if self.log is not None:
            self.log.completed(self._ring)

    def signal(self) -> None:
        """Signal the guest once if it asks for that at any chain completed since the last call.

        This also works after the ring broke. The caller must hold nothing that others wait for,
        such as a snapshot of the store, because a front-end can make a write to its descriptor
        block.
        """
        lib.eng_ring_signal(self._ring)

    def arm(self) -> bool:
        """Ask for a kick; return whether chains arrived meanwhile, so that the caller must pop."""
        status = lib.eng_ring_arm(self._ring)
        if status < 0:
            self._raise(-status)
        if self.log is not None:
            self.log.armed(self._ring)
        return status > 0

    def translate(self) -> None:
        """Find the ring again after guest memory has changed; all slots become invalid.

        Raises:
            RingError: an area of the ring is not in guest memory any more.
        """
        self.check(lib.eng_ring_translate(self._ring))

    def set_call(self, fd: int) -> None:
        """Signal `fd` from now on, and also now, as a signal to the old one may be lost."""
        self._ring.call_fd = fd
        self._ring.call_kind = _signal_kind(fd)
        signal_fd(fd)

    def signal_error(self) -> None:
        """Tell the front-end that the ring is broken."""
        signal_fd(self._err_fd)

    def close(self) -> None:
        """Release the inflight area; the ring cannot be used afterwards."""
        self._ring.fault = lib.ENG_EBROKEN
        ffi.release(self._inflight)
