"""The hashing process: reads files once, into the ring, and hashes them there.

It is forked before any LMDB environment or thread exists, serves paths until its pipe ends, and
never touches the store but for the files it stages.
"""

import ctypes
import mmap
import os
import stat
from typing import Final

from blake3 import blake3

from appliance.castore.names import display
from appliance.errors import ImportTreeError
from appliance.importer.file_reader import FRAME_EXTRA_MAX, FileReader, Reading
from appliance.importer.long_paths import open_at
from appliance.importer.records import DIGEST_SIZE, HASH_RECORD, HashKind, HashRecord
from appliance.importer.staging import staged_path
from appliance.store.disk_errors import FULL_ERRNOS
from appliance.store.schema import INLINE, INLINE_MAX

# The largest piece of a file in the ring at once.
PIECE_MAX: Final = 1 << 20

_REQUESTS_SIZE: Final = 1 << 16
_RECORDS_MAX: Final = 64
_CONTENT_MAX: Final = 1 << 20
# Room for a small file; what is larger asks for more.
_ROOM_MIN: Final = INLINE_MAX + FRAME_EXTRA_MAX
_ROOM_MAX: Final = PIECE_MAX + FRAME_EXTRA_MAX
_INLINE_PREFIX: Final = bytes([INLINE])
_MESSAGE_MAX: Final = 1 << 16
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_SYNC_FILE_RANGE_WRITE: Final = 2
_WHOLE: Final = ctypes.c_int64(0)
_NO_STAGED: Final = 0
_NO_DIGEST: Final = bytes(DIGEST_SIZE)
_STAGE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class HasherLoop:
    """The life of a hashing process.

    Args:
        requests: pipe of paths, each ended by NUL; its end ends `run`.
        results: pipe of records.
        returned: eventfd that counts the bytes of the ring given back.
        ring: shared memory.
        staging: existing directory for the content of files over `INLINE_MAX`.
    """

    def __init__(
        self, requests: int, results: int, returned: int, ring: mmap.mmap, staging: str
    ) -> None:
        self._requests = requests
        self._results = results
        self._returned = returned
        self._ring = memoryview(ring)
        self._ring_size = len(ring)
        self._reader = FileReader(ring, PIECE_MAX, _RECORDS_MAX)
        self._free_bytes = self._ring_size
        self._position = 0
        self._skipped = 0
        self._staging = staging
        self._num_staged = 0
        # Digests of what was staged in one piece.
        self._staged: set[bytes] = set()
        self._records = bytearray()
        self._libc = ctypes.CDLL(None)
        self._unsent_bytes = 0

    def run(self) -> None:
        """Serve until the requests end."""
        rest = b""
        while data := os.read(self._requests, _REQUESTS_SIZE):
            data = rest + data
            end = data.rfind(b"\0") + 1
            self._serve_all(memoryview(data)[:end])
            rest = data[end:]
            self._send()

    def _serve_all(self, paths: memoryview) -> None:
        room = _ROOM_MIN
        while paths:
            reading = self._read(paths, room)
            paths = paths[reading.num_done :]
            # The next file did not fit.
            room = _ROOM_MIN if reading.records else _ROOM_MAX
            if reading.is_refused:
                path, _, _ = bytes(paths).partition(b"\0")
                self._serve(path)
                paths = paths[len(path) + 1 :]

    def _read(self, paths: memoryview, room_min: int) -> Reading:
        """Read files until one is refused, or it is time to send."""
        start = self._reserve(room_min)
        room = min(self._free_bytes - self._skipped, self._ring_size - start, _ROOM_MAX)
        records_max = _RECORDS_MAX - len(self._records) // HASH_RECORD.size
        reading = self._reader.read(paths, start, room, self._skipped, records_max)
        records = reading.records
        if records:
            last = HASH_RECORD.unpack_from(records, len(records) - HASH_RECORD.size)
            _, _, lead, offset, _, _, _, _, frame_size, _ = last
            end = offset - lead + frame_size
            for at in reading.large:
                self._stage(records[at : at + HASH_RECORD.size])
            self._add(records, end, self._skipped + end - start)
        return reading

    def _stage(self, packed: memoryview) -> None:
        """Stage the content of a file that is in the ring; set that in its record, or why not.

        Content that was staged before is not again: it is in the ring for whoever needs it.
        """
        record = HashRecord._make(HASH_RECORD.unpack(packed))
        if record.digest in self._staged:
            return
        self._staged.add(record.digest)
        self._num_staged += 1
        path = staged_path(self._staging, self._num_staged)
        content = self._ring[record.offset : record.offset + record.size]
        try:
            out = _create(path)
            try:
                _write_staged(out, content, path)
                self._begin_sync(out)
            finally:
                os.close(out)
            record = record._replace(staged=self._num_staged)
        except _StagingError as exc:
            message = str(exc).encode()[:_MESSAGE_MAX]
            content[: len(message)] = message
            record = record._replace(kind=exc.kind, size=len(message), frame_size=0)
        HASH_RECORD.pack_into(packed, 0, *record)

    def _serve(self, path: bytes) -> None:
        try:
            fd = open_at(path, _OPEN_FLAGS)
            try:
                self._read_file(fd)
            finally:
                os.close(fd)
        except ImportTreeError as exc:
            self._put_message(HashKind.REFUSED, f"{display(path)}: {exc}")
        except _StagingError as exc:
            self._put_message(exc.kind, str(exc))
        except OSError as exc:
            self._put_message(HashKind.REFUSED, f"{display(path)}: {exc.strerror}")

    def _read_file(self, fd: int) -> None:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode):
            raise ImportTreeError("is no longer a regular file")
        if before.st_size > INLINE_MAX:
            self._read_large(fd, before)
            return
        start, content = self._read_piece(fd, before.st_size, before, _INLINE_PREFIX, has_end=True)
        digest = blake3(content).digest()
        self._put(HashKind.LAST, before, start, before.st_size, _NO_STAGED, digest)

    def _read_large(self, fd: int, before: os.stat_result) -> None:
        self._num_staged += 1
        number = self._num_staged
        path = staged_path(self._staging, number)
        out = _create(path)
        try:
            hasher = blake3()
            left = before.st_size
            while left > PIECE_MAX:
                start, piece = self._read_piece(fd, PIECE_MAX, before, has_end=False)
                hasher.update(piece)
                _write_staged(out, piece, path)
                self._put(HashKind.PIECE, before, start, PIECE_MAX, number, _NO_DIGEST)
                left -= PIECE_MAX
            start, piece = self._read_piece(fd, left, before, has_end=True)
            hasher.update(piece)
            _write_staged(out, piece, path)
            self._begin_sync(out)
            self._put(HashKind.LAST, before, start, left, number, hasher.digest())
        except BaseException:
            os.unlink(path)  # noqa: PTH108 -- no Path is made for a file
            raise
        finally:
            os.close(out)

    def _begin_sync(self, fd: int) -> None:
        # The commit will wait for the disk, which can begin now. A hint: failures show there.
        self._libc.sync_file_range(fd, _WHOLE, _WHOLE, _SYNC_FILE_RANGE_WRITE)

    def _read_piece(
        self,
        fd: int,
        size: int,
        before: os.stat_result,
        prefix: bytes = b"",
        *,
        has_end: bool,
    ) -> tuple[int, memoryview]:
        """Read `size` bytes; return where in the ring they are, behind `prefix`, and they."""
        # One byte more than there should be shows the end of the file without another read.
        start = self._reserve(len(prefix) + size + has_end)
        self._ring[start : start + len(prefix)] = prefix
        start += len(prefix)
        self._skipped += len(prefix)
        num_read = _fill(fd, self._ring[start : start + size + has_end], size)
        if num_read != size or (has_end and not _is_unchanged(fd, before)):
            raise ImportTreeError("changed while it was read")
        return start, self._ring[start : start + size]

    def _reserve(self, size: int) -> int:
        """Wait until `size` bytes in a row are free, and return where."""
        start = self._position
        self._skipped = 0
        if size > self._ring_size - start:
            self._skipped = self._ring_size - start
            start = 0
        needed = size + self._skipped
        if needed > self._free_bytes:
            self._send()
            while needed > self._free_bytes:
                self._free_bytes += os.eventfd_read(self._returned)
        return start

    def _put(
        self, kind: HashKind, st: os.stat_result, start: int, size: int, staged: int, digest: bytes
    ) -> None:
        used = self._skipped + size
        executable = st.st_mode & stat.S_IXUSR != 0
        record = HASH_RECORD.pack(
            kind, executable, 0, start, size, used, st.st_size, staged, 0, digest
        )
        self._add(record, start + size, used)

    def _put_message(self, kind: HashKind, text: str) -> None:
        message = text.encode()[:_MESSAGE_MAX]
        start = self._reserve(len(message))
        self._ring[start : start + len(message)] = message
        self._put(kind, _NO_STAT, start, len(message), _NO_STAGED, _NO_DIGEST)

    def _add(self, records: bytes | memoryview, end: int, used: int) -> None:
        """Send `records` soon; what they use of the ring ends at `end`."""
        self._records += records
        self._position = end
        self._free_bytes -= used
        self._unsent_bytes += used
        if (
            self._unsent_bytes >= _CONTENT_MAX
            or len(self._records) >= _RECORDS_MAX * HASH_RECORD.size
        ):
            self._send()

    def _send(self) -> None:
        data = bytes(self._records)
        while data:
            data = data[os.write(self._results, data) :]
        self._records.clear()
        self._unsent_bytes = 0


class _StagingError(Exception):
    """Content could not be written to the disk of the store."""

    def __init__(self, path: str, cause: OSError) -> None:
        super().__init__(f"{path}: {cause.strerror}")
        self.kind = HashKind.FULL if cause.errno in FULL_ERRNOS else HashKind.FAILED


_NO_STAT: Final = os.stat_result([0] * 10)


def _fill(fd: int, view: memoryview, enough: int) -> int:
    """Read until a read ends at `enough`, `view` is full or the file ends; return the bytes."""
    num_read = 0
    while num_read < len(view):
        more = os.readv(fd, [view[num_read:]])
        num_read += more
        if not more or num_read == enough:
            break
    return num_read


def _is_unchanged(fd: int, before: os.stat_result) -> bool:
    now = os.fstat(fd)
    return (
        now.st_size == before.st_size
        and now.st_mtime_ns == before.st_mtime_ns
        and now.st_ctime_ns == before.st_ctime_ns
    )


def _create(path: str) -> int:
    try:
        return os.open(path, _STAGE_FLAGS, 0o444)
    except OSError as exc:
        raise _StagingError(path, exc) from exc


def _write_staged(fd: int, data: memoryview, path: str) -> None:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as exc:
        raise _StagingError(path, exc) from exc
