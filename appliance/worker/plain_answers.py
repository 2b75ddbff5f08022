"""Plain requests answered in C: the ring's and the device's loops, until Python has to look.

`APPLIANCE_ANSWERS` in the environment of the process that starts the workers says who answers: `c`,
plain requests are answered by the C module; `python`, the default, everything is answered by the
handler. The bytes of the answers are the same.
"""

import mmap
import os
import resource
from typing import Final

from appliance._engine import ffi, lib
from appliance.engine import Ring
from appliance.fs.files import ALL_LOCAL, RemoteParts
from appliance.store.blob_cache import directory_key
from appliance.store.store_reader import StoreReader

VARIABLE: Final = "APPLIANCE_ANSWERS"

# With a lower limit of open files, those of blobs are left to the handler, which holds fewer then.
_LIMIT_MIN: Final = 512


def are_wanted() -> bool:
    """Whether plain requests are to be answered in C."""
    return os.environ.get(VARIABLE) == "c"


class PlainAnswers:
    """Answers the plain requests of one session.

    No snapshot of `store` may be open in any call: each opens its own.

    Args:
        store: which the handler reads, too.
        grants_fd: of the session; stays the caller's, and must stay open.
        session: memory whose first byte says whether INIT was answered.
        counters: 64 slots of 8 bytes, by opcode.
        remote: what the store is only a cache of; what is used of that is passed to `used` once a
            second at most.

    Raises:
        OSError: the grants cannot be mapped.
    """

    def __init__(
        self,
        store: StoreReader,
        grants_fd: int,
        session: memoryview,
        counters: memoryview,
        *,
        remote: RemoteParts = ALL_LOCAL,
    ) -> None:
        self._store = store
        self._report = remote.used
        self._session = ffi.from_buffer("uint8_t[]", session, require_writable=False)
        self._counters = ffi.from_buffer("uint64_t[]", counters, require_writable=True)
        # Mapped, not allocated: pages that are never used are never resident.
        self._listing = ffi.from_buffer(
            "uint8_t[]", mmap.mmap(-1, lib.ENG_LISTING_SIZE), require_writable=True
        )
        self._memory = ffi.from_buffer(
            "uint8_t[]", mmap.mmap(-1, ffi.sizeof("struct eng_answers")), require_writable=True
        )
        self._reply = ffi.new("struct eng_reply *")
        answers = self._answers = ffi.cast("struct eng_answers *", self._memory)
        answers.session = self._session
        answers.counters = self._counters
        answers.listing = self._listing
        answers.store = answers.places.store = store.cdata
        self._usage = ffi.addressof(answers, "usage")
        answers.places.usage = self._usage
        answers.usage.is_kept[lib.ENG_USED_BLOB] = remote.has_blobs
        answers.usage.is_kept[lib.ENG_USED_DIRECTORY] = remote.has_directories
        limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        num_fds = lib.ENG_BLOB_FDS_MAX if limit >= _LIMIT_MIN else 0
        directory_fd, skip = store.files.directory()
        lib.eng_blob_fds_init(ffi.addressof(answers, "blobs"), directory_fd, skip, num_fds)
        error = -lib.eng_grants_init(ffi.addressof(answers.places, "grants"), grants_fd)
        if error:
            raise OSError(error, os.strerror(error))

    def answer(self, request: bytes | memoryview, readable_len: int, room: int) -> bytes | None:
        """Return the reply to one request as bytes, empty if it has none; None if it is not plain.

        This is for tests: what the loops below send, they do not copy.
        """
        answers, reply = self._answers, self._reply
        source = ffi.from_buffer(request)
        lib.eng_answers_begin(answers)
        try:
            outcome = lib.eng_answer(answers, source, len(source), readable_len, room, reply)
            if outcome == lib.ENG_NOT_PLAIN:
                return None
            lib.eng_answers_count(answers, source)
            if outcome == lib.ENG_NO_REPLY:
                return b""
            head = bytes(ffi.buffer(reply.head, reply.head_size))
            if reply.fd >= 0:
                return head + os.pread(reply.fd, reply.body_size, reply.offset)
            return head + bytes(ffi.buffer(reply.body, reply.body_size))
        finally:
            lib.eng_answers_end(answers)

    def serve_batch(self, ring: Ring, limit: int) -> list[int]:
        """Pop up to `limit` chains, answer plain requests, and return the slots of the others.

        Raises:
            RingError: the guest broke the ring.
        """
        ring.check(lib.eng_serve_batch(self._answers, ring.cdata, limit))
        return self._left()

    def serve_ring(self, ring: Ring, epoll_fd: int, kick_fd: int, *, is_busy: bool) -> list[int]:
        """Serve `ring`, and wait, until there is something to look at; return slots as above.

        Args:
            ring: that is started.
            epoll_fd: has `kick_fd` and whatever else ends the wait.
            kick_fd: is read here.
            is_busy: do not wait at first.

        Raises:
            RingError: the guest broke the ring.
        """
        ring.check(lib.eng_serve_ring(self._answers, ring.cdata, epoll_fd, kick_fd, is_busy))
        return self._left()

    def serve_device(self, fd: int, request: memoryview) -> int:
        """Serve a /dev/fuse descriptor until a request is not plain; return its size in `request`.

        Waits for requests unless `fd` is non-blocking.

        Raises:
            OSError: read(2) or write(2) failed.
        """
        buffer = ffi.from_buffer("uint8_t[]", request, require_writable=True)
        size = lib.eng_serve_device(self._answers, fd, buffer, len(buffer))
        self._report_used()
        if size < 0:
            raise OSError(-size, os.strerror(-size))
        return size

    def close_unlinked(self) -> None:
        """Close files that were evicted from a cache; call it when a blob is missing there."""
        lib.eng_blob_fds_close_unlinked(ffi.addressof(self._answers, "blobs"))

    def close(self) -> None:
        """Close files and unmap the grants; the store stays the caller's."""
        lib.eng_blob_fds_close(ffi.addressof(self._answers, "blobs"))
        lib.eng_grants_deinit(ffi.addressof(self._answers.places, "grants"))
        ffi.release(self._session)
        ffi.release(self._counters)

    def _report_used(self) -> None:
        usage = self._answers.usage
        if lib.eng_usage_is_due(self._usage):
            keys = []
            for used in usage.used[0 : usage.num]:
                digest = bytes(ffi.buffer(used.digest))
                is_directory = used.kind == lib.ENG_USED_DIRECTORY
                keys.append(directory_key(digest) if is_directory else digest)
            lib.eng_usage_clear(self._usage)
            self._report(keys)

    def _left(self) -> list[int]:
        self._report_used()
        answers = self._answers
        return [answers.left[index] for index in range(answers.left_num)]
