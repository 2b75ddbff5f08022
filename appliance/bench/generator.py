"""The load generator: virtqueues full of FUSE requests, or system calls, each driven by C.

This is the only importer of the C module. The C half sends, waits, checks each reply and records
how long it took; this half prepares what it sends and turns its codes into errors. Calls into C
release the interpreter lock, so one thread can drive each virtqueue.
"""

import errno
import os
import threading
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from appliance._bench import ffi, lib
from appliance.bench.fuse_requests import ParsedReply, parse_reply
from appliance.bench.guest_ram import PAGE, GuestRam
from appliance.engine import RingLayout
from appliance.errors import BenchError
from appliance.fuse_proto._fuse_wire import OUT_HEADER_SIZE
from appliance.fuse_proto.format import format_request_untrusted

if TYPE_CHECKING:
    from appliance._bench import CData

NS_PER_S: Final = 1_000_000_000
ROOM_MAX: Final = 1 << 20
"""The largest reply body: Linux reads at most 1 MiB at a time."""
_DESC_SIZE: Final = 16
_USED_ELEM_SIZE: Final = 8
_RING_SLACK: Final = 4 * PAGE  # page 0, and what lies between the three areas
_CLOSE_TIMEOUT_S: Final = 5.0
_LIST_BUFFER: Final = 32 << 10  # what the C library gives getdents64(2)

# By code; the fields are those of a failed run.
_FAULTS: Final = {
    lib.BENCH_EGONE: "the back-end closed the connection before it answered",
    lib.BENCH_ESTALL: "no reply in {stall_s:g} s",
    lib.BENCH_EINTR: "interrupted by a signal",
    lib.BENCH_EKICK: "the kick descriptor cannot be written: {strerror}",
    lib.BENCH_EUSED: "the used ring names descriptor {value}, which is not in flight",
    lib.BENCH_EJUMP: "the index of the used ring ran ahead, to {value}",
    lib.BENCH_EUNIQUE: "the reply is to request {value}, expected {wanted}",
    lib.BENCH_ELEN: "the reply's header states {value} bytes, expected 16 to {wanted}",
    lib.BENCH_EERROR: "the reply is an error: {strerror}",
    lib.BENCH_EBODY: "the reply's body has {value} bytes, expected {wanted}",
    lib.BENCH_ENODE: "the reply's nodeid is {value}, expected {node}",
}
_IN_FLIGHT: Final = frozenset(
    {lib.BENCH_EGONE, lib.BENCH_ESTALL, lib.BENCH_EKICK, lib.BENCH_EUSED, lib.BENCH_EJUMP}
)


class Expected(IntEnum):
    """What the reply to a request must be."""

    ANY = lib.BENCH_ANY
    DATA = lib.BENCH_DATA
    FOUND = lib.BENCH_FOUND
    ABSENT = lib.BENCH_ABSENT


class CallKind(IntEnum):
    """A system call on a mounted directory."""

    STAT = lib.BENCH_CALL_STAT
    ABSENT = lib.BENCH_CALL_ABSENT
    FSTAT = lib.BENCH_CALL_FSTAT
    LIST = lib.BENCH_CALL_LIST
    READ = lib.BENCH_CALL_READ
    READLINK = lib.BENCH_CALL_READLINK


class PreparedRequest(NamedTuple):
    """A FUSE request, and the size in bytes that the body of its reply must have."""

    data: bytes
    room: int  # bytes of descriptors for the body
    body_min: int
    body_max: int
    expected: Expected


class RequestSet:
    """Prepared requests in the form that C reads."""

    def __init__(self, requests: Sequence[PreparedRequest]) -> None:
        self.requests = requests
        self.data = b"".join(request.data for request in requests)
        self.bytes = ffi.from_buffer("uint8_t[]", self.data)
        self.array = ffi.new("struct bench_request[]", len(requests))
        at = 0
        for index, request in enumerate(requests):
            if len(request.data) > lib.BENCH_REQUEST_MAX:
                raise ValueError(f"the request has {len(request.data)} bytes")
            row = self.array[index]
            row.at, row.size, row.room = at, len(request.data), request.room
            row.body_min, row.body_max = request.body_min, request.body_max
            row.kind = request.expected
            at += len(request.data)


class Figures:
    """What runs have measured: counts, and latencies in a histogram with buckets 3 % wide."""

    def __init__(self) -> None:
        self.c = ffi.new("struct bench_figures *")

    @property
    def completed(self) -> int:
        """The number of replies."""
        return self.c.completed

    @property
    def elapsed_s(self) -> float:
        """Seconds from the first request to the last reply, added up over runs."""
        return self.c.elapsed_ns / NS_PER_S

    @property
    def body_bytes(self) -> int:
        """Bytes of all bodies of replies."""
        return self.c.body_bytes

    @property
    def max_s(self) -> float:
        """The longest latency."""
        return self.c.max_ns / NS_PER_S

    @property
    def odd_lengths(self) -> int:
        """The number of replies that the used ring states another length for."""
        return self.c.odd_lengths

    @property
    def kicks(self) -> int:
        """How often the back-end had to be woken."""
        return self.c.kicks

    @property
    def waits(self) -> int:
        """How often the generator slept."""
        return self.c.waits


def quantile_s(parts: Iterable[Figures], fraction: float) -> float:
    """Return the latency that `fraction` of all replies did not exceed; 0 if there are none."""
    figures = [part.c for part in parts]
    num_left = fraction * sum(each.completed for each in figures)
    for bucket in range(lib.BENCH_BUCKETS):
        num_left -= sum(each.buckets[bucket] for each in figures)
        if num_left <= 0:
            # The middle of the bucket, but no more than was ever seen.
            start = lib.bench_bucket_start(bucket)
            middle = (start + lib.bench_bucket_start(bucket + 1)) / 2
            return min(middle, max(each.max_ns for each in figures)) / NS_PER_S
    return 0.0


def ring_memory_size(num: int, num_slots: int, room_max: int) -> int:
    """Return the bytes of guest memory that a GeneratorRing needs."""
    areas = (_DESC_SIZE + 2 + _USED_ELEM_SIZE) * num
    return areas + num_slots * lib.bench_slot_size(room_max) + _RING_SLACK


class GeneratorRing:
    """One virtqueue, driver side, with room for some requests. Owns its two eventfds.

    Args:
        memory: where the ring and its requests lie; must outlive this ring.
        num: entries, a power of two.
        num_slots: requests that can be in flight at once, at most `num`.
        room_max: bytes of the largest body of a reply.
        is_event_idx: whether VIRTIO_F_EVENT_IDX was agreed on.
        back_end_fd: the connection to the back-end, which becomes readable when that ends.
    """

    def __init__(
        self,
        memory: GuestRam,
        *,
        num: int,
        num_slots: int,
        room_max: int,
        is_event_idx: bool,
        back_end_fd: int,
    ) -> None:
        self.num = num
        self._desc_gpa = memory.alloc(_DESC_SIZE * num)
        self._avail_gpa = memory.alloc(6 + 2 * num)
        self._used_gpa = memory.alloc(6 + _USED_ELEM_SIZE * num)
        slot_size = lib.bench_slot_size(room_max)
        slots_gpa = memory.alloc(slot_size * num_slots)
        self._memory = memory
        self._file = ffi.from_buffer("uint8_t[]", memory.file, require_writable=True)
        self._slots = ffi.new("struct bench_slot[]", num_slots)
        # Held while C uses the memory and the descriptors.
        self._busy = threading.Lock()
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        ring = self._ring = ffi.new("struct bench_ring *")
        ring.desc = self._host(self._desc_gpa)
        ring.avail = self._host(self._avail_gpa)
        ring.used = self._host(self._used_gpa)
        ring.memory, ring.memory_gpa = self._host(slots_gpa), slots_gpa
        ring.num, ring.slots_num, ring.slot_size = num, num_slots, slot_size
        ring.slots = self._slots
        ring.is_event_idx = is_event_idx
        ring.kick_fd, ring.call_fd, ring.back_end_fd = self.kick_fd, self.call_fd, back_end_fd

    def _host(self, gpa: int) -> "CData":
        return self._file + self._memory.offset(gpa)

    def close(self) -> None:
        """Close the eventfds, and let go of the memory.

        A run in another thread must end first. It does when the connection to the back-end ends.

        Raises:
            TimeoutError: it does not end; everything stays as it is.
        """
        if not self._busy.acquire(timeout=_CLOSE_TIMEOUT_S):
            raise TimeoutError("a run has not ended")
        os.close(self.kick_fd)
        os.close(self.call_fd)
        del self._file, self._ring

    def layout(self) -> RingLayout:
        """Return the ring's place in user addresses, as SET_VRING_ADDR carries it."""
        place = self._memory.user_addr
        return RingLayout(
            self.num, place(self._desc_gpa), place(self._avail_gpa), place(self._used_gpa)
        )

    def ask(self, request: bytes, *, room: int, timeout_s: float) -> ParsedReply:
        """Send one request and return its reply, whose body has at most `room` bytes.

        Raises:
            BenchError: the reply does not come in time or breaks a rule of FUSE.
        """
        one = RequestSet([PreparedRequest(request, room, 0, room, Expected.ANY)])
        figures = Figures()
        self._run(one, figures, depth=1, count=1, seconds=timeout_s, stall_s=timeout_s)
        header = bytes(ffi.buffer(lib.bench_reply(self._ring, 0), OUT_HEADER_SIZE))
        body = bytes(ffi.buffer(lib.bench_reply_body(self._ring, 0), figures.body_bytes))
        try:
            return parse_reply(header + body)
        except ValueError as exc:
            raise BenchError(f"{_describe(request)}: {exc}") from exc

    def run(
        self,
        requests: RequestSet,
        figures: Figures,
        *,
        depth: int,
        seconds: float,
        stall_s: float,
        first: int = 0,
    ) -> None:
        """Keep `depth` requests in flight for `seconds`, and wait for the last reply.

        The requests are sent in their order, from number `first` on, over and over.

        Raises:
            BenchError: a reply is wrong, no reply came for `stall_s`, or the back-end is gone. The
                ring is then of no more use.
        """
        self._run(
            requests, figures, depth=depth, count=0, seconds=seconds, stall_s=stall_s, first=first
        )

    def _run(
        self,
        requests: RequestSet,
        figures: Figures,
        *,
        depth: int,
        count: int,
        seconds: float,
        stall_s: float,
        first: int = 0,
    ) -> None:
        ring = self._ring
        ring.bytes, ring.requests = requests.bytes, requests.array
        ring.requests_num, ring.first = len(requests.requests), first
        ring.depth, ring.count = depth, count
        ring.duration_ns, ring.stall_ns = int(seconds * NS_PER_S), int(stall_s * NS_PER_S)
        ring.figures = figures.c
        with self._busy:
            code = -lib.bench_ring_run(ring)
        if code:
            raise self._error(code, requests, stall_s)

    def _error(self, code: int, requests: RequestSet, stall_s: float) -> BenchError:
        ring = self._ring
        index = ring.fault_request
        if code in _IN_FLIGHT:
            slots = map(self._slots.__getitem__, range(ring.slots_num))
            waiting = [slot.request for slot in slots if slot.unique]
            index = waiting[0] if waiting else 0
        request = requests.requests[index]
        reason = _FAULTS[code].format(
            stall_s=stall_s,
            value=ring.fault_value,
            wanted=ring.fault_wanted,
            strerror=_errno_text(ring.fault_value),
            node="another one" if request.expected == Expected.FOUND else "0",
        )
        return BenchError(f"{_describe(request.data)}: {reason}")


