"""FUSE requests and replies on /dev/fuse: one request per read(2), one reply per writev(2).

A reply must be written to the descriptor from which its request was read, and must carry `unique`
as it was read: in a request that the kernel sends again, bit 63 of it is set.
"""

import errno
import logging
import os
from typing import Final

from appliance.fuse_proto._fuse_wire import IN_HEADER_SIZE, OUT_HEADER_SIZE, unpack_in_header
from appliance.fuse_proto.dispatch import Dispatcher
from appliance.fuse_proto.encode import pack_reply_header
from appliance.fuse_proto.init import MAX_PAGES
from appliance.fuse_proto.operations import FileSlice, NotReady
from appliance.session.wants import BlobWanted
from appliance.worker.plain_answers import PlainAnswers

_LOG: Final = logging.getLogger(__name__)
# The kernel wants room for at least 8 KiB (linux fs/fuse/dev.c: fuse_dev_do_read). With more room,
# one BATCH_FORGET has thousands of the inodes that the kernel drops.
REQUEST_BYTES: Final = 64 << 10
# The largest reply that the kernel asks for: a READ or a listing of MAX_PAGES pages.
REPLY_BYTES: Final = OUT_HEADER_SIZE + (MAX_PAGES << 12)
# ENODEV: it was unmounted; ECONNABORTED: it was aborted. Nothing can be read or answered any more.
_ENDED: Final = frozenset({errno.ENODEV, errno.ECONNABORTED})
# ENOENT: the request was withdrawn while it was read. EAGAIN: there is none, or another worker took
# it.
_NOTHING: Final = frozenset({errno.ENOENT, errno.EAGAIN, errno.EINTR})


class DeviceEndedError(Exception):
    """The mount is gone."""


class FuseDevice:
    """One clone of a mount's /dev/fuse descriptor (lent), with the buffers to use it.

    Args:
        fd: the descriptor.
        plain: answers plain requests in C; None: `receive` returns every request.
    """

    def __init__(self, fd: int, plain: PlainAnswers | None = None) -> None:
        self.fd = fd
        self._plain = plain
        self._request = memoryview(bytearray(REQUEST_BYTES))
        self._reply = memoryview(bytearray(REPLY_BYTES))
        self._buffers = [self._request]

    def receive(self) -> memoryview | None:
        """Return the next request that is not plain; plain ones before it are answered.

        This waits for a request unless the descriptor is non-blocking.

        Returns:
            A view that is valid until the next call, or None if there is no request after all.

        Raises:
            DeviceEndedError: the mount is gone.
        """
        try:
            if self._plain is not None:
                size = self._plain.serve_device(self.fd, self._request)
            else:
                size = os.readv(self.fd, self._buffers)
        except OSError as exc:
            if exc.errno in _NOTHING:
                return None
            if exc.errno in _ENDED:
                raise DeviceEndedError from exc
            raise
        return self._request[:size]

    def serve(self, request: memoryview, dispatcher: Dispatcher) -> bool:
        """Answer `request`; return False if the kernel does not want the answer any more.

        Raises:
            NotReady: the answer is not there yet. The caller parks a copy of the request.
            DeviceEndedError: the mount is gone.
        """
        try:
            reply = dispatcher.handle_untrusted(request, len(request), REPLY_BYTES)
        except NotReady as exc:
            if self._plain is not None and isinstance(exc.want, BlobWanted):
                self._plain.close_unlinked()
            raise
        if reply is None:
            return True
        body = reply.body
        if isinstance(body, FileSlice):
            return self._deliver_file(reply.unique, body, dispatcher)
        return self._deliver(pack_reply_header(reply.unique, reply.error, len(body)), body)

    def fail(self, request: memoryview, dispatcher: Dispatcher, error: int) -> None:
        """Answer `request`, which has a whole header, with `error` (a positive errno).

        Raises:
            DeviceEndedError: the mount is gone.
        """
        header = unpack_in_header(request[:IN_HEADER_SIZE])
        dispatcher.count_untrusted(header.opcode, error)
        self._deliver(pack_reply_header(header.unique, error, 0), b"")

    def _deliver_file(self, unique: int, piece: FileSlice, dispatcher: Dispatcher) -> bool:
        end = OUT_HEADER_SIZE + piece.size
        try:
            size = os.preadv(piece.fd, [self._reply[OUT_HEADER_SIZE:end]], piece.offset)
        except OSError as exc:
            _LOG.error("reading %d bytes at %d of a blob file: %s", piece.size, piece.offset, exc)
            dispatcher.note_unread(errno.EIO)
            return self._deliver(pack_reply_header(unique, errno.EIO, 0), b"")
        if size != piece.size:
            _LOG.error("a blob file ends %d bytes early", piece.size - size)
            dispatcher.note_unread(errno.EIO)
            return self._deliver(pack_reply_header(unique, errno.EIO, 0), b"")
        self._reply[:OUT_HEADER_SIZE] = pack_reply_header(unique, 0, size)
        return self._deliver(self._reply[:end], b"")

    def _deliver(self, head: bytes | memoryview, body: bytes | memoryview) -> bool:
        try:
            os.writev(self.fd, (head, body))
        except OSError as exc:
            if exc.errno == errno.ENOENT:
                return False  # interrupted, or read again by another worker after a resend
            if exc.errno in _ENDED:
                raise DeviceEndedError from exc
            raise
        return True
