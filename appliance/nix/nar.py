"""The tokens of a NAR.

    str(s)  = length of s as u64 LE, s, zeros up to a multiple of 8
    archive = str("nix-archive-1") node
    node    = str("(") str("type") body str(")")
    body    = str("symlink")   str("target") str(target)
            | str("regular")   [ str("executable") str("") ] str("contents") str(data)
            | str("directory") { str("entry") str("(") str("name") str(name)
                                 str("node") node str(")") }

Entries are sorted by name, bytewise. The constants below are the runs of tokens between the
variable parts.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from appliance.castore.names import NAME_MAX, TARGET_MAX, check_name, check_target
from appliance.errors import DirectoryError, NarError

_LENGTH: Final = struct.Struct("<Q")

# Zeros that follow a string, by the last three bits of its length.
PADDING: Final = tuple(bytes(-size % 8) for size in range(8))


def length(size: int) -> bytes:
    """Return the token that precedes a string of `size` bytes."""
    return _LENGTH.pack(size)


def string(value: bytes) -> bytes:
    """Return `value` with its length and padding."""
    return b"".join((_LENGTH.pack(len(value)), value, PADDING[len(value) & 7]))


def _run(*tokens: bytes) -> bytes:
    return b"".join(map(string, tokens))


HEADER: Final = _run(b"nix-archive-1", b"(", b"type")
DIRECTORY: Final = _run(b"directory")
SYMLINK: Final = _run(b"symlink", b"target")
REGULAR: Final = _run(b"regular", b"contents")
EXECUTABLE: Final = _run(b"regular", b"executable", b"", b"contents")
ENTRY: Final = _run(b"entry", b"(", b"name")
NODE: Final = _run(b"node", b"(", b"type")
CLOSE: Final = _run(b")")
# Ends the node of an entry and the entry.
CLOSE_ENTRY: Final = CLOSE + CLOSE


# --- A strict, streaming NAR reader ---
#
# Every token must be there byte for byte, padding must be zero, names and targets must be valid,
# and the entries of a directory strictly ascending by name. What follows the archive is not read.

_LENGTH_SIZE: Final = 8
_PIECE_SIZE: Final = 1 << 18

_ENTRY: Final = string(b"entry")
_ENTRY_REST: Final = ENTRY.removeprefix(_ENTRY)
_CONTENTS: Final = string(b"contents")
_EMPTY: Final = string(b"")
_TARGET: Final = string(b"target")


class NarTruncatedError(NarError):
    """The archive ends before its end."""


class SymlinkRead(NamedTuple):
    """A symlink."""

    target: bytes


class FileRead(NamedTuple):
    """A file; its content follows, in pieces that make up `size` bytes."""

    size: int
    executable: bool


class ContentRead(NamedTuple):
    """The next part of the content of a file."""

    data: bytes


class DirectoryRead(NamedTuple):
    """A directory; its entries follow, each an `EntryRead` and a node."""


class EntryRead(NamedTuple):
    """The name of the node that follows."""

    name: bytes


class DirectoryEndRead(NamedTuple):
    """The directory last opened has no more entries."""


Event = SymlinkRead | FileRead | ContentRead | DirectoryRead | EntryRead | DirectoryEndRead


def read_nar(read: Callable[[int], bytes]) -> Iterator[Event]:
    """Yield what an archive contains.

    Args:
        read: returns at most so many of the next bytes, and none at the end only.

    Raises:
        NarTruncatedError: the input ends too early.
        NarError: a rule is broken.
    """
    source = _Source(read)
    source.expect(HEADER)
    # Of each open directory: the name of its last entry.
    last_names: list[bytes] = []
    while True:
        yield from _node(source, last_names)
        while last_names:
            token = source.token(len(b"entry"))
            if token == b"entry":
                yield _entry(source, last_names)
                break
            if token != b")":
                raise source.error(f"{token!r} instead of an entry, or the end of the directory")
            last_names.pop()
            yield DirectoryEndRead()
            _end_entry(source, last_names)
        else:
            return


def _node(source: "_Source", last_names: list[bytes]) -> Iterator[Event]:
    kind = source.token(len(b"directory"))
    if kind == b"directory":
        last_names.append(b"")
        yield DirectoryRead()
        return
    if kind == b"symlink":
        source.expect(_TARGET)
        yield SymlinkRead(_checked(source, check_target, source.token(TARGET_MAX)))
    elif kind == b"regular":
        yield from _file(source)
    else:
        raise source.error(f"unknown type {kind!r}")
    source.expect(CLOSE)
    _end_entry(source, last_names)


def _file(source: "_Source") -> Iterator[Event]:
    token = source.token(len(b"executable"))
    is_executable = token == b"executable"
    if is_executable:
        source.expect(_EMPTY + _CONTENTS)
    elif token != b"contents":
        raise source.error(f"{token!r} instead of the contents of a file")
    size = source.length()
    yield FileRead(size, is_executable)
    left = size
    while left:
        data = source.some(min(left, _PIECE_SIZE))
        left -= len(data)
        yield ContentRead(data)
    source.padding(size)


def _entry(source: "_Source", last_names: list[bytes]) -> EntryRead:
    source.expect(_ENTRY_REST)
    name = _checked(source, check_name, source.token(NAME_MAX))
    if name <= last_names[-1]:
        raise source.error(f"name {name!r} does not come after {last_names[-1]!r}")
    last_names[-1] = name
    source.expect(NODE)
    return EntryRead(name)


def _end_entry(source: "_Source", last_names: list[bytes]) -> None:
    # Every node but the outermost is in an entry.
    if last_names:
        source.expect(CLOSE)


def _checked(source: "_Source", check: Callable[[bytes], bytes], value: bytes) -> bytes:
    try:
        return check(value)
    except DirectoryError as exc:
        raise source.error(str(exc)) from exc


class _Source:
    """Bytes, and how many there were."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._offset = 0

    def some(self, size: int) -> bytes:
        """Return at least one, and at most `size` bytes."""
        data = self._read(size)
        if not data:
            raise NarTruncatedError(f"the NAR ends at offset {self._offset}, within a node")
        self._offset += len(data)
        return data

    def exactly(self, size: int) -> bytes:
        data = self.some(size) if size else b""
        while len(data) < size:
            data += self.some(size - len(data))
        return data

    def expect(self, tokens: bytes) -> None:
        found = self.exactly(len(tokens))
        if found != tokens:
            raise self.error(f"{found!r} instead of {tokens!r}")

    def length(self) -> int:
        return int.from_bytes(self.exactly(_LENGTH_SIZE), "little")

    def token(self, maximum: int) -> bytes:
        size = self.length()
        if size > maximum:
            raise self.error(f"a string of {size} bytes, where {maximum} are allowed")
        value = self.exactly(size)
        self.padding(size)
        return value

    def padding(self, size: int) -> None:
        if any(self.exactly(-size % 8)):
            raise self.error("padding that is not zero")

    def error(self, reason: str) -> NarError:
        return NarError(f"NAR, before offset {self._offset}: {reason}")


