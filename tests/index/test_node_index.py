"""Numbers, images and the root's entries as they are assigned, shared and given up."""

import multiprocessing
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.castore.nodes import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.errors import StoreError
from appliance.fuse_proto import _wire
from appliance.index import images, node_index
from appliance.index.children import Kind
from appliance.index.node_index import NodeIndex

DEADLINE_S = 30
BOOT = "00000000-0000-4000-8000-000000000001"
OTHER_BOOT = "00000000-0000-4000-8000-000000000002"


def blob(name: bytes, content: bytes, *, executable: bool = False) -> FileNode:
    return FileNode(name, Digest.of(content), len(content), executable)


def subdirectory(name: bytes, directory: Directory) -> DirectoryNode:
    return DirectoryNode(name, directory.digest(), directory.size())


def numbers_below(index: NodeIndex, number: int) -> dict[bytes, int]:
    with index.read() as txn:
        image = index.image(txn, number)
        assert image is not None
        words = image.cast("I")
        found = {}
        for at in words[2 : 2 + words[1]]:
            plus = _wire.unpack_direntplus(image, at & ~1)
            start = (at & ~1) + _wire.DIRENTPLUS_SIZE
            found[bytes(image[start : start + plus.dirent.namelen])] = plus.entry_out.nodeid
        return found


def add(index: NodeIndex, number: int, directory: Directory) -> dict[bytes, int]:
    index.write(lambda txn: index.add_directory(txn, number, directory))
    return numbers_below(index, number)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[NodeIndex]:
    opened = NodeIndex.open(tmp_path, is_readonly=False)
    yield opened
    opened.close()


def test_children_get_sequential_numbers_from_2_in_the_order_of_their_names(
    index: NodeIndex,
) -> None:
    directory = Directory(
        [subdirectory(b"b", Directory())],
        [blob(b"a", b"1"), blob(b"d", b"2")],
        [SymlinkNode(b"c", b"t")],
    )
    assert add(index, 100, directory) == {b".": 0, b"..": 0, b"a": 2, b"b": 3, b"c": 4, b"d": 5}


def test_equal_content_gets_one_number_wherever_it_is_and_the_executable_bit_another(
    index: NodeIndex,
) -> None:
    empty = subdirectory(b"e", Directory())
    one = add(
        index,
        100,
        Directory([empty], [blob(b"a", b"1"), blob(b"b", b"1")], [SymlinkNode(b"l", b"1")]),
    )
    two = add(
        index,
        101,
        Directory(
            [empty],
            [blob(b"x", b"1", executable=True), blob(b"z", b"1")],
            [SymlinkNode(b"m", b"1")],
        ),
    )
    assert one[b"a"] == one[b"b"] == two[b"z"]
    assert one[b"l"] == two[b"m"]
    assert one[b"e"] == two[b"e"]
    assert len({one[b"a"], one[b"l"], one[b"e"], two[b"x"]}) == 4


def test_a_directory_that_has_an_image_keeps_it(index: NodeIndex) -> None:
    first = add(index, 100, Directory(files=[blob(b"a", b"1")]))
    assert add(index, 100, Directory(files=[blob(b"b", b"2")])) == first


def test_a_content_record_tells_what_a_number_stands_for(index: NodeIndex) -> None:
    numbers = add(
        index, 100, Directory(files=[blob(b"a", b"1")], symlinks=[SymlinkNode(b"l", b"to")])
    )
    with index.read() as txn:
        file = index.record(txn, numbers[b"a"])
        link = index.record(txn, numbers[b"l"])
        assert file is not None
        assert link is not None
        assert (images.kind_of(file), images.size_of(file)) == (Kind.FILE, 1)
        assert bytes(images.digest_of(file)) == Digest.of(b"1")
        assert (images.kind_of(link), bytes(images.target_of(link))) == (Kind.SYMLINK, b"to")
        assert index.record(txn, 1) is None
        assert index.record(txn, 2**32 - 1) is None
        assert index.image(txn, numbers[b"a"]) is None


def test_root_entries_keep_their_place_in_the_listing(index: NodeIndex) -> None:
    nodes: list[Node] = [
        blob(b"file", b"1"),
        subdirectory(b"dir", Directory()),
        blob(b"again", b"1"),
    ]
    for node in [*nodes, *nodes, blob(b"file", b"other content")]:
        index.write(partial(index.add_root, node=node))
    with index.read() as txn:
        listing = [_wire.unpack_direntplus(record) for record in index.root_listing(txn, 0)]
        assert [plus.dirent.off for plus in listing] == [1, 2, 3, 4, 5]
        assert [plus.entry_out.nodeid for plus in listing[:2]] == [0, 0]
        assert [plus.dirent.ino for plus in listing] == [1, 1, 2, 3, 2]
        place = images.position(b"dir", 1) << 32
        assert [plus.entry_out.nodeid for plus in listing[2:]] == [2, place | 3, 2]
        for node, plus in zip(nodes, listing[2:], strict=True):
            entry = index.root_entry(txn, node.name)
            assert entry is not None
            assert _wire.unpack_entry_out(entry) == plus.entry_out
        assert len(list(index.root_listing(txn, 4))) == 1
        assert list(index.root_listing(txn, 5)) == list(index.root_listing(txn, 2**64 - 1)) == []
        assert index.root_entry(txn, b"absent") is None


