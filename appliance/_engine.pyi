# The typed face of the C extension: mirrors cffi_build/engine.h, as far as engine.py uses it.

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, overload

class CData:
    def __len__(self) -> int: ...
    def __int__(self) -> int: ...

class EngMap(CData): ...

class EngRecovered(CData):
    counter: int
    head: int

class EngRecoveredArray(CData):
    def __getitem__(self, part: slice) -> Iterable[EngRecovered]: ...

class EngRing(CData):
    map: EngMap
    inflight: CData
    recovered: CData
    scratch: CData
    iov: CData
    desc_addr: int
    avail_addr: int
    used_addr: int
    num: int
    is_event_idx: int
    is_indirect: int
    call_fd: int
    is_call_socket: int
    last_avail: int
    in_flight: int
    fault: int
    fault_head: int
    fault_value: int
    head: CData
    request_start: CData
    request_end: CData
    iov_num: Sequence[int]
    readable_len: CData
    writable_len: CData

class _Allocator(Protocol):
    @overload
    def __call__(self, cdecl: Literal["struct eng_recovered[]"], num: int) -> EngRecoveredArray: ...
    @overload
    def __call__(self, cdecl: str, num: int) -> CData: ...

class _Ffi(Protocol):
    NULL: CData
    @overload
    def new(self, cdecl: Literal["struct eng_map *"]) -> EngMap: ...
    @overload
    def new(self, cdecl: Literal["struct eng_ring *"]) -> EngRing: ...
    def new_allocator(self, *, should_clear_after_alloc: bool) -> _Allocator: ...
    def addressof(self, cdata: EngRing, field: str, /) -> CData: ...
    @overload
    def from_buffer(self, source: bytes | bytearray | memoryview, /) -> CData: ...
    @overload
    def from_buffer(
        self, cdecl: str, source: bytearray | memoryview, /, *, require_writable: bool
    ) -> CData: ...
    def buffer(self, cdata: CData) -> memoryview: ...
    def cast(self, cdecl: str, source: CData) -> CData: ...
    def release(self, cdata: CData) -> None: ...

class _Lib(Protocol):
    ENG_REGIONS_MAX: int
    ENG_REQUEST_MAX: int
    ENG_SCRATCH_SIZE: int
    ENG_IOV_SIZE: int
    ENG_ENUM: int
    ENG_EDESC_AREA: int
    ENG_EAVAIL_AREA: int
    ENG_EUSED_AREA: int
    ENG_EINFLIGHT: int
    ENG_EUSED_IDX: int
    ENG_EAVAIL_JUMP: int
    ENG_EHEAD: int
    ENG_ENEXT: int
    ENG_ELOOP: int
    ENG_EINDIRECT_FEATURE: int
    ENG_EINDIRECT_NEXT: int
    ENG_EINDIRECT_NESTED: int
    ENG_EINDIRECT_LEN: int
    ENG_EADDR_OVERFLOW: int
    ENG_EADDR: int
    ENG_EORDER: int
    ENG_ETOTAL: int
    ENG_EFRAGMENTS: int
    ENG_EBROKEN: int
    ENG_ESTALE: int
    ENG_ESLOT: int
    ENG_EBOUNDS: int
    ENG_EIDLE: int

    def eng_map_add(
        self, map_: EngMap, fd: int, gpa: int, size: int, user_addr: int, offset: int, /
    ) -> int: ...
    def eng_map_remove(self, map_: EngMap, gpa: int, /) -> int: ...
    def eng_map_deinit(self, map_: EngMap, /) -> None: ...
    def eng_ring_start(self, ring: EngRing, base: int, /) -> int: ...
    def eng_ring_translate(self, ring: EngRing, /) -> int: ...
    def eng_ring_pop(self, ring: EngRing, limit: int, /) -> int: ...
    def eng_ring_load(self, ring: EngRing, head: int, /) -> int: ...
    def eng_ring_complete(self, ring: EngRing, slot: int, length: int, /) -> int: ...
    def eng_ring_signal(self, ring: EngRing, /) -> None: ...
    def eng_ring_arm(self, ring: EngRing, /) -> int: ...
    def eng_signal(self, fd: int, is_socket: int, /) -> None: ...
    def eng_slot_write(
        self, ring: EngRing, slot: int, offset: int, data: bytes | CData, size: int, /
    ) -> int: ...
    def eng_slot_read_file(
        self,
        ring: EngRing,
        slot: int,
        offset: int,
        fd: int,
        file_offset: int,
        size: int,
        /,
    ) -> int: ...

ffi: _Ffi
lib: _Lib
