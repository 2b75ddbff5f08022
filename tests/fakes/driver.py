"""The driver's side of a split virtqueue: guest RAM in a memfd, rings, eventfds. No socket.

VIRTIO 1.3, 2.7, little-endian. `GuestMemory` is what a VMM would share; `DriverRing` is one queue
in it, with well-formed chains by `add_chain()` and raw words for tests that play a hostile guest.
"""

import mmap
import os
import select
import threading
import time
from collections.abc import Sequence
from struct import Struct
from typing import Final, NamedTuple

from appliance.bench.guest_ram import GuestRam
from appliance.engine import FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, GuestMap, RingLayout

DESC: Final = Struct("<QIHH")
"""addr, len, flags, next."""
USED_ELEM: Final = Struct("<II")
"""id, len."""
EVENTFD: Final = Struct("Q")

DESC_NEXT: Final = 1
DESC_WRITE: Final = 2
DESC_INDIRECT: Final = 4
AVAIL_NO_INTERRUPT: Final = 1
USED_NO_NOTIFY: Final = 1

VERSION_1: Final = 1 << 32
PAGE: Final = mmap.PAGESIZE

_fence_lock = threading.Lock()


def _fence() -> None:
    # Taking a lock is an atomic read-modify-write: the full barrier that Python has no name for.
    with _fence_lock:
        pass


