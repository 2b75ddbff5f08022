"""What an encoded Directory comes to in a NAR, made by the C module in one call.

The body of a directory is its structure, tokens with names and targets, and between two parts of it
what an item stands for: the content of a file that is not empty, or the body of a subdirectory.

    structure up to item 0 | item 0 | structure up to item 1 | item 1 | ... | the rest

All NARs are made of such frames: a root has one of its own around it, see `frames_of_root`.
"""

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from appliance._images import ffi, lib
from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, Node, SymlinkNode
from appliance.errors import DirectoryError
from appliance.nix import nar

if TYPE_CHECKING:
    from appliance._images import FrameToken

# The kinds of items.
FILE: Final = ord("f")
DIRECTORY: Final = ord("d")

# struct frame_item: size of the content or, as the node states it, of the subdirectory; bytes of
# structure before it; kind; digest.
_ITEM: Final = struct.Struct("=QII32s")
Item = tuple[int, int, int, bytes]

_RULES: Final = {
    lib.IMG_EENCODING: "not the canonical encoding of a Directory",
    lib.IMG_ENAME: "an entry has an invalid name",
    lib.IMG_EORDER: "names are not sorted, or not unique",
    lib.IMG_EDIGEST: "a digest does not have 32 bytes",
    lib.IMG_ETARGET: "a symlink target is empty, too long or has a NUL",
    lib.IMG_ESPAN: "the sum of the sizes exceeds 64 bits",
    lib.IMG_EROOM: "more entries than fit in a NAR",
}


class NarFrames(NamedTuple):
    """The body of a directory in a NAR, without what its items stand for; sizes are in bytes.

    `size` is that of the structure and of the contents of files.
    """

    num_entries: int
    size: int
    structure: bytes
    packed_items: bytes

    def items(self) -> Iterator[Item]:
        """Yield size, bytes of structure before it, kind, and digest of each item in order."""
        return _ITEM.iter_unpack(self.packed_items)

    def directories(self) -> list[Digest]:
        """Return the digests of the subdirectories in order."""
        return [Digest(digest) for _size, _at, kind, digest in self.items() if kind == DIRECTORY]


class _Tokens:
    """The runs of tokens, as the C module takes them."""

    def __init__(self) -> None:
        self.cdata = tokens = ffi.new("struct frame_tokens *")
        self._kept = [
            _set_token(tokens.directory, nar.DIRECTORY),
            _set_token(tokens.symlink, nar.SYMLINK),
            _set_token(tokens.regular, nar.REGULAR),
            _set_token(tokens.executable, nar.EXECUTABLE),
            _set_token(tokens.entry, nar.ENTRY),
            _set_token(tokens.node, nar.NODE),
            _set_token(tokens.close, nar.CLOSE_ENTRY),
        ]


def _set_token(token: "FrameToken", value: bytes) -> object:
    """Point `token` at `value`; return the object that must be kept alive as long as `token`."""
    buffer = ffi.from_buffer("uint8_t[]", value)
    token.bytes = buffer
    token.size = len(value)
    return buffer


_TOKENS: Final = _Tokens()


def frames_of(encoded: bytes | memoryview) -> NarFrames:
    """Return the frames of a Directory, given in its canonical encoding.

    Raises:
        DirectoryError: it is not the canonical encoding of a Directory, or is too large.
    """
    buffer = ffi.from_buffer("uint8_t[]", encoded)
    sizes = ffi.new("struct frame_sizes *")
    _check(lib.frames_measure(sizes, _TOKENS.cdata, buffer, len(encoded)))
    structure = bytearray(sizes.structure)
    items = bytearray(sizes.items_num * _ITEM.size)
    _check(
        lib.frames_write(
            sizes,
            _TOKENS.cdata,
            buffer,
            len(encoded),
            ffi.from_buffer("uint8_t[]", structure),
            ffi.from_buffer("struct frame_item[]", items),
        )
    )
    size = sizes.structure + sizes.contents
    return NarFrames(sizes.entries_num, size, bytes(structure), bytes(items))


def frames_of_root(root: Node) -> NarFrames:
    """Return the frames of a whole NAR, whose only item is what its root has.

    `num_entries` does not count the root, and `size` is without the body of a directory.
    """
    if isinstance(root, SymlinkNode):
        structure = nar.HEADER + nar.SYMLINK + nar.string(root.target) + nar.CLOSE
        return NarFrames(0, len(structure), structure, b"")
    if isinstance(root, DirectoryNode):
        item = _ITEM.pack(root.size, len(nar.HEADER), DIRECTORY, root.digest)
        structure = nar.HEADER + nar.CLOSE
        return NarFrames(0, len(structure), structure, item)
    size = root.size
    kind = nar.EXECUTABLE if root.executable else nar.REGULAR
    before = nar.HEADER + kind + nar.length(size)
    structure = before + nar.PADDING[size & 7] + nar.CLOSE
    item = _ITEM.pack(size, len(before), FILE, root.digest) if size else b""
    return NarFrames(0, len(structure) + size, structure, item)


def _check(result: int) -> None:
    if result < 0:
        raise DirectoryError(_RULES[-result])


if ffi.sizeof("struct frame_item") != _ITEM.size:
    raise ImportError("the C module was built from another version: its items have another size")
