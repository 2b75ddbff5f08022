"""The handler of a mount where the kernel reads large files itself, from backing files."""

import os
from collections.abc import Callable
from errno import EINVAL, ENXIO
from typing import Final

from appliance.fs.files import ALL_LOCAL, ByteRange, OpenBlob, RemoteParts
from appliance.fs.handler import Handler
from appliance.fuse_proto._fuse_wire import (
    IN_HEADER_SIZE,
    LseekOut,
    Opcode,
    OpenFlag,
    OpenOut,
    pack_lseek_out,
    pack_open_out,
    unpack_in_header,
)
from appliance.fuse_proto.operations import Body, NotReady, Request
from appliance.images.layout import Kind
from appliance.session.first_reads import FirstReads
from appliance.session.grants import Grants
from appliance.session.wants import BackingWanted
from appliance.store.schema import INLINE_MAX
from appliance.store.store_reader import ReadableStore

_CACHED: Final = pack_open_out(OpenOut(fh=0, open_flags=OpenFlag.KEEP_CACHE, backing_id=0))

_FILES: Final = frozenset({Kind.FILE, Kind.EXECUTABLE})

_RESENT_BIT: Final = 63  # in `unique` (linux/fuse.h: FUSE_UNIQUE_RESEND)


class PassthroughHandler(Handler):
    """A handler that implements OPEN, with which the kernel can be given a backing file.

    All concurrent opens of an inode must have the same backing file (linux fs/fuse/iomode.c:
    fuse_inode_uncached_io_start), whichever worker answers them. So the supervisor hands out the
    backing ids and counts the opens of each. The handle of such an open is the nodeid: any worker
    that gets the RELEASE can tell which file it is for.

    Args:
        grants: see `Handler`.
        store: see `Handler`.
        is_root_listable: see `Handler`.
        released: called with the nodeid when an open with a backing id has ended.
        remote: see `Handler`.
        makes_images: see `Handler`.
    """

    def __init__(
        self,
        grants: Grants,
        store: ReadableStore,
        *,
        is_root_listable: bool,
        released: Callable[[int], None],
        remote: RemoteParts = ALL_LOCAL,
        makes_images: bool = False,
        first_reads: FirstReads | None = None,
    ) -> None:
        super().__init__(
            grants,
            store,
            is_root_listable=is_root_listable,
            remote=remote,
            makes_images=makes_images,
            first_reads=first_reads,
        )
        self._released = released
        self._granted: dict[int, int] = {}

    def grant(self, want: BackingWanted, backing_id: int) -> None:
        """Set the backing id for the open that `want` stands for; 0 makes the kernel send READ."""
        self._granted[want.unique] = backing_id

    def open(self, request: Request) -> Body:
        """See `Operations.open`; a backing id is wanted only for blobs that are kept in files."""
        nodeid = request.nodeid
        node = self._node(nodeid)
        if node.size <= INLINE_MAX:
            return _CACHED
        backing_id = self._granted.pop(request.unique, None)
        if backing_id is None:
            raise NotReady(BackingWanted(nodeid, request.unique, node.digest, node.size))
        flags = OpenFlag.PASSTHROUGH if backing_id else OpenFlag.KEEP_CACHE
        return pack_open_out(OpenOut(nodeid, flags, backing_id))

    def release(self, request: Request) -> Body:
        """See `Operations.release`."""
        # A worker that died may have reported the end of this open before the request was sent
        # again. It is better to keep a backing id for too long than to close it too early.
        is_resent = request.unique >> _RESENT_BIT & 1
        if request.args.fh and not is_resent:
            self._released(request.args.fh)
        return b""

    def lseek(self, request: Request) -> Body:
        """See `Operations.lseek`; a blob that is kept in a file has the holes of that file."""
        args = request.args
        node = self._node(request.nodeid)
        if node.kind not in _FILES or args.whence not in {os.SEEK_DATA, os.SEEK_HOLE}:
            raise OSError(EINVAL, "only SEEK_DATA and SEEK_HOLE in a file are supported")
        if args.offset >= node.size:
            raise OSError(ENXIO, "the offset is past the end of the file")
        found = args.offset if args.whence == os.SEEK_DATA else node.size
        if node.size > INLINE_MAX:
            whole = ByteRange(0, node.size)
            content = self._blobs.content(self._in_store(), node.digest, node.size, whole)
            if isinstance(content, OpenBlob):
                found = os.lseek(content.fd, args.offset, args.whence)
        if found >= node.size and args.whence == os.SEEK_DATA:
            raise OSError(ENXIO, "there is no data between the offset and the end of the file")
        return pack_lseek_out(LseekOut(min(found, node.size)))

    def unanswered(self, request: memoryview) -> None:
        """See `Handler.unanswered`; an OPEN whose reply is not wanted counts as ended."""
        header = unpack_in_header(request[:IN_HEADER_SIZE])
        if header.opcode == Opcode.OPEN:
            self._released(header.nodeid)
