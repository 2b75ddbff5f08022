"""Reading NARs: the reader accepts what the writer writes, and refuses every other archive."""

import io
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import NarError
from appliance.nix import nar
from appliance.nix.nar import (
    ContentRead,
    DirectoryEndRead,
    DirectoryRead,
    EntryRead,
    Event,
    FileRead,
    NarWriter,
    SymlinkRead,
    read_nar,
)
from tests.refusal import refused

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
        with refused(NarError, "truncated"):
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
    for prefix in (b"", nar.HEADER, nar.HEADER + nar.DIRECTORY):
        with pytest.raises(NarError):
            read(prefix + data + b"\xff")


DIRECTORY = nar.HEADER + nar.DIRECTORY
FILE = nar.REGULAR + nar.string(b"x") + nar.CLOSE
BROKEN = {
    "name empty": DIRECTORY + nar.ENTRY + nar.string(b"") + nar.NODE + FILE,
    "name .": DIRECTORY + nar.ENTRY + nar.string(b".") + nar.NODE + FILE,
    "name ..": DIRECTORY + nar.ENTRY + nar.string(b"..") + nar.NODE + FILE,
    "name with slash": DIRECTORY + nar.ENTRY + nar.string(b"a/b") + nar.NODE + FILE,
    "name with NUL": DIRECTORY + nar.ENTRY + nar.string(b"a\0b") + nar.NODE + FILE,
    "name too long": DIRECTORY + nar.ENTRY + nar.string(b"x" * 256) + nar.NODE + FILE,
    "names equal": DIRECTORY
    + 2 * (nar.ENTRY + nar.string(b"a") + nar.NODE + FILE + nar.CLOSE),
    "names descending": DIRECTORY
    + nar.ENTRY + nar.string(b"b") + nar.NODE + FILE + nar.CLOSE
    + nar.ENTRY + nar.string(b"a") + nar.NODE + FILE + nar.CLOSE,
    "target empty": nar.HEADER + nar.SYMLINK + nar.string(b"") + nar.CLOSE,
    "target with NUL": nar.HEADER + nar.SYMLINK + nar.string(b"a\0") + nar.CLOSE,
    "target too long": nar.HEADER + nar.SYMLINK + nar.string(b"x" * 4096) + nar.CLOSE,
    "executable not empty": nar.HEADER
    + nar.string(b"regular") + nar.string(b"executable") + nar.string(b"1")
    + nar.string(b"contents") + nar.string(b"") + nar.CLOSE,
    "padding not zero": nar.HEADER
    + nar.REGULAR + nar.length(1) + b"x" + b"\0" * 6 + b"\1" + nar.CLOSE,
    "unknown type": nar.HEADER + nar.string(b"fifo") + nar.CLOSE,
    "huge token": nar.HEADER + nar.length(1 << 63),
    "another magic": nar.string(b"nix-archive-2") + nar.string(b"("),
}  # fmt: skip


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_archive_that_breaks_a_rule_is_refused(data: bytes) -> None:
    with pytest.raises(NarError) as caught:
        read(data + b"\0" * 64)

    assert caught.value.rule != "truncated"
