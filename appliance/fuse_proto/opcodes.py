"""One row per FUSE opcode: what a request carries, and what a read-only file system answers.

The enum in `_fuse_wire.py`, the decoder, the dispatcher and the log lines all come from these rows.
"""

from enum import Enum
from errno import EIO, ENOSYS, ENOTTY, EROFS
from typing import Final, NamedTuple

# Reply kind of an opcode whose successful reply is bytes and no structure.
DATA: Final = "data"


class Answer(Enum):
    """Who answers an opcode, where that is not one fixed errno."""

    OPERATIONS = "a method of Operations"
    SESSION = "the dispatcher itself"
    NOTHING = "nobody: there is no reply"


class Op(NamedTuple):
    """One opcode.

    `answer` is an `Answer`, or the positive errno every such request is answered with (0: success
    and no body), for which its body is not looked at. `args` and `reply` name structures of
    `_fuse_wire`, in order and separated by spaces; `DATA` stands for bare bytes.
    `compat` is the shortest argument structure accepted, 0 for a whole one: fields not sent read
    as zero. Where names follow, such a structure is never longer than that.
    """

    number: int
    name: str
    answer: Answer | int
    args: str = ""
    names: int = 0
    reply: str = ""
    compat: int = 0
    is_early: bool = False
    min_minor: int = 0


OPS: Final = (
    Op(1, "LOOKUP", Answer.OPERATIONS, names=1, reply="EntryOut"),
    Op(2, "FORGET", Answer.NOTHING, "ForgetIn", is_early=True),
    Op(3, "GETATTR", Answer.OPERATIONS, "GetattrIn", reply="AttrOut"),
    Op(4, "SETATTR", EROFS, "SetattrIn", reply="AttrOut"),
    Op(5, "READLINK", Answer.OPERATIONS, reply=DATA),
    Op(6, "SYMLINK", EROFS, names=2, reply="EntryOut"),
    Op(8, "MKNOD", EROFS, "MknodIn", names=1, reply="EntryOut"),
    Op(9, "MKDIR", EROFS, "MkdirIn", names=1, reply="EntryOut"),
    Op(10, "UNLINK", EROFS, names=1),
    Op(11, "RMDIR", EROFS, names=1),
    Op(12, "RENAME", EROFS, "RenameIn", names=2),
    Op(13, "LINK", EROFS, "LinkIn", names=1, reply="EntryOut"),
    Op(14, "OPEN", Answer.OPERATIONS, "OpenIn", reply="OpenOut"),
    Op(15, "READ", Answer.OPERATIONS, "ReadIn", reply=DATA),
    Op(16, "WRITE", EROFS, "WriteIn", reply="WriteOut"),
    Op(17, "STATFS", Answer.OPERATIONS, reply="StatfsOut"),
    Op(18, "RELEASE", Answer.OPERATIONS, "ReleaseIn"),
    Op(20, "FSYNC", ENOSYS, "FsyncIn"),
    # Never the 16-byte structure: SETXATTR_EXT is not negotiated.
    Op(21, "SETXATTR", EROFS, "SetxattrIn", names=1, compat=8),
    Op(22, "GETXATTR", Answer.OPERATIONS, "GetxattrIn", names=1, reply=DATA),
    Op(23, "LISTXATTR", Answer.OPERATIONS, "GetxattrIn", reply=DATA),
    Op(24, "REMOVEXATTR", EROFS, names=1),
    Op(25, "FLUSH", ENOSYS, "FlushIn"),
    # linux/fuse.h before 7.36 ends the structure at `flags`.
    Op(26, "INIT", Answer.SESSION, "InitIn", reply="InitOut", compat=16, is_early=True),
    Op(27, "OPENDIR", Answer.OPERATIONS, "OpenIn", reply="OpenOut"),
    Op(28, "READDIR", Answer.OPERATIONS, "ReadIn", reply=DATA),
    Op(29, "RELEASEDIR", 0, "ReleaseIn"),
    Op(30, "FSYNCDIR", ENOSYS, "FsyncIn"),
    Op(31, "GETLK", ENOSYS, "LkIn", reply="LkOut"),
    Op(32, "SETLK", ENOSYS, "LkIn"),
    Op(33, "SETLKW", ENOSYS, "LkIn"),
    Op(34, "ACCESS", Answer.OPERATIONS, "AccessIn"),
    Op(35, "CREATE", EROFS, "CreateIn", names=1, reply="EntryOut OpenOut"),
    Op(36, "INTERRUPT", Answer.NOTHING, "InterruptIn", is_early=True),
    Op(37, "BMAP", ENOSYS, "BmapIn", reply="BmapOut"),
    Op(38, "DESTROY", Answer.SESSION, is_early=True),
    Op(39, "IOCTL", ENOTTY, "IoctlIn", reply="IoctlOut"),
    Op(40, "POLL", ENOSYS, "PollIn", reply="PollOut"),
    Op(41, "NOTIFY_REPLY", Answer.NOTHING, "NotifyRetrieveIn", is_early=True),
    Op(42, "BATCH_FORGET", Answer.NOTHING, "BatchForgetIn", is_early=True),
    Op(43, "FALLOCATE", EROFS, "FallocateIn"),
    Op(44, "READDIRPLUS", Answer.OPERATIONS, "ReadIn", reply=DATA),
    Op(45, "RENAME2", EROFS, "Rename2In", names=2),
    Op(46, "LSEEK", Answer.OPERATIONS, "LseekIn", reply="LseekOut"),
    Op(47, "COPY_FILE_RANGE", EROFS, "CopyFileRangeIn", reply="WriteOut"),
    Op(48, "SETUPMAPPING", ENOSYS, "SetupmappingIn", min_minor=31),
    Op(49, "REMOVEMAPPING", ENOSYS, "RemovemappingIn", min_minor=31),
    Op(50, "SYNCFS", ENOSYS, "SyncfsIn", min_minor=34),
    Op(51, "TMPFILE", EROFS, "CreateIn", names=1, reply="EntryOut OpenOut", min_minor=37),
    Op(52, "STATX", Answer.OPERATIONS, "StatxIn", reply="StatxOut", min_minor=39),
    Op(53, "COPY_FILE_RANGE_64", EROFS, "CopyFileRangeIn", reply="CopyFileRangeOut", min_minor=45),
    # INIT of a guest of the other byte order.
    Op(436207616, "INIT_BSWAP_RESERVED", EIO, is_early=True, min_minor=33),
)