class GuestMemory(GuestRam):
    """Guest memory whose bytes tests read and write."""

    def map_into(self, guest_map: GuestMap) -> None:
        """Add every region to a back-end's map."""
        for region in self.regions:
            guest_map.add(self.fd, region)

    def read(self, gpa: int, size: int) -> bytes:
        """Return bytes of guest memory; they may span regions that touch."""
        pieces = []
        while size:
            region = self.region_of(gpa)
            step = min(size, region.gpa + region.size - gpa)
            at = self.offset(gpa)
            pieces.append(bytes(self.file[at : at + step]))
            gpa += step
            size -= step
        return b"".join(pieces)

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory; it may span regions that touch."""
        done = 0
        while done < len(data):
            region = self.region_of(gpa + done)
            step = min(len(data) - done, region.gpa + region.size - gpa - done)
            at = self.offset(gpa + done)
            self.file[at : at + step] = data[done : done + step]
            done += step

    def image(self) -> bytes:
        """Return a copy of the whole file: to be compared with a later one."""
        return bytes(self.file)


class Used(NamedTuple):
    """A chain that came back: `data` is the first `length` bytes of its writable part."""

    head: int
    length: int
    data: bytes


class _Buffer(NamedTuple):
    gpa: int
    size: int
    flags: int


class _Chain(NamedTuple):
    descs: list[int]
    buffers: list[_Buffer]
    table: _Buffer | None


class DriverRing:
    """One split virtqueue, driver side. Owns its three eventfds; the memory stays the caller's.

    Args:
        memory: where rings and buffers are allocated.
        num: queue size, a power of two.
        event_idx: whether VIRTIO_F_EVENT_IDX was negotiated.
        base: what avail.idx and used.idx start at.
        region: index of the region that holds the ring areas.
    """

    def __init__(
        self,
        memory: GuestMemory,
        num: int,
        *,
        event_idx: bool = True,
        base: int = 0,
        region: int = -1,
    ) -> None:
        self.memory = memory
        self.num = num
        self.base = base
        self.is_event_idx = event_idx
        self.features = VERSION_1 | FEATURE_INDIRECT_DESC | (FEATURE_EVENT_IDX if event_idx else 0)
        self.desc_gpa = memory.alloc(DESC.size * num, region=region)
        self.avail_gpa = memory.alloc(6 + 2 * num, region=region)
        self.used_gpa = memory.alloc(6 + USED_ELEM.size * num, region=region)
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.err_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._free = list(range(num))[::-1]
        self._chains: dict[int, _Chain] = {}
        self._next_avail = base
        self._last_used = base
        self.avail_idx = base
        self.used_idx = base
        self.used_event = base

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    def layout(self) -> RingLayout:
        """Return the ring's place in user addresses, as SET_VRING_ADDR carries it."""
        place = self.memory.user_addr
        return RingLayout(
            self.num, place(self.desc_gpa), place(self.avail_gpa), place(self.used_gpa)
        )

    # The ring's words, for the driver below and for tests that write nonsense into them.

    def _word(self, gpa: int) -> int:
        return self.memory.words[self.memory.offset(gpa) // 2]

    def _set_word(self, gpa: int, value: int) -> None:
        # One store: Struct.pack_into clears the place first, and the device would see that.
        self.memory.words[self.memory.offset(gpa) // 2] = value & 0xFFFF

    @property
    def avail_flags(self) -> int:
        return self._word(self.avail_gpa)

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self._set_word(self.avail_gpa, value)

    @property
    def avail_idx(self) -> int:
        return self._word(self.avail_gpa + 2)

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self._set_word(self.avail_gpa + 2, value)

    @property
    def used_event(self) -> int:
        return self._word(self.avail_gpa + 4 + 2 * self.num)

    @used_event.setter
    def used_event(self, value: int) -> None:
        self._set_word(self.avail_gpa + 4 + 2 * self.num, value)

    @property
    def used_flags(self) -> int:
        return self._word(self.used_gpa)

    @used_flags.setter
    def used_flags(self, value: int) -> None:
        self._set_word(self.used_gpa, value)

    @property
    def used_idx(self) -> int:
        return self._word(self.used_gpa + 2)

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        self._set_word(self.used_gpa + 2, value)

    @property
    def avail_event(self) -> int:
        return self._word(self.used_gpa + 4 + USED_ELEM.size * self.num)

    def used_elem(self, idx: int) -> tuple[int, int]:
        """Return (id, len) at a free-running index of the used ring."""
        at = self.used_gpa + 4 + USED_ELEM.size * (idx % self.num)
        head, length = USED_ELEM.unpack_from(self.memory.file, self.memory.offset(at))
        return head, length

    def set_desc(
        self, index: int, addr: int, length: int, flags: int = 0, next_index: int = 0
    ) -> None:
        """Write one descriptor, well-formed or not."""
        at = self.memory.offset(self.desc_gpa + DESC.size * index)
        DESC.pack_into(self.memory.file, at, addr, length, flags, next_index)

    def offer(self, head: int) -> None:
        """Put a head index into the available ring; `publish()` makes it visible."""
        self._set_word(self.avail_gpa + 4 + 2 * (self._next_avail % self.num), head)
        self._next_avail = (self._next_avail + 1) & 0xFFFF

    # A well-behaved driver.

    def add_chain(
        self, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False
    ) -> int:
        """Queue a chain of fresh buffers, one descriptor each; return its head. See `publish()`."""
        buffers = [self._fill(data) for data in readable]
        buffers += [_Buffer(self.memory.alloc(size), size, DESC_WRITE) for size in writable]
        table = self._write_table(buffers) if indirect else None
        descs = self._write_descs([table] if table else buffers)
        self._chains[descs[0]] = _Chain(descs, buffers, table)
        self.offer(descs[0])
        return descs[0]

    def _fill(self, data: bytes) -> _Buffer:
        gpa = self.memory.alloc(len(data))
        self.memory.write(gpa, data)
        return _Buffer(gpa, len(data), 0)

    def _write_table(self, buffers: Sequence[_Buffer]) -> _Buffer:
        last = len(buffers) - 1
        image = b"".join(
            DESC.pack(b.gpa, b.size, b.flags | (DESC_NEXT if i < last else 0), (i + 1) % (last + 1))
            for i, b in enumerate(buffers)
        )
        table = self._fill(image)
        return table._replace(flags=DESC_INDIRECT)

    def _write_descs(self, buffers: Sequence[_Buffer]) -> list[int]:
        if len(buffers) > len(self._free):
            raise BufferError(f"{len(buffers)} descriptors wanted, {len(self._free)} free")
        descs = [self._free.pop() for _ in buffers]
        for buffer, index, next_index in zip(buffers, descs, [*descs[1:], None], strict=True):
            flags = buffer.flags | (0 if next_index is None else DESC_NEXT)
            self.set_desc(index, buffer.gpa, buffer.size, flags, next_index or 0)
        return descs

    def publish(self) -> bool:
        """Show the device what was queued; kicks and returns True if it asked for that."""
        old = self.avail_idx
        self.avail_idx = self._next_avail
        _fence()
        if self.is_event_idx:
            added = (self._next_avail - old) & 0xFFFF
            is_wanted = (self._next_avail - self.avail_event - 1) & 0xFFFF < added
        else:
            is_wanted = not self.used_flags & USED_NO_NOTIFY
        if is_wanted:
            self.kick()
        return is_wanted

    def kick(self) -> None:
        """Signal the device, wanted or not."""
        os.write(self.kick_fd, EVENTFD.pack(1))

    def poll(self) -> list[Used]:
        """Return what came back, without waiting, and ask for a call at the next completion."""
        done: list[Used] = []
        while True:
            while self._last_used != self.used_idx:
                done.append(self._reap(*self.used_elem(self._last_used)))
                self._last_used = (self._last_used + 1) & 0xFFFF
            self.used_event = self._last_used
            _fence()
            if self._last_used == self.used_idx:
                return done

    def _reap(self, head: int, length: int) -> Used:
        chain = self._chains.pop(head)
        writable = (b for b in chain.buffers if b.flags & DESC_WRITE)
        data = b"".join(self.memory.read(b.gpa, b.size) for b in writable)[:length]
        for buffer in [*chain.buffers, *([chain.table] if chain.table else [])]:
            self.memory.free(buffer.gpa, buffer.size)
        self._free += chain.descs[::-1]
        return Used(head, length, data)

    def collect(self, count: int = 1, *, timeout_s: float = 10.0) -> list[Used]:
        """Return at least `count` chains that came back; waits on the call eventfd.

        Raises:
            TimeoutError: fewer came back in time.
        """
        deadline = time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self.call_fd, select.POLLIN)
        done = self.poll()
        while len(done) < count:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poller.poll(left_s * 1000):
                raise TimeoutError(f"{len(done)} of {count} chains came back in {timeout_s} s")
            os.eventfd_read(self.call_fd)
            done += self.poll()
        return done

    def calls(self) -> int:
        """Return and clear the number of signals on the call eventfd."""
        return drain_eventfd(self.call_fd)

    def errors(self) -> int:
        """Return and clear the number of signals on the err eventfd."""
        return drain_eventfd(self.err_fd)


def drain_eventfd(fd: int) -> int:
    """Return and clear a non-blocking eventfd's counter, 0 included."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
