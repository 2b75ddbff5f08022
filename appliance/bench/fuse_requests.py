"""FUSE requests as Linux sends them, and their replies taken apart as strictly as Linux does.

One function per opcode returns the bytes of a request; `parse_reply` and the parsers below it raise
ValueError for a reply that Linux would refuse.
"""

import os
from typing import Final, NamedTuple

from appliance.fuse_proto import _fuse_wire
from appliance.fuse_proto._fuse_wire import InHeader, Opcode

ROOT: Final = 1
INIT_6_1: Final = _fuse_wire.InitIn(7, 38, 131072, 0x7BFFFFFB, 0xB)
"""What Linux 6.1 offers over virtiofs."""


# --- Requests ---


def request(opcode: int, nodeid: int = ROOT, body: bytes = b"", *, unique: int = 1) -> bytes:
    """Return a request with its header, from root's process 1."""
    header = InHeader(
        len=_fuse_wire.IN_HEADER_SIZE + len(body),
        opcode=opcode,
        unique=unique,
        nodeid=nodeid,
        uid=0,
        gid=0,
        pid=1,
        total_extlen=0,
    )
    return _fuse_wire.pack_in_header(header) + body


def names(*values: bytes) -> bytes:
    """Return names as a request carries them."""
    return b"".join(value + b"\0" for value in values)


def init(offer: _fuse_wire.InitIn = INIT_6_1, *, unique: int = 1) -> bytes:
    """Return INIT, which begins a session."""
    return request(Opcode.INIT, 0, _fuse_wire.pack_init_in(offer), unique=unique)


def destroy(*, unique: int = 1) -> bytes:
    """Return DESTROY, which ends a session."""
    return request(Opcode.DESTROY, 0, unique=unique)


def lookup(nodeid: int, name: bytes, *, unique: int = 1) -> bytes:
    """Return LOOKUP of a name in a directory."""
    return request(Opcode.LOOKUP, nodeid, names(name), unique=unique)


def getattr_(nodeid: int, *, unique: int = 1) -> bytes:
    """Return GETATTR."""
    body = _fuse_wire.pack_getattr_in(_fuse_wire.GetattrIn(0, 0))
    return request(Opcode.GETATTR, nodeid, body, unique=unique)


def readlink(nodeid: int, *, unique: int = 1) -> bytes:
    """Return READLINK."""
    return request(Opcode.READLINK, nodeid, unique=unique)


def open_(nodeid: int, flags: int = os.O_RDONLY, *, unique: int = 1) -> bytes:
    """Return OPEN."""
    body = _fuse_wire.pack_open_in(_fuse_wire.OpenIn(flags, 0))
    return request(Opcode.OPEN, nodeid, body, unique=unique)


def opendir(nodeid: int, *, unique: int = 1) -> bytes:
    """Return OPENDIR."""
    body = _fuse_wire.pack_open_in(_fuse_wire.OpenIn(0, 0))
    return request(Opcode.OPENDIR, nodeid, body, unique=unique)


def release(nodeid: int, *, fh: int = 0, unique: int = 1) -> bytes:
    """Return RELEASE of an open file."""
    body = _fuse_wire.pack_release_in(_fuse_wire.ReleaseIn(fh, 0, 0, 0))
    return request(Opcode.RELEASE, nodeid, body, unique=unique)


def releasedir(nodeid: int, *, fh: int = 0, unique: int = 1) -> bytes:
    """Return RELEASEDIR of an open directory."""
    body = _fuse_wire.pack_release_in(_fuse_wire.ReleaseIn(fh, 0, 0, 0))
    return request(Opcode.RELEASEDIR, nodeid, body, unique=unique)


def _read_in(offset: int, size: int, fh: int) -> bytes:
    return _fuse_wire.pack_read_in(_fuse_wire.ReadIn(fh, offset, size, 0, 0, 0))


def read(nodeid: int, offset: int, size: int, *, fh: int = 0, unique: int = 1) -> bytes:
    """Return READ of a file."""
    return request(Opcode.READ, nodeid, _read_in(offset, size, fh), unique=unique)


def readdir(nodeid: int, offset: int, size: int = 4096, *, fh: int = 0, unique: int = 1) -> bytes:
    """Return READDIR from the record behind `offset` on."""
    return request(Opcode.READDIR, nodeid, _read_in(offset, size, fh), unique=unique)


def readdirplus(
    nodeid: int, offset: int, size: int = 4096, *, fh: int = 0, unique: int = 1
) -> bytes:
    """Return READDIRPLUS from the record behind `offset` on."""
    return request(Opcode.READDIRPLUS, nodeid, _read_in(offset, size, fh), unique=unique)


