"""The hashing process: reads files once, into the ring, and hashes them there.

It is forked before any LMDB environment or thread exists, serves paths until its pipe ends, and
never touches the store but for the files it stages.
"""

import ctypes
import mmap
import os
import stat
from pathlib import Path
from typing import Final

from blake3 import blake3

from appliance.errors import ImportTreeError
from appliance.importer.long_paths import open_at
from appliance.importer.records import DIGEST_SIZE, HASH_RECORD, HashKind
from appliance.importer.walk import display
from appliance.store.lmdb_env import FULL_ERRNOS
from appliance.store.schema import INLINE, INLINE_MAX

# The largest piece of a file in the ring at once.
PIECE_MAX: Final = 1 << 20

_REQUESTS_SIZE: Final = 1 << 16
_RECORDS_MAX: Final = 64
_CONTENT_MAX: Final = 1 << 20
_INLINE_PREFIX: Final = bytes([INLINE])
_MESSAGE_MAX: Final = 1 << 16
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_SYNC_FILE_RANGE_WRITE: Final = 2
_WHOLE: Final = ctypes.c_int64(0)
_NO_STAGED: Final = 0
_NO_DIGEST: Final = bytes(DIGEST_SIZE)
_STAGE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def staged_path(staging: Path, number: int) -> Path:
    """Return where the staged file `number` of one hashing process is."""
    return staging / str(number)


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
        self, requests: int, results: int, returned: int, ring: mmap.mmap, staging: Path
    ) -> None:
        self._requests = requests
        self._results = results
        self._returned = returned
        self._ring = memoryview(ring)
        self._ring_size = len(ring)
        self._free_bytes = self._ring_size
        self._position = 0
        self._skipped = 0
        self._staging = staging
        self._num_staged = 0
        self._records: list[bytes] = []
        self._libc = ctypes.CDLL(None)
        self._unsent_bytes = 0

    def run(self) -> None:
        """Serve until the requests end."""
        rest = b""
        while data := os.read(self._requests, _REQUESTS_SIZE):
            *paths, rest = (rest + data).split(b"\0")
            for path in paths:
                self._serve(path)
            self._send()

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
        size = before.st_size
        start = self._reserve(size + 2, prefix=_INLINE_PREFIX)
        # One byte more than there should be shows the end of the file without another read.
        num_read = os.readv(fd, [self._ring[start : start + size + 1]])
        if num_read < size:  # the file system gives little at a time; or the file has shrunk
            num_read += _fill(fd, self._ring[start + num_read : start + size + 1])
        self._check_unchanged(fd, before, num_read)
        content = self._ring[start : start + size]
        self._put(HashKind.LAST, before, start, size, _NO_STAGED, blake3(content).digest())

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
            # The commit will wait for the disk, which can begin now. A hint: failures show there.
            self._libc.sync_file_range(out, _WHOLE, _WHOLE, _SYNC_FILE_RANGE_WRITE)
            self._put(HashKind.LAST, before, start, left, number, hasher.digest())
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(out)

    def _read_piece(
        self, fd: int, size: int, before: os.stat_result, *, has_end: bool
    ) -> tuple[int, memoryview]:
        start = self._reserve(size + has_end)
        view = self._ring[start : start + size + has_end]
        num_read = _fill(fd, view)
        if has_end:
            self._check_unchanged(fd, before, num_read + before.st_size - size)
        elif num_read != size:
            raise ImportTreeError("changed while it was read")
        return start, view[:size]

    def _check_unchanged(self, fd: int, before: os.stat_result, num_read: int) -> None:
        after = os.fstat(fd)
        if (
            num_read != before.st_size
            or after.st_size != before.st_size
            or after.st_mtime_ns != before.st_mtime_ns
            or after.st_ctime_ns != before.st_ctime_ns
        ):
            raise ImportTreeError("changed while it was read")

    def _reserve(self, size: int, prefix: bytes = b"") -> int:
        """Wait until `size` bytes in a row are free; return where, after `prefix` was put there."""
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
        if prefix:
            self._ring[start : start + len(prefix)] = prefix
        self._skipped += len(prefix)
        return start + len(prefix)

    def _put(
        self, kind: HashKind, st: os.stat_result, start: int, size: int, staged: int, digest: bytes
    ) -> None:
        used = self._skipped + size
        self._position = start + size
        self._free_bytes -= used
        self._unsent_bytes += size
        executable = st.st_mode & stat.S_IXUSR != 0
        record = HASH_RECORD.pack(kind, executable, start, size, used, st.st_size, staged, digest)
        self._records.append(record)
        if self._unsent_bytes >= _CONTENT_MAX or len(self._records) >= _RECORDS_MAX:
            self._send()

    def _put_message(self, kind: HashKind, text: str) -> None:
        message = text.encode()[:_MESSAGE_MAX]
        start = self._reserve(len(message))
        self._ring[start : start + len(message)] = message
        self._put(kind, _NO_STAT, start, len(message), _NO_STAGED, _NO_DIGEST)

    def _send(self) -> None:
        data = memoryview(b"".join(self._records))
        while data:
            data = data[os.write(self._results, data) :]
        self._records.clear()
        self._unsent_bytes = 0


class _StagingError(Exception):
    """Content could not be written to the disk of the store."""

    def __init__(self, path: Path, cause: OSError) -> None:
        super().__init__(f"{path}: {cause.strerror}")
        self.kind = HashKind.FULL if cause.errno in FULL_ERRNOS else HashKind.FAILED


_NO_STAT: Final = os.stat_result([0] * 10)


def _fill(fd: int, view: memoryview) -> int:
    """Read until `view` is full or the file ends; return the bytes read."""
    num_read = 0
    while num_read < len(view):
        more = os.readv(fd, [view[num_read:]])
        if not more:
            break
        num_read += more
    return num_read


def _create(path: Path) -> int:
    try:
        return os.open(path, _STAGE_FLAGS, 0o444)
    except OSError as exc:
        raise _StagingError(path, exc) from exc


def _write_staged(fd: int, data: memoryview, path: Path) -> None:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as exc:
        raise _StagingError(path, exc) from exc
