"""The hashing process: reads files once, into the ring, and hashes them there.

It is forked before any LMDB environment or thread exists, serves paths until its pipe ends, and
never touches the store but for the files it stages.
"""

import mmap
import os
import stat
from contextlib import suppress
from typing import Final, NamedTuple

from blake3 import blake3

from appliance.castore.names import display
from appliance.errors import ImportTreeError
from appliance.importer.beneath import open_beneath
from appliance.importer.file_reader import FRAME_EXTRA_MAX, FileReader, Reading
from appliance.importer.records import (
    DIGEST_SIZE,
    HASH_RECORD,
    HashKind,
    HashRecord,
    unpack_root_request,
)
from appliance.importer.roots import CHANGED, Identity, identity_of, open_directory, reason
from appliance.importer.staging import Holes, StagingError, StagingFile
from appliance.store.schema import INLINE_MAX

# The largest piece of a file in the ring at once.
PIECE_MAX: Final = 1 << 20

_REQUESTS_SIZE: Final = 1 << 16
_RECORDS_MAX: Final = 64
_CONTENT_MAX: Final = 1 << 20
# Room for a small file; what is larger asks for more.
_ROOM_MIN: Final = INLINE_MAX + FRAME_EXTRA_MAX
_ROOM_MAX: Final = PIECE_MAX + FRAME_EXTRA_MAX
_MESSAGE_MAX: Final = 1 << 16
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_NO_STAGED: Final = 0
_NO_DIGEST: Final = bytes(DIGEST_SIZE)
_ZEROS: Final = bytes(PIECE_MAX)


