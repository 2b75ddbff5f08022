"""A strict, streaming NAR reader.

Every token must be there byte for byte, padding must be zero, names and targets must be valid, and
the entries of a directory strictly ascending by name. What follows the archive is not read.
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from appliance.castore.names import NAME_MAX, TARGET_MAX, check_name, check_target
from appliance.errors import DirectoryError, NarError
from appliance.nar import wire

_LENGTH_SIZE: Final = 8
_PIECE_SIZE: Final = 1 << 18

_ENTRY: Final = wire.string(b"entry")
_ENTRY_REST: Final = wire.ENTRY.removeprefix(_ENTRY)
_CONTENTS: Final = wire.string(b"contents")
_EMPTY: Final = wire.string(b"")
_TARGET: Final = wire.string(b"target")


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
    source.expect(wire.HEADER)
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
    source.expect(wire.CLOSE)
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
    source.expect(wire.NODE)
    return EntryRead(name)


def _end_entry(source: "_Source", last_names: list[bytes]) -> None:
    # Every node but the outermost is in an entry.
    if last_names:
        source.expect(wire.CLOSE)


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
