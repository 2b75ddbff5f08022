"""Wants are resolved together, and what is wrong with one is nothing to the others."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.castore.nodes import Directory, DirectoryNode
from appliance.fuse_proto import _wire
from appliance.index import images, resolver
from appliance.index.node_index import NodeIndex
from appliance.index.resolver import Resolver
from appliance.index.wants import DirectoryWanted, RootListWanted, RootNameWanted, Want
from appliance.store.batch import Batch
from appliance.store.store import Store
from tests.fs.guest import File, Model, Tree, add_path, basename, put, store_path


class Rig:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = Store.open(path / "store", create=True, map_size_bytes=1 << 24)
        self.index = NodeIndex.open(path / "index", is_readonly=False)
        self.resolver = Resolver(self.store, self.index)

    def close(self) -> None:
        self.index.close()
        self.store.close()

    def resolve(self, *wants: Want) -> list[int]:
        return self.resolver.resolve(wants)

    def root_number(self, name: str, model: Model) -> int:
        """Commit a store path and return its content number."""
        name_bytes = put(self.store, name, model)
        assert self.resolve(RootNameWanted(name_bytes)) == [0]
        with self.index.read() as txn:
            entry = self.index.root_entry(txn, name_bytes)
            assert entry is not None
            return _wire.unpack_entry_out(entry).attr.ino

    def child_numbers(self, number: int) -> dict[bytes, int]:
        with self.index.read() as txn:
            image = self.index.image(txn, number)
            assert image is not None
            words = image.cast("I")
            numbers = {}
            for word in words[4 : 2 + words[1]]:
                record = _wire.unpack_direntplus(image, word & ~1)
                name_at = (word & ~1) + _wire.DIRENTPLUS_SIZE
                name = bytes(image[name_at : name_at + record.dirent.namelen])
                numbers[name] = record.dirent.ino
            return numbers

    def has_image(self, number: int) -> bool:
        with self.index.read() as txn:
            return self.index.image(txn, number) is not None

    def root_names(self) -> int:
        with self.index.read() as txn:
            return len(list(self.index.root_listing(txn, 2)))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def test_each_want_of_a_batch_gets_its_own_answer(rig: Rig) -> None:
    file = rig.root_number("file", File(b"1"))
    tree = rig.root_number("tree", {b"a": {}})
    batch = Batch()
    add_path(batch, "broken", DirectoryNode(b"", Digest.of(b"missing"), 1))
    batch.add_path_info(store_path("garbled").digest, b"\xff\xff")
    rig.store.commit(batch)
    assert rig.resolve(RootNameWanted(basename("broken"))) == [0]
    expected: dict[Want, int] = {
        DirectoryWanted(2**32 - 1): errno.ESTALE,
        DirectoryWanted(2**63): errno.ESTALE,
        DirectoryWanted(1): errno.ESTALE,
        DirectoryWanted(file): errno.ENOTDIR,
        DirectoryWanted(tree): 0,
        DirectoryWanted(tree + 1): errno.EIO,
        RootNameWanted(basename("tree")): 0,
        RootNameWanted(basename("absent")): errno.ENOENT,
        RootNameWanted(basename("tree") + b"x"): errno.ENOENT,
        RootNameWanted(b"no store path"): errno.ENOENT,
        RootNameWanted(b"x" * 600): errno.ENOENT,
        RootNameWanted(basename("garbled")): errno.EIO,
        RootListWanted(): 0,
    }
    assert rig.resolve(*expected) == list(expected.values())
    assert rig.has_image(tree)
    assert rig.resolve(*reversed(expected)) == list(reversed(expected.values()))
    assert rig.resolve() == []


def test_a_garbled_path_is_left_out_of_the_listing_and_logged(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    batch = Batch()
    batch.add_path_info(store_path("garbled").digest, b"\xff\xff")
    add_path(batch, "good", DirectoryNode(b"", Digest.of(b""), 0))
    rig.store.commit(batch)
    assert rig.resolve(RootListWanted()) == [0]
    assert rig.root_names() == 1
    assert "left out" in caplog.text
    with rig.index.read() as txn:
        assert rig.index.root_generation(txn) == 2


def test_a_change_that_fails_does_not_take_the_others_with_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wide = rig.root_number("wide", {b"%d" % i: File(b"%d" % i) for i in range(50)})
    small = rig.root_number("small", {b"f": File(b"1")})
    put(rig.store, "new", File(b"new"))
    monkeypatch.setattr(images, "_IMAGE_SIZE_MAX", 2000)
    new = RootNameWanted(basename("new"))
    wants: list[Want] = [DirectoryWanted(small), DirectoryWanted(wide), new]
    assert rig.resolve(*wants) == [0, errno.EIO, 0]
    assert rig.has_image(small)
    assert not rig.has_image(wide)
    assert "50 entries is too big" in caplog.text


def test_subdirectories_come_along_up_to_a_number(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "_AHEAD_MAX", 3)
    tree: Tree = {b"%d" % i: {b"deeper": {b"f": File(b"%d" % i)}} for i in range(5)}
    top = rig.root_number("tree", tree)
    assert rig.resolve(DirectoryWanted(top)) == [0]
    numbers = rig.child_numbers(top)
    assert [rig.has_image(numbers[b"%d" % i]) for i in range(5)] == [True] * 3 + [False] * 2
    deeper = rig.child_numbers(numbers[b"0"])[b"deeper"]
    assert not rig.has_image(deeper)
    assert rig.resolve(DirectoryWanted(deeper), DirectoryWanted(numbers[b"4"])) == [0, 0]


def test_big_subdirectories_wait_until_they_are_wanted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "_AHEAD_BYTES_MAX", 500)
    big = {b"%d" % i: File(b"%d" % i) for i in range(20)}
    top = rig.root_number("tree", {b"a": {b"f": File(b"1")}, b"b": big, b"c": {b"g": File(b"2")}})
    assert rig.resolve(DirectoryWanted(top)) == [0]
    numbers = rig.child_numbers(top)
    assert [rig.has_image(numbers[name]) for name in (b"a", b"b", b"c")] == [True, False, True]


def test_a_broken_subdirectory_does_not_keep_its_parent_from_being_indexed(rig: Rig) -> None:
    batch = Batch()
    batch.add_directory(Digest.of(b"garbled"), b"\xff\xff")
    rig.store.commit(batch)
    model_of = {name: DirectoryNode(name, Digest.of(name), 1) for name in (b"garbled", b"missing")}
    directory = Directory(directories=list(model_of.values()))
    batch = Batch()
    batch.add_directory(directory.digest(), directory.to_bytes())
    add_path(batch, "top", DirectoryNode(b"", directory.digest(), directory.size()))
    rig.store.commit(batch)
    assert rig.resolve(RootNameWanted(basename("top")), DirectoryWanted(2)) == [0, errno.ESTALE]
    assert rig.resolve(DirectoryWanted(2)) == [0]
    assert rig.child_numbers(2).keys() == model_of.keys()


def test_the_root_of_a_store_that_was_overwritten_is_not_kept(tmp_path: Path) -> None:
    # As where a backup is restored in place, or a file system gives the same inode number again.
    first = Rig(tmp_path)
    first.root_number("old", {})
    assert first.resolve(RootListWanted()) == [0]
    first.close()
    other = Rig(tmp_path / "elsewhere")
    other.root_number("new", {})
    other.close()
    content = (tmp_path / "elsewhere" / "store" / "data.mdb").read_bytes()
    (tmp_path / "store" / "data.mdb").write_bytes(content)
    second = Rig(tmp_path)
    assert second.resolve(RootNameWanted(basename("old"))) == [errno.ENOENT]
    assert second.resolve(RootListWanted()) == [0]
    assert second.root_names() == 1
    second.close()
    third = Rig(tmp_path)
    assert third.root_names() == 1
    third.close()


def test_the_root_of_a_store_that_was_replaced_is_not_kept(tmp_path: Path) -> None:
    first = Rig(tmp_path)
    first.root_number("old", {})
    assert first.resolve(RootListWanted()) == [0]
    first.close()
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    second = Rig(tmp_path)
    assert second.root_names() == 0
    assert second.resolve(RootNameWanted(basename("old"))) == [errno.ENOENT]
    second.root_number("new", {})
    second.close()
    third = Rig(tmp_path)
    assert third.root_names() == 1
    third.close()
