"""Directory streams, cut out of stored images (linux/fuse.h: READDIR, READDIRPLUS).

A cookie is the index of the record to go on with, so any one of any age can be resumed from. A
reply holds whole records only; nothing at all means the end, so a buffer too small for one record
is EINVAL.
"""

import struct
from bisect import bisect_right
from collections.abc import Iterable
from errno import EINVAL
from itertools import pairwise
from typing import Final
from zlib import crc32

from appliance.fuse_proto._wire import ENTRY_OUT_SIZE
from appliance.index.images import IS_DIRECTORY, NAME_AT, NAMELEN_AT, POSITION_AT

_U32: Final = struct.Struct("<I")


def plus_slice(image: memoryview, nodeid: int, cookie: int, size: int) -> bytes | memoryview:
    """Return the READDIRPLUS reply of at most `size` bytes for the directory `nodeid`.

    Raises:
        OSError: EINVAL, the next record alone is bigger than `size`.
    """
    words = image.cast("I")
    table = words[2 : 3 + words[1]]
    if cookie >= len(table) - 1:
        return b""
    start = table[cookie] & ~IS_DIRECTORY
    # Ends are multiples of 8, but for the flag bit: find the last one that is not beyond.
    end_index = bisect_right(table, ((start + size) & ~7) | IS_DIRECTORY, lo=cookie) - 1
    if end_index == cookie:
        raise _too_small(size)
    piece = image[start : table[end_index] & ~IS_DIRECTORY]
    flagged = [word - start for word in table[cookie:end_index] if word & IS_DIRECTORY]
    return _positioned(piece, nodeid, flagged) if flagged else piece


def _positioned(piece: memoryview, nodeid: int, flagged: list[int]) -> memoryview:
    # `flagged` are offsets in `piece` with the flag bit. The CRC of each name goes on from that of
    # the parent (images.position).
    parent = crc32(nodeid.to_bytes(8, "little"))
    copy = bytearray(piece)
    for word in flagged:
        at = word & ~IS_DIRECTORY
        name_at = at + NAME_AT
        (name_size,) = _U32.unpack_from(piece, at + NAMELEN_AT)
        name = piece[name_at : name_at + name_size]
        _U32.pack_into(copy, at + POSITION_AT, crc32(name, parent))
    return memoryview(copy)


def plain_slice(image: memoryview, cookie: int, size: int) -> bytes:
    """Return the READDIR reply of at most `size` bytes.

    Raises:
        OSError: EINVAL, the next record alone is bigger than `size`.
    """
    words = image.cast("I")
    parts: list[memoryview] = []
    left = size
    # One word before the others: where the first record starts, then where each ends.
    ends = (word & ~IS_DIRECTORY for word in words[2 + cookie : 3 + words[1]])
    for at, end in pairwise(ends):
        left -= end - at - ENTRY_OUT_SIZE
        if left < 0:
            break
        parts.append(image[at + ENTRY_OUT_SIZE : end])
    if left < 0 and not parts:
        raise _too_small(size)
    return b"".join(parts)


def plus_stream(records: Iterable[memoryview], size: int) -> bytes:
    """Return as many of `records`, which have their positions, as fit `size` bytes.

    Raises:
        OSError: EINVAL, the first alone is bigger than `size`.
    """
    return _joined(records, size, 0)


def plain_stream(records: Iterable[memoryview], size: int) -> bytes:
    """Return as many of `records`, without their entry_out, as fit `size` bytes.

    Raises:
        OSError: EINVAL, the first alone is bigger than `size`.
    """
    return _joined(records, size, ENTRY_OUT_SIZE)


def _joined(records: Iterable[memoryview], size: int, skip: int) -> bytes:
    parts: list[memoryview] = []
    left = size
    for record in records:
        part = record[skip:]
        left -= len(part)
        if left < 0:
            if not parts:
                raise _too_small(size)
            break
        parts.append(part)
    return b"".join(parts)


def _too_small(size: int) -> OSError:
    return OSError(EINVAL, f"{size} bytes do not hold one directory record")
