"""Memory that the supervisor and the workers of one session share, and that outlives any worker.

There are two memfds. `SessionMemory` holds what INIT negotiated and what each queue has served, all
in host byte order:

    offset  type  field
    0       u32   initialised (0 or 1); the next three fields are valid when it is 1
    4       u32   FUSE minor version
    8       u64   negotiated FUSE flags
    16      u32   max_readahead in bytes
    20      u32   whether a request without a preceding INIT was seen (0 or 1)
    24      u32   where the tables of errors begin; 0 in memory that an earlier release made
    4096          one block of statistics for each queue (see `request_statistics`)
    ...           one table of errors for each queue

INIT may come on any queue. Its worker fills in the fields and sets `initialised` before it
publishes the reply, and the guest sends nothing else before it has the reply.

`InflightMemory` holds the record of requests that were popped and not yet returned, one area per
queue, in the layout for split virtqueues.

Spec: vhost-user: Inflight I/O tracking.
"""

import contextlib
import fcntl
import mmap
import os
import struct
from typing import Final

from appliance.engine import inflight_size
from appliance.session.request_statistics import (
    ERRORS_BYTES,
    STATISTICS_BYTES,
    QueueStatistics,
    SessionStatistics,
)

_STATISTICS_OFFSET: Final = 4096
_FIELDS: Final = struct.Struct("<IIQI")
_INITIALISED: Final = struct.Struct("<I")
_WITHOUT_INIT_OFFSET: Final = _FIELDS.size
_ERRORS_AT: Final = struct.Struct("<I")
_ERRORS_AT_OFFSET: Final = 24

# QueueRegionSplit.version in the specification; it is 0 until the queue is started.
_VERSION_OFFSET: Final = 8


class SessionMemory:
    """The shared state of one FUSE session; owns its memfd and mapping."""

    def __init__(self, fd: int) -> None:
        """Map the memfd `fd`, which this object owns from now on."""
        self.fd = fd
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)

    @classmethod
    def create(cls, num_queues: int) -> "SessionMemory":
        """Return blank session memory for `num_queues` virtqueues.

        Raises:
            OSError: there is not enough memory or no free descriptor.
        """
        errors_at = _STATISTICS_OFFSET + num_queues * STATISTICS_BYTES
        fd = _sealed_memfd("session", errors_at + num_queues * ERRORS_BYTES)
        try:
            memory = cls(fd)
        except OSError:
            os.close(fd)
            raise
        _ERRORS_AT.pack_into(memory._map, _ERRORS_AT_OFFSET, errors_at)
        return memory

    @property
    def memory(self) -> memoryview:
        """A view of all of it; the first byte is 0 unless the session is initialised."""
        return memoryview(self._map)

    @property
    def is_initialised(self) -> bool:
        """Whether INIT was answered, and no DESTROY or device reset has followed."""
        return self._map[0] != 0

    @property
    def flags(self) -> int:
        """The negotiated FUSE flags, a mask of 64 bits."""
        flags: int = _FIELDS.unpack_from(self._map)[2]
        return flags

    @property
    def minor(self) -> int:
        """The negotiated FUSE minor version."""
        minor: int = _FIELDS.unpack_from(self._map)[1]
        return minor

    @property
    def max_readahead(self) -> int:
        """The negotiated max_readahead in bytes."""
        max_readahead: int = _FIELDS.unpack_from(self._map)[3]
        return max_readahead

    def start(self, minor: int, flags: int, max_readahead: int) -> None:
        """Record what INIT negotiated; every worker sees it when this returns.

        Args:
            minor: the FUSE minor version.
            flags: the FUSE flags, 64 bits.
            max_readahead: in bytes.
        """
        _FIELDS.pack_into(self._map, 0, 0, minor, flags, max_readahead)
        _INITIALISED.pack_into(self._map, 0, 1)

    def end(self) -> None:
        """Mark the session as ended (DESTROY, device reset)."""
        _INITIALISED.pack_into(self._map, 0, 0)

    def begin_again(self) -> None:
        """Be as new memory is, but for the statistics, which go on."""
        self.end()
        self._map[_WITHOUT_INIT_OFFSET] = 0

    def is_first_without_init(self) -> bool:
        """Return whether this is the first request without INIT, and note that one was seen.

        If two workers call this at the same instant, both may get True.
        """
        is_first = self._map[_WITHOUT_INIT_OFFSET] == 0
        self._map[_WITHOUT_INIT_OFFSET] = 1
        return is_first

    def statistics(self, queue: int) -> QueueStatistics:
        """Return the statistics of `queue`, which its worker writes."""
        statistics, errors = self._regions()
        return QueueStatistics(
            statistics[queue * STATISTICS_BYTES :][:STATISTICS_BYTES],
            errors[queue * ERRORS_BYTES :][:ERRORS_BYTES],
        )

    def totals(self) -> SessionStatistics:
        """Return the present sums over all queues."""
        return SessionStatistics(*self._regions())

    def _regions(self) -> tuple[memoryview, memoryview]:
        # The blocks of statistics, and the tables of errors: no bytes if there are none.
        memory = memoryview(self._map)
        (errors_at,) = _ERRORS_AT.unpack_from(memory, _ERRORS_AT_OFFSET)
        end = errors_at or len(memory)
        return memory[_STATISTICS_OFFSET:end], memory[end:]

    def close(self) -> None:
        """Close the descriptor, and the mapping unless a view of it still exists."""
        os.close(self.fd)
        with contextlib.suppress(BufferError):
            self._map.close()


