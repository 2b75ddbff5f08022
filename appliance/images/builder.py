"""Making images from encoded Directories; the only module that uses the C code for that."""

from collections.abc import Iterator
from typing import Final

from appliance._images import ffi, lib
from appliance.errors import DirectoryError
from appliance.images.layout import GUIDE_AT, GUIDE_ENTRY, Image, name_of

_RULES: Final = {
    lib.IMG_EENCODING: "not the canonical encoding of a Directory",
    lib.IMG_ENAME: "an entry has an invalid name",
    lib.IMG_EORDER: "names are not sorted, or not unique",
    lib.IMG_EDIGEST: "a digest does not have 32 bytes",
    lib.IMG_ETARGET: "a symlink target is empty, too long or has a NUL",
    lib.IMG_ESPAN: "the sum of the sizes exceeds 64 bits",
    lib.IMG_EROOM: "more entries than an image can hold",
}


class ImageBuilder:
    """Makes the pieces of the image of one Directory, in order.

    Args:
        encoded: the canonical encoding. It is not copied, and must not change while this object is
            in use.

    Raises:
        DirectoryError: `encoded` is not the canonical encoding of a Directory.
    """

    def __init__(self, encoded: bytes | memoryview) -> None:
        self._buffer = ffi.from_buffer(encoded)
        self._builder = ffi.new("struct img_builder *")
        _check(lib.img_builder_init(self._builder, self._buffer, len(encoded)))
        self.num_pieces = self._builder.pieces_num

    def next_piece(self) -> bytearray:
        """Return the next piece; the first one still lacks its guide if there are several.

        Raises:
            DirectoryError: the piece would outgrow 32-bit offsets.
        """
        size = _check(lib.img_piece_size(self._builder))
        piece = bytearray(size)
        _check(lib.img_piece_write(self._builder, ffi.from_buffer("uint8_t[]", piece), size))
        return piece


def build(encoded: bytes | memoryview) -> bytearray:
    """Return the image of a Directory that is small enough for one piece.

    Raises:
        DirectoryError: `encoded` is not the canonical encoding of a Directory.
        ValueError: the image has several pieces.
    """
    builder = ImageBuilder(encoded)
    if builder.num_pieces > 1:
        raise ValueError(f"the image has {builder.num_pieces} pieces, expected 1")
    return builder.next_piece()


def pieces(encoded: bytes | memoryview) -> Iterator[tuple[int, bytearray]]:
    """Yield (number, piece) for each piece of an image; the first piece, number 0, comes last.

    If the caller stores the pieces in this order, the last one makes the whole image visible.

    Raises:
        DirectoryError: `encoded` is not the canonical encoding of a Directory.
    """
    builder = ImageBuilder(encoded)
    head = builder.next_piece()
    guide = []
    for number in range(1, builder.num_pieces):
        piece = builder.next_piece()
        image = Image(memoryview(piece))
        guide.append((image.place(0), name_of(image.record(0))))
        yield number, piece
    if guide:
        _append_guide(head, guide)
    yield 0, head


def _append_guide(head: bytearray, guide: list[tuple[int, bytes]]) -> None:
    guide_at = len(head)
    head[GUIDE_AT : GUIDE_AT + 4] = guide_at.to_bytes(4, "little")
    name_at = guide_at + GUIDE_ENTRY.size * len(guide)
    for place, name in guide:
        head += GUIDE_ENTRY.pack(place, name_at, len(name))
        name_at += len(name)
    for _place, name in guide:
        head += name


def _check(result: int) -> int:
    if result < 0:
        raise DirectoryError(_RULES[-result])
    return result
