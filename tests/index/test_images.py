"""The images are what the generated codec makes of the same values, laid out as documented."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.castore.digest import Digest
from appliance.castore.nodes import DirectoryNode, FileNode, Node, SymlinkNode
from appliance.errors import StoreError
from appliance.fuse_proto import _wire
from appliance.fuse_proto._wire import Attr, AttrOut, Direntplus, EntryOut
from appliance.fuse_proto.encode import FOREVER_S
from appliance.index import images
from appliance.index.children import Child, Kind, child_of, identity
from appliance.index.images import Entry

MODES = {
    Kind.DIRECTORY: 0o040555,
    Kind.FILE: 0o100444,
    Kind.EXECUTABLE: 0o100555,
    Kind.SYMLINK: 0o120444,
}
NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: name not in {b".", b".."} and not {0, ord("/")} & set(name)
)
ENTRIES = st.builds(
    Entry,
    NAMES,
    st.sampled_from(Kind),
    st.integers(2, 2**32 - 2),
    st.integers(0, 2**64 - 512),
)
DIGEST = Digest.of(b"content")


def attr(kind: Kind, number: int, size: int) -> Attr:
    return Attr(
        ino=number,
        size=size,
        blocks=-(-size // 512),
        atime=1,
        mtime=1,
        ctime=1,
        atimensec=0,
        mtimensec=0,
        ctimensec=0,
        mode=MODES[kind],
        nlink=1,
        uid=0,
        gid=0,
        rdev=0,
        blksize=4096,
        flags=0,
    )


def entry_out(entry: Entry, nodeid: int) -> EntryOut:
    return EntryOut(
        nodeid=nodeid,
        generation=0,
        entry_valid=FOREVER_S,
        attr_valid=FOREVER_S,
        entry_valid_nsec=0,
        attr_valid_nsec=0,
        attr=attr(Kind(entry.kind), entry.number, entry.size),
    )


@given(ENTRIES, st.integers(1, 2**63 - 1), st.integers(0, 2**64 - 1))
def test_a_record_is_what_the_codec_packs(entry: Entry, off: int, nodeid: int) -> None:
    record = images.record(entry, off, nodeid)
    plus: Direntplus = _wire.unpack_direntplus(record)
    assert plus.entry_out == entry_out(entry, nodeid)
    assert plus.dirent == _wire.Dirent(
        entry.number, off, len(entry.name), MODES[Kind(entry.kind)] >> 12
    )
    assert record[_wire.DIRENTPLUS_SIZE :].rstrip(b"\0") == entry.name
    assert record == (_wire.pack_direntplus(plus) + entry.name).ljust(len(record), b"\0")
    assert len(record) % 8 == 0
    assert len(record) - _wire.DIRENTPLUS_SIZE - len(entry.name) < 8


@given(st.lists(ENTRIES, max_size=40, unique_by=lambda entry: entry.name))
def test_a_directory_image_has_the_documented_layout(entries: list[Entry]) -> None:
    entries.sort()
    image = images.directory_image(7, entries)
    magic, count = array("I", image[:8])
    assert image[:4] == b"DIR1"
    assert magic == images.MAGIC
    assert count == len(entries) + 2
    table = array("I", image[8 : 8 + 4 * (count + 1)])
    assert table[-1] == len(image)
    assert table[0] == (8 + 4 * (count + 1) + 7) // 8 * 8
    assert not any(image[8 + 4 * (count + 1) : table[0]])
    starts = [word & ~1 for word in table]
    assert all(start % 8 == 0 for start in starts)
    dots = [_wire.unpack_direntplus(image, start) for start in starts[:2]]
    assert [dot.entry_out for dot in dots] == [EntryOut(0, 0, 0, 0, 0, 0, Attr(*[0] * 16))] * 2
    assert [dot.dirent for dot in dots] == [
        _wire.Dirent(7, 1, 1, 4),
        _wire.Dirent(images.PARENT_INO, 2, 2, 4),
    ]
    assert [word & 1 for word in table[:2]] == [0, 0]
    for index, entry in enumerate(entries, 2):
        record = image[starts[index] : starts[index + 1]]
        assert record == images.record(entry, index + 1, entry.number)
        assert table[index] & 1 == (entry.kind == Kind.DIRECTORY)


@given(st.lists(ENTRIES, max_size=40, unique_by=lambda entry: entry.name), NAMES)
def test_a_record_is_found_by_its_name_and_by_no_other(entries: list[Entry], other: bytes) -> None:
    entries.sort()
    image = memoryview(images.directory_image(7, entries))
    for entry in entries:
        word = images.find_record(image, entry.name)
        nodeid = entry.number
        if entry.kind == Kind.DIRECTORY:
            nodeid |= images.position(entry.name, 99) << 32
        found = _wire.unpack_entry_out(images.entry_at(image, word, entry.name, 99))
        assert found == entry_out(entry, nodeid)
    if other not in {entry.name for entry in entries}:
        assert images.find_record(image, other) == 0
    assert images.find_record(image, b".") == images.find_record(image, b"..") == 0


def test_a_position_depends_on_the_name_and_on_the_whole_parent_nodeid() -> None:
    places = [(b"lib", 5), (b"lib", 5 | 1 << 32), (b"lib", 6), (b"bin", 5)]
    assert len({images.position(name, parent) for name, parent in places}) == len(places)
    assert images.position(b"lib", 5) < 2**32


@pytest.mark.parametrize("kind", Kind)
def test_a_content_record_holds_the_getattr_reply_and_all_the_rest(kind: Kind) -> None:
    target = b"../target" if kind == Kind.SYMLINK else b""
    record = memoryview(images.content_record(9, Child(b"x", kind, DIGEST, 5000, target)))
    assert bytes(images.attr_out_of(record)) == _wire.pack_attr_out(
        AttrOut(FOREVER_S, 0, attr(kind, 9, 5000))
    )
    assert images.kind_of(record) == kind
    assert images.size_of(record) == 5000
    assert bytes(images.digest_of(record)) == DIGEST
    assert bytes(images.target_of(record)) == target


@pytest.mark.parametrize(("generation", "mtime"), [(0, (1, 0)), (1, (1, 1)), (10**9 + 7, (2, 7))])
def test_the_mtime_of_the_root_grows_with_the_store(
    generation: int, mtime: tuple[int, int]
) -> None:
    reply = _wire.unpack_attr_out(images.root_attr_out(generation))
    assert (reply.attr.mtime, reply.attr.mtimensec) == mtime
    assert (reply.attr_valid, reply.attr.ino, reply.attr.mode) == (1, 1, 0o040555)


def test_an_image_that_outgrows_its_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_IMAGE_SIZE_MAX", 1000)
    entries = [Entry(b"%02d" % number, Kind.FILE, number, 0) for number in range(2, 9)]
    with pytest.raises(StoreError, match="7 entries is too big"):
        images.directory_image(9, entries)


def test_identity_is_kind_content_and_size() -> None:
    nodes: list[Node] = [
        FileNode(b"a", DIGEST, 7, executable=False),
        FileNode(b"a", DIGEST, 7, executable=True),
        FileNode(b"a", DIGEST, 8, executable=False),
        DirectoryNode(b"a", DIGEST, 7),
        SymlinkNode(b"a", b"content"),
    ]
    assert len({identity(child_of(node)) for node in nodes}) == len(nodes)
    for node in nodes:
        assert identity(child_of(node._replace(name=b"b"))) == identity(child_of(node))
    # Who wrote a DirectoryNode decides how its size is counted, not what it contains.
    assert identity(child_of(DirectoryNode(b"a", DIGEST, 8))) == identity(child_of(nodes[3]))
