"""NARs that clients have sent, until the narinfos that describe them come.

Nix sends the NAR of a path first, then its narinfo. Until then nothing of it is in the store: the
NAR is kept decompressed in a file without a name, which is gone when the process ends, however it
ends.
"""

import bz2
import hashlib
import lzma
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, Protocol

from zstandard import ZstdDecompressor, ZstdError

from appliance.errors import InvalidRequestError, NarError, ServiceLimitError, disk_error
from appliance.nix.hashes import NixHash
from appliance.nix.nar import ContentRead, read_nar
from appliance.services.nar_extent import ENTRIES_MAX, NarTooLargeError

# A narinfo follows its NAR at once; after this long it will not come any more. After one that was
# refused, another one may follow.
_LIFETIME_S: Final = 3600.0
_REFUSED_LIFETIME_S: Final = 60.0
_PENDING_MAX: Final = 256
# In bytes, of all pending NARs together; decompressed.
_PENDING_BYTES_MAX: Final = 64 << 30
# In bytes. What decompressors make at a time; the memory that one of lzma may take, which holds the
# dictionary of `xz -9`; and the window of zstd, which holds that of `zstd -19`.
_PIECE_SIZE: Final = 1 << 20
_LZMA_MEMORY: Final = 96 << 20
_ZSTD_WINDOW: Final = 16 << 20
# 4 bytes of zstd may stand for 128 KiB, so this may for 16 MiB.
_ZSTD_INPUT: Final = 1 << 9


class PendingNar(NamedTuple):
    """A NAR that is complete and well formed, in `file`, and the file that it came as."""

    file: BinaryIO
    nar_hash: NixHash
    nar_size: int
    file_hash: NixHash
    file_size: int
    compression: str


class DiskBudget:
    """How many bytes uploaded NARs take, those that are being received included."""

    def __init__(self, maximum: int = _PENDING_BYTES_MAX) -> None:
        self._left = maximum
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Account for `size` more bytes.

        Raises:
            ServiceLimitError: there is no room for them, and they are not accounted for.
        """
        with self._lock:
            if size > self._left:
                raise ServiceLimitError("uploaded NARs that wait for their narinfos are too large")
            self._left -= size

    def give(self, size: int) -> None:
        """Account for `size` bytes that are gone."""
        with self._lock:
            self._left += size


class _Entry:
    def __init__(self, nar: PendingNar) -> None:
        self.nar = nar
        self.num_expected = 0
        self.deadline_s = 0.0
        self.is_refused = False
        self.num_users = 0


class PendingNars:
    """The NARs that wait for narinfos, by their URLs."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = DiskBudget()
        self._entries: dict[str, _Entry] = {}
        self._clock = clock

    def __len__(self) -> int:
        """Return the number of NARs that wait."""
        return len(self._entries)

    def check_room(self) -> None:
        """Check that one more NAR may come.

        Raises:
            ServiceLimitError: too many are waiting.
        """
        self.drop_old()
        if len(self._entries) >= _PENDING_MAX:
            self._drop_one_refused()
        if len(self._entries) >= _PENDING_MAX:
            raise ServiceLimitError("too many uploaded NARs wait for their narinfos")

    def drop_old(self) -> None:
        """Drop those that have waited too long."""
        now_s = self._clock()
        for url, entry in list(self._entries.items()):
            if entry.deadline_s <= now_s and not entry.num_users:
                self._remove(url)

    def add(self, url: str, nar: PendingNar) -> None:
        """Keep a NAR for one narinfo; equal NARs of several paths share one file."""
        entry = self._entries.get(url)
        if entry is None:
            entry = self._entries[url] = _Entry(nar)
        else:
            self._drop(nar)
        entry.num_expected += 1
        entry.is_refused = False
        entry.deadline_s = self._clock() + _LIFETIME_S

    def borrow(self, url: str) -> PendingNar:
        """Return a NAR, which stays open until it is given back.

        Raises:
            InvalidRequestError: it was not uploaded, or too long ago.
        """
        entry = self._entries.get(url)
        if entry is None:
            raise InvalidRequestError(f"URL: {url[:100]} has not been uploaded just before")
        entry.num_users += 1
        return entry.nar

    def give_back(self, url: str, *, is_done: bool) -> None:
        """End the use of a NAR; without `is_done`, its narinfo was refused."""
        entry = self._entries[url]
        entry.num_users -= 1
        entry.num_expected -= is_done
        if not is_done:
            entry.is_refused = True
            deadline_s = self._clock() + _REFUSED_LIFETIME_S
            entry.deadline_s = min(entry.deadline_s, deadline_s)
        if entry.num_expected <= 0 and not entry.num_users:
            self._remove(url)

    def close(self) -> None:
        """Drop all of them."""
        for url in list(self._entries):
            self._remove(url)

    def _drop_one_refused(self) -> None:
        # They are in the order in which they came.
        for url, entry in self._entries.items():
            if entry.is_refused and not entry.num_users:
                self._remove(url)
                return

    def _remove(self, url: str) -> None:
        self._drop(self._entries.pop(url).nar)

    def _drop(self, nar: PendingNar) -> None:
        nar.file.close()
        self.budget.give(nar.nar_size)


