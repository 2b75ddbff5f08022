"""A streaming NAR writer."""

from collections.abc import Callable
from typing import Final

from appliance.errors import NarError
from appliance.nar import wire

Buffer = bytes | bytearray | memoryview

_FLUSH_SIZE: Final = 1 << 14


class NarWriter:
    """Frames one tree and hands its bytes to `sink`, which is done with a buffer when it returns.

    The caller walks the tree: `entry` before each node but the root; `regular`, `content`... for a
    file; `symlink`; or `directory`, its entries by ascending name, `end_directory`. Then `finish`.
    """

    __slots__ = ("_depth", "_missing_bytes", "_pending", "_sink", "_size")

    def __init__(self, sink: Callable[[Buffer], object]) -> None:
        self._sink = sink
        self._size = 0
        self._depth = 0
        self._missing_bytes = 0
        self._pending = wire.HEADER

    def entry(self, name: bytes) -> None:
        """Begin the entry `name` of the open directory."""
        size = len(name)
        pending = b"".join(
            (self._pending, wire.ENTRY, wire.length(size), name, wire.PADDING[size & 7], wire.NODE)
        )
        self._pending = pending
        if len(pending) > _FLUSH_SIZE:
            self._flush()

    def symlink(self, target: bytes) -> None:
        """Write a symlink."""
        self._pending += wire.SYMLINK + wire.string(target) + self._close()

    def directory(self) -> None:
        """Open a directory."""
        self._pending += wire.DIRECTORY
        self._depth += 1

    def end_directory(self) -> None:
        """Close the open directory."""
        self._depth -= 1
        self._pending += self._close()

    def regular(self, size: int, *, executable: bool) -> None:
        """Begin a file of `size` bytes, all to be brought by `content` before anything else."""
        kind = wire.EXECUTABLE if executable else wire.REGULAR
        self._pending += kind + wire.length(size)
        self._missing_bytes = size
        if size == 0:
            self._pending += self._close()

    def file(self, content: Buffer, *, executable: bool) -> None:
        """Write a file whole."""
        size = len(content)
        kind = wire.EXECUTABLE if executable else wire.REGULAR
        head = b"".join((self._pending, kind, wire.length(size)))
        self._sink(head)
        self._sink(content)
        self._size += len(head) + size
        self._pending = wire.PADDING[size & 7] + self._close()

    def entries(self, data: Buffer) -> None:
        """Write whole entries of the open directory, framed already."""
        self._flush()
        self._sink(data)
        self._size += len(data)

    def content(self, data: Buffer) -> None:
        """Write the next part of the file's content, not empty.

        Raises:
            NarError: more than the size stated.
        """
        size = len(data)
        if size > self._missing_bytes:
            raise NarError("a blob is longer than its node says")
        self._missing_bytes -= size
        self._flush()
        self._sink(data)
        self._size += size
        if self._missing_bytes == 0:
            self._pending = wire.PADDING[self._size & 7] + self._close()

    def finish(self) -> int:
        """Write what is left and return the size of the NAR in bytes."""
        self._flush()
        return self._size

    def _close(self) -> bytes:
        return wire.CLOSE_ENTRY if self._depth else wire.CLOSE

    def _flush(self) -> None:
        self._sink(self._pending)
        self._size += len(self._pending)
        self._pending = b""