# --- Replies ---


class ParsedReply(NamedTuple):
    """A reply as received; `error` is a positive errno, or 0."""

    unique: int
    error: int
    body: bytes


class DirectoryRecord(NamedTuple):
    """One entry of a listing; `off` is the offset that the records after it are asked for with."""

    ino: int
    off: int
    kind: int
    name: bytes


def parse_reply(data: bytes) -> ParsedReply:
    """Return the reply in `data`, which must end where the reply ends."""
    size = _fuse_wire.OUT_HEADER_SIZE
    if len(data) < size:
        raise ValueError(f"the reply has {len(data)} bytes, expected at least {size}")
    header = _fuse_wire.unpack_out_header(data)
    if header.len != len(data):
        raise ValueError(f"the header states {header.len} bytes, the reply has {len(data)}")
    if not -512 < header.error <= 0:
        raise ValueError(f"the error is {header.error}, expected 0 or a negative errno")
    body = data[size:]
    if header.error and body:
        raise ValueError(f"the reply has error {header.error} and a body of {len(body)} bytes")
    return ParsedReply(header.unique, -header.error, body)


def parse_init(body: bytes) -> _fuse_wire.InitOut:
    """Return the body of a reply to INIT."""
    return _fuse_wire.unpack_init_out(exactly(body, _fuse_wire.INIT_OUT_SIZE))


def parse_entry(body: bytes) -> _fuse_wire.EntryOut:
    """Return the body of a reply to LOOKUP."""
    return _fuse_wire.unpack_entry_out(exactly(body, _fuse_wire.ENTRY_OUT_SIZE))


def parse_attr(body: bytes) -> _fuse_wire.AttrOut:
    """Return the body of a reply to GETATTR."""
    return _fuse_wire.unpack_attr_out(exactly(body, _fuse_wire.ATTR_OUT_SIZE))


def parse_open(body: bytes) -> _fuse_wire.OpenOut:
    """Return the body of a reply to OPEN or OPENDIR."""
    return _fuse_wire.unpack_open_out(exactly(body, _fuse_wire.OPEN_OUT_SIZE))


def parse_dirents(body: bytes) -> list[DirectoryRecord]:
    """Return the records of a reply to READDIR."""
    records: list[DirectoryRecord] = []
    at = 0
    while at < len(body):
        record, at = _dirent(body, at)
        records.append(record)
    return records


def parse_direntplus(body: bytes) -> list[tuple[_fuse_wire.EntryOut, DirectoryRecord]]:
    """Return the records of a reply to READDIRPLUS, each with what a LOOKUP would have answered."""
    records: list[tuple[_fuse_wire.EntryOut, DirectoryRecord]] = []
    at = 0
    while at < len(body):
        _check_room(body, at, _fuse_wire.ENTRY_OUT_SIZE)
        entry = _fuse_wire.unpack_entry_out(body, at)
        record, at = _dirent(body, at + _fuse_wire.ENTRY_OUT_SIZE)
        records.append((entry, record))
    return records


# Source: linux fs/fuse/readdir.c: parse_dirfile. That padding must be zero is a rule of ours:
# anything else would be memory that the back-end did not mean to show.
def _dirent(body: bytes, at: int) -> tuple[DirectoryRecord, int]:
    _check_room(body, at, _fuse_wire.DIRENT_SIZE)
    head = _fuse_wire.unpack_dirent(body, at)
    start = at + _fuse_wire.DIRENT_SIZE
    name = body[start : start + head.namelen]
    end = start + (head.namelen + 7) // 8 * 8
    if not 1 <= len(name) == head.namelen <= 255 or b"/" in name or b"\0" in name:
        raise ValueError(f"no entry can have the name {name!r}, stated with {head.namelen} bytes")
    padding = body[start + head.namelen : end]
    if end > len(body) or padding.strip(b"\0"):
        raise ValueError(f"the padding behind {name!r} is cut off or not zero: {padding!r}")
    return DirectoryRecord(head.ino, head.off, head.type, name), end


def _check_room(body: bytes, at: int, size: int) -> None:
    if len(body) - at < size:
        raise ValueError(f"a record is cut off: {len(body) - at} bytes, expected at least {size}")


def exactly(body: bytes, size: int) -> bytes:
    """Return `body`; raises ValueError if it has not exactly `size` bytes."""
    if len(body) != size:
        raise ValueError(f"the body has {len(body)} bytes, expected {size}")
    return body
