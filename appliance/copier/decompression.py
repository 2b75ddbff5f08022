"""NARs as binary caches keep them: compressed in one of several ways, or not."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from typing import BinaryIO, Final, Protocol

import zstandard

from appliance.errors import NarError

_PIECE_SIZE: Final = 1 << 18


class ByteSource(Protocol):
    """What bytes are read from."""

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` of the next bytes, and none at the end only."""


def _zstd(raw: BinaryIO) -> ByteSource:
    return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)


def _gzip(raw: BinaryIO) -> ByteSource:
    return gzip.GzipFile(fileobj=raw)


# By the names that narinfos have for them.
_DECOMPRESSORS: Final[dict[str, Callable[[BinaryIO], ByteSource]]] = {
    "none": lambda raw: raw,
    "": lambda raw: raw,
    "xz": lzma.LZMAFile,
    "lzma": lzma.LZMAFile,
    "bzip2": bz2.BZ2File,
    "gzip": _gzip,
    "zstd": _zstd,
}
_ERRORS: Final = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zstandard.ZstdError)


class Decompressed:
    """Bytes as they were before they were compressed.

    Args:
        raw: the compressed bytes; it stays the caller's.
        compression: the name that a narinfo has for it.

    Raises:
        NarError: the compression is unknown.
    """

    def __init__(self, raw: BinaryIO, compression: str) -> None:
        decompressor = _DECOMPRESSORS.get(compression)
        if decompressor is None:
            known = ", ".join(name for name in _DECOMPRESSORS if name)
            raise NarError(f"NAR: compressed with {compression!r}; {known} are known")
        self._compression = compression
        self._source = decompressor(raw)
        # Most of what a NAR is read in are tokens of a few bytes.
        self._left = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Return at most `size` of the next bytes, and none at the end only.

        Raises:
            NarError: what is compressed is damaged, or ends too early.
            OSError: the compressed bytes cannot be read.
        """
        if not self._left:
            self._left = memoryview(self._read())
        data, self._left = bytes(self._left[:size]), self._left[size:]
        return data

    def _read(self) -> bytes:
        try:
            return self._source.read(_PIECE_SIZE)
        except _ERRORS as exc:
            raise NarError(f"NAR, compressed with {self._compression}: {exc}") from exc
        except OSError as exc:
            # bz2 has no error of its own; those of the system have a number.
            if exc.errno is None and type(exc) is OSError:
                raise NarError(f"NAR, compressed with {self._compression}: {exc}") from exc
            raise
