"""Decompression of NARs from binary caches, with bounded memory."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from typing import BinaryIO, Final, Protocol

import zstandard

from appliance.errors import NarError

_PIECE_SIZE: Final = 1 << 18


class ByteSource(Protocol):
    """A stream of bytes."""

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` of the next bytes, and none at the end only."""


def _zstd(raw: BinaryIO) -> ByteSource:
    return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)


def _gzip(raw: BinaryIO) -> ByteSource:
    return gzip.GzipFile(fileobj=raw)


# By their names in narinfos.
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
    """The decompressed bytes of a stream.

    Args:
        raw: the compressed bytes; it stays the caller's.
        compression: its name in a narinfo.

    Raises:
        NarError: the compression is unknown.
    """

    def __init__(self, raw: BinaryIO, compression: str) -> None:
        decompressor = _DECOMPRESSORS.get(compression)
        if decompressor is None:
            known = ", ".join(name for name in _DECOMPRESSORS if name)
            raise NarError(f"NAR: unknown compression {compression!r}; known are {known}")
        self._compression = compression
        self._source = decompressor(raw)
        # A buffer, because most tokens of a NAR have a few bytes.
        self._left = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Return at most `size` of the next bytes, and none at the end only.

        Raises:
            NarError: the compressed bytes are damaged, or end too early.
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
            # bz2 raises plain OSErrors for damaged data; those of the system have an errno.
            if exc.errno is None and type(exc) is OSError:
                raise NarError(f"NAR, compressed with {self._compression}: {exc}") from exc
            raise
