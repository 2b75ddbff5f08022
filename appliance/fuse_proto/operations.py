"""What a file system implements to be served: one method per opcode a read-only file system has.

The dispatcher answers every other opcode by itself (`opcodes.OPS`). Nothing here counts lookups: a
nodeid stands for the same object for ever, so FORGET asks for no work and never arrives.
"""

from errno import ENOSYS
from typing import Any, NamedTuple, NoReturn

from appliance.fuse_proto._fuse_wire import Opcode


class Request(NamedTuple):
    """One decoded request; everything in it comes from the guest.

    `uid`, `gid` and `pid` are for logs: the guest's kernel has checked permissions. `args` is the
    opcode's argument structure, or None if it has none; `names` are NUL-free, without their NUL.
    """

    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    args: Any
    names: tuple[bytes, ...]


class FileSlice(NamedTuple):
    """A READ answered from a plain file: `size` bytes of `fd` from `offset`.

    The front end reads the file straight into the reply; `fd` stays the file system's, which keeps
    it open until the reply has left. The slice must lie within the file: a short reply in the
    middle of a file would be taken for its end.
    """

    fd: int
    offset: int
    size: int


Body = bytes | memoryview | FileSlice


class NotReady(Exception):  # noqa: N818 - a turn in the road, not an error: the request runs again
    """An operation lacks something another process can fetch.

    The front end parks the request, asks for `want`, and runs the request again, from the start,
    once it has come. Until then the request counts as not answered.
    """

    def __init__(self, want: object) -> None:
        super().__init__(want)
        self.want = want


def _unsupported(request: Request) -> NoReturn:
    raise OSError(ENOSYS, Opcode(request.opcode).name)


class Operations:
    """The operations of one file system, all ENOSYS until overridden.

    Each takes a `Request` and returns the body of a successful reply, or raises `OSError` with the
    errno to answer, or `NotReady`. A memoryview that is returned must hold still until the reply
    has left. Linux takes ENOSYS for «never ask again» (until the next mount) from OPEN, OPENDIR,
    GETXATTR, LISTXATTR, ACCESS, LSEEK and STATX; to the others it is an error like any.
    """

    def lookup(self, request: Request) -> Body:
        """Return the packed `EntryOut` of `names[0]` in directory `nodeid`.

        The name is 1 to 255 bytes without a slash. "." is the node itself, of whatever kind, and
        ".." the directory that it is in. A name that does not exist is a success, with nodeid 0 and
        the time it may be remembered in `entry_valid` (`encode.negative_entry`); ENOENT says the
        same and is not remembered.
        """
        _unsupported(request)

    def getattr(self, request: Request) -> Body:
        """Return the packed `AttrOut` of `nodeid`. Args: `GetattrIn`."""
        _unsupported(request)

    def readlink(self, request: Request) -> Body:
        """Return the target of symlink `nodeid`, 1 to 4095 bytes, without a NUL."""
        _unsupported(request)

    def open(self, request: Request) -> Body:
        """Return a packed `OpenOut`. Args: `OpenIn`. ENOSYS: opens succeed with fh 0, unasked."""
        _unsupported(request)

    def read(self, request: Request) -> Body:
        """Return the bytes of file `nodeid` from `args.offset`. Args: `ReadIn`.

        Exactly `args.size` bytes, fewer only where the file ends and none behind its end: the guest
        fills a short reply with zeros, or cuts the file there. What cannot be read is EIO.
        """
        _unsupported(request)

    def release(self, request: Request) -> Body:
        """Return an empty body: an open has ended. Args: `ReleaseIn`. Nobody sees an error.

        One comes for every open that was answered, unless the mount ends before.
        """
        _unsupported(request)

    def statfs(self, request: Request) -> Body:
        """Return a packed `StatfsOut`. ENOSYS would reach `df`, so do answer."""
        _unsupported(request)

    def getxattr(self, request: Request) -> Body:
        """Return the value of attribute `names[0]` of `nodeid`. Args: `GetxattrIn`.

        With `args.size` 0 the body is a packed `GetxattrOut` with the value's size; a value longer
        than `args.size` is ERANGE, no such attribute ENODATA.
        """
        _unsupported(request)

    def listxattr(self, request: Request) -> Body:
        """Return the attribute names of `nodeid`, each followed by a NUL; sizes as in getxattr."""
        _unsupported(request)

    def opendir(self, request: Request) -> Body:
        """Return a packed `OpenOut`. Args: `OpenIn`. ENOSYS: as for open, and listings cached."""
        _unsupported(request)

    def readdir(self, request: Request) -> Body:
        """Return `encode.pack_dirent` records of directory `nodeid`. Args: `ReadIn`.

        Whole records only, at most `args.size` bytes, starting behind the record whose `off` was
        `args.offset` (0: at the start); none at the end. "." and ".." are records too.
        """
        _unsupported(request)

    def readdirplus(self, request: Request) -> Body:
        """Return `encode.pack_direntplus` records; all else as in readdir.

        Records of "." and ".." carry nodeid 0. Linux has no way to do without this operation once
        DO_READDIRPLUS was agreed.
        """
        _unsupported(request)

    def access(self, request: Request) -> Body:
        """Return an empty body if `args.mask` is allowed on `nodeid`. Args: `AccessIn`."""
        _unsupported(request)

    def lseek(self, request: Request) -> Body:
        """Return a packed `LseekOut`. Args: `LseekIn`. ENOSYS: files have no holes."""
        _unsupported(request)

    def statx(self, request: Request) -> Body:
        """Return a packed `StatxOut`. Args: `StatxIn`. ENOSYS: Linux sends GETATTR instead."""
        _unsupported(request)
