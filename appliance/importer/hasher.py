"""The hashing process: reads each requested file once, into its ring, and hashes it there.

It serves requests until their pipe ends. Most files are read by the C module (`file_reader`), many
in one call. Files of more than 1 MiB are read here, piece by piece. Contents that are too large to
be kept inline in a store are also copied to files in the staging directory; nothing else of the
store is touched. What is read piece by piece is also cut into chunks on the way. Large files with
several names are staged and hashed once (`HardLinks`).

The process is forked before any thread or LMDB environment exists.
"""

import mmap
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from blake3 import blake3

from appliance.castore.chunking import UNCHUNKED_MAX, Chunker
from appliance.castore.names import display
from appliance.errors import ImportTreeError
from appliance.importer.beneath import open_beneath
from appliance.importer.file_reader import FRAME_EXTRA_MAX, FileReader, Reading
from appliance.importer.hard_links import HardLinks
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

# Bytes of the largest piece of a file that is in the ring at once.
PIECE_MAX: Final = 1 << 20

# Bytes of requests read from the pipe at once.
_REQUESTS_SIZE: Final = 1 << 16
# Records are sent when there are this many, or when they have used this many bytes of the ring.
_RECORDS_MAX: Final = 64
_UNSENT_BYTES_MAX: Final = 1 << 20
# Bytes of the ring to reserve before the C module is called: enough for a small file at first, and
# for any file after a call that returned no record.
_ROOM_MIN: Final = INLINE_MAX + FRAME_EXTRA_MAX
_ROOM_MAX: Final = PIECE_MAX + FRAME_EXTRA_MAX
# Bytes of an error message; the rest is cut off.
_MESSAGE_MAX: Final = 1 << 16
# O_NONBLOCK: a FIFO that has taken the place of a file must not block the open.
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_NO_STAGED: Final = 0
_NO_DIGEST: Final = bytes(DIGEST_SIZE)
_NO_STAT: Final = os.stat_result([0] * 10)
_ZEROS: Final = bytes(PIECE_MAX)