class InflightMemory:
    """The inflight record of every queue of a device; owns its descriptor.

    The file may belong to the front-end, which may shrink it at any time. Accessing a mapping of it
    would then raise SIGBUS. Therefore only workers map it, through `area`; the supervisor uses
    pread(2) and pwrite(2).

    Spec: vhost-user: Inflight I/O tracking.
    """

    def __init__(self, fd: int, *, offset: int, num_queues: int, queue_size: int) -> None:
        """Use the areas that start at byte `offset` of `fd`, which this object owns from now on.

        Raises:
            ValueError: the file is too small for the areas, or `offset` is not page-aligned.
        """
        self.fd = fd
        self.offset = offset
        self.num_queues = num_queues
        self.queue_size = queue_size
        self.area_bytes = inflight_size(queue_size)
        self.size = num_queues * self.area_bytes
        file_size = os.fstat(fd).st_size
        if file_size < offset + self.size:
            raise ValueError(
                f"the file has {file_size} bytes, expected at least {offset + self.size}"
            )
        if offset % mmap.ALLOCATIONGRANULARITY:
            raise ValueError(
                f"the offset {offset} is not a multiple of {mmap.ALLOCATIONGRANULARITY}"
            )

    @classmethod
    def create(cls, num_queues: int, queue_size: int) -> "InflightMemory":
        """Return blank areas for `num_queues` queues of `queue_size` entries each.

        Raises:
            OSError: there is not enough memory or no free descriptor.
        """
        size = num_queues * inflight_size(queue_size)
        return cls(
            _sealed_memfd("inflight", size), offset=0, num_queues=num_queues, queue_size=queue_size
        )

    def area(self, queue: int) -> memoryview:
        """Map the areas and return the writable one of `queue`; the view keeps the mapping alive.

        Raises:
            OSError: the areas cannot be mapped.
            ValueError: the file has become too small for them.
        """
        start = queue * self.area_bytes
        mapping = mmap.mmap(self.fd, self.size, offset=self.offset)
        return memoryview(mapping)[start : start + self.area_bytes]

    def clear(self, queue: int) -> None:
        """Erase the record of `queue`, whose ring then starts with nothing in flight.

        Raises:
            OSError: the file cannot be written.
        """
        os.pwrite(self.fd, bytes(self.area_bytes), self.offset + queue * self.area_bytes)

    @property
    def is_blank(self) -> bool:
        """Whether no queue was ever started on this memory."""
        return all(map(self.is_blank_of, range(self.num_queues)))

    def is_blank_of(self, queue: int) -> bool:
        """Return whether `queue` was never started on this memory: its area has version 0.

        Raises:
            OSError: the file cannot be read.
        """
        version_at = self.offset + queue * self.area_bytes + _VERSION_OFFSET
        return not any(os.pread(self.fd, 1, version_at))

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


def _sealed_memfd(name: str, size: int) -> int:
    # Sealed, so that no holder of the descriptor can shrink the file under a mapping (SIGBUS).
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd
