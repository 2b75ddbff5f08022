"""Wire codec, generated from tools.fuse_table by tools.wiregen; do not edit."""

import sys
from collections.abc import Callable
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Any, NamedTuple

Buffer = bytes | bytearray | memoryview

if sys.byteorder != "little":
    raise ImportError("the wire codecs need a little-endian host")


class Opcode(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53
    INIT_BSWAP_RESERVED = 436207616


class InitFlag(IntFlag):
    ASYNC_READ = 0x1
    POSIX_LOCKS = 0x2
    FILE_OPS = 0x4
    ATOMIC_O_TRUNC = 0x8
    EXPORT_SUPPORT = 0x10
    BIG_WRITES = 0x20
    DONT_MASK = 0x40
    SPLICE_WRITE = 0x80
    SPLICE_MOVE = 0x100
    SPLICE_READ = 0x200
    FLOCK_LOCKS = 0x400
    HAS_IOCTL_DIR = 0x800
    AUTO_INVAL_DATA = 0x1000
    DO_READDIRPLUS = 0x2000
    READDIRPLUS_AUTO = 0x4000
    ASYNC_DIO = 0x8000
    WRITEBACK_CACHE = 0x10000
    NO_OPEN_SUPPORT = 0x20000
    PARALLEL_DIROPS = 0x40000
    HANDLE_KILLPRIV = 0x80000
    POSIX_ACL = 0x100000
    ABORT_ERROR = 0x200000
    MAX_PAGES = 0x400000
    CACHE_SYMLINKS = 0x800000
    NO_OPENDIR_SUPPORT = 0x1000000
    EXPLICIT_INVAL_DATA = 0x2000000
    MAP_ALIGNMENT = 0x4000000
    SUBMOUNTS = 0x8000000
    HANDLE_KILLPRIV_V2 = 0x10000000
    SETXATTR_EXT = 0x20000000
    INIT_EXT = 0x40000000
    SECURITY_CTX = 0x100000000
    HAS_INODE_DAX = 0x200000000
    CREATE_SUPP_GROUP = 0x400000000
    HAS_EXPIRE_ONLY = 0x800000000
    DIRECT_IO_ALLOW_MMAP = 0x1000000000
    PASSTHROUGH = 0x2000000000
    NO_EXPORT_SUPPORT = 0x4000000000
    HAS_RESEND = 0x8000000000
    ALLOW_IDMAP = 0x10000000000
    OVER_IO_URING = 0x20000000000
    REQUEST_TIMEOUT = 0x40000000000


class OpenFlag(IntFlag):
    DIRECT_IO = 0x1
    KEEP_CACHE = 0x2
    NONSEEKABLE = 0x4
    CACHE_DIR = 0x8
    STREAM = 0x10
    NOFLUSH = 0x20
    PARALLEL_DIRECT_WRITES = 0x40
    PASSTHROUGH = 0x80


class NotifyCode(IntEnum):
    RESEND = 7


class GetattrFlag(IntFlag):
    FH = 0x1


class AttrFlag(IntFlag):
    SUBMOUNT = 0x1
    DAX = 0x2


class InHeader(NamedTuple):
    len: int
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    total_extlen: int


IN_HEADER = Struct("<2I2Q3IH2x")
IN_HEADER_SIZE = 40


def unpack_in_header(buf: Buffer, offset: int = 0) -> InHeader:
    return tuple.__new__(InHeader, IN_HEADER.unpack_from(buf, offset))


def pack_in_header(value: InHeader) -> bytes:
    return IN_HEADER.pack(*value)


class OutHeader(NamedTuple):
    len: int
    error: int
    unique: int


OUT_HEADER = Struct("<IiQ")
OUT_HEADER_SIZE = 16


def unpack_out_header(buf: Buffer, offset: int = 0) -> OutHeader:
    return tuple.__new__(OutHeader, OUT_HEADER.unpack_from(buf, offset))


def pack_out_header(value: OutHeader) -> bytes:
    return OUT_HEADER.pack(*value)


class Attr(NamedTuple):
    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int


ATTR = Struct("<6Q10I")
ATTR_SIZE = 88


def unpack_attr(buf: Buffer, offset: int = 0) -> Attr:
    return tuple.__new__(Attr, ATTR.unpack_from(buf, offset))


def pack_attr(value: Attr) -> bytes:
    return ATTR.pack(*value)


class EntryOut(NamedTuple):
    nodeid: int
    generation: int
    entry_valid: int
    attr_valid: int
    entry_valid_nsec: int
    attr_valid_nsec: int
    attr: Attr


ENTRY_OUT = Struct("<4Q2I6Q10I")
ENTRY_OUT_SIZE = 128


def unpack_entry_out(buf: Buffer, offset: int = 0) -> EntryOut:
    flat = ENTRY_OUT.unpack_from(buf, offset)
    return EntryOut._make(
        (
            *flat[0:6],
            tuple.__new__(Attr, flat[6:22]),
        )
    )


def pack_entry_out(value: EntryOut) -> bytes:
    return ENTRY_OUT.pack(
        *value[0:6],
        *value.attr,
    )


class AttrOut(NamedTuple):
    attr_valid: int
    attr_valid_nsec: int
    attr: Attr


ATTR_OUT = Struct("<QI4x6Q10I")
ATTR_OUT_SIZE = 104


def unpack_attr_out(buf: Buffer, offset: int = 0) -> AttrOut:
    flat = ATTR_OUT.unpack_from(buf, offset)
    return AttrOut._make(
        (
            *flat[0:2],
            tuple.__new__(Attr, flat[2:18]),
        )
    )


def pack_attr_out(value: AttrOut) -> bytes:
    return ATTR_OUT.pack(
        *value[0:2],
        *value.attr,
    )


class ForgetIn(NamedTuple):
    nlookup: int


FORGET_IN = Struct("<Q")
FORGET_IN_SIZE = 8


def unpack_forget_in(buf: Buffer, offset: int = 0) -> ForgetIn:
    return tuple.__new__(ForgetIn, FORGET_IN.unpack_from(buf, offset))


def pack_forget_in(value: ForgetIn) -> bytes:
    return FORGET_IN.pack(*value)


class ForgetOne(NamedTuple):
    nodeid: int
    nlookup: int


FORGET_ONE = Struct("<2Q")
FORGET_ONE_SIZE = 16


def unpack_forget_one(buf: Buffer, offset: int = 0) -> ForgetOne:
    return tuple.__new__(ForgetOne, FORGET_ONE.unpack_from(buf, offset))


def pack_forget_one(value: ForgetOne) -> bytes:
    return FORGET_ONE.pack(*value)


class BatchForgetIn(NamedTuple):
    count_: int


BATCH_FORGET_IN = Struct("<I4x")
BATCH_FORGET_IN_SIZE = 8


def unpack_batch_forget_in(buf: Buffer, offset: int = 0) -> BatchForgetIn:
    return tuple.__new__(BatchForgetIn, BATCH_FORGET_IN.unpack_from(buf, offset))


def pack_batch_forget_in(value: BatchForgetIn) -> bytes:
    return BATCH_FORGET_IN.pack(*value)


class GetattrIn(NamedTuple):
    getattr_flags: int
    fh: int


GETATTR_IN = Struct("<I4xQ")
GETATTR_IN_SIZE = 16


def unpack_getattr_in(buf: Buffer, offset: int = 0) -> GetattrIn:
    return tuple.__new__(GetattrIn, GETATTR_IN.unpack_from(buf, offset))


def pack_getattr_in(value: GetattrIn) -> bytes:
    return GETATTR_IN.pack(*value)


class SetattrIn(NamedTuple):
    valid: int
    fh: int
    size: int
    lock_owner: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    uid: int
    gid: int


SETATTR_IN = Struct("<I4x6Q4I4x2I4x")
SETATTR_IN_SIZE = 88


def unpack_setattr_in(buf: Buffer, offset: int = 0) -> SetattrIn:
    return tuple.__new__(SetattrIn, SETATTR_IN.unpack_from(buf, offset))


def pack_setattr_in(value: SetattrIn) -> bytes:
    return SETATTR_IN.pack(*value)


class MknodIn(NamedTuple):
    mode: int
    rdev: int
    umask: int


MKNOD_IN = Struct("<3I4x")
MKNOD_IN_SIZE = 16


def unpack_mknod_in(buf: Buffer, offset: int = 0) -> MknodIn:
    return tuple.__new__(MknodIn, MKNOD_IN.unpack_from(buf, offset))


def pack_mknod_in(value: MknodIn) -> bytes:
    return MKNOD_IN.pack(*value)


class MkdirIn(NamedTuple):
    mode: int
    umask: int


MKDIR_IN = Struct("<2I")
MKDIR_IN_SIZE = 8


def unpack_mkdir_in(buf: Buffer, offset: int = 0) -> MkdirIn:
    return tuple.__new__(MkdirIn, MKDIR_IN.unpack_from(buf, offset))


def pack_mkdir_in(value: MkdirIn) -> bytes:
    return MKDIR_IN.pack(*value)


class RenameIn(NamedTuple):
    newdir: int


RENAME_IN = Struct("<Q")
RENAME_IN_SIZE = 8


def unpack_rename_in(buf: Buffer, offset: int = 0) -> RenameIn:
    return tuple.__new__(RenameIn, RENAME_IN.unpack_from(buf, offset))


def pack_rename_in(value: RenameIn) -> bytes:
    return RENAME_IN.pack(*value)


class Rename2In(NamedTuple):
    newdir: int
    flags: int


RENAME2_IN = Struct("<QI4x")
RENAME2_IN_SIZE = 16


def unpack_rename2_in(buf: Buffer, offset: int = 0) -> Rename2In:
    return tuple.__new__(Rename2In, RENAME2_IN.unpack_from(buf, offset))


def pack_rename2_in(value: Rename2In) -> bytes:
    return RENAME2_IN.pack(*value)


class LinkIn(NamedTuple):
    oldnodeid: int


LINK_IN = Struct("<Q")
LINK_IN_SIZE = 8


def unpack_link_in(buf: Buffer, offset: int = 0) -> LinkIn:
    return tuple.__new__(LinkIn, LINK_IN.unpack_from(buf, offset))


def pack_link_in(value: LinkIn) -> bytes:
    return LINK_IN.pack(*value)


class OpenIn(NamedTuple):
    flags: int
    open_flags: int


OPEN_IN = Struct("<2I")
OPEN_IN_SIZE = 8


def unpack_open_in(buf: Buffer, offset: int = 0) -> OpenIn:
    return tuple.__new__(OpenIn, OPEN_IN.unpack_from(buf, offset))


def pack_open_in(value: OpenIn) -> bytes:
    return OPEN_IN.pack(*value)


class OpenOut(NamedTuple):
    fh: int
    open_flags: int
    backing_id: int


OPEN_OUT = Struct("<QIi")
OPEN_OUT_SIZE = 16


def unpack_open_out(buf: Buffer, offset: int = 0) -> OpenOut:
    return tuple.__new__(OpenOut, OPEN_OUT.unpack_from(buf, offset))


def pack_open_out(value: OpenOut) -> bytes:
    return OPEN_OUT.pack(*value)


class CreateIn(NamedTuple):
    flags: int
    mode: int
    umask: int
    open_flags: int


CREATE_IN = Struct("<4I")
CREATE_IN_SIZE = 16


def unpack_create_in(buf: Buffer, offset: int = 0) -> CreateIn:
    return tuple.__new__(CreateIn, CREATE_IN.unpack_from(buf, offset))


def pack_create_in(value: CreateIn) -> bytes:
    return CREATE_IN.pack(*value)


class ReleaseIn(NamedTuple):
    fh: int
    flags: int
    release_flags: int
    lock_owner: int


RELEASE_IN = Struct("<Q2IQ")
RELEASE_IN_SIZE = 24


def unpack_release_in(buf: Buffer, offset: int = 0) -> ReleaseIn:
    return tuple.__new__(ReleaseIn, RELEASE_IN.unpack_from(buf, offset))


def pack_release_in(value: ReleaseIn) -> bytes:
    return RELEASE_IN.pack(*value)


class FlushIn(NamedTuple):
    fh: int
    lock_owner: int


FLUSH_IN = Struct("<Q8xQ")
FLUSH_IN_SIZE = 24


def unpack_flush_in(buf: Buffer, offset: int = 0) -> FlushIn:
    return tuple.__new__(FlushIn, FLUSH_IN.unpack_from(buf, offset))


def pack_flush_in(value: FlushIn) -> bytes:
    return FLUSH_IN.pack(*value)


class ReadIn(NamedTuple):
    fh: int
    offset: int
    size: int
    read_flags: int
    lock_owner: int
    flags: int


READ_IN = Struct("<2Q2IQI4x")
READ_IN_SIZE = 40


def unpack_read_in(buf: Buffer, offset: int = 0) -> ReadIn:
    return tuple.__new__(ReadIn, READ_IN.unpack_from(buf, offset))


def pack_read_in(value: ReadIn) -> bytes:
    return READ_IN.pack(*value)


class WriteIn(NamedTuple):
    fh: int
    offset: int
    size: int
    write_flags: int
    lock_owner: int
    flags: int


WRITE_IN = Struct("<2Q2IQI4x")
WRITE_IN_SIZE = 40


def unpack_write_in(buf: Buffer, offset: int = 0) -> WriteIn:
    return tuple.__new__(WriteIn, WRITE_IN.unpack_from(buf, offset))


def pack_write_in(value: WriteIn) -> bytes:
    return WRITE_IN.pack(*value)


class WriteOut(NamedTuple):
    size: int


WRITE_OUT = Struct("<I4x")
WRITE_OUT_SIZE = 8


def unpack_write_out(buf: Buffer, offset: int = 0) -> WriteOut:
    return tuple.__new__(WriteOut, WRITE_OUT.unpack_from(buf, offset))


def pack_write_out(value: WriteOut) -> bytes:
    return WRITE_OUT.pack(*value)


class Kstatfs(NamedTuple):
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    bsize: int
    namelen: int
    frsize: int


KSTATFS = Struct("<5Q3I28x")
KSTATFS_SIZE = 80


def unpack_kstatfs(buf: Buffer, offset: int = 0) -> Kstatfs:
    return tuple.__new__(Kstatfs, KSTATFS.unpack_from(buf, offset))


def pack_kstatfs(value: Kstatfs) -> bytes:
    return KSTATFS.pack(*value)


class StatfsOut(NamedTuple):
    st: Kstatfs


STATFS_OUT = Struct("<5Q3I28x")
STATFS_OUT_SIZE = 80


def unpack_statfs_out(buf: Buffer, offset: int = 0) -> StatfsOut:
    flat = STATFS_OUT.unpack_from(buf, offset)
    return StatfsOut._make((tuple.__new__(Kstatfs, flat[0:8]),))


def pack_statfs_out(value: StatfsOut) -> bytes:
    return STATFS_OUT.pack(*value.st)


class FsyncIn(NamedTuple):
    fh: int
    fsync_flags: int


FSYNC_IN = Struct("<QI4x")
FSYNC_IN_SIZE = 16


def unpack_fsync_in(buf: Buffer, offset: int = 0) -> FsyncIn:
    return tuple.__new__(FsyncIn, FSYNC_IN.unpack_from(buf, offset))


def pack_fsync_in(value: FsyncIn) -> bytes:
    return FSYNC_IN.pack(*value)


class SetxattrIn(NamedTuple):
    size: int
    flags: int
    setxattr_flags: int


SETXATTR_IN = Struct("<3I4x")
SETXATTR_IN_SIZE = 16


def unpack_setxattr_in(buf: Buffer, offset: int = 0) -> SetxattrIn:
    return tuple.__new__(SetxattrIn, SETXATTR_IN.unpack_from(buf, offset))


def pack_setxattr_in(value: SetxattrIn) -> bytes:
    return SETXATTR_IN.pack(*value)


class GetxattrIn(NamedTuple):
    size: int


GETXATTR_IN = Struct("<I4x")
GETXATTR_IN_SIZE = 8


def unpack_getxattr_in(buf: Buffer, offset: int = 0) -> GetxattrIn:
    return tuple.__new__(GetxattrIn, GETXATTR_IN.unpack_from(buf, offset))


def pack_getxattr_in(value: GetxattrIn) -> bytes:
    return GETXATTR_IN.pack(*value)


class GetxattrOut(NamedTuple):
    size: int


GETXATTR_OUT = Struct("<I4x")
GETXATTR_OUT_SIZE = 8


def unpack_getxattr_out(buf: Buffer, offset: int = 0) -> GetxattrOut:
    return tuple.__new__(GetxattrOut, GETXATTR_OUT.unpack_from(buf, offset))


def pack_getxattr_out(value: GetxattrOut) -> bytes:
    return GETXATTR_OUT.pack(*value)


class FileLock(NamedTuple):
    start: int
    end: int
    type: int
    pid: int


FILE_LOCK = Struct("<2Q2I")
FILE_LOCK_SIZE = 24


def unpack_file_lock(buf: Buffer, offset: int = 0) -> FileLock:
    return tuple.__new__(FileLock, FILE_LOCK.unpack_from(buf, offset))


def pack_file_lock(value: FileLock) -> bytes:
    return FILE_LOCK.pack(*value)


class LkIn(NamedTuple):
    fh: int
    owner: int
    lk: FileLock
    lk_flags: int


LK_IN = Struct("<4Q3I4x")
LK_IN_SIZE = 48


def unpack_lk_in(buf: Buffer, offset: int = 0) -> LkIn:
    flat = LK_IN.unpack_from(buf, offset)
    return LkIn._make(
        (
            *flat[0:2],
            tuple.__new__(FileLock, flat[2:6]),
            *flat[6:7],
        )
    )


def pack_lk_in(value: LkIn) -> bytes:
    return LK_IN.pack(
        *value[0:2],
        *value.lk,
        *value[3:],
    )


class LkOut(NamedTuple):
    lk: FileLock


LK_OUT = Struct("<2Q2I")
LK_OUT_SIZE = 24


def unpack_lk_out(buf: Buffer, offset: int = 0) -> LkOut:
    flat = LK_OUT.unpack_from(buf, offset)
    return LkOut._make((tuple.__new__(FileLock, flat[0:4]),))


def pack_lk_out(value: LkOut) -> bytes:
    return LK_OUT.pack(*value.lk)


class AccessIn(NamedTuple):
    mask: int


ACCESS_IN = Struct("<I4x")
ACCESS_IN_SIZE = 8


def unpack_access_in(buf: Buffer, offset: int = 0) -> AccessIn:
    return tuple.__new__(AccessIn, ACCESS_IN.unpack_from(buf, offset))


def pack_access_in(value: AccessIn) -> bytes:
    return ACCESS_IN.pack(*value)


class InitIn(NamedTuple):
    major: int
    minor: int
    max_readahead: int
    flags: int
    flags2: int


INIT_IN = Struct("<5I44x")
INIT_IN_SIZE = 64


def unpack_init_in(buf: Buffer, offset: int = 0) -> InitIn:
    return tuple.__new__(InitIn, INIT_IN.unpack_from(buf, offset))


def pack_init_in(value: InitIn) -> bytes:
    return INIT_IN.pack(*value)


class InitOut(NamedTuple):
    major: int
    minor: int
    max_readahead: int
    flags: int
    max_background: int
    congestion_threshold: int
    max_write: int
    time_gran: int
    max_pages: int
    map_alignment: int
    flags2: int
    max_stack_depth: int
    request_timeout: int


INIT_OUT = Struct("<4I2H2I2H2IH22x")
INIT_OUT_SIZE = 64


def unpack_init_out(buf: Buffer, offset: int = 0) -> InitOut:
    return tuple.__new__(InitOut, INIT_OUT.unpack_from(buf, offset))


def pack_init_out(value: InitOut) -> bytes:
    return INIT_OUT.pack(*value)


class InterruptIn(NamedTuple):
    unique: int


INTERRUPT_IN = Struct("<Q")
INTERRUPT_IN_SIZE = 8


def unpack_interrupt_in(buf: Buffer, offset: int = 0) -> InterruptIn:
    return tuple.__new__(InterruptIn, INTERRUPT_IN.unpack_from(buf, offset))


def pack_interrupt_in(value: InterruptIn) -> bytes:
    return INTERRUPT_IN.pack(*value)


class BmapIn(NamedTuple):
    block: int
    blocksize: int


BMAP_IN = Struct("<QI4x")
BMAP_IN_SIZE = 16


def unpack_bmap_in(buf: Buffer, offset: int = 0) -> BmapIn:
    return tuple.__new__(BmapIn, BMAP_IN.unpack_from(buf, offset))


def pack_bmap_in(value: BmapIn) -> bytes:
    return BMAP_IN.pack(*value)


class BmapOut(NamedTuple):
    block: int


BMAP_OUT = Struct("<Q")
BMAP_OUT_SIZE = 8


def unpack_bmap_out(buf: Buffer, offset: int = 0) -> BmapOut:
    return tuple.__new__(BmapOut, BMAP_OUT.unpack_from(buf, offset))


def pack_bmap_out(value: BmapOut) -> bytes:
    return BMAP_OUT.pack(*value)


class IoctlIn(NamedTuple):
    fh: int
    flags: int
    cmd: int
    arg: int
    in_size: int
    out_size: int


IOCTL_IN = Struct("<Q2IQ2I")
IOCTL_IN_SIZE = 32


def unpack_ioctl_in(buf: Buffer, offset: int = 0) -> IoctlIn:
    return tuple.__new__(IoctlIn, IOCTL_IN.unpack_from(buf, offset))


def pack_ioctl_in(value: IoctlIn) -> bytes:
    return IOCTL_IN.pack(*value)


class IoctlOut(NamedTuple):
    result: int
    flags: int
    in_iovs: int
    out_iovs: int


IOCTL_OUT = Struct("<i3I")
IOCTL_OUT_SIZE = 16


def unpack_ioctl_out(buf: Buffer, offset: int = 0) -> IoctlOut:
    return tuple.__new__(IoctlOut, IOCTL_OUT.unpack_from(buf, offset))


def pack_ioctl_out(value: IoctlOut) -> bytes:
    return IOCTL_OUT.pack(*value)


class PollIn(NamedTuple):
    fh: int
    kh: int
    flags: int
    events: int


POLL_IN = Struct("<2Q2I")
POLL_IN_SIZE = 24


def unpack_poll_in(buf: Buffer, offset: int = 0) -> PollIn:
    return tuple.__new__(PollIn, POLL_IN.unpack_from(buf, offset))


def pack_poll_in(value: PollIn) -> bytes:
    return POLL_IN.pack(*value)


class PollOut(NamedTuple):
    revents: int


POLL_OUT = Struct("<I4x")
POLL_OUT_SIZE = 8


def unpack_poll_out(buf: Buffer, offset: int = 0) -> PollOut:
    return tuple.__new__(PollOut, POLL_OUT.unpack_from(buf, offset))


def pack_poll_out(value: PollOut) -> bytes:
    return POLL_OUT.pack(*value)


class FallocateIn(NamedTuple):
    fh: int
    offset: int
    length: int
    mode: int


FALLOCATE_IN = Struct("<3QI4x")
FALLOCATE_IN_SIZE = 32


def unpack_fallocate_in(buf: Buffer, offset: int = 0) -> FallocateIn:
    return tuple.__new__(FallocateIn, FALLOCATE_IN.unpack_from(buf, offset))


def pack_fallocate_in(value: FallocateIn) -> bytes:
    return FALLOCATE_IN.pack(*value)


class LseekIn(NamedTuple):
    fh: int
    offset: int
    whence: int


LSEEK_IN = Struct("<2QI4x")
LSEEK_IN_SIZE = 24


def unpack_lseek_in(buf: Buffer, offset: int = 0) -> LseekIn:
    return tuple.__new__(LseekIn, LSEEK_IN.unpack_from(buf, offset))


def pack_lseek_in(value: LseekIn) -> bytes:
    return LSEEK_IN.pack(*value)


class LseekOut(NamedTuple):
    offset: int


LSEEK_OUT = Struct("<Q")
LSEEK_OUT_SIZE = 8


def unpack_lseek_out(buf: Buffer, offset: int = 0) -> LseekOut:
    return tuple.__new__(LseekOut, LSEEK_OUT.unpack_from(buf, offset))


def pack_lseek_out(value: LseekOut) -> bytes:
    return LSEEK_OUT.pack(*value)


class CopyFileRangeIn(NamedTuple):
    fh_in: int
    off_in: int
    nodeid_out: int
    fh_out: int
    off_out: int
    len: int
    flags: int


COPY_FILE_RANGE_IN = Struct("<7Q")
COPY_FILE_RANGE_IN_SIZE = 56


def unpack_copy_file_range_in(buf: Buffer, offset: int = 0) -> CopyFileRangeIn:
    return tuple.__new__(CopyFileRangeIn, COPY_FILE_RANGE_IN.unpack_from(buf, offset))


def pack_copy_file_range_in(value: CopyFileRangeIn) -> bytes:
    return COPY_FILE_RANGE_IN.pack(*value)


class CopyFileRangeOut(NamedTuple):
    bytes_copied: int


COPY_FILE_RANGE_OUT = Struct("<Q")
COPY_FILE_RANGE_OUT_SIZE = 8


def unpack_copy_file_range_out(buf: Buffer, offset: int = 0) -> CopyFileRangeOut:
    return tuple.__new__(CopyFileRangeOut, COPY_FILE_RANGE_OUT.unpack_from(buf, offset))


def pack_copy_file_range_out(value: CopyFileRangeOut) -> bytes:
    return COPY_FILE_RANGE_OUT.pack(*value)


class SetupmappingIn(NamedTuple):
    fh: int
    foffset: int
    len: int
    flags: int
    moffset: int


SETUPMAPPING_IN = Struct("<5Q")
SETUPMAPPING_IN_SIZE = 40


def unpack_setupmapping_in(buf: Buffer, offset: int = 0) -> SetupmappingIn:
    return tuple.__new__(SetupmappingIn, SETUPMAPPING_IN.unpack_from(buf, offset))


def pack_setupmapping_in(value: SetupmappingIn) -> bytes:
    return SETUPMAPPING_IN.pack(*value)


class RemovemappingIn(NamedTuple):
    count_: int


REMOVEMAPPING_IN = Struct("<I")
REMOVEMAPPING_IN_SIZE = 4


def unpack_removemapping_in(buf: Buffer, offset: int = 0) -> RemovemappingIn:
    return tuple.__new__(RemovemappingIn, REMOVEMAPPING_IN.unpack_from(buf, offset))


def pack_removemapping_in(value: RemovemappingIn) -> bytes:
    return REMOVEMAPPING_IN.pack(*value)


class RemovemappingOne(NamedTuple):
    moffset: int
    len: int


REMOVEMAPPING_ONE = Struct("<2Q")
REMOVEMAPPING_ONE_SIZE = 16


def unpack_removemapping_one(buf: Buffer, offset: int = 0) -> RemovemappingOne:
    return tuple.__new__(RemovemappingOne, REMOVEMAPPING_ONE.unpack_from(buf, offset))


def pack_removemapping_one(value: RemovemappingOne) -> bytes:
    return REMOVEMAPPING_ONE.pack(*value)


class SyncfsIn(NamedTuple):
    padding: int


SYNCFS_IN = Struct("<Q")
SYNCFS_IN_SIZE = 8


def unpack_syncfs_in(buf: Buffer, offset: int = 0) -> SyncfsIn:
    return tuple.__new__(SyncfsIn, SYNCFS_IN.unpack_from(buf, offset))


def pack_syncfs_in(value: SyncfsIn) -> bytes:
    return SYNCFS_IN.pack(*value)


class SxTime(NamedTuple):
    tv_sec: int
    tv_nsec: int


SX_TIME = Struct("<qI4x")
SX_TIME_SIZE = 16


def unpack_sx_time(buf: Buffer, offset: int = 0) -> SxTime:
    return tuple.__new__(SxTime, SX_TIME.unpack_from(buf, offset))


def pack_sx_time(value: SxTime) -> bytes:
    return SX_TIME.pack(*value)


class Statx(NamedTuple):
    mask: int
    blksize: int
    attributes: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    blocks: int
    attributes_mask: int
    atime: SxTime
    btime: SxTime
    ctime: SxTime
    mtime: SxTime
    rdev_major: int
    rdev_minor: int
    dev_major: int
    dev_minor: int


STATX = Struct("<2IQ3IH2x4QqI4xqI4xqI4xqI4x4I112x")
STATX_SIZE = 256


def unpack_statx(buf: Buffer, offset: int = 0) -> Statx:
    flat = STATX.unpack_from(buf, offset)
    return Statx._make(
        (
            *flat[0:11],
            tuple.__new__(SxTime, flat[11:13]),
            tuple.__new__(SxTime, flat[13:15]),
            tuple.__new__(SxTime, flat[15:17]),
            tuple.__new__(SxTime, flat[17:19]),
            *flat[19:23],
        )
    )


def pack_statx(value: Statx) -> bytes:
    return STATX.pack(
        *value[0:11],
        *value.atime,
        *value.btime,
        *value.ctime,
        *value.mtime,
        *value[15:],
    )


class StatxIn(NamedTuple):
    getattr_flags: int
    fh: int
    sx_flags: int
    sx_mask: int


STATX_IN = Struct("<I4xQ2I")
STATX_IN_SIZE = 24


def unpack_statx_in(buf: Buffer, offset: int = 0) -> StatxIn:
    return tuple.__new__(StatxIn, STATX_IN.unpack_from(buf, offset))


def pack_statx_in(value: StatxIn) -> bytes:
    return STATX_IN.pack(*value)


class StatxOut(NamedTuple):
    attr_valid: int
    attr_valid_nsec: int
    flags: int
    stat: Statx


STATX_OUT = Struct("<Q2I16x2IQ3IH2x4QqI4xqI4xqI4xqI4x4I112x")
STATX_OUT_SIZE = 288


def unpack_statx_out(buf: Buffer, offset: int = 0) -> StatxOut:
    flat = STATX_OUT.unpack_from(buf, offset)
    return StatxOut._make(
        (
            *flat[0:3],
            Statx._make(
                (
                    *flat[3:14],
                    tuple.__new__(SxTime, flat[14:16]),
                    tuple.__new__(SxTime, flat[16:18]),
                    tuple.__new__(SxTime, flat[18:20]),
                    tuple.__new__(SxTime, flat[20:22]),
                    *flat[22:26],
                )
            ),
        )
    )


def pack_statx_out(value: StatxOut) -> bytes:
    return STATX_OUT.pack(
        *value[0:3],
        *value.stat[0:11],
        *value.stat.atime,
        *value.stat.btime,
        *value.stat.ctime,
        *value.stat.mtime,
        *value.stat[15:],
    )


class Dirent(NamedTuple):
    ino: int
    off: int
    namelen: int
    type: int


DIRENT = Struct("<2Q2I")
DIRENT_SIZE = 24


def unpack_dirent(buf: Buffer, offset: int = 0) -> Dirent:
    return tuple.__new__(Dirent, DIRENT.unpack_from(buf, offset))


def pack_dirent(value: Dirent) -> bytes:
    return DIRENT.pack(*value)


class Direntplus(NamedTuple):
    entry_out: EntryOut
    dirent: Dirent


DIRENTPLUS = Struct("<4Q2I6Q10I2Q2I")
DIRENTPLUS_SIZE = 152


def unpack_direntplus(buf: Buffer, offset: int = 0) -> Direntplus:
    flat = DIRENTPLUS.unpack_from(buf, offset)
    return Direntplus._make(
        (
            EntryOut._make(
                (
                    *flat[0:6],
                    tuple.__new__(Attr, flat[6:22]),
                )
            ),
            tuple.__new__(Dirent, flat[22:26]),
        )
    )


def pack_direntplus(value: Direntplus) -> bytes:
    return DIRENTPLUS.pack(
        *value.entry_out[0:6],
        *value.entry_out.attr,
        *value.dirent,
    )


class NotifyRetrieveIn(NamedTuple):
    offset: int
    size: int


NOTIFY_RETRIEVE_IN = Struct("<8xQI20x")
NOTIFY_RETRIEVE_IN_SIZE = 40


def unpack_notify_retrieve_in(buf: Buffer, offset: int = 0) -> NotifyRetrieveIn:
    return tuple.__new__(NotifyRetrieveIn, NOTIFY_RETRIEVE_IN.unpack_from(buf, offset))


def pack_notify_retrieve_in(value: NotifyRetrieveIn) -> bytes:
    return NOTIFY_RETRIEVE_IN.pack(*value)


class BackingMap(NamedTuple):
    fd: int
    flags: int


BACKING_MAP = Struct("<iI8x")
BACKING_MAP_SIZE = 16


def unpack_backing_map(buf: Buffer, offset: int = 0) -> BackingMap:
    return tuple.__new__(BackingMap, BACKING_MAP.unpack_from(buf, offset))


def pack_backing_map(value: BackingMap) -> bytes:
    return BACKING_MAP.pack(*value)


class _Codec(NamedTuple):
    size: int
    unpack: Callable[[Buffer, int], tuple[Any, ...]]
    pack: Callable[[Any], bytes]


CODECS = {
    "InHeader": _Codec(IN_HEADER_SIZE, unpack_in_header, pack_in_header),
    "OutHeader": _Codec(OUT_HEADER_SIZE, unpack_out_header, pack_out_header),
    "Attr": _Codec(ATTR_SIZE, unpack_attr, pack_attr),
    "EntryOut": _Codec(ENTRY_OUT_SIZE, unpack_entry_out, pack_entry_out),
    "AttrOut": _Codec(ATTR_OUT_SIZE, unpack_attr_out, pack_attr_out),
    "ForgetIn": _Codec(FORGET_IN_SIZE, unpack_forget_in, pack_forget_in),
    "ForgetOne": _Codec(FORGET_ONE_SIZE, unpack_forget_one, pack_forget_one),
    "BatchForgetIn": _Codec(BATCH_FORGET_IN_SIZE, unpack_batch_forget_in, pack_batch_forget_in),
    "GetattrIn": _Codec(GETATTR_IN_SIZE, unpack_getattr_in, pack_getattr_in),
    "SetattrIn": _Codec(SETATTR_IN_SIZE, unpack_setattr_in, pack_setattr_in),
    "MknodIn": _Codec(MKNOD_IN_SIZE, unpack_mknod_in, pack_mknod_in),
    "MkdirIn": _Codec(MKDIR_IN_SIZE, unpack_mkdir_in, pack_mkdir_in),
    "RenameIn": _Codec(RENAME_IN_SIZE, unpack_rename_in, pack_rename_in),
    "Rename2In": _Codec(RENAME2_IN_SIZE, unpack_rename2_in, pack_rename2_in),
    "LinkIn": _Codec(LINK_IN_SIZE, unpack_link_in, pack_link_in),
    "OpenIn": _Codec(OPEN_IN_SIZE, unpack_open_in, pack_open_in),
    "OpenOut": _Codec(OPEN_OUT_SIZE, unpack_open_out, pack_open_out),
    "CreateIn": _Codec(CREATE_IN_SIZE, unpack_create_in, pack_create_in),
    "ReleaseIn": _Codec(RELEASE_IN_SIZE, unpack_release_in, pack_release_in),
    "FlushIn": _Codec(FLUSH_IN_SIZE, unpack_flush_in, pack_flush_in),
    "ReadIn": _Codec(READ_IN_SIZE, unpack_read_in, pack_read_in),
    "WriteIn": _Codec(WRITE_IN_SIZE, unpack_write_in, pack_write_in),
    "WriteOut": _Codec(WRITE_OUT_SIZE, unpack_write_out, pack_write_out),
    "Kstatfs": _Codec(KSTATFS_SIZE, unpack_kstatfs, pack_kstatfs),
    "StatfsOut": _Codec(STATFS_OUT_SIZE, unpack_statfs_out, pack_statfs_out),
    "FsyncIn": _Codec(FSYNC_IN_SIZE, unpack_fsync_in, pack_fsync_in),
    "SetxattrIn": _Codec(SETXATTR_IN_SIZE, unpack_setxattr_in, pack_setxattr_in),
    "GetxattrIn": _Codec(GETXATTR_IN_SIZE, unpack_getxattr_in, pack_getxattr_in),
    "GetxattrOut": _Codec(GETXATTR_OUT_SIZE, unpack_getxattr_out, pack_getxattr_out),
    "FileLock": _Codec(FILE_LOCK_SIZE, unpack_file_lock, pack_file_lock),
    "LkIn": _Codec(LK_IN_SIZE, unpack_lk_in, pack_lk_in),
    "LkOut": _Codec(LK_OUT_SIZE, unpack_lk_out, pack_lk_out),
    "AccessIn": _Codec(ACCESS_IN_SIZE, unpack_access_in, pack_access_in),
    "InitIn": _Codec(INIT_IN_SIZE, unpack_init_in, pack_init_in),
    "InitOut": _Codec(INIT_OUT_SIZE, unpack_init_out, pack_init_out),
    "InterruptIn": _Codec(INTERRUPT_IN_SIZE, unpack_interrupt_in, pack_interrupt_in),
    "BmapIn": _Codec(BMAP_IN_SIZE, unpack_bmap_in, pack_bmap_in),
    "BmapOut": _Codec(BMAP_OUT_SIZE, unpack_bmap_out, pack_bmap_out),
    "IoctlIn": _Codec(IOCTL_IN_SIZE, unpack_ioctl_in, pack_ioctl_in),
    "IoctlOut": _Codec(IOCTL_OUT_SIZE, unpack_ioctl_out, pack_ioctl_out),
    "PollIn": _Codec(POLL_IN_SIZE, unpack_poll_in, pack_poll_in),
    "PollOut": _Codec(POLL_OUT_SIZE, unpack_poll_out, pack_poll_out),
    "FallocateIn": _Codec(FALLOCATE_IN_SIZE, unpack_fallocate_in, pack_fallocate_in),
    "LseekIn": _Codec(LSEEK_IN_SIZE, unpack_lseek_in, pack_lseek_in),
    "LseekOut": _Codec(LSEEK_OUT_SIZE, unpack_lseek_out, pack_lseek_out),
    "CopyFileRangeIn": _Codec(
        COPY_FILE_RANGE_IN_SIZE,
        unpack_copy_file_range_in,
        pack_copy_file_range_in,
    ),
    "CopyFileRangeOut": _Codec(
        COPY_FILE_RANGE_OUT_SIZE,
        unpack_copy_file_range_out,
        pack_copy_file_range_out,
    ),
    "SetupmappingIn": _Codec(SETUPMAPPING_IN_SIZE, unpack_setupmapping_in, pack_setupmapping_in),
    "RemovemappingIn": _Codec(
        REMOVEMAPPING_IN_SIZE,
        unpack_removemapping_in,
        pack_removemapping_in,
    ),
    "RemovemappingOne": _Codec(
        REMOVEMAPPING_ONE_SIZE,
        unpack_removemapping_one,
        pack_removemapping_one,
    ),
    "SyncfsIn": _Codec(SYNCFS_IN_SIZE, unpack_syncfs_in, pack_syncfs_in),
    "SxTime": _Codec(SX_TIME_SIZE, unpack_sx_time, pack_sx_time),
    "Statx": _Codec(STATX_SIZE, unpack_statx, pack_statx),
    "StatxIn": _Codec(STATX_IN_SIZE, unpack_statx_in, pack_statx_in),
    "StatxOut": _Codec(STATX_OUT_SIZE, unpack_statx_out, pack_statx_out),
    "Dirent": _Codec(DIRENT_SIZE, unpack_dirent, pack_dirent),
    "Direntplus": _Codec(DIRENTPLUS_SIZE, unpack_direntplus, pack_direntplus),
    "NotifyRetrieveIn": _Codec(
        NOTIFY_RETRIEVE_IN_SIZE,
        unpack_notify_retrieve_in,
        pack_notify_retrieve_in,
    ),
    "BackingMap": _Codec(BACKING_MAP_SIZE, unpack_backing_map, pack_backing_map),
}
