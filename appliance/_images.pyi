# The typed face of the C extension: mirrors cffi_build/images.h and frames.h, as far as needed.

from typing import Literal, Protocol, overload

class CData: ...

class Builder(CData):
    pieces_num: int

class FrameToken(CData):
    bytes: CData
    size: int

class FrameTokens(CData):
    directory: FrameToken
    symlink: FrameToken
    regular: FrameToken
    executable: FrameToken
    entry: FrameToken
    node: FrameToken
    close: FrameToken

class FrameSizes(CData):
    entries_num: int
    structure: int
    contents: int
    items_num: int

class _Ffi(Protocol):
    @overload
    def new(self, cdecl: Literal["struct img_builder *"]) -> Builder: ...
    @overload
    def new(self, cdecl: Literal["struct frame_tokens *"]) -> FrameTokens: ...
    @overload
    def new(self, cdecl: Literal["struct frame_sizes *"]) -> FrameSizes: ...
    @overload
    def from_buffer(self, buffer: object) -> CData: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["uint8_t[]", "struct frame_item[]"], buffer: object
    ) -> CData: ...
    def sizeof(self, cdecl: Literal["struct frame_item"]) -> int: ...

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
    def frames_measure(
        self, ret: FrameSizes, tokens: FrameTokens, encoded: CData, size: int
    ) -> int: ...
    def frames_write(
        self,
        sizes: FrameSizes,
        tokens: FrameTokens,
        encoded: CData,
        size: int,
        structure: CData,
        items: CData,
    ) -> int: ...

ffi: _Ffi
lib: _Lib
