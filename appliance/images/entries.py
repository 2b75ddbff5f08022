"""Attributes and READDIRPLUS records of nodes that are in no image, and st_ino by content.

Images have records of their own, which `cffi_build/images.c` makes. What is made here is for the
root directory and for the roots of store paths.
"""

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
# An st_ino by content has 63 bits, as a nodeid has, and is too large to be that of the root.
_INO_MASK: Final = (1 << 63) - 1
_INO_MIN: Final = 1 << 32


def attributes(mode: int, *, ino: int, size: int, mtime: int = 1, mtimensec: int = 0) -> Attr:
    """Return the attributes of a node; all others are the same for every node.

    Args:
        mode: st_mode.
        ino: st_ino.
        size: st_size in bytes.
        mtime: seconds of st_mtime.
        mtimensec: nanoseconds of st_mtime.
    """
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
    name: bytes,
    kind: Kind,
    *,
    nodeid: int,
    generation: int,
    ino: int,
    st_size: int,
    off: int,
    name_valid_s: int = FOREVER_S,
) -> bytes:
    """Return a READDIRPLUS record.

    Args:
        name: the name of the node.
        kind: its kind.
        nodeid: its nodeid.
        generation: the generation of the nodeid.
        ino: its st_ino.
        st_size: its st_size; for a directory, it does not matter.
        off: the cookie of the record after it.
        name_valid_s: how long the guest may take the name to be that of this node, in seconds.
    """
    size = DIRECTORY_SIZE if kind == Kind.DIRECTORY else st_size
    mode = MODES[kind]
    attr = attributes(mode, ino=ino, size=size)
    entry = EntryOut(nodeid, generation, name_valid_s, FOREVER_S, 0, 0, attr)
    return pack_direntplus(entry, ino, off, mode >> 12, name)


def pack_attributes(attr: Attr, valid_s: int) -> bytes:
    """Return a reply to GETATTR that is valid for `valid_s` seconds."""
    return pack_attr_out(AttrOut(valid_s, 0, attr))


def content_ino(kind: Kind, digest: bytes | memoryview, target: bytes) -> int:
    """Return the st_ino that all nodes with the same content share under `--inodes=content`.

    Args:
        kind: the kind of the node; a file and an executable with the same bytes differ.
        digest: the digest of the node; unused for a symlink.
        target: the target of a symlink; unused for other kinds.
    """
    content = fnv1a(target) if kind == Kind.SYMLINK else _U64.unpack_from(digest)[0]
    return ino_of_content(kind, content)


def ino_of_content(kind: int, content: int) -> int:
    """Return `content_ino` from a kind and the first 8 bytes of an image's digest field."""
    ino = (content ^ kind) & _INO_MASK
    return ino if ino >= _INO_MIN else ino + _INO_MIN


def fnv1a(text: bytes) -> int:
    """Return the 64-bit FNV-1a hash, which `cffi_build/images.c` computes of symlink targets."""
    value = _FNV_OFFSET
    for byte in text:
        value = ((value ^ byte) * _FNV_PRIME) & _U64_MASK
    return value
