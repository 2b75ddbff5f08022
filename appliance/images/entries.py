"""READDIRPLUS records of nodes that are in no image, and the number that stands for a content."""

import struct
from typing import Final

from appliance.fuse_proto._fuse_wire import Attr, AttrOut, EntryOut, pack_attr_out
from appliance.fuse_proto.encode import FOREVER_S, pack_direntplus
from appliance.images.layout import DIRECTORY_SIZE, MODES, Kind

BLOCK_SIZE: Final = 4096

_SECTOR: Final = 512
_U64: Final = struct.Struct("<Q")
_FNV_OFFSET: Final = 0xCBF29CE484222325
_FNV_PRIME: Final = 0x100000001B3
_U64_MASK: Final = (1 << 64) - 1
# Numbers by content stay below nodeids' limit, and above what could be the root's.
_INO_MASK: Final = (1 << 63) - 1
_INO_MIN: Final = 1 << 32


def attributes(mode: int, *, ino: int, size: int, mtime: int = 1, mtimensec: int = 0) -> Attr:
    """Return the attributes of a node, of which only these differ; `size` is st_size in bytes."""
    return Attr(
        ino=ino,
        size=size,
        blocks=-(-size // _SECTOR),
        atime=1,
        mtime=mtime,
        ctime=1,
        atimensec=0,
        mtimensec=mtimensec,
        ctimensec=0,
        mode=mode,
        nlink=1,
        uid=0,
        gid=0,
        rdev=0,
        blksize=BLOCK_SIZE,
        flags=0,
    )


def pack_record(
    name: bytes, kind: Kind, *, nodeid: int, generation: int, ino: int, st_size: int, off: int
) -> bytes:
    """Return a READDIRPLUS record; `off` is the cookie after it."""
    size = DIRECTORY_SIZE if kind == Kind.DIRECTORY else st_size
    mode = MODES[kind]
    attr = attributes(mode, ino=ino, size=size)
    entry = EntryOut(nodeid, generation, FOREVER_S, FOREVER_S, 0, 0, attr)
    return pack_direntplus(entry, ino, off, mode >> 12, name)


def pack_attributes(attr: Attr, valid_s: int) -> bytes:
    """Return a reply to GETATTR that is valid for `valid_s` seconds."""
    return pack_attr_out(AttrOut(valid_s, 0, attr))


def content_ino(kind: Kind, digest: bytes | memoryview, target: bytes) -> int:
    """Return the st_ino that all nodes of this content have with `--inodes=content`.

    Args:
        kind: of the node; a file and an executable of the same bytes are two.
        digest: its digest; of a symlink it is not looked at.
        target: of a symlink.
    """
    content = fnv1a(target) if kind == Kind.SYMLINK else _U64.unpack_from(digest)[0]
    return ino_of_content(kind, content)


def ino_of_content(kind: int, content: int) -> int:
    """Return `content_ino` of a kind and the first 8 bytes that an image has for the content."""
    ino = (content ^ kind) & _INO_MASK
    return ino if ino >= _INO_MIN else ino + _INO_MIN


def fnv1a(text: bytes) -> int:
    """Return FNV-1a with 64 bits, as `cffi_build/images.c` computes it of a symlink's target."""
    value = _FNV_OFFSET
    for byte in text:
        value = ((value ^ byte) * _FNV_PRIME) & _U64_MASK
    return value