# --- A streaming NAR writer ---

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
        self._pending = HEADER

    def entry(self, name: bytes) -> None:
        """Begin the entry `name` of the open directory."""
        size = len(name)
        pending = b"".join((self._pending, ENTRY, length(size), name, PADDING[size & 7], NODE))
        self._pending = pending
        if len(pending) > _FLUSH_SIZE:
            self._flush()

    def symlink(self, target: bytes) -> None:
        """Write a symlink."""
        self._pending += SYMLINK + string(target) + self._close()

    def directory(self) -> None:
        """Open a directory."""
        self._pending += DIRECTORY
        self._depth += 1

    def end_directory(self) -> None:
        """Close the open directory."""
        self._depth -= 1
        self._pending += self._close()

    def regular(self, size: int, *, executable: bool) -> None:
        """Begin a file of `size` bytes, all to be brought by `content` before anything else."""
        kind = EXECUTABLE if executable else REGULAR
        self._pending += kind + length(size)
        self._missing_bytes = size
        if size == 0:
            self._pending += self._close()

    def file(self, content: Buffer, *, executable: bool) -> None:
        """Write a file whole."""
        size = len(content)
        kind = EXECUTABLE if executable else REGULAR
        head = b"".join((self._pending, kind, length(size)))
        self._sink(head)
        self._sink(content)
        self._size += len(head) + size
        self._pending = PADDING[size & 7] + self._close()

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
            self._pending = PADDING[self._size & 7] + self._close()

    def finish(self) -> int:
        """Write what is left and return the size of the NAR in bytes."""
        self._flush()
        return self._size

    def _close(self) -> bytes:
        return CLOSE_ENTRY if self._depth else CLOSE

    def _flush(self) -> None:
        self._sink(self._pending)
        self._size += len(self._pending)
        self._pending = b""
