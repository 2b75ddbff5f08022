"""The structures and numbers of the FUSE wire format, as in linux/fuse.h 7.45.

`tools.wiregen` makes `_fuse_wire.py` from the rows, and assertions against the installed header.
Fields that the kernel calls padding, dummy, unused or spare are padding here, too.
"""

from typing import Final

from appliance.fuse_proto.opcodes import OPS
from tools.wiregen import Enum, Flags, Struct

OUTPUT: Final = "appliance/fuse_proto/_fuse_wire.py"
C_HEADER: Final = "linux/fuse.h"

STRUCTS: Final = (
    Struct(
        "InHeader",
        "fuse_in_header",
        "len:I opcode:I unique:Q nodeid:Q uid:I gid:I pid:I total_extlen:H 2x",
        newer={"total_extlen": 38},
    ),
    Struct("OutHeader", "fuse_out_header", "len:I error:i unique:Q"),
    Struct(
        "Attr",
        "fuse_attr",
        "ino:Q size:Q blocks:Q atime:Q mtime:Q ctime:Q atimensec:I mtimensec:I ctimensec:I"
        " mode:I nlink:I uid:I gid:I rdev:I blksize:I flags:I",
        newer={"flags": 32},
    ),
    Struct(
        "EntryOut",
        "fuse_entry_out",
        "nodeid:Q generation:Q entry_valid:Q attr_valid:Q entry_valid_nsec:I attr_valid_nsec:I"
        " attr:Attr",
    ),
    Struct("AttrOut", "fuse_attr_out", "attr_valid:Q attr_valid_nsec:I 4x attr:Attr"),
    Struct("ForgetIn", "fuse_forget_in", "nlookup:Q"),
    Struct("ForgetOne", "fuse_forget_one", "nodeid:Q nlookup:Q"),
    Struct("BatchForgetIn", "fuse_batch_forget_in", "count_:I 4x"),
    Struct("GetattrIn", "fuse_getattr_in", "getattr_flags:I 4x fh:Q"),
    Struct(
        "SetattrIn",
        "fuse_setattr_in",
        "valid:I 4x fh:Q size:Q lock_owner:Q atime:Q mtime:Q ctime:Q"
        " atimensec:I mtimensec:I ctimensec:I mode:I 4x uid:I gid:I 4x",
    ),
    Struct("MknodIn", "fuse_mknod_in", "mode:I rdev:I umask:I 4x"),
    Struct("MkdirIn", "fuse_mkdir_in", "mode:I umask:I"),
    Struct("RenameIn", "fuse_rename_in", "newdir:Q"),
    Struct("Rename2In", "fuse_rename2_in", "newdir:Q flags:I 4x"),
    Struct("LinkIn", "fuse_link_in", "oldnodeid:Q"),
    Struct("OpenIn", "fuse_open_in", "flags:I open_flags:I", newer={"open_flags": 33}),
    Struct("OpenOut", "fuse_open_out", "fh:Q open_flags:I backing_id:i", newer={"backing_id": 40}),
    Struct(
        "CreateIn",
        "fuse_create_in",
        "flags:I mode:I umask:I open_flags:I",
        newer={"open_flags": 33},
    ),
    Struct("ReleaseIn", "fuse_release_in", "fh:Q flags:I release_flags:I lock_owner:Q"),
    Struct("FlushIn", "fuse_flush_in", "fh:Q 8x lock_owner:Q"),
    Struct("ReadIn", "fuse_read_in", "fh:Q offset:Q size:I read_flags:I lock_owner:Q flags:I 4x"),
    Struct(
        "WriteIn", "fuse_write_in", "fh:Q offset:Q size:I write_flags:I lock_owner:Q flags:I 4x"
    ),
    Struct("WriteOut", "fuse_write_out", "size:I 4x"),
    Struct(
        "Kstatfs",
        "fuse_kstatfs",
        "blocks:Q bfree:Q bavail:Q files:Q ffree:Q bsize:I namelen:I frsize:I 28x",
    ),
    Struct("StatfsOut", "fuse_statfs_out", "st:Kstatfs"),
    Struct("FsyncIn", "fuse_fsync_in", "fh:Q fsync_flags:I 4x"),
    Struct(
        "SetxattrIn",
        "fuse_setxattr_in",
        "size:I flags:I setxattr_flags:I 4x",
        min_minor=33,
    ),
    Struct("GetxattrIn", "fuse_getxattr_in", "size:I 4x"),
    Struct("GetxattrOut", "fuse_getxattr_out", "size:I 4x"),
    Struct("FileLock", "fuse_file_lock", "start:Q end:Q type:I pid:I"),
    Struct("LkIn", "fuse_lk_in", "fh:Q owner:Q lk:FileLock lk_flags:I 4x"),
    Struct("LkOut", "fuse_lk_out", "lk:FileLock"),
    Struct("AccessIn", "fuse_access_in", "mask:I 4x"),
    Struct(
        "InitIn",
        "fuse_init_in",
        "major:I minor:I max_readahead:I flags:I flags2:I 44x",
        min_minor=36,
    ),
    Struct(
        "InitOut",
        "fuse_init_out",
        "major:I minor:I max_readahead:I flags:I max_background:H congestion_threshold:H"
        " max_write:I time_gran:I max_pages:H map_alignment:H flags2:I max_stack_depth:I"
        " request_timeout:H 22x",
        min_minor=36,
        newer={"max_stack_depth": 40, "request_timeout": 43},
    ),
    Struct("InterruptIn", "fuse_interrupt_in", "unique:Q"),
    Struct("BmapIn", "fuse_bmap_in", "block:Q blocksize:I 4x"),
    Struct("BmapOut", "fuse_bmap_out", "block:Q"),
    Struct("IoctlIn", "fuse_ioctl_in", "fh:Q flags:I cmd:I arg:Q in_size:I out_size:I"),
    Struct("IoctlOut", "fuse_ioctl_out", "result:i flags:I in_iovs:I out_iovs:I"),
    Struct("PollIn", "fuse_poll_in", "fh:Q kh:Q flags:I events:I"),
    Struct("PollOut", "fuse_poll_out", "revents:I 4x"),
    Struct("FallocateIn", "fuse_fallocate_in", "fh:Q offset:Q length:Q mode:I 4x"),
    Struct("LseekIn", "fuse_lseek_in", "fh:Q offset:Q whence:I 4x"),
    Struct("LseekOut", "fuse_lseek_out", "offset:Q"),
    Struct(
        "CopyFileRangeIn",
        "fuse_copy_file_range_in",
        "fh_in:Q off_in:Q nodeid_out:Q fh_out:Q off_out:Q len:Q flags:Q",
    ),
    Struct("CopyFileRangeOut", "fuse_copy_file_range_out", "bytes_copied:Q", min_minor=45),
    Struct(
        "SetupmappingIn",
        "fuse_setupmapping_in",
        "fh:Q foffset:Q len:Q flags:Q moffset:Q",
        min_minor=31,
    ),
    # Entries follow without padding, at offsets that are not multiples of their alignment.
    Struct("RemovemappingIn", "fuse_removemapping_in", "count_:I", min_minor=31),
    Struct("RemovemappingOne", "fuse_removemapping_one", "moffset:Q len:Q", min_minor=31),
    Struct("SyncfsIn", "fuse_syncfs_in", "padding:Q", min_minor=34),
    Struct("SxTime", "fuse_sx_time", "tv_sec:q tv_nsec:I 4x", min_minor=39),
    Struct(
        "Statx",
        "fuse_statx",
        "mask:I blksize:I attributes:Q nlink:I uid:I gid:I mode:H 2x ino:Q size:Q blocks:Q"
        " attributes_mask:Q atime:SxTime btime:SxTime ctime:SxTime mtime:SxTime"
        " rdev_major:I rdev_minor:I dev_major:I dev_minor:I 112x",
        min_minor=39,
    ),
    Struct(
        "StatxIn",
        "fuse_statx_in",
        "getattr_flags:I 4x fh:Q sx_flags:I sx_mask:I",
        min_minor=39,
    ),
    Struct(
        "StatxOut",
        "fuse_statx_out",
        "attr_valid:Q attr_valid_nsec:I flags:I 16x stat:Statx",
        min_minor=39,
    ),
    # The name follows without NUL, then zeros up to a multiple of 8 bytes.
    Struct("Dirent", "fuse_dirent", "ino:Q off:Q namelen:I type:I"),
    Struct("Direntplus", "fuse_direntplus", "entry_out:EntryOut dirent:Dirent"),
    Struct("NotifyRetrieveIn", "fuse_notify_retrieve_in", "8x offset:Q size:I 20x"),
    Struct("BackingMap", "fuse_backing_map", "fd:i flags:I 8x", min_minor=40),
)

