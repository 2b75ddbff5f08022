# The typed face of the C extension: mirrors cffi_build/reader.h, as far as file_reader.py uses it.

from typing import Literal, Protocol, overload

class CData:
    def __add__(self, offset: int) -> CData: ...

class Token(CData):
    bytes: CData
    size: int

class Reader(CData):
    entry: Token
    node: Token
    regular: Token
    executable: Token
    close: Token
    kind: int
    file_max: int
    ring: CData
    position: int
    room: int
    skipped: int
    records: CData
    records_max: int
    records_num: int
    is_refused: int

class _Ffi(Protocol):
    @overload
    def new(self, cdecl: Literal["struct reader *"]) -> Reader: ...
    @overload
    def new(self, cdecl: Literal["struct reader_record[]"], num: int) -> CData: ...
    @overload
    def from_buffer(self, buffer: object) -> CData: ...
    @overload
    def from_buffer(self, cdecl: Literal["uint8_t[]"], buffer: object) -> CData: ...
    def buffer(self, cdata: CData) -> object: ...
    def sizeof(self, cdecl: str) -> int: ...

class _Lib(Protocol):
    def reader_read(self, reader: Reader, paths: CData, size: int) -> int: ...

ffi: _Ffi
lib: _Lib
