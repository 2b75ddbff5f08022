"""The dirty log: marks the pages of guest memory that a ring writes, while a front-end asks for it.

A front-end that saves or moves a running guest shares a bitmap with its back-ends. It has one bit
for each 4 KiB of guest physical memory; each back-end sets the bits of the pages that it has
written, and the front-end clears them and copies the pages. A bit is set after the write that it
stands for, so a page that is copied too early is copied once more.

Spec: vhost-user: Migration.
"""

import logging
import mmap
from typing import TYPE_CHECKING, Final

from appliance._engine import ffi, lib
from appliance.errors import RingError
from appliance.protos import control_pb2 as pb

if TYPE_CHECKING:
    from appliance._engine import EngRing

_LOG: Final = logging.getLogger(__name__)

# struct vring_used (linux/virtio_ring.h): flags and idx of 2 bytes each, the entries of 8, and
# avail_event of 2.
_HEADER_BYTES: Final = 4
_ENTRY_BYTES: Final = 8
_EVENT_BYTES: Final = 2
_PAGES_PER_BYTE: Final = 8
_PAGE_BYTES: Final = 4096


class DirtyLog:
    """The `WriteLog` of one ring; maps the bitmap, and unmaps it when it is forgotten.

    Args:
        fd: the file of the bitmap, lent for the duration of this call. The front-end may shrink it;
            an access beyond its end is SIGBUS.
        size: the size of the bitmap in bytes.
        offset: where it begins in the file, a multiple of a page.
        used_addr: the guest address of the used ring; None if writes to that are not logged.

    Raises:
        OSError, ValueError: it cannot be mapped, or the file is too small.
    """

    def __init__(self, fd: int, size: int, offset: int, used_addr: int | None) -> None:
        mapping = mmap.mmap(fd, size, offset=offset)
        self._bits = ffi.from_buffer("uint8_t[]", mapping, require_writable=True)
        self._size = size
        self._used_addr = used_addr
        self._armed_at: int | None = None
        self._is_too_small = False

    def replied(self, ring: "EngRing", slot: int, offset: int, size: int) -> None:
        """See `WriteLog.replied`."""
        self._check(lib.eng_log_slot(self._bits, self._size, ring, slot, offset, size))

    def completed(self, ring: "EngRing") -> None:
        """See `WriteLog.completed`."""
        newest = (ring.used_idx - 1) & (ring.num - 1)
        self._used(_HEADER_BYTES + newest * _ENTRY_BYTES, _ENTRY_BYTES)
        self._used(0, _HEADER_BYTES)

    def suppressed(self, ring: "EngRing") -> None:
        """See `WriteLog.suppressed`."""
        if not ring.is_event_idx:
            self._used(0, _HEADER_BYTES)

    def armed(self, ring: "EngRing") -> None:
        """See `WriteLog.armed`."""
        if not ring.is_event_idx:
            self._used(0, _HEADER_BYTES)
        elif self._armed_at != ring.last_avail:
            self._armed_at = ring.last_avail
            self._used(_HEADER_BYTES + ring.num * _ENTRY_BYTES, _EVENT_BYTES)

    def _used(self, offset: int, size: int) -> None:
        if self._used_addr is not None:
            at = self._used_addr + offset
            self._check(lib.eng_log_guest(self._bits, self._size, at, size))

    def _check(self, status: int) -> None:
        if status and not self._is_too_small:
            self._is_too_small = True
            _LOG.error(
                "the dirty log covers guest memory up to %#x, and pages beyond that were written: "
                "a guest that is moved now will miss them",
                self._size * _PAGES_PER_BYTE * _PAGE_BYTES,
            )


def open_log(log: pb.DirtyLog, fd: int | None = None) -> DirtyLog | None:
    """Return the log that a message describes, in the file `fd` (lent); None if there is no file.

    Raises:
        RingError: it cannot be mapped.
    """
    if fd is None:
        return None
    used_addr = log.used_addr if log.HasField("used_addr") else None
    try:
        return DirtyLog(fd, log.size, log.offset, used_addr)
    except (ValueError, OSError) as exc:
        raise RingError(f"dirty log: {exc}") from exc
