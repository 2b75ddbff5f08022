"""Plain requests answered in C: the loops over a ring and over a device, until Python must look.

A request is plain if it is well formed, does not fail, and everything that its answer takes is in
the store. The C module answers such requests without Python. It leaves all others to the handler,
which can answer every request and is the reference for the bytes of every reply.

If `APPLIANCE_ANSWERS` is `python` in the environment of `virtiofs` or `mount`, there is no
`PlainAnswers`, and the handler answers everything.
"""

import mmap
import os
import resource
import time
from typing import TYPE_CHECKING, Final

from appliance._engine import ffi, lib
from appliance.engine import Ring
from appliance.fs.files import ALL_LOCAL, RemoteParts
from appliance.session.first_reads import SEGMENT_SHIFT, FirstRead, FirstReads
from appliance.session.request_statistics import STATISTICS_BYTES, QueueStatistics
from appliance.store.blob_cache import directory_key
from appliance.store.store_reader import StoreReader

if TYPE_CHECKING:
    from appliance._engine import EngUsage

# Descriptors that a worker needs for other things than blob files, those of the handler included.
_OTHERS_OPEN: Final = 256
# How often what was used of a cache is reported, and what is recorded is told.
_REPORT_EVERY_NS: Final = 1_000_000_000
_TELL_EVERY_NS: Final = 100_000_000
# The shift of segments where a blob is one.
_UNDIVIDED: Final = 63


class RingWait:
    """Where the worker of one ring sleeps, and how long it polls before that.

    Args:
        epoll_fd: has `kick_fd`, registered for EPOLLIN | EPOLLET, and whatever else ends a wait
            (lent).
        kick_fd: the kick descriptor of the ring (lent); it is not read.
    """

    def __init__(self, epoll_fd: int, kick_fd: int) -> None:
        self.cdata = ffi.new("struct eng_wait *")
        self.cdata.epoll_fd, self.cdata.kick_fd = epoll_fd, kick_fd


