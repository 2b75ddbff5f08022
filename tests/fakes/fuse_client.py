"""The kernel's side of FUSE: the requests and parsers of the product, and all others.

One function per opcode returns the bytes of a request; `parse_reply` and the parsers take a reply
apart, and raise ValueError for whatever Linux would refuse.
"""

import os
from collections.abc import Sequence

from appliance.bench.fuse_requests import (
    INIT_6_1,
    ROOT,
    DirectoryRecord,
    ParsedReply,
    destroy,
    exactly,
    getattr_,
    init,
    lookup,
    names,
    open_,
    opendir,
    parse_attr,
    parse_direntplus,
    parse_dirents,
    parse_entry,
    parse_init,
    parse_reply,
    read,
    readdir,
    readdirplus,
    readlink,
    release,
    releasedir,
    request,
)
from appliance.fuse_proto import _fuse_wire
from appliance.fuse_proto._fuse_wire import Opcode
from appliance.fuse_proto.dispatch import Reply
from appliance.fuse_proto.encode import body_size, pack_reply_header
from appliance.fuse_proto.operations import FileSlice

__all__ = [
    "INIT_6_1",
    "ROOT",
    "DirectoryRecord",
    "destroy",
    "getattr_",
    "init",
    "lookup",
    "names",
    "open_",
    "opendir",
    "parse_attr",
    "parse_direntplus",
    "parse_dirents",
    "parse_entry",
    "parse_init",
    "parse_reply",
    "read",
    "readdir",
    "readdirplus",
    "readlink",
    "release",
    "releasedir",
    "request",
]

Answer = ParsedReply


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


def setattr_(nodeid: int, *, unique: int = 1) -> bytes:
    body = bytes(_fuse_wire.SETATTR_IN_SIZE)
    return request(Opcode.SETATTR, nodeid, body, unique=unique)


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


def wire(reply: Reply) -> bytes:
    """Return the bytes a front end delivers for `reply`."""
    header = pack_reply_header(reply.unique, reply.error, body_size(reply.body))
    if isinstance(reply.body, FileSlice):
        return header + os.pread(reply.body.fd, reply.body.size, reply.body.offset)
    return header + bytes(reply.body)


def parse_statfs(body: bytes) -> _fuse_wire.Kstatfs:
    return _fuse_wire.unpack_statfs_out(exactly(body, _fuse_wire.STATFS_OUT_SIZE)).st


def parse_xattr_size(body: bytes) -> int:
    return _fuse_wire.unpack_getxattr_out(exactly(body, _fuse_wire.GETXATTR_OUT_SIZE)).size


def parse_xattr_names(body: bytes) -> list[bytes]:
    if body and not body.endswith(b"\0"):
        raise ValueError(f"unended list {body!r}")
    return body.split(b"\0")[:-1]
