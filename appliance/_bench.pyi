# The typed face of the C extension: mirrors cffi_build/bench.h, as far as generator.py uses it.

from collections.abc import MutableSequence, Sequence
from typing import Literal, Protocol, overload

class CData:
    def __add__(self, offset: int) -> CData: ...
    def __int__(self) -> int: ...
    def __getitem__(self, index: int) -> CData: ...

class Figures(CData):
    completed: int
    elapsed_ns: int
    body_bytes: int
    max_ns: int
    kicks: int
    waits: int
    odd_lengths: int
    buckets: MutableSequence[int]

class Request(CData):
    at: int
    size: int
    room: int
    body_min: int
    body_max: int
    kind: int

class RequestArray(CData):
    def __getitem__(self, index: int) -> Request: ...

class Slot(CData):
    unique: int
    request: int

class SlotArray(CData):
    def __getitem__(self, index: int) -> Slot: ...

class Ring(CData):
    desc: CData
    avail: CData
    used: CData
    num: int
    is_event_idx: int
    kick_fd: int
    call_fd: int
    back_end_fd: int
    memory: CData
    memory_gpa: int
    slot_size: int
    slots_num: int
    slots: CData
    in_flight: int
    bytes: CData
    requests: CData
    requests_num: int
    first: int
    depth: int
    count: int
    duration_ns: int
    stall_ns: int
    figures: Figures
    fault_request: int
    fault_value: int
    fault_wanted: int

class Call(CData):
    path: int
    fd: int
    offset: int
    size: int

class CallArray(CData):
    def __getitem__(self, index: int) -> Call: ...

class Calls(CData):
    kind: int
    paths: CData
    calls: CData
    calls_num: int
    first: int
    buffer: CData
    buffer_size: int
    duration_ns: int
    figures: Figures
    fault_call: int
    fault_value: int

class _Ffi(Protocol):
    @overload
    def new(self, cdecl: Literal["struct bench_ring *"]) -> Ring: ...
    @overload
    def new(self, cdecl: Literal["struct bench_figures *"]) -> Figures: ...
    @overload
    def new(self, cdecl: Literal["struct bench_calls *"]) -> Calls: ...
    @overload
    def new(self, cdecl: Literal["struct bench_request[]"], num: int) -> RequestArray: ...
    @overload
    def new(self, cdecl: Literal["struct bench_slot[]"], num: int) -> SlotArray: ...
    @overload
    def new(self, cdecl: Literal["struct bench_call[]"], num: int) -> CallArray: ...
    @overload
    def new(self, cdecl: Literal["uint8_t[]"], num: int) -> CData: ...
    def from_buffer(
        self,
        cdecl: Literal["uint8_t[]", "char[]"],
        buffer: bytes | memoryview,
        require_writable: bool = False,
    ) -> CData: ...
    def buffer(self, cdata: CData, size: int) -> Sequence[int]: ...

class _Lib(Protocol):
    BENCH_BUCKETS: int
    BENCH_PAGE: int
    BENCH_REQUEST_MAX: int
    BENCH_ANY: int
    BENCH_DATA: int
    BENCH_FOUND: int
    BENCH_ABSENT: int
    BENCH_EGONE: int
    BENCH_ESTALL: int
    BENCH_EINTR: int
    BENCH_EKICK: int
    BENCH_EUSED: int
    BENCH_EJUMP: int
    BENCH_EUNIQUE: int
    BENCH_ELEN: int
    BENCH_EERROR: int
    BENCH_EBODY: int
    BENCH_ENODE: int
    BENCH_CALL_STAT: int
    BENCH_CALL_ABSENT: int
    BENCH_CALL_FSTAT: int
    BENCH_CALL_LIST: int
    BENCH_CALL_READ: int
    BENCH_CALL_READLINK: int
    def bench_bucket(self, latency_ns: int) -> int: ...
    def bench_bucket_start(self, bucket: int) -> int: ...
    def bench_slot_size(self, room_max: int) -> int: ...
    def bench_reply(self, ring: Ring, slot: int) -> CData: ...
    def bench_reply_body(self, ring: Ring, slot: int) -> CData: ...
    def bench_ring_run(self, ring: Ring) -> int: ...
    def bench_calls_run(self, calls: Calls) -> int: ...

ffi: _Ffi
lib: _Lib