class PlainAnswers:
    """Answers the plain requests of one session, for one worker.

    No snapshot of `store` may be open when a method is called, because each opens its own.

    Args:
        store: the store (lent), which the handler reads as well.
        grants_fd: descriptor of the session's grants; it stays the caller's and must stay open.
        session: memory whose first byte says whether INIT was answered.
        statistics: where answered requests are counted.
        remote: which objects `store` is only a cache of. The keys of those that were used are
            passed to `remote.used`, once a second at most.
        first_reads: notes what was answered with, if the session is recorded.
        poll_us: how long an empty ring may be polled before the worker sleeps, in microseconds.

    Raises:
        OSError: the grants cannot be mapped.
    """

    def __init__(
        self,
        store: StoreReader,
        grants_fd: int,
        session: memoryview,
        statistics: QueueStatistics,
        *,
        remote: RemoteParts = ALL_LOCAL,
        first_reads: FirstReads | None = None,
        poll_us: int = 0,
    ) -> None:
        if ffi.sizeof("struct eng_statistics") != STATISTICS_BYTES:
            raise AssertionError("the C module has another layout of statistics")
        self._store = store
        self._report = remote.used
        self._is_cached = {
            lib.ENG_USED_BLOB: remote.has_blobs,
            lib.ENG_USED_DIRECTORY: remote.has_directories,
        }
        self._first_reads = first_reads
        self._poll_ns = 1000 * poll_us
        self._session = ffi.from_buffer("uint8_t[]", session, require_writable=False)
        self._statistics = ffi.from_buffer(
            "struct eng_statistics[1]", statistics.memory, require_writable=True
        )
        # Mapped rather than allocated: pages that are never used take no memory.
        self._listing = ffi.from_buffer(
            "uint8_t[]", mmap.mmap(-1, lib.ENG_LISTING_SIZE), require_writable=True
        )
        self._memory = ffi.from_buffer(
            "uint8_t[]", mmap.mmap(-1, ffi.sizeof("struct eng_answers")), require_writable=True
        )
        self._reply = ffi.new("struct eng_reply *")
        answers = self._answers = ffi.cast("struct eng_answers *", self._memory)
        answers.session = self._session
        answers.statistics = self._statistics
        answers.listing = self._listing
        answers.store = answers.places.store = store.cdata
        self._usage = ffi.addressof(answers, "usage")
        answers.places.usage = self._usage
        self._set_usage(answers.usage)
        # With a low limit of open files, blob files are left to the handler, which holds fewer.
        limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        directory_fd, skip = store.files.directory()
        self._blobs = ffi.addressof(answers, "blobs")
        lib.eng_blob_fds_init(self._blobs, directory_fd, skip, max(0, limit - _OTHERS_OPEN))
        error = -lib.eng_grants_init(ffi.addressof(answers.places, "grants"), grants_fd)
        if error:
            raise OSError(error, os.strerror(error))

    def answer(self, request: bytes | memoryview, readable_len: int, room: int) -> bytes | None:
        """Return the reply to one request as bytes; this is for tests.

        Returns:
            The reply, empty if the request has none, or None if the request is not plain.
        """
        answers, reply = self._answers, self._reply
        source = ffi.from_buffer(request)
        answers.taken_ns = time.monotonic_ns()
        lib.eng_answers_begin(answers)
        try:
            outcome = lib.eng_answer(answers, source, len(source), readable_len, room, reply)
            if outcome == lib.ENG_NOT_PLAIN:
                return None
            lib.eng_answers_count(answers, source, reply)
            if outcome == lib.ENG_NO_REPLY:
                return b""
            head = bytes(ffi.buffer(reply.head, reply.head_size))
            if reply.fd >= 0:
                return head + os.pread(reply.fd, reply.body_size, reply.offset)
            return head + bytes(ffi.buffer(reply.body, reply.body_size))
        finally:
            lib.eng_answers_end(answers)

    def serve_batch(self, ring: Ring, limit: int) -> list[int]:
        """Pop up to `limit` chains, answer plain ones, and return the slots of the others.

        Raises:
            RingError: the guest broke the ring.
        """
        ring.check(lib.eng_serve_batch(self._answers, ring.cdata, limit))
        return self._left()

    def serve_ring(self, ring: Ring, wait: RingWait) -> list[int]:
        """Serve `ring`, sleeping while it is empty, until Python must look.

        Returns:
            The slots of requests that are not plain. If there are none, look at the descriptors in
            the epoll set of `wait`, and call this again.

        Raises:
            RingError: the guest broke the ring.
        """
        wait.cdata.poll_max_ns = self._poll_ns
        ring.check(lib.eng_serve_ring(self._answers, ring.cdata, wait.cdata))
        return self._left()

    def serve_device(self, fd: int, request: memoryview) -> int:
        """Serve a /dev/fuse descriptor until a request is not plain; return its size in `request`.

        This waits for requests unless `fd` is non-blocking.

        Raises:
            OSError: read(2) or write(2) failed, or (EAGAIN) it is time to look at other things.
        """
        buffer = ffi.from_buffer("uint8_t[]", request, require_writable=True)
        size = lib.eng_serve_device(self._answers, fd, buffer, len(buffer))
        self._report_used_if_due()
        if size < 0:
            raise OSError(-size, os.strerror(-size))
        return size

    def close_unlinked(self) -> None:
        """Close blob files that were evicted from a cache; to be called when a blob is missing."""
        lib.eng_blob_fds_close_unlinked(self._blobs)

    def close(self) -> None:
        """Close blob files and unmap the grants."""
        lib.eng_blob_fds_close(self._blobs)
        lib.eng_grants_deinit(ffi.addressof(self._answers.places, "grants"))
        ffi.release(self._session)
        ffi.release(self._statistics)

    def _set_usage(self, usage: "EngUsage") -> None:
        is_recorded = self._first_reads is not None
        for kind, is_cached in self._is_cached.items():
            usage.is_kept[kind] = is_cached or is_recorded
        usage.shift = SEGMENT_SHIFT if is_recorded else _UNDIVIDED
        # What is recorded must not wait for the next request.
        usage.every_ns = _TELL_EVERY_NS if is_recorded else _REPORT_EVERY_NS

    def report_used(self) -> None:
        """Report what was used, whether or not it is due."""
        usage = self._answers.usage
        keys: dict[bytes, None] = {}
        for used in usage.used[0 : usage.num]:
            digest = bytes(ffi.buffer(used.digest))
            is_directory = used.kind == lib.ENG_USED_DIRECTORY
            if self._is_cached[used.kind]:
                keys[directory_key(digest) if is_directory else digest] = None
            if self._first_reads is not None:
                size = None if is_directory else used.size
                self._first_reads.note(FirstRead(digest, used.used_ns, size, used.segment))
        lib.eng_usage_clear(self._usage, self._answers.now_ns)
        if keys:
            self._report(list(keys))
        if self._first_reads is not None:
            self._first_reads.flush()

    def _report_used_if_due(self) -> None:
        if lib.eng_usage_is_due(self._usage, self._answers.now_ns):
            self.report_used()

    def _left(self) -> list[int]:
        self._report_used_if_due()
        answers = self._answers
        return [answers.left[index] for index in range(answers.left_num)]
