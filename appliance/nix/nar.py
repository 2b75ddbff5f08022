"""NARs: the tokens they are made of, a strict streaming reader, and a streaming writer.

    str(s)  = length of s as u64 LE, s, zeros up to a multiple of 8
    archive = str("nix-archive-1") node
    node    = str("(") str("type") body str(")")
    body    = str("symlink")   str("target") str(target)
            | str("regular")   [ str("executable") str("") ] str("contents") str(data)
            | str("directory") { str("entry") str("(") str("name") str(name)
                                 str("node") node str(")") }

The entries of a directory are sorted by name, bytewise.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from appliance.castore.names import NAME_MAX, TARGET_MAX, check_name, check_target
from appliance.errors import DirectoryError, NarError

Buffer = bytes | bytearray | memoryview

# The zeros that follow a string, indexed by the last three bits of its length.
PADDING: Final = tuple(bytes(-size % 8) for size in range(8))

_LENGTH: Final = struct.Struct("<Q")
_LENGTH_SIZE: Final = _LENGTH.size

# The reader yields the content of a file in pieces of at most this many bytes.
_PIECE_SIZE: Final = 1 << 18
# The writer passes framing on once it has more bytes than this.
_FLUSH_SIZE: Final = 1 << 14

# --- Tokens ---


def length(size: int) -> bytes:
    """Return the token that precedes a string of `size` bytes."""
    return _LENGTH.pack(size)


def string(value: bytes) -> bytes:
    """Return `value` with its length and padding."""
    return b"".join((_LENGTH.pack(len(value)), value, PADDING[len(value) & 7]))


def _run(*tokens: bytes) -> bytes:
    return b"".join(map(string, tokens))


# The runs of tokens between the variable parts.
HEADER: Final = _run(b"nix-archive-1", b"(", b"type")
DIRECTORY: Final = _run(b"directory")
SYMLINK: Final = _run(b"symlink", b"target")
REGULAR: Final = _run(b"regular", b"contents")
EXECUTABLE: Final = _run(b"regular", b"executable", b"", b"contents")
ENTRY: Final = _run(b"entry", b"(", b"name")
NODE: Final = _run(b"node", b"(", b"type")
CLOSE: Final = _run(b")")
# Ends the node of an entry, and the entry.
CLOSE_ENTRY: Final = CLOSE + CLOSE

# What remains of such a run once the reader has consumed the token that decides between two.
_ENTRY_REST: Final = ENTRY.removeprefix(string(b"entry"))
_EXECUTABLE_REST: Final = _run(b"", b"contents")
_SYMLINK_REST: Final = _run(b"target")


# --- Reader ---
#
# Every token must be there byte for byte, padding must be zero, names and targets must be valid,
# and the names in a directory strictly ascending. What follows the archive is not read.


class SymlinkRead(NamedTuple):
    """A symlink."""

    target: bytes


class FileRead(NamedTuple):
    """A file; `ContentRead`s of `size` bytes in all follow."""

    size: int
    executable: bool


class ContentRead(NamedTuple):
    """The next part of the content of the file last opened; never empty."""

    data: bytes


class DirectoryRead(NamedTuple):
    """A directory; its entries follow, each an `EntryRead` and a node, then `DirectoryEndRead`."""


class EntryRead(NamedTuple):
    """The name of the node that follows."""

    name: bytes


class DirectoryEndRead(NamedTuple):
    """The directory last opened has no more entries."""


Event = SymlinkRead | FileRead | ContentRead | DirectoryRead | EntryRead | DirectoryEndRead


def read_nar(read: Callable[[int], bytes]) -> Iterator[Event]:
    """Yield what an archive contains.

    Args:
        read: returns the next bytes, at most as many as its argument says; none only at the end of
            the input.

    Raises:
        NarError: the archive breaks a rule. The rule is `truncated` if the input ends within the
            archive.
    """
    source = _Source(read)
    source.expect(HEADER)
    # For each open directory, the name of its last entry.
    last_names: list[bytes] = []
    while True:
        yield from _node(source, last_names)
        while last_names:
            token = source.token(len(b"entry"))
            if token == b"entry":
                yield _entry(source, last_names)
                break
            if token != b")":
                raise source.error(f"found {token!r}, expected an entry or the end of a directory")
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
        source.expect(_SYMLINK_REST)
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
        source.expect(_EXECUTABLE_REST)
    elif token != b"contents":
        raise source.error(f"found {token!r}, expected the contents of a file")
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
    # Only the outermost node is not in an entry.
    if last_names:
        source.expect(CLOSE)


def _checked(source: "_Source", check: Callable[[bytes], bytes], value: bytes) -> bytes:
    try:
        return check(value)
    except DirectoryError as exc:
        raise source.error(str(exc)) from exc


class _Source:
    """The input, and how many bytes of it have been read."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._offset = 0

    def some(self, size: int) -> bytes:
        """Return at least one and at most `size` bytes."""
        data = self._read(size)
        if not data:
            raise NarError(f"NAR ends at offset {self._offset}, within a node", rule="truncated")
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
            raise self.error(f"found {found!r}, expected {tokens!r}")

    def length(self) -> int:
        return int.from_bytes(self.exactly(_LENGTH_SIZE), "little")

    def token(self, maximum: int) -> bytes:
        size = self.length()
        if size > maximum:
            raise self.error(f"string has {size} bytes, expected at most {maximum}")
        value = self.exactly(size)
        self.padding(size)
        return value

    def padding(self, size: int) -> None:
        if any(self.exactly(-size % 8)):
            raise self.error("padding is not zero")

    def error(self, reason: str) -> NarError:
        return NarError(f"NAR, before offset {self._offset}: {reason}")


