"""Encodes replies and directory records."""

from typing import Final, NamedTuple

from appliance.fuse_proto import _fuse_wire
from appliance.fuse_proto._fuse_wire import Attr, Dirent, EntryOut
from appliance.fuse_proto.operations import Body, FileSlice

# A validity of 68 years, in seconds. Linux shortens longer ones, but not in the same way in every
# version.
FOREVER_S: Final = 2**31 - 1
# The `EntryOut` of a READDIRPLUS record that does not count as a lookup ("." and "..").
NO_ENTRY: Final = EntryOut(0, 0, 0, 0, 0, 0, Attr(*[0] * len(Attr._fields)))
NAME_MAX: Final = 255


class Reply(NamedTuple):
    """A reply for the transport to deliver.

    `error` is 0 or a positive errno. With an errno, `body` is empty.
    """

    unique: int
    error: int
    body: Body


def body_size(body: Body) -> int:
    """Return the size of a reply's body in bytes."""
    return body.size if isinstance(body, FileSlice) else len(body)


def pack_reply_header(unique: int, error: int, size: int) -> bytes:
    """Return the 16 bytes that precede a body of `size` bytes; `error` is 0 or a positive errno."""
    return _fuse_wire.OUT_HEADER.pack(_fuse_wire.OUT_HEADER_SIZE + size, -error, unique)


def negative_entry(valid_s: int) -> bytes:
    """Return the LOOKUP reply for a missing name, which Linux caches for `valid_s` seconds."""
    return _fuse_wire.pack_entry_out(NO_ENTRY._replace(entry_valid=valid_s))


def dirent_size(name_size: int) -> int:
    """Return the size of a READDIR record in bytes, including its padding."""
    return _padded(_fuse_wire.DIRENT_SIZE + name_size)


def pack_dirent(ino: int, off: int, kind: int, name: bytes) -> bytes:
    """Return one READDIR record.

    Args:
        ino: st_ino of the entry.
        off: the offset at which to continue after this record; not 0.
        kind: DT_*, which is `mode >> 12`.
        name: 1 to 255 bytes without NUL or slash. Any other name makes Linux fail the whole
            listing.
    """
    head = _fuse_wire.pack_dirent(Dirent(ino, off, len(name), kind))
    return (head + name).ljust(dirent_size(len(name)), b"\0")


def pack_direntplus(entry: EntryOut, ino: int, off: int, kind: int, name: bytes) -> bytes:
    """Return one READDIRPLUS record: an `EntryOut`, then the record that `pack_dirent` returns.

    `entry` is what LOOKUP of the name would answer, or `NO_ENTRY` for "." and "..".
    """
    # There is no padding between the two, because the size of an EntryOut is a multiple of 8.
    return _fuse_wire.pack_entry_out(entry) + pack_dirent(ino, off, kind, name)


def _padded(size: int) -> int:
    return (size + 7) & ~7
