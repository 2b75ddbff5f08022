"""The interface of a file system: one method for each opcode that a read-only one supports.

The dispatcher answers all other opcodes itself (`opcodes.OPS`). Lookups are not counted: a nodeid
always stands for the same object, so there is nothing to do on FORGET, and there is no method for
it.
"""

from errno import ENOSYS
from typing import Any, NamedTuple, NoReturn

from appliance.fuse_proto._fuse_wire import Opcode


class Request(NamedTuple):
    """One decoded request; everything in it comes from the guest.

    `uid`, `gid` and `pid` are only for logs, because the guest's kernel has checked permissions.
    `args` is the structure of arguments, or None if the opcode has none. `names` have no NUL.
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
    """The body of a READ that is answered from a plain file: `size` bytes of `fd` from `offset`.

    The transport reads the file directly into the reply. The file system owns `fd` and keeps it
    open until the reply is delivered. The slice must lie within the file, because the guest would
    take a short reply for the end of the file.
    """

    fd: int
    offset: int
    size: int


Body = bytes | memoryview | FileSlice


class NotReady(Exception):  # noqa: N818 - not an error: the request is run again
    """An operation needs something that another process has to fetch.

    The transport keeps the request, asks for `want`, and runs the request again from its start once
    that has been fetched. Until then the request has not been answered.
    """

    def __init__(self, want: object) -> None:
        super().__init__(want)
        self.want = want


def _unsupported(request: Request) -> NoReturn:
    raise OSError(ENOSYS, Opcode(request.opcode).name)


class Operations:
    """The operations of one file system; those that are not overridden answer ENOSYS.

    Each takes a `Request` and returns the body of a successful reply, or raises `OSError` with the
    errno to answer, or `NotReady`. The bytes of a returned memoryview must not change until the
    reply is delivered. After ENOSYS for OPEN, OPENDIR, GETXATTR, LISTXATTR, ACCESS, LSEEK or STATX,
    Linux does not send that opcode again until the next mount. For others, ENOSYS is an ordinary
    error.
    """

    def lookup(self, request: Request) -> Body:
        """Return the packed `EntryOut` of `names[0]` in directory `nodeid`.

        The name has 1 to 255 bytes without a slash, except for "/". "." is the node itself,
        whatever its kind, and ".." is the directory that contains it. A missing name is a success
        with nodeid 0, which Linux caches for `entry_valid` (`encode.negative_entry`), or ENOENT,
        which Linux does not cache.
        """
        _unsupported(request)

    def getattr(self, request: Request) -> Body:
        """Return the packed `AttrOut` of `nodeid`. Args: `GetattrIn`."""
        _unsupported(request)

    def readlink(self, request: Request) -> Body:
        """Return the target of symlink `nodeid`: 1 to 4095 bytes without NUL."""
        _unsupported(request)

    def open(self, request: Request) -> Body:
        """Return a packed `OpenOut`. Args: `OpenIn`.

        After ENOSYS, Linux lets opens succeed with fh 0 without sending OPEN.
        """
        _unsupported(request)

    def read(self, request: Request) -> Body:
        """Return the bytes of file `nodeid` from `args.offset`. Args: `ReadIn`.

        The body has exactly `args.size` bytes, or fewer if the file ends before, or none at or
        behind its end. The guest fills a short reply with zeros, or truncates the file there, so
        content that cannot be read must be EIO.
        """
        _unsupported(request)

    def release(self, request: Request) -> Body:
        """Return an empty body: an open file is closed. Args: `ReleaseIn`.

        There is one RELEASE for each OPEN that was answered, unless the mount ends before. No
        program sees an error of it.
        """
        _unsupported(request)

    def statfs(self, request: Request) -> Body:
        """Return a packed `StatfsOut`. With ENOSYS, `df` would fail."""
        _unsupported(request)

    def getxattr(self, request: Request) -> Body:
        """Return the value of attribute `names[0]` of `nodeid`. Args: `GetxattrIn`.

        If `args.size` is 0, the body is a packed `GetxattrOut` with the size of the value. A value
        longer than `args.size` is ERANGE, a missing attribute is ENODATA.
        """
        _unsupported(request)

    def listxattr(self, request: Request) -> Body:
        """Return the attribute names of `nodeid`, each followed by NUL.

        Args: `GetxattrIn`; its `size` has the same meaning as for `getxattr`.
        """
        _unsupported(request)

    def opendir(self, request: Request) -> Body:
        """Return a packed `OpenOut`. Args: `OpenIn`.

        After ENOSYS, Linux lets opens succeed without sending OPENDIR, and caches listings.
        """
        _unsupported(request)

    def readdir(self, request: Request) -> Body:
        """Return `encode.pack_dirent` records of directory `nodeid`. Args: `ReadIn`.

        The body has only whole records, at most `args.size` bytes of them, and none at the end of
        the directory. They begin after the record whose `off` is `args.offset`; with 0, at the
        start. "." and ".." have records, too.
        """
        _unsupported(request)

    def readdirplus(self, request: Request) -> Body:
        """Return `encode.pack_direntplus` records; otherwise like `readdir`.

        Records of "." and ".." have nodeid 0. Once DO_READDIRPLUS is agreed on, Linux cannot do
        without this operation.
        """
        _unsupported(request)

    def access(self, request: Request) -> Body:
        """Return an empty body if `args.mask` is allowed on `nodeid`. Args: `AccessIn`."""
        _unsupported(request)

    def lseek(self, request: Request) -> Body:
        """Return a packed `LseekOut`. Args: `LseekIn`.

        After ENOSYS, Linux takes files to have no holes.
        """
        _unsupported(request)

    def statx(self, request: Request) -> Body:
        """Return a packed `StatxOut`. Args: `StatxIn`.

        After ENOSYS, Linux sends GETATTR instead.
        """
        _unsupported(request)
