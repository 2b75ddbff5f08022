"""Reading NARs: what the writer writes comes back; every other archive is refused."""

import io
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import NarError
from appliance.nar import wire
from appliance.nar.reader import (
    ContentRead,
    DirectoryEndRead,
    DirectoryRead,
    EntryRead,
    Event,
    FileRead,
    NarTruncatedError,
    SymlinkRead,
    read_nar,
)
from appliance.nar.writer import NarWriter

NAMES = st.binary(min_size=1, max_size=20).filter(
    lambda name: not {0, ord("/")} & set(name) and name not in {b".", b".."}
)
TARGETS = st.binary(min_size=1, max_size=40).filter(lambda target: 0 not in target)
TREES: st.SearchStrategy[object] = st.recursive(
    st.one_of(st.tuples(st.binary(max_size=40), st.booleans()), TARGETS),
    lambda children: st.dictionaries(NAMES, children, max_size=4),
    max_leaves=12,
)


def write(events: Sequence[Event]) -> bytes:
    parts: list[bytes] = []
    writer = NarWriter(lambda data: parts.append(bytes(data)))
    for event in events:
        match event:
            case SymlinkRead(target):
                writer.symlink(target)
            case FileRead(size, executable):
                writer.regular(size, executable=executable)
            case ContentRead(data):
                writer.content(data)
            case DirectoryRead():
                writer.directory()
            case EntryRead(name):
                writer.entry(name)
            case DirectoryEndRead():
                writer.end_directory()
    writer.finish()
    return b"".join(parts)


def events_of(tree: object) -> Iterator[Event]:
    match tree:
        case bytes():
            yield SymlinkRead(tree)
        case (bytes() as content, bool() as is_executable):
            yield FileRead(len(content), is_executable)
            if content:
                yield ContentRead(content)
        case dict():
            yield DirectoryRead()
            for name in sorted(tree):
                yield EntryRead(name)
                yield from events_of(tree[name])
            yield DirectoryEndRead()


def read(data: bytes) -> list[Event]:
    return list(read_nar(io.BytesIO(data).read))


SAMPLE = write(list(events_of({b"a": (b"content", True), b"b": {}, b"c": b"target"})))


@pytest.mark.slow
@given(TREES)
def test_what_was_written_is_read(tree: object) -> None:
    events = list(events_of(tree))

    assert read(write(events)) == events


@given(TREES, st.integers(1, 7))
def test_input_may_come_in_any_pieces(tree: object, piece: int) -> None:
    source = io.BytesIO(write(list(events_of(tree))))

    parts = list(read_nar(lambda size: source.read(min(size, piece))))
    assert write(parts) == source.getvalue()


def test_archive_is_refused_wherever_it_ends() -> None:
    for size in range(len(SAMPLE)):
        with pytest.raises(NarTruncatedError):
            read(SAMPLE[:size])


def test_archive_is_refused_or_another_whichever_byte_changes() -> None:
    original = read(SAMPLE)
    for index in range(len(SAMPLE)):
        changed = bytearray(SAMPLE)
        changed[index] ^= 0x01
        try:
            events = read(bytes(changed))
        except NarError:
            continue
        assert events != original


def test_what_follows_is_not_read() -> None:
    source = io.BytesIO(SAMPLE + b"more")

    list(read_nar(source.read))
    assert source.read() == b"more"


def test_tree_of_any_depth_is_read() -> None:
    depth = 5000
    events: list[Event] = []
    for _ in range(depth):
        events += [DirectoryRead(), EntryRead(b"d")]
    events += [SymlinkRead(b"t"), *[DirectoryEndRead()] * depth]

    assert read(write(events)) == events


@given(st.binary(max_size=200))
def test_any_bytes_give_a_tree_or_a_nar_error(data: bytes) -> None:
    for prefix in (b"", wire.HEADER, wire.HEADER + wire.DIRECTORY):
        with pytest.raises(NarError):
            read(prefix + data + b"\xff")


DIRECTORY = wire.HEADER + wire.DIRECTORY
FILE = wire.REGULAR + wire.string(b"x") + wire.CLOSE
BROKEN = {
    "name empty": DIRECTORY + wire.ENTRY + wire.string(b"") + wire.NODE + FILE,
    "name .": DIRECTORY + wire.ENTRY + wire.string(b".") + wire.NODE + FILE,
    "name ..": DIRECTORY + wire.ENTRY + wire.string(b"..") + wire.NODE + FILE,
    "name with slash": DIRECTORY + wire.ENTRY + wire.string(b"a/b") + wire.NODE + FILE,
    "name with NUL": DIRECTORY + wire.ENTRY + wire.string(b"a\0b") + wire.NODE + FILE,
    "name too long": DIRECTORY + wire.ENTRY + wire.string(b"x" * 256) + wire.NODE + FILE,
    "names equal": DIRECTORY
    + 2 * (wire.ENTRY + wire.string(b"a") + wire.NODE + FILE + wire.CLOSE),
    "names descending": DIRECTORY
    + wire.ENTRY + wire.string(b"b") + wire.NODE + FILE + wire.CLOSE
    + wire.ENTRY + wire.string(b"a") + wire.NODE + FILE + wire.CLOSE,
    "target empty": wire.HEADER + wire.SYMLINK + wire.string(b"") + wire.CLOSE,
    "target with NUL": wire.HEADER + wire.SYMLINK + wire.string(b"a\0") + wire.CLOSE,
    "target too long": wire.HEADER + wire.SYMLINK + wire.string(b"x" * 4096) + wire.CLOSE,
    "executable not empty": wire.HEADER
    + wire.string(b"regular") + wire.string(b"executable") + wire.string(b"1")
    + wire.string(b"contents") + wire.string(b"") + wire.CLOSE,
    "padding not zero": wire.HEADER
    + wire.REGULAR + wire.length(1) + b"x" + b"\0" * 6 + b"\1" + wire.CLOSE,
    "unknown type": wire.HEADER + wire.string(b"fifo") + wire.CLOSE,
    "huge token": wire.HEADER + wire.length(1 << 63),
    "another magic": wire.string(b"nix-archive-2") + wire.string(b"("),
}  # fmt: skip


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_archive_that_breaks_a_rule_is_refused(data: bytes) -> None:
    with pytest.raises(NarError) as caught:
        read(data + b"\0" * 64)

    assert not isinstance(caught.value, NarTruncatedError)