class HasherLoop:
    """The life of a hashing process.

    Args:
        requests: pipe of requests, see `records`; its end ends `run`.
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
        self._links = Links()
        self._records = bytearray()
        self._unsent_bytes = 0
        # The root of the tree in hand, None if it cannot be opened, and the directory in it.
        self._root: int | None = None
        self._prefix = b""
        self._directory = b""

    def run(self) -> None:
        """Serve until the requests end."""
        rest = b""
        while data := os.read(self._requests, _REQUESTS_SIZE):
            data = rest + data
            end = data.rfind(b"\0") + 1
            self._serve_all(data[:end])
            rest = data[end:]
            self._send()

    def _serve_all(self, requests: bytes) -> None:
        view = memoryview(requests)
        room = _ROOM_MIN
        at = 0
        while at < len(requests):
            reading = self._read(view[at:], room)
            at += reading.num_done
            # The next file did not fit.
            room = _ROOM_MIN if reading.records else _ROOM_MAX
            if reading.is_refused:
                end = requests.index(b"\0", at)
                self._serve(requests[at:end], _directory_at(requests, at, self._directory))
                at = end + 1
        self._directory = _directory_at(requests, at, self._directory)

    def _read(self, requests: memoryview, room_min: int) -> Reading:
        """Read files until one is refused, or it is time to send."""
        start = self._reserve(room_min)
        room = min(self._free_bytes - self._skipped, self._ring_size - start, _ROOM_MAX)
        records_max = _RECORDS_MAX - len(self._records) // HASH_RECORD.size
        reading = self._reader.read(requests, start, room, self._skipped, records_max)
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
        content = self._ring[record.offset : record.offset + record.size]
        try:
            staged = self._create_staged()
            try:
                staged.write(content)
                staged.finish()
            finally:
                staged.close()
            record = record._replace(staged=staged.number)
        except StagingError as exc:
            message = str(exc).encode()[:_MESSAGE_MAX]
            content[: len(message)] = message
            record = record._replace(kind=exc.kind, size=len(message), frame_size=0)
        HASH_RECORD.pack_into(packed, 0, *record)

    def _create_staged(self) -> StagingFile:
        self._num_staged += 1
        return StagingFile(self._staging, self._num_staged)

    def _serve(self, request: bytes, directory: bytes) -> None:
        """Serve a request that is not for the reader."""
        root = unpack_root_request(request)
        if root is not None:
            self._begin_root(*root)
            return
        path = b"%b/%b" % (directory, request) if directory else request
        text = display(self._prefix + path)
        try:
            if self._root is None:
                raise ImportTreeError(CHANGED)
            fd = open_beneath(self._root, path, _OPEN_FLAGS)
            try:
                self._read_file(fd)
            finally:
                os.close(fd)
        except ImportTreeError as exc:
            self._put_message(HashKind.REFUSED, f"{text}: {exc}")
        except StagingError as exc:
            self._put_message(exc.kind, str(exc))
        except OSError as exc:
            self._put_message(HashKind.REFUSED, f"{text}: {reason(exc)}")

    def _begin_root(self, identity: Identity, prefix: bytes) -> None:
        """Read below the directory `prefix` from now on, if it still is the one of `identity`."""
        self._reader.begin_root(None)
        if self._root is not None:
            os.close(self._root)
            self._root = None
        self._prefix = prefix
        self._links.clear()
        with suppress(OSError):
            fd = open_directory(prefix)
            if identity_of(os.fstat(fd)) == identity:
                self._root = fd
            else:
                os.close(fd)
        self._reader.begin_root(self._root)

    def _read_file(self, fd: int) -> None:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode):
            raise ImportTreeError("is no longer a regular file")
        size = before.st_size
        if size > INLINE_MAX:
            self._read_large(fd, before)
            return
        start, content = self._reserve_piece(size)
        _fill(fd, 0, content, size)
        _check_unchanged(fd, before)
        digest = blake3(content[:size]).digest()
        self._put(HashKind.LAST, before, start, size, _NO_STAGED, digest)

    def _read_large(self, fd: int, before: os.stat_result) -> None:
        digest = self._links.digest(before)
        if digest is not None:
            self._put_pieces(fd, before, None, digest)
            return
        staged = self._create_staged()
        try:
            self._links.remember(before, self._put_pieces(fd, before, staged, _NO_DIGEST))
        except BaseException:
            staged.remove()
            raise
        finally:
            staged.close()

    def _put_pieces(
        self, fd: int, before: os.stat_result, staged: StagingFile | None, digest: bytes
    ) -> bytes:
        """Read a file piece by piece, and put them; return the digest.

        Args:
            fd: the file.
            before: its status.
            staged: what it is copied to, and hashed on the way; None if it was before.
            digest: what it came to then.
        """
        hasher = blake3()
        holes = Holes(fd, before)
        number = _NO_STAGED if staged is None else staged.number
        end = 0
        while True:
            at, end = end, min(end + PIECE_MAX, before.st_size)
            size = end - at
            is_last = end == before.st_size
            start, room = self._reserve_piece(size)
            piece = room[:size]
            is_hole = holes.have(at, end)
            if is_hole:
                piece[:] = memoryview(_ZEROS)[:size]
            else:
                _fill(fd, at, room if is_last else piece, size)
            if staged is not None:
                hasher.update(piece)
                staged.skip(size) if is_hole else staged.write(piece)
            if is_last:
                break
            self._put(HashKind.PIECE, before, start, size, number, _NO_DIGEST)
        _check_unchanged(fd, before)
        if staged is not None:
            staged.finish()
            digest = hasher.digest()
        self._put(HashKind.LAST, before, start, size, number, digest)
        return digest

    def _reserve_piece(self, size: int) -> tuple[int, memoryview]:
        """Find room for a piece; return its offset in the ring, and the room.

        The room is one byte larger than the piece, so that reading a file into it shows that the
        file has ended without another read.
        """
        start = self._reserve(size + 1)
        return start, self._ring[start : start + size + 1]

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


_NO_STAT: Final = os.stat_result([0] * 10)


def _directory_at(requests: bytes, at: int, before: bytes) -> bytes:
    """Return the directory that the request at `at` is in; the first one of all is in `before`."""
    slash = requests.rfind(b"\0/", 0, at) + 1
    if slash == 0 and (at == 0 or not requests.startswith(b"/")):
        return before
    return requests[slash + 1 : requests.index(b"\0", slash)]


def _fill(fd: int, at: int, view: memoryview, size: int) -> None:
    """Read a file from `at` on, until a read ends after `size` bytes or `view` is full.

    Raises:
        ImportTreeError: the file has not so many, or more where `view` has room for more.
    """
    num_read = 0
    while num_read < len(view):
        more = os.preadv(fd, [view[num_read:]], at + num_read)
        num_read += more
        if not more or num_read == size:
            break
    if num_read != size:
        raise ImportTreeError(CHANGED)


def _check_unchanged(fd: int, before: os.stat_result) -> None:
    now = os.fstat(fd)
    if (
        now.st_size != before.st_size
        or now.st_mtime_ns != before.st_mtime_ns
        or now.st_ctime_ns != before.st_ctime_ns
    ):
        raise ImportTreeError(CHANGED)


# --- Files with several names: the content of a large one is hashed and staged once.

# What is remembered takes some 300 bytes a file; more files are forgotten, and hashed again.
_FILES_MAX: Final = 1 << 14


class _State(NamedTuple):
    """What changes when the content of a file does."""

    size: int
    mtime_ns: int
    ctime_ns: int


class Links:
    """Remembers the files with several names that were read, until `clear`."""

    def __init__(self) -> None:
        self._files: dict[Identity, tuple[_State, bytes]] = {}

    def digest(self, status: os.stat_result) -> bytes | None:
        """Return the digest of the file if it is remembered, and as it was then."""
        if status.st_nlink == 1:
            return None
        state, digest = self._files.get(identity_of(status), (None, b""))
        return digest if state == _state_of(status) else None

    def remember(self, status: os.stat_result, digest: bytes) -> None:
        """Remember a file that was read, unless it has one name."""
        if status.st_nlink == 1:
            return
        if len(self._files) >= _FILES_MAX:
            self.clear()
        self._files[identity_of(status)] = _state_of(status), digest

    def clear(self) -> None:
        """Forget all."""
        self._files.clear()


def _state_of(status: os.stat_result) -> _State:
    return _State(status.st_size, status.st_mtime_ns, status.st_ctime_ns)