# --- Writer ---


class NarWriter:
    """Writes one tree as a NAR.

    The caller walks the tree and calls:

    - `entry` before each node but the root;
    - for a file `regular` and then `content` until its size is reached, or else `file`;
    - for a symlink `symlink`;
    - for a directory `directory`, then its entries by ascending name, then `end_directory`;
    - `finish` at the end.

    None of this order is checked, and neither are names and targets.

    Args:
        sink: is called with the next bytes of the NAR. It must be done with the buffer when it
            returns: the buffer may be the caller's own.
    """

    __slots__ = ("_depth", "_missing_bytes", "_pending", "_sink", "_size")

    def __init__(self, sink: Callable[[Buffer], object]) -> None:
        self._sink = sink
        self._size = 0
        self._depth = 0
        self._missing_bytes = 0
        self._pending = HEADER

    def entry(self, name: bytes) -> None:
        """Begin the entry `name` of the innermost open directory."""
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
        """Close the innermost open directory."""
        self._depth -= 1
        self._pending += self._close()

    def regular(self, size: int, *, executable: bool) -> None:
        """Begin a file of `size` bytes; `content` must follow until all of them are written."""
        kind = EXECUTABLE if executable else REGULAR
        self._pending += kind + length(size)
        self._missing_bytes = size
        if size == 0:
            self._pending += self._close()

    def file(self, content: Buffer, *, executable: bool) -> None:
        """Write a whole file."""
        size = len(content)
        kind = EXECUTABLE if executable else REGULAR
        head = b"".join((self._pending, kind, length(size)))
        self._sink(head)
        self._sink(content)
        self._size += len(head) + size
        self._pending = PADDING[size & 7] + self._close()

    def entries(self, data: Buffer) -> None:
        """Write entries of the innermost open directory that are encoded already."""
        self._flush()
        self._sink(data)
        self._size += len(data)

    def content(self, data: Buffer) -> None:
        """Write the next part of the file's content; `data` is not empty.

        Raises:
            NarError: the file would get longer than the size given to `regular`.
        """
        size = len(data)
        if size > self._missing_bytes:
            raise NarError("blob is longer than its node says", rule="blob-too-long")
        self._missing_bytes -= size
        self._flush()
        self._sink(data)
        self._size += size
        if self._missing_bytes == 0:
            # Everything before this content has a multiple of 8 bytes, so the size written so far
            # gives the same padding as the size of the content.
            self._pending = PADDING[self._size & 7] + self._close()

    def finish(self) -> int:
        """Write what is pending and return the size of the NAR in bytes."""
        self._flush()
        return self._size

    def _close(self) -> bytes:
        return CLOSE_ENTRY if self._depth else CLOSE

    def _flush(self) -> None:
        self._sink(self._pending)
        self._size += len(self._pending)
        self._pending = b""