# Bit 31 stays reserved, so that `flags` can be a signed integer.
_INIT_FLAG_BITS: Final = {
    "ASYNC_READ": 0,
    "POSIX_LOCKS": 1,
    "FILE_OPS": 2,
    "ATOMIC_O_TRUNC": 3,
    "EXPORT_SUPPORT": 4,
    "BIG_WRITES": 5,
    "DONT_MASK": 6,
    "SPLICE_WRITE": 7,
    "SPLICE_MOVE": 8,
    "SPLICE_READ": 9,
    "FLOCK_LOCKS": 10,
    "HAS_IOCTL_DIR": 11,
    "AUTO_INVAL_DATA": 12,
    "DO_READDIRPLUS": 13,
    "READDIRPLUS_AUTO": 14,
    "ASYNC_DIO": 15,
    "WRITEBACK_CACHE": 16,
    "NO_OPEN_SUPPORT": 17,
    "PARALLEL_DIROPS": 18,
    "HANDLE_KILLPRIV": 19,
    "POSIX_ACL": 20,
    "ABORT_ERROR": 21,
    "MAX_PAGES": 22,
    "CACHE_SYMLINKS": 23,
    "NO_OPENDIR_SUPPORT": 24,
    "EXPLICIT_INVAL_DATA": 25,
    "MAP_ALIGNMENT": 26,
    "SUBMOUNTS": 27,
    "HANDLE_KILLPRIV_V2": 28,
    "SETXATTR_EXT": 29,
    "INIT_EXT": 30,
    "SECURITY_CTX": 32,
    "HAS_INODE_DAX": 33,
    "CREATE_SUPP_GROUP": 34,
    "HAS_EXPIRE_ONLY": 35,
    "DIRECT_IO_ALLOW_MMAP": 36,
    "PASSTHROUGH": 37,
    "NO_EXPORT_SUPPORT": 38,
    "HAS_RESEND": 39,
    "ALLOW_IDMAP": 40,
    "OVER_IO_URING": 41,
    "REQUEST_TIMEOUT": 42,
}

