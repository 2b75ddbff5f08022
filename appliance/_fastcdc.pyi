# The typed face of the C extension: mirrors cffi_build/fastcdc.h.

from typing import Literal, Protocol, overload

class CData:
    def __getitem__(self, index: int) -> int: ...

class FastCdc(CData):
    min: int
    normal: int
    max: int
    mask_short: int
    mask_long: int
    settled: int

class _Ffi(Protocol):
    @overload
    def new(self, cdecl: Literal["struct fastcdc *"]) -> FastCdc: ...
    @overload
    def new(self, cdecl: Literal["uint64_t[]"], num: int) -> CData: ...
    def from_buffer(self, buffer: object) -> CData: ...

class _Lib(Protocol):
    def fastcdc_take(self, cdc: FastCdc, data: CData, size: int, ends: CData) -> int: ...

ffi: _Ffi
lib: _Lib
