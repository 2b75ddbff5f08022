# The typed face of the C extension: mirrors cffi_build/images.h, as far as builder.py uses it.

from typing import Literal, Protocol, overload

class CData: ...

class Builder(CData):
    pieces_num: int

class _Ffi(Protocol):
    def new(self, cdecl: Literal["struct img_builder *"]) -> Builder: ...
    @overload
    def from_buffer(self, buffer: object) -> CData: ...
    @overload
    def from_buffer(self, cdecl: Literal["uint8_t[]"], buffer: object) -> CData: ...

class _Lib(Protocol):
    IMG_EENCODING: int
    IMG_ENAME: int
    IMG_EORDER: int
    IMG_EDIGEST: int
    IMG_ETARGET: int
    IMG_ESPAN: int
    IMG_EROOM: int

    def img_builder_init(self, ret: Builder, encoded: CData, size: int) -> int: ...
    def img_piece_size(self, builder: Builder) -> int: ...
    def img_piece_write(self, builder: Builder, to: CData, size: int) -> int: ...

ffi: _Ffi
lib: _Lib