ENUMS: Final = (
    Enum(
        "Opcode",
        {op.name: op.number for op in OPS},
        c_prefix="FUSE_",
        newer={op.name: op.min_minor for op in OPS if op.min_minor},
    ),
    Flags(
        "InitFlag",
        {name: 1 << bit for name, bit in _INIT_FLAG_BITS.items()},
        c_prefix="FUSE_",
        newer={
            "MAP_ALIGNMENT": 31,
            "SUBMOUNTS": 32,
            "HANDLE_KILLPRIV_V2": 33,
            "SETXATTR_EXT": 33,
            "INIT_EXT": 36,
            "SECURITY_CTX": 36,
            "HAS_INODE_DAX": 36,
            # These two came with 7.38, but some 7.38 headers have only one of them.
            "CREATE_SUPP_GROUP": 39,
            "HAS_EXPIRE_ONLY": 39,
            "DIRECT_IO_ALLOW_MMAP": 39,
            "PASSTHROUGH": 40,
            "NO_EXPORT_SUPPORT": 40,
            "HAS_RESEND": 40,
            "ALLOW_IDMAP": 41,
            "OVER_IO_URING": 42,
            "REQUEST_TIMEOUT": 43,
        },
    ),
    Flags(
        "OpenFlag",
        {
            "DIRECT_IO": 1 << 0,
            "KEEP_CACHE": 1 << 1,
            "NONSEEKABLE": 1 << 2,
            "CACHE_DIR": 1 << 3,
            "STREAM": 1 << 4,
            "NOFLUSH": 1 << 5,
            "PARALLEL_DIRECT_WRITES": 1 << 6,
            "PASSTHROUGH": 1 << 7,
        },
        c_prefix="FOPEN_",
        newer={"NOFLUSH": 35, "PARALLEL_DIRECT_WRITES": 38, "PASSTHROUGH": 40},
    ),
    Enum("NotifyCode", {"RESEND": 7}, c_prefix="FUSE_NOTIFY_", newer={"RESEND": 40}),
    Flags("GetattrFlag", {"FH": 1}, c_prefix="FUSE_GETATTR_"),
    Flags("AttrFlag", {"SUBMOUNT": 1, "DAX": 2}, c_prefix="FUSE_ATTR_", newer={"DAX": 36}),
)