class HasherLoop:
    """The main loop of a hashing process.

    Args:
        requests: read end of the pipe of requests, see `records`; `run` returns at its end.
        results: write end of the pipe of records.
        returned: eventfd to which the committing process adds the bytes of the ring given back.
        ring: shared memory that only this process writes.
        staging: existing directory for contents of more than `INLINE_MAX` bytes.
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
        # Where the next piece goes, and bytes left unused before the one being read.
        self._position = 0
        self._skipped = 0
        self._staging = staging
        self._num_staged = 0
        # Digests of the staged contents that fit into one piece.
        self._staged: set[bytes] = set()
        self._links = HardLinks()
        # Cutting takes about as long as hashing and staging, so it goes on beside them.
        self._beside = ThreadPoolExecutor(1, "chunks")
        self._records = bytearray()
        self._unsent_bytes = 0
        # Descriptor of the root of the current tree, None if it cannot be opened; what the root was
        # opened by; and the path in it of the directory that the next requests are about.
        self._root: int | None = None
        self._prefix = b""
        self._directory = b""

    def run(self) -> None:
        """Serve requests until their pipe ends."""
        rest = b""
        with self._beside:
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
            # Without any record, the next file did not fit into the room.
            room = _ROOM_MIN if reading.records else _ROOM_MAX
            if reading.is_refused:
                end = requests.index(b"\0", at)
                self._serve(requests[at:end], _directory_at(requests, at, self._directory))
                at = end + 1
        self._directory = _directory_at(requests, at, self._directory)

    def _read(self, requests: memoryview, room_min: int) -> Reading:
        """Read files until one is refused, the room is used up, or records have to be sent.

        Args:
            requests: whole requests.
            room_min: bytes of the ring to wait for.
        """
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
        """Stage the content of a file that is whole in the ring, and update its packed record.

        The record gets the number of the staged file, or becomes an error message. A content that
        was staged for an earlier file is not staged again; its record keeps the number 0, and the
        committing process can still take the content from the ring.
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
        """Serve a request that the C module refuses."""
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
        """Open the root of another tree, unless another directory is at `prefix` by now."""
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
        """Read a file piece by piece, send a record for each, and return the digest.

        Args:
            fd: the file.
            before: its status before it was read.
            staged: where to copy the content, which is hashed too, or a clone of the file to be;
                None if the content was staged and hashed before.
            digest: the digest from that time; not used otherwise.

        Raises:
            ImportTreeError: the file changed while it was read.
            StagingError: the copy cannot be written.
        """
        hasher = blake3()
        chunker = None
        if staged is not None and before.st_size > UNCHUNKED_MAX:
            chunker = Chunker()
        holes = Holes(fd, before)
        cloned = None if staged is None else staged.clone(fd, before.st_size)
        source = fd if cloned is None else cloned
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
                _fill(source, at, room if is_last else piece, size)
            chunking = None if chunker is None else self._beside.submit(chunker.update, piece)
            if staged is not None:
                hasher.update(piece)
                staged.skip(size) if is_hole else staged.write(piece)
            if chunking is not None:
                chunking.result()
            if is_last:
                break
            self._put(HashKind.PIECE, before, start, size, number, _NO_DIGEST)
            if chunker is not None:
                self._put_bytes(HashKind.CHUNKS, before, chunker.take_packed())
        _check_unchanged(fd, before)
        if chunker is not None:
            # All chunks come before the last record, which then has no content of its own.
            self._put(HashKind.PIECE, before, start, size, number, _NO_DIGEST)
            self._put_bytes(HashKind.CHUNKS, before, chunker.finish())
            start, size = self._reserve(0), 0
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
        """Wait until `size` contiguous bytes of the ring are free, and return their offset.

        If the ring ends before that, the bytes up to its end are skipped. Before it waits, all
        records are sent, as nothing would ever be given back otherwise.
        """
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
        self._put_bytes(kind, _NO_STAT, text.encode()[:_MESSAGE_MAX])

    def _put_bytes(self, kind: HashKind, st: os.stat_result, content: bytes) -> None:
        start = self._reserve(len(content))
        self._ring[start : start + len(content)] = content
        self._put(kind, st, start, len(content), _NO_STAGED, _NO_DIGEST)

    def _add(self, records: bytes | memoryview, end: int, used: int) -> None:
        """Queue packed records, and send all that are queued if they are enough.

        Args:
            records: packed `HashRecord`s.
            end: offset in the ring behind what they refer to.
            used: bytes of the ring that they take, skipped ones included.
        """
        self._records += records
        self._position = end
        self._free_bytes -= used
        self._unsent_bytes += used
        if (
            self._unsent_bytes >= _UNSENT_BYTES_MAX
            or len(self._records) >= _RECORDS_MAX * HASH_RECORD.size
        ):
            self._send()

    def _send(self) -> None:
        data = bytes(self._records)
        while data:
            data = data[os.write(self._results, data) :]
        self._records.clear()
        self._unsent_bytes = 0


def _directory_at(requests: bytes, at: int, before: bytes) -> bytes:
    """Return the path of the directory that holds the file requested at offset `at`.

    That is named by the last request before `at` that begins with a slash. If there is none, it is
    `before`, the directory at the start of `requests`.
    """
    slash = requests.rfind(b"\0/", 0, at) + 1
    if slash == 0 and (at == 0 or not requests.startswith(b"/")):
        return before
    return requests[slash + 1 : requests.index(b"\0", slash)]


def _fill(fd: int, at: int, view: memoryview, size: int) -> None:
    """Read `size` bytes of a file, from offset `at` on, into `view`.

    If `view` is larger than `size`, the bytes must also be the last ones of the file.

    Raises:
        ImportTreeError: the file has fewer bytes, or is found to have more.
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
