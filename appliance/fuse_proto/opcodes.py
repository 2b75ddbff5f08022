"""The table of FUSE opcodes: what a request has, and what a read-only file system answers.

The enum in `_fuse_wire.py`, the decoder, the dispatcher and the log lines are made from its rows.
"""

from enum import Enum
from errno import EIO, ENOSYS, ENOTTY, EROFS
from typing import Final, NamedTuple

# `Op.reply` of an opcode whose successful reply is bytes without a structure.
DATA: Final = "data"


class Answer(Enum):
    """What answers an opcode that has no fixed answer."""

    OPERATIONS = "a method of Operations"
    SESSION = "the dispatcher itself"
    NOTHING = "there is no reply"


class Op(NamedTuple):
    """One opcode.

    Attributes:
        number: the opcode.
        name: as in linux/fuse.h, without FUSE_.
        answer: an `Answer`, or a positive errno for every request, or 0 for success without a body.
            With an errno or 0, the body of the request is not looked at.
        args: name of the structure of arguments in `_fuse_wire`, or empty.
        names: number of names after the arguments, each ending with NUL.
        reply: names of the structures of a successful reply, separated by spaces, or `DATA`.
        compat: minimum size of the arguments in bytes, or 0 if they must be whole. Missing fields
            read as zero. If names follow, the arguments always have this size.
        is_early: whether the request needs no INIT before it.
        min_minor: first minor version of the protocol that has the opcode, or 0.
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
    # The structure never has 16 bytes, because SETXATTR_EXT is not negotiated.
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
    # INIT of a guest with the other byte order.
    Op(436207616, "INIT_BSWAP_RESERVED", EIO, is_early=True, min_minor=33),
)
