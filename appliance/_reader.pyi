# The typed face of the C extension: mirrors cffi_build/reader.h, as far as the importer uses it.

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
    root: int
    directory: int
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
    def from_buffer(self, cdecl: Literal["char[]", "uint8_t[]"], buffer: object) -> CData: ...
    def buffer(self, cdata: CData) -> object: ...
    def sizeof(self, cdecl: str) -> int: ...

class _Lib(Protocol):
    READER_FILE: int
    READER_DIRECTORY: int
    READER_SYMLINK: int
    def reader_read(self, reader: Reader, requests: CData, size: int) -> int: ...
    def reader_open(self, root: int, path: bytes, flags: int) -> int: ...
    def reader_list(self, directory: int, to: CData, size: int) -> int: ...
    def reader_write_sparse(self, fd: int, data: CData, size: int, offset: int) -> int: ...

ffi: _Ffi
lib: _Lib
