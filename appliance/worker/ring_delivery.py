"""FUSE requests and replies in the descriptor chains of a virtqueue.

A request is the readable part of a chain, taken as one stream of bytes. The reply is written to the
writable part (VIRTIO 1.3, 5.11.6). The used length is exactly the length of the reply, which newer
guests check.
"""

import errno
import logging
from typing import Final

from appliance.engine import Ring
from appliance.fuse_proto._fuse_wire import IN_HEADER_SIZE, OUT_HEADER_SIZE, unpack_in_header
from appliance.fuse_proto.dispatch import Dispatcher
from appliance.fuse_proto.encode import pack_reply_header
from appliance.fuse_proto.operations import FileSlice

_LOG: Final = logging.getLogger(__name__)


def serve(ring: Ring, slot: int, dispatcher: Dispatcher) -> None:
    """Answer the request in `slot` and return its chain to the guest.

    Raises:
        NotReady: the answer is not there yet. The chain stays popped, and the caller parks it.
        RingError: the guest broke the ring.
    """
    reply = dispatcher.handle_untrusted(
        ring.request(slot), ring.readable_len(slot), ring.writable_len(slot)
    )
    if reply is None:
        ring.complete(slot, 0)
        return
    body = reply.body
    if isinstance(body, FileSlice):
        if not _deliver_file(ring, slot, reply.unique, body):
            dispatcher.note_unread(errno.EIO)
        return
    header = pack_reply_header(reply.unique, reply.error, len(body))
    if isinstance(body, bytes):
        ring.write(slot, 0, header + body)
    else:
        ring.write(slot, 0, header)
        ring.write(slot, OUT_HEADER_SIZE, body)
    ring.complete(slot, OUT_HEADER_SIZE + len(body))


def fail(ring: Ring, slot: int, dispatcher: Dispatcher, error: int) -> None:
    """Answer the request in `slot` with `error` (a positive errno) and return its chain."""
    request = ring.request(slot)
    if len(request) < IN_HEADER_SIZE or ring.writable_len(slot) < OUT_HEADER_SIZE:
        ring.complete(slot, 0)
        return
    header = unpack_in_header(request)
    dispatcher.count_untrusted(header.opcode, error)
    _deliver_error(ring, slot, header.unique, error)


def _deliver_error(ring: Ring, slot: int, unique: int, error: int) -> None:
    ring.write(slot, 0, pack_reply_header(unique, error, 0))
    ring.complete(slot, OUT_HEADER_SIZE)


def _deliver_file(ring: Ring, slot: int, unique: int, piece: FileSlice) -> bool:
    # The header is written last, because it depends on the result of reading the file.
    try:
        size = ring.read_file(slot, OUT_HEADER_SIZE, piece.fd, piece.offset, piece.size)
    except OSError as exc:
        _LOG.error("reading %d bytes at %d of a blob file: %s", piece.size, piece.offset, exc)
        _deliver_error(ring, slot, unique, errno.EIO)
        return False
    if size != piece.size:
        _LOG.error("a blob file ends %d bytes early", piece.size - size)
        _deliver_error(ring, slot, unique, errno.EIO)
        return False
    ring.write(slot, 0, pack_reply_header(unique, 0, size))
    ring.complete(slot, OUT_HEADER_SIZE + size)
    return True