class PreparedCall(NamedTuple):
    """A system call: on `path`, which is absolute, or on `fd`."""

    path: bytes = b""
    fd: int = -1
    offset: int = 0
    size: int = 0


class CallSet:
    """Prepared system calls of one kind in the form that C reads."""

    def __init__(self, kind: CallKind, calls: Sequence[PreparedCall]) -> None:
        self.kind = kind
        self.calls = calls
        self._data = b"".join(call.path + b"\0" for call in calls)
        self.paths = ffi.from_buffer("char[]", self._data)
        self.array = ffi.new("struct bench_call[]", len(calls))
        at = 0
        for index, call in enumerate(calls):
            row = self.array[index]
            row.path, row.fd, row.offset, row.size = at, call.fd, call.offset, call.size
            at += len(call.path) + 1

    def run(self, figures: Figures, *, seconds: float, first: int = 0) -> None:
        """Make the calls one after the other, from number `first` on, over and over.

        Raises:
            BenchError: a call failed, or did not deliver what it should.
        """
        calls = ffi.new("struct bench_calls *")
        size = max(_LIST_BUFFER, *(call.size for call in self.calls))
        buffer = ffi.new("uint8_t[]", size)
        calls.kind, calls.paths, calls.calls = self.kind, self.paths, self.array
        calls.calls_num, calls.first = len(self.calls), first
        calls.buffer, calls.buffer_size = buffer, size
        calls.duration_ns = int(seconds * NS_PER_S)
        calls.figures = figures.c
        if lib.bench_calls_run(calls):
            call = self.calls[calls.fault_call]
            what = f"{self.kind.name} of {os.fsdecode(call.path) or f'descriptor {call.fd}'}"
            if self.kind == CallKind.READ:
                what += f", {call.size} bytes at {call.offset}"
            raise BenchError(f"{what}: {_errno_text(calls.fault_value) or 'not what was expected'}")


def _describe(request: bytes) -> str:
    # What every request has alike says nothing.
    line = format_request_untrusted(memoryview(request))
    return line.replace(" unique=1", "").replace(" uid=0 gid=0 pid=1", "")


def _errno_text(value: int) -> str:
    number = abs(value)
    return f"{errno.errorcode.get(number, number)} ({os.strerror(number)})" if number else ""