class NarReceiver:
    """Takes in the file of one NAR; its methods block, and are called one after another.

    Args:
        file_hash: SHA-256 that the file must have, in base 32.
        compression: how the file is compressed.
        directory: where the NAR is kept; None for the usual place of temporary files.
        budget: what the bytes of the NAR are taken from; `abort` gives them back.

    Raises:
        StoreError: no file can be made.
    """

    def __init__(
        self, file_hash: str, compression: str, directory: Path | None, budget: DiskBudget
    ) -> None:
        self._expected = NixHash.parse(f"sha256:{file_hash}")
        self._compression = compression
        self._decompress = _DECOMPRESSORS[compression]()
        self._budget = budget
        self._file_hasher = hashlib.sha256()
        self._nar_hasher = hashlib.sha256()
        self._file_size = 0
        self._nar_size = 0
        self._where = directory or Path(tempfile.gettempdir())
        try:
            self._file = tempfile.TemporaryFile(dir=self._where, buffering=0)  # noqa: SIM115 - closed by abort
        except OSError as exc:
            raise disk_error(exc, self._where) from exc

    def receive(self, data: bytes) -> None:
        """Take in the next bytes of the file.

        Raises:
            InvalidRequestError: the compression is broken.
            ServiceLimitError: there are too many bytes.
            StoreError: the disk is full, or fails.
        """
        self._file_hasher.update(data)
        self._file_size += len(data)
        try:
            for piece in self._decompress.pieces(data):
                self._budget.take(len(piece))
                self._nar_size += len(piece)
                self._nar_hasher.update(piece)
                _write_all(self._file, piece)
        except _BROKEN as exc:
            raise InvalidRequestError(f"{self._compression}: {exc}") from exc
        except OSError as exc:
            if exc.errno is None:  # That is how bz2 says it.
                raise InvalidRequestError(f"{self._compression}: {exc}") from exc
            raise disk_error(exc, self._where) from exc

    def finish(self) -> PendingNar:
        """Check that the file is whole and is a NAR; the caller owns the result.

        Raises:
            InvalidRequestError: it has another hash, or ends within the compressed data.
            NarError: it is not a NAR.
        """
        found = NixHash("sha256", self._file_hasher.digest())
        if found != self._expected:
            raise InvalidRequestError(f"file has the hash {found}, expected {self._expected}")
        if not self._decompress.is_at_end():
            raise InvalidRequestError(f"{self._compression}: the data ends too early")
        _check_nar(self._file, self._nar_size)
        nar_hash = NixHash("sha256", self._nar_hasher.digest())
        return PendingNar(
            self._file, nar_hash, self._nar_size, found, self._file_size, self._compression
        )

    def abort(self) -> None:
        """Drop what has come; not to be called after `finish` has returned."""
        self._file.close()
        self._budget.give(self._nar_size)


def buffered(file: BinaryIO) -> BinaryIO:
    """Return a reader of a NAR from its start, with an offset of its own; the caller closes it."""
    return Path(f"/proc/self/fd/{file.fileno()}").open("rb", buffering=_PIECE_SIZE)


def _check_nar(file: BinaryIO, size: int) -> None:
    num_nodes = 0
    with buffered(file) as reader:
        for event in read_nar(reader.read):
            num_nodes += not isinstance(event, ContentRead)
            if num_nodes > 3 * ENTRIES_MAX:
                raise NarTooLargeError(f"NAR has more than {ENTRIES_MAX} entries")
        if reader.tell() != size:
            raise NarError(
                f"NAR ends at offset {reader.tell()}, but {size} bytes came", rule="trailing-data"
            )


def _write_all(file: BinaryIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


# --- Decompressors: none makes more than a bounded piece at a time, whatever the input says ---


class _Decompressor(Protocol):
    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Yield what the next bytes of the file decompress to."""

    def is_at_end(self) -> bool:
        """Whether the file may end here."""


class _Plain:
    def pieces(self, data: bytes) -> Iterator[bytes]:
        yield data

    def is_at_end(self) -> bool:
        return True


class _Stream(Protocol):
    """What the decompressors of the standard library have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Streams:
    """One stream after another, as parallel compressors write them."""

    def __init__(self, new_stream: Callable[[], _Stream]) -> None:
        self._new_stream = new_stream
        self._stream = new_stream()

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._stream.eof:
                if not data:
                    return
                self._stream = self._new_stream()
            yield self._stream.decompress(data, _PIECE_SIZE)
            data = self._stream.unused_data if self._stream.eof else b""
            if not self._stream.eof and self._stream.needs_input:
                return

    def is_at_end(self) -> bool:
        return self._stream.eof


class _Zstd:
    """The same for zstd, which takes no limit of what it may return, but little input."""

    def __init__(self) -> None:
        self._decompressor = ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._stream = self._decompressor.decompressobj()

    def pieces(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), _ZSTD_INPUT):
            part = data[start : start + _ZSTD_INPUT]
            while part:
                if self._stream.eof:
                    self._stream = self._decompressor.decompressobj()
                yield self._stream.decompress(part)
                part = self._stream.unused_data if self._stream.eof else b""

    def is_at_end(self) -> bool:
        return self._stream.eof


def _lzma_stream() -> _Stream:
    return lzma.LZMADecompressor(memlimit=_LZMA_MEMORY)


_BROKEN: Final = (lzma.LZMAError, ZstdError, EOFError, ValueError)
_DECOMPRESSORS: Final[dict[str, Callable[[], _Decompressor]]] = {
    "none": _Plain,
    "xz": lambda: _Streams(_lzma_stream),
    "bzip2": lambda: _Streams(bz2.BZ2Decompressor),
    "zstd": _Zstd,
}
