"""The kernel's side of FUSE: builds requests, reads replies, and is strict about both.

One function per opcode returns the bytes of a request; `parse_reply` and the parsers below it take
a reply apart, and raise ValueError for whatever Linux would refuse.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from appliance.fuse_proto import _fuse_wire
from appliance.fuse_proto._fuse_wire import InHeader, Opcode
from appliance.fuse_proto.dispatch import Reply
from appliance.fuse_proto.encode import body_size, pack_reply_header
from appliance.fuse_proto.operations import FileSlice

ROOT = 1
# What Linux 6.1 offers over virtiofs.
INIT_6_1 = _fuse_wire.InitIn(7, 38, 131072, 0x7BFFFFFB, 0xB)


class PlainSession:
    """A session in this process; `started` keeps what each INIT agreed."""

    def __init__(self) -> None:
        self.is_initialised = False
        self.num_without_init = 0
        self.minor = 0
        self.started: list[tuple[int, int, int]] = []

    def start(self, minor: int, flags: int, max_readahead: int) -> None:
        self.is_initialised = True
        self.minor = minor
        self.started.append((minor, flags, max_readahead))

    def is_first_without_init(self) -> bool:
        self.num_without_init += 1
        return self.num_without_init == 1

    def end(self) -> None:
        self.is_initialised = False


# --- Requests ---


def request(opcode: int, nodeid: int = ROOT, body: bytes = b"", *, unique: int = 1) -> bytes:
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
    return b"".join(value + b"\0" for value in values)


def init(offer: _fuse_wire.InitIn = INIT_6_1, *, unique: int = 1) -> bytes:
    return request(Opcode.INIT, 0, _fuse_wire.pack_init_in(offer), unique=unique)


def destroy(*, unique: int = 1) -> bytes:
    return request(Opcode.DESTROY, 0, unique=unique)


def lookup(nodeid: int, name: bytes, *, unique: int = 1) -> bytes:
    return request(Opcode.LOOKUP, nodeid, names(name), unique=unique)


def forget(nodeid: int, nlookup: int = 1, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_forget_in(_fuse_wire.ForgetIn(nlookup))
    return request(Opcode.FORGET, nodeid, body, unique=unique)


def batch_forget(nodeids: Sequence[int], *, unique: int = 1) -> bytes:
    ones = b"".join(
        _fuse_wire.pack_forget_one(_fuse_wire.ForgetOne(nodeid, 1)) for nodeid in nodeids
    )
    head = _fuse_wire.pack_batch_forget_in(_fuse_wire.BatchForgetIn(len(nodeids)))
    return request(Opcode.BATCH_FORGET, 0, head + ones, unique=unique)


def interrupt(target: int, *, unique: int = 1) -> bytes:
    return request(
        Opcode.INTERRUPT,
        0,
        _fuse_wire.pack_interrupt_in(_fuse_wire.InterruptIn(target)),
        unique=unique,
    )


def getattr_(nodeid: int, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_getattr_in(_fuse_wire.GetattrIn(0, 0))
    return request(Opcode.GETATTR, nodeid, body, unique=unique)


def setattr_(nodeid: int, *, unique: int = 1) -> bytes:
    body = bytes(_fuse_wire.SETATTR_IN_SIZE)
    return request(Opcode.SETATTR, nodeid, body, unique=unique)


def readlink(nodeid: int, *, unique: int = 1) -> bytes:
    return request(Opcode.READLINK, nodeid, unique=unique)


def symlink(nodeid: int, name: bytes, target: bytes, *, unique: int = 1) -> bytes:
    return request(Opcode.SYMLINK, nodeid, names(name, target), unique=unique)


def mknod(nodeid: int, name: bytes, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_mknod_in(_fuse_wire.MknodIn(0o100644, 0, 0o22)) + names(name)
    return request(Opcode.MKNOD, nodeid, body, unique=unique)


def mkdir(nodeid: int, name: bytes, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_mkdir_in(_fuse_wire.MkdirIn(0o755, 0o22)) + names(name)
    return request(Opcode.MKDIR, nodeid, body, unique=unique)


def unlink(nodeid: int, name: bytes, *, unique: int = 1) -> bytes:
    return request(Opcode.UNLINK, nodeid, names(name), unique=unique)


def rmdir(nodeid: int, name: bytes, *, unique: int = 1) -> bytes:
    return request(Opcode.RMDIR, nodeid, names(name), unique=unique)


def rename(nodeid: int, name: bytes, newdir: int, newname: bytes, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_rename_in(_fuse_wire.RenameIn(newdir)) + names(name, newname)
    return request(Opcode.RENAME, nodeid, body, unique=unique)


def rename2(nodeid: int, name: bytes, newdir: int, newname: bytes, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_rename2_in(_fuse_wire.Rename2In(newdir, 0)) + names(name, newname)
    return request(Opcode.RENAME2, nodeid, body, unique=unique)


def link(nodeid: int, name: bytes, oldnodeid: int, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_link_in(_fuse_wire.LinkIn(oldnodeid)) + names(name)
    return request(Opcode.LINK, nodeid, body, unique=unique)


def create(nodeid: int, name: bytes, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_create_in(_fuse_wire.CreateIn(os.O_RDWR, 0o100644, 0o22, 0)) + names(
        name
    )
    return request(Opcode.CREATE, nodeid, body, unique=unique)


def open_(nodeid: int, flags: int = os.O_RDONLY, *, unique: int = 1) -> bytes:
    return request(
        Opcode.OPEN, nodeid, _fuse_wire.pack_open_in(_fuse_wire.OpenIn(flags, 0)), unique=unique
    )


def opendir(nodeid: int, *, unique: int = 1) -> bytes:
    return request(
        Opcode.OPENDIR, nodeid, _fuse_wire.pack_open_in(_fuse_wire.OpenIn(0, 0)), unique=unique
    )


def release(nodeid: int, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_release_in(_fuse_wire.ReleaseIn(0, 0, 0, 0))
    return request(Opcode.RELEASE, nodeid, body, unique=unique)


def releasedir(nodeid: int, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_release_in(_fuse_wire.ReleaseIn(0, 0, 0, 0))
    return request(Opcode.RELEASEDIR, nodeid, body, unique=unique)


def flush(nodeid: int, *, unique: int = 1) -> bytes:
    return request(
        Opcode.FLUSH, nodeid, _fuse_wire.pack_flush_in(_fuse_wire.FlushIn(0, 0)), unique=unique
    )


def fsync(nodeid: int, *, unique: int = 1) -> bytes:
    return request(
        Opcode.FSYNC, nodeid, _fuse_wire.pack_fsync_in(_fuse_wire.FsyncIn(0, 0)), unique=unique
    )


def fsyncdir(nodeid: int, *, unique: int = 1) -> bytes:
    return request(
        Opcode.FSYNCDIR, nodeid, _fuse_wire.pack_fsync_in(_fuse_wire.FsyncIn(0, 0)), unique=unique
    )


def _read_in(offset: int, size: int) -> bytes:
    return _fuse_wire.pack_read_in(_fuse_wire.ReadIn(0, offset, size, 0, 0, 0))


def read(nodeid: int, offset: int, size: int, *, unique: int = 1) -> bytes:
    return request(Opcode.READ, nodeid, _read_in(offset, size), unique=unique)


def readdir(nodeid: int, offset: int, size: int = 4096, *, unique: int = 1) -> bytes:
    return request(Opcode.READDIR, nodeid, _read_in(offset, size), unique=unique)


def readdirplus(nodeid: int, offset: int, size: int = 4096, *, unique: int = 1) -> bytes:
    return request(Opcode.READDIRPLUS, nodeid, _read_in(offset, size), unique=unique)


def write(nodeid: int, offset: int, data: bytes, *, unique: int = 1) -> bytes:
    head = _fuse_wire.pack_write_in(_fuse_wire.WriteIn(0, offset, len(data), 0, 0, 0))
    return request(Opcode.WRITE, nodeid, head + data, unique=unique)


def statfs(nodeid: int = ROOT, *, unique: int = 1) -> bytes:
    return request(Opcode.STATFS, nodeid, unique=unique)


def access(nodeid: int, mask: int = os.R_OK, *, unique: int = 1) -> bytes:
    return request(
        Opcode.ACCESS, nodeid, _fuse_wire.pack_access_in(_fuse_wire.AccessIn(mask)), unique=unique
    )


def getxattr(nodeid: int, name: bytes, size: int, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_getxattr_in(_fuse_wire.GetxattrIn(size)) + names(name)
    return request(Opcode.GETXATTR, nodeid, body, unique=unique)


def listxattr(nodeid: int, size: int, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_getxattr_in(_fuse_wire.GetxattrIn(size))
    return request(Opcode.LISTXATTR, nodeid, body, unique=unique)


def setxattr(nodeid: int, name: bytes, value: bytes, *, unique: int = 1) -> bytes:
    # SETXATTR_EXT is never agreed, so the structure ends after `flags`.
    head = _fuse_wire.pack_setxattr_in(_fuse_wire.SetxattrIn(len(value), 0, 0))[:8]
    return request(Opcode.SETXATTR, nodeid, head + names(name) + value, unique=unique)


def removexattr(nodeid: int, name: bytes, *, unique: int = 1) -> bytes:
    return request(Opcode.REMOVEXATTR, nodeid, names(name), unique=unique)


def lseek(nodeid: int, offset: int, whence: int, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_lseek_in(_fuse_wire.LseekIn(0, offset, whence))
    return request(Opcode.LSEEK, nodeid, body, unique=unique)


def statx(nodeid: int, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_statx_in(_fuse_wire.StatxIn(0, 0, 0, 0xFFF))
    return request(Opcode.STATX, nodeid, body, unique=unique)


def ioctl(nodeid: int, cmd: int, data: bytes = b"", *, unique: int = 1) -> bytes:
    head = _fuse_wire.pack_ioctl_in(_fuse_wire.IoctlIn(0, 0, cmd, 0, len(data), 0))
    return request(Opcode.IOCTL, nodeid, head + data, unique=unique)


def fallocate(nodeid: int, length: int, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_fallocate_in(_fuse_wire.FallocateIn(0, 0, length, 0))
    return request(Opcode.FALLOCATE, nodeid, body, unique=unique)


def copy_file_range(nodeid: int, target: int, length: int, *, unique: int = 1) -> bytes:
    body = _fuse_wire.pack_copy_file_range_in(
        _fuse_wire.CopyFileRangeIn(0, 0, target, 0, 0, length, 0)
    )
    return request(Opcode.COPY_FILE_RANGE, nodeid, body, unique=unique)


def syncfs(*, unique: int = 1) -> bytes:
    return request(
        Opcode.SYNCFS, ROOT, _fuse_wire.pack_syncfs_in(_fuse_wire.SyncfsIn(0)), unique=unique
    )


# --- Replies ---


class Answer(NamedTuple):
    """A reply as received; `error` is a positive errno."""

    unique: int
    error: int
    body: bytes


class DirectoryRecord(NamedTuple):
    ino: int
    off: int
    kind: int
    name: bytes


def wire(reply: Reply) -> bytes:
    """Return the bytes a front end delivers for `reply`."""
    header = pack_reply_header(reply.unique, reply.error, body_size(reply.body))
    if isinstance(reply.body, FileSlice):
        return header + os.pread(reply.body.fd, reply.body.size, reply.body.offset)
    return header + bytes(reply.body)


def parse_reply(data: bytes) -> Answer:
    if len(data) < _fuse_wire.OUT_HEADER_SIZE:
        raise ValueError(f"a reply of {len(data)} bytes")
    header = _fuse_wire.unpack_out_header(data)
    if header.len != len(data):
        raise ValueError(f"len {header.len} in a reply of {len(data)} bytes")
    if not -512 < header.error <= 0:
        raise ValueError(f"error {header.error}")
    body = data[_fuse_wire.OUT_HEADER_SIZE :]
    if header.error and body:
        raise ValueError(f"error {header.error} and a body")
    return Answer(header.unique, -header.error, body)


def parse_init(body: bytes) -> _fuse_wire.InitOut:
    return _fuse_wire.unpack_init_out(_exactly(body, _fuse_wire.INIT_OUT_SIZE))


def parse_entry(body: bytes) -> _fuse_wire.EntryOut:
    return _fuse_wire.unpack_entry_out(_exactly(body, _fuse_wire.ENTRY_OUT_SIZE))


def parse_attr(body: bytes) -> _fuse_wire.AttrOut:
    return _fuse_wire.unpack_attr_out(_exactly(body, _fuse_wire.ATTR_OUT_SIZE))


def parse_statfs(body: bytes) -> _fuse_wire.Kstatfs:
    return _fuse_wire.unpack_statfs_out(_exactly(body, _fuse_wire.STATFS_OUT_SIZE)).st


def parse_xattr_size(body: bytes) -> int:
    return _fuse_wire.unpack_getxattr_out(_exactly(body, _fuse_wire.GETXATTR_OUT_SIZE)).size


def parse_xattr_names(body: bytes) -> list[bytes]:
    if body and not body.endswith(b"\0"):
        raise ValueError(f"unended list {body!r}")
    return body.split(b"\0")[:-1]


def parse_dirents(body: bytes) -> list[DirectoryRecord]:
    records: list[DirectoryRecord] = []
    at = 0
    while at < len(body):
        record, at = _dirent(body, at)
        records.append(record)
    return records


def parse_direntplus(body: bytes) -> list[tuple[_fuse_wire.EntryOut, DirectoryRecord]]:
    records: list[tuple[_fuse_wire.EntryOut, DirectoryRecord]] = []
    at = 0
    while at < len(body):
        entry = _fuse_wire.unpack_entry_out(body, at)
        record, at = _dirent(body, at + _fuse_wire.ENTRY_OUT_SIZE)
        records.append((entry, record))
    return records


# linux fs/fuse/readdir.c: parse_dirfile; the padding's zeros are our own rule.
def _dirent(body: bytes, at: int) -> tuple[DirectoryRecord, int]:
    head = _fuse_wire.unpack_dirent(body, at)
    start = at + _fuse_wire.DIRENT_SIZE
    name = body[start : start + head.namelen]
    end = start + (head.namelen + 7) // 8 * 8
    if not 1 <= len(name) == head.namelen <= 255 or b"/" in name or b"\0" in name:
        raise ValueError(f"name {name!r} of {head.namelen} bytes")
    padding = body[start + head.namelen : end]
    if end > len(body) or padding.strip(b"\0"):
        raise ValueError(f"padding {padding!r} after {name!r}")
    return DirectoryRecord(head.ino, head.off, head.type, name), end


def _exactly(body: bytes, size: int) -> bytes:
    if len(body) != size:
        raise ValueError(f"{len(body)} bytes in place of {size}")
    return body