def test_the_generation_of_the_root_never_goes_back(index: NodeIndex) -> None:
    for generation in (7, 5):
        index.write(partial(index.set_root_generation, generation=generation))
    with index.read() as txn:
        assert index.root_generation(txn) == 7


def test_a_root_of_another_store_is_emptied_and_its_numbers_stay(index: NodeIndex) -> None:
    def claim(identity: bytes, generation: int) -> int:
        index.write(partial(index.claim_root, store_identity=identity, generation=generation))
        with index.read() as txn:
            assert (index.root_entry(txn, b"file") is None) == (index.root_generation(txn) == 0)
            assert index.record(txn, 2) is not None
            return len(list(index.root_listing(txn, 0)))

    def fill() -> None:
        index.write(partial(index.add_root, node=blob(b"file", b"1")))
        index.write(partial(index.set_root_generation, generation=7))

    fill()
    assert claim(b"store 1", 7) == 2
    fill()
    assert claim(b"store 1", 8) == 3
    assert claim(b"store 1", 6) == 2
    fill()
    assert claim(b"store 2", 7) == 2


def test_running_out_of_numbers_is_an_error_that_stores_nothing(
    index: NodeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_index, "_NUMBER_MAX", 3)
    directory = Directory(files=[blob(b"%d" % number, b"%d" % number) for number in range(3)])
    with pytest.raises(StoreError, match="all 3 content numbers"):
        add(index, 100, directory)
    with index.read() as txn:
        assert index.image(txn, 100) is None
        assert index.record(txn, 2) is None
    assert add(index, 100, Directory(files=directory.files[:2])).keys() >= {b"0", b"1"}


def test_an_index_of_this_boot_is_kept_and_one_of_another_boot_is_removed(tmp_path: Path) -> None:
    directory = Directory(files=[blob(b"a", b"1")])
    opened = NodeIndex.open(tmp_path, is_readonly=False, boot_id=BOOT)
    add(opened, 100, directory)
    opened.close()
    opened = NodeIndex.open(tmp_path, is_readonly=False, boot_id=BOOT)
    assert numbers_below(opened, 100)[b"a"] == 2
    opened.close()
    opened = NodeIndex.open(tmp_path, is_readonly=False, boot_id=OTHER_BOOT)
    with opened.read() as txn:
        assert opened.image(txn, 100) is None
    opened.close()
    assert [child.name for child in tmp_path.iterdir()] == [f"v1-{OTHER_BOOT}"]


def test_an_index_of_another_boot_is_not_even_opened(tmp_path: Path) -> None:
    broken = tmp_path / f"v1-{BOOT}"
    broken.mkdir()
    (broken / "data.mdb").write_bytes(b"what a host crash left")
    (tmp_path / "vault").mkdir()
    NodeIndex.open(tmp_path, is_readonly=False, boot_id=OTHER_BOOT).close()
    assert {child.name for child in tmp_path.iterdir()} == {f"v1-{OTHER_BOOT}", "vault"}


def test_an_index_of_another_schema_may_be_in_use_and_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / f"v99-{BOOT}").mkdir()
    NodeIndex.open(tmp_path, is_readonly=False, boot_id=BOOT).close()
    assert (tmp_path / f"v99-{BOOT}").is_dir()


def test_a_reader_needs_a_writer_to_have_been_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        NodeIndex.open(tmp_path, is_readonly=True)
    assert list(tmp_path.iterdir()) == []


def _write_shared(path: Path, order: range, start: Connection) -> None:
    index = NodeIndex.open(path, is_readonly=False)
    start.send("open")
    start.recv()
    for seed in order:
        files = [blob(b"%03d" % name, b"%d" % (seed + name)) for name in range(20)]
        directory = Directory(files=files)
        index.write(partial(index.add_directory, number=1000 + seed, directory=directory))
        index.write(partial(index.add_root, node=blob(b"root-%d" % seed, b"%d" % seed)))
    index.close()


def test_two_processes_that_share_an_index_assign_the_same_numbers(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = []
    for order in (range(60), range(59, -1, -1)):
        ours, theirs = context.Pipe()
        process = context.Process(target=_write_shared, args=(tmp_path, order, theirs))
        process.start()
        writers.append((process, ours))
    for _process, channel in writers:
        assert channel.poll(DEADLINE_S)
        channel.recv()
    for _process, channel in writers:
        channel.send("go")
    for process, _channel in writers:
        process.join(DEADLINE_S)
        assert process.exitcode == 0
    index = NodeIndex.open(tmp_path, is_readonly=True)
    number_of: dict[int, int] = {}
    for seed in range(60):
        numbers = numbers_below(index, 1000 + seed)
        for name in range(20):
            assert (
                number_of.setdefault(seed + name, numbers[b"%03d" % name])
                == numbers[b"%03d" % name]
            )
    assert sorted(number_of.values()) == list(range(2, 2 + len(number_of)))
    with index.read() as txn:
        listing = [_wire.unpack_direntplus(record) for record in index.root_listing(txn, 0)]
    assert [plus.dirent.off for plus in listing] == list(range(1, 63))
    assert {plus.dirent.ino for plus in listing[2:]} == {number_of[seed] for seed in range(60)}
    index.close()
