# The typed face of the C extension: mirrors engine.h, answers.h and dirty_log.h, as far as they are
# used.

from collections.abc import Iterable, Sequence
from mmap import mmap
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
    call_kind: int
    last_avail: int
    used_idx: int
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

class EngBytes(CData):
    at: CData
    size: int

class EngStore(CData): ...

class EngUsed(CData):
    kind: int
    segment: int
    size: int
    used_ns: int
    digest: CData

class EngUsage(CData):
    is_kept: list[int]
    shift: int
    every_ns: int
    num: int
    used: Sequence[EngUsed]

class EngPlaces(CData):
    store: EngStore
    usage: CData

class EngReply(CData):
    head: CData
    head_size: int
    fd: int
    offset: int
    body: CData
    body_size: int

class EngAnswers(CData):
    session: CData
    statistics: CData
    listing: CData
    store: EngStore
    places: EngPlaces
    usage: EngUsage
    now_ns: int
    taken_ns: int
    left_num: int
    left: Sequence[int]

class EngWait(CData):
    epoll_fd: int
    kick_fd: int
    poll_max_ns: int
    poll_ns: int

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
    @overload
    def new(self, cdecl: Literal["struct eng_bytes *"]) -> EngBytes: ...
    @overload
    def new(self, cdecl: Literal["struct eng_store *"]) -> EngStore: ...
    @overload
    def new(self, cdecl: Literal["struct eng_reply *"]) -> EngReply: ...
    @overload
    def new(self, cdecl: Literal["struct eng_wait *"]) -> EngWait: ...
    def new_allocator(self, *, should_clear_after_alloc: bool) -> _Allocator: ...
    def addressof(self, cdata: CData, field: str, /) -> CData: ...
    @overload
    def from_buffer(self, source: bytes | bytearray | memoryview, /) -> CData: ...
    @overload
    def from_buffer(
        self, cdecl: str, source: bytearray | memoryview | mmap, /, *, require_writable: bool
    ) -> CData: ...
    def buffer(self, cdata: CData, size: int = -1, /) -> memoryview: ...
    def string(self, cdata: CData) -> bytes: ...
    @overload
    def cast(self, cdecl: Literal["struct eng_answers *"], source: CData) -> EngAnswers: ...
    @overload
    def cast(self, cdecl: str, source: CData) -> CData: ...
    def sizeof(self, cdecl: str) -> int: ...
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
    ENG_EKICK: int
    ENG_EBROKEN: int
    ENG_ESTALE: int
    ENG_ESLOT: int
    ENG_EBOUNDS: int
    ENG_EIDLE: int
    ENG_SIGNAL_POLLED: int
    ENG_SIGNAL_SOCKET: int
    ENG_SIGNAL_NONBLOCKING: int

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
    def eng_signal(self, fd: int, kind: int, /) -> None: ...
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
    def eng_log_guest(self, log: CData, log_size: int, gpa: int, size: int, /) -> int: ...
    def eng_log_slot(
        self, log: CData, log_size: int, ring: EngRing, slot: int, offset: int, size: int, /
    ) -> int: ...
    ENG_META: int
    ENG_BLOBS: int
    ENG_DIRECTORIES: int
    ENG_IMAGES: int
    ENG_PATH_INFOS: int
    ENG_PATH_INFO_LOG: int
    ENG_NAR_INFOS: int
    ENG_STORE_NOT_FOUND: int
    ENG_STORE_RESIZED: int
    ENG_BLOB_FDS_MAX: int
    ENG_LISTING_SIZE: int
    ENG_USED_BLOB: int
    ENG_USED_DIRECTORY: int
    ENG_NOT_PLAIN: int
    ENG_NO_REPLY: int

    def eng_store_open(
        self, ret: EngStore, path: bytes, map_size: int, readers_max: int, is_locked: int, /
    ) -> int: ...
    def eng_store_close(self, store: EngStore, /) -> None: ...
    def eng_store_begin(self, store: EngStore, /) -> int: ...
    def eng_store_end(self, store: EngStore, /) -> None: ...
    def eng_store_resize(self, store: EngStore, map_size: int, /) -> int: ...
    def eng_store_map_size(self, store: EngStore, /) -> int: ...
    def eng_store_commits_since(self, store: EngStore, /) -> int: ...
    def eng_store_error(self, code: int, /) -> CData: ...
    def eng_store_get(
        self, store: EngStore, table: int, key: bytes, key_size: int, ret: EngBytes, /
    ) -> int: ...
    def eng_grants_init(self, ret: CData, fd: int, /) -> int: ...
    def eng_grants_deinit(self, grants: CData, /) -> None: ...
    def eng_blob_fds_init(self, ret: CData, directory_fd: int, skip: int, num: int, /) -> None: ...
    def eng_blob_fds_limit(self, fds: CData, limit: int, /) -> None: ...
    def eng_blob_fds_close(self, fds: CData, /) -> None: ...
    def eng_blob_fds_close_unlinked(self, fds: CData, /) -> None: ...
    def eng_usage_is_due(self, usage: CData, now_ns: int, /) -> int: ...
    def eng_usage_clear(self, usage: CData, now_ns: int, /) -> None: ...
    def eng_answer(
        self,
        answers: EngAnswers,
        request: CData,
        size: int,
        readable_len: int,
        writable_len: int,
        ret: EngReply,
        /,
    ) -> int: ...
    def eng_answers_begin(self, answers: EngAnswers, /) -> int: ...
    def eng_answers_end(self, answers: EngAnswers, /) -> None: ...
    def eng_answers_count(
        self, answers: EngAnswers, request: CData, reply: EngReply, /
    ) -> None: ...
    def eng_serve_batch(self, answers: EngAnswers, ring: EngRing, limit: int, /) -> int: ...
    def eng_serve_ring(
        self,
        answers: EngAnswers,
        ring: EngRing,
        wait: EngWait,
        /,
    ) -> int: ...
    def eng_note_refusals(self, shared: CData, /) -> int: ...
    def eng_serve_device(
        self, answers: EngAnswers, fd: int, request: CData, size: int, /
    ) -> int: ...

ffi: _Ffi
lib: _Lib
