"""Listings: complete, in order, and resumable at any cookie with any size."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.castore.directory import Directory, DirectoryNode
from appliance.castore.size_dialect import SizeDialect
from appliance.fuse_proto import _fuse_wire
from appliance.resolve import local
from appliance.store.batch import Batch
from tests.fakes import fuse_client
from tests.fakes.fuse_client import ROOT
from tests.fs.guest import File, Guest, Link, Model, Tree, add_path, basename, node_of, put

NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: name not in {b".", b".."} and not {0, ord("/")} & set(name)
)
CONTENTS = (b"", b"1", b"two", b"3" * 70000)
LEAVES = st.one_of(
    st.tuples(st.integers(0, 3), st.booleans()).map(lambda pair: File(CONTENTS[pair[0]], pair[1])),
    st.builds(Link, st.binary(min_size=1, max_size=40).filter(lambda target: b"\0" not in target)),
)


def trees(children: st.SearchStrategy[Model]) -> st.SearchStrategy[Tree]:
    return st.dictionaries(NAMES, children, max_size=6)


TREES = trees(st.recursive(LEAVES, trees, max_leaves=12))


class Seen:
    """The result of a walk: nodeid and ino of every node, and the inos of each content."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.inos: dict[int, int] = {}
        self.by_content: dict[object, set[int]] = {}

    def check(self, entry: _fuse_wire.EntryOut, model: Model) -> None:
        attr = fuse_client.parse_attr(self.guest.body(fuse_client.getattr_(entry.nodeid))).attr
        assert attr == entry.attr
        if isinstance(model, File):
            self.check_leaf(attr, 0o100555 if model.is_executable else 0o100444, model.content)
            read = fuse_client.read(entry.nodeid, 0, 1 << 20)
            assert self.guest.body(read) == model.content
            identity: object = model
        elif isinstance(model, Link):
            self.check_leaf(attr, 0o120444, model.target)
            assert self.guest.body(fuse_client.readlink(entry.nodeid)) == model.target
            identity = model
        else:
            assert (attr.mode, attr.size, attr.blocks) == (0o040555, 4096, 8)
            identity = repr(sorted(model.items()))
            self.check_children(entry.nodeid, model)
        assert entry.generation == self.guest.grants.generation
        assert self.guest.lookup(entry.nodeid, b".") == entry
        assert entry.nodeid not in self.inos, "another node has this nodeid"
        self.inos[entry.nodeid] = attr.ino
        self.by_content.setdefault(identity, set()).add(attr.ino)

    @staticmethod
    def check_leaf(attr: _fuse_wire.Attr, mode: int, content: bytes) -> None:
        assert (attr.mode, attr.size, attr.nlink) == (mode, len(content), 1)
        assert attr.blocks == (len(content) + 511) // 512

    def check_children(self, nodeid: int, model: Tree) -> None:
        plus = self.guest.listing_plus(nodeid)
        assert [record.name for _entry, record in plus] == [b".", b"..", *sorted(model)]
        assert [record for _entry, record in plus] == self.guest.listing(nodeid)
        above = self.guest.lookup(nodeid, b"..")
        own = self.guest.lookup(nodeid, b".")
        assert [record.ino for _entry, record in plus[:2]] == [own.attr.ino, above.attr.ino]
        for entry, record in plus[2:]:
            assert entry == self.guest.lookup(nodeid, record.name)
            assert (record.ino, record.kind) == (entry.attr.ino, entry.attr.mode >> 12)
            self.check(entry, model[record.name])
            assert self.guest.lookup(entry.nodeid, b"..") == own


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(TREES, st.sampled_from(["place", "content"]), st.sampled_from(SizeDialect))
def test_a_walk_sees_the_model_and_nothing_else(
    tree: Tree, inodes: str, dialect: SizeDialect
) -> None:
    is_by_content = inodes == "content"
    with TemporaryDirectory() as path:
        guest = Guest(Path(path), is_by_content=is_by_content)
        try:
            name = put(guest.store, "tree", tree, dialect)
            seen = Seen(guest)
            seen.check(guest.lookup(ROOT, name), tree)
            if is_by_content:
                assert all(len(inos) == 1 for inos in seen.by_content.values())
                assert len(set(seen.inos.values())) == len(seen.by_content)
            else:
                assert all(nodeid == ino for nodeid, ino in seen.inos.items())
            assert [record.name for record in guest.listing(ROOT)] == [b".", b"..", name]
        finally:
            guest.close()


def mixed(num: int) -> Tree:
    tree: dict[bytes, Model] = {}
    for i in range(num):
        name = b"%03d" % i + b"n" * (i * 7 % 250)
        tree[name] = {b"x": File(b"%d" % i)} if i % 3 == 0 else File(b"%d" % i)
    return tree


@pytest.fixture
def top(guest: Guest) -> int:
    return guest.walk(put(guest.store, "mixed", mixed(100)))


@pytest.mark.parametrize("size", [408, 500, 1000, 4096, 65536, 1 << 20])
def test_every_size_lists_the_same(guest: Guest, top: int, size: int) -> None:
    assert guest.listing_plus(top, size) == guest.listing_plus(top, 1 << 20)
    assert guest.listing(top, size) == guest.listing(top, 1 << 20)


def test_a_listing_goes_on_from_any_cookie(guest: Guest, top: int) -> None:
    whole = guest.listing_plus(top, 1 << 20)
    for index in range(len(whole) + 1):
        rest = guest.body(fuse_client.readdirplus(top, index, 1 << 20))
        assert fuse_client.parse_direntplus(rest) == whole[index:]
        rest = guest.body(fuse_client.readdir(top, index, 1 << 20))
        assert fuse_client.parse_dirents(rest) == [record for _entry, record in whole[index:]]
    assert [record.off for _entry, record in whole] == list(range(1, len(whole) + 1))


def test_a_reply_holds_as_many_whole_records_as_fit(guest: Guest, top: int) -> None:
    whole = guest.body(fuse_client.readdirplus(top, 0, 1 << 20))
    ends: list[int] = []
    for _entry, record in fuse_client.parse_direntplus(whole):
        padded = (152 + len(record.name) + 7) // 8 * 8
        ends.append((ends[-1] if ends else 0) + padded)
    for end in ends:
        for size in (end - 1, end, end + 1):
            fitting = max((e for e in ends if e <= size), default=0)
            if fitting:
                assert guest.body(fuse_client.readdirplus(top, 0, size)) == whole[:fitting]


@pytest.mark.parametrize("cookie", [103, 2**31, 2**63, 2**64 - 1])
def test_a_cookie_beyond_the_end_is_the_end(guest: Guest, top: int, cookie: int) -> None:
    for nodeid in (top, ROOT):
        assert guest.body(fuse_client.readdirplus(nodeid, cookie)) == b""
        assert guest.body(fuse_client.readdir(nodeid, cookie)) == b""


@pytest.mark.parametrize("size", [1, 8, 24])
def test_room_for_less_than_a_record_is_invalid_not_the_end(
    guest: Guest, top: int, size: int
) -> None:
    for nodeid in (top, ROOT):
        assert guest.ask(fuse_client.readdirplus(nodeid, 0, size)).error == 22
        assert guest.ask(fuse_client.readdir(nodeid, 0, size)).error == 22


@pytest.mark.slow
def test_the_root_lists_what_was_added_since_and_keeps_its_cookies(guest: Guest) -> None:
    names = {b".", b".."}
    before: list[tuple[_fuse_wire.EntryOut, fuse_client.DirectoryRecord]] = []
    for i in range(20):
        name = put(guest.store, f"path-{i}", {b"x": File(b"%d" % i)})
        names.add(name)
        if i % 2:
            assert guest.lookup(ROOT, name).nodeid
        if i % 5 == 4:
            plus = guest.listing_plus(ROOT, 1000)
            assert {record.name for _entry, record in plus} == names
            assert guest.listing(ROOT, 1000) == [record for _entry, record in plus]
            assert [record.off for _entry, record in plus] == list(range(1, len(names) + 1))
            for entry, record in plus[2:]:
                assert entry == guest.lookup(ROOT, record.name)
            assert plus[: len(before)] == before
            before = plus


def test_a_path_put_again_is_listed_once_as_it_was(guest: Guest) -> None:
    name = put(guest.store, "again", File(b"first"))
    assert len(guest.listing(ROOT)) == 3
    batch = Batch()
    batch.may_replace_paths = True
    add_path(batch, "again", node_of(batch, guest.store.path / "spare", b"", File(b"second!")))
    guest.store.commit(batch)
    assert [record.name for record in guest.listing(ROOT)] == [b".", b"..", name]
    assert guest.lookup(ROOT, name).attr.size == 5


@pytest.mark.parametrize("num", [9, 10, 11, 20, 25])
def test_the_root_lists_more_paths_than_go_into_one_transaction(
    guest: Guest, num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_ROOT_CHUNK", 10)
    batch = Batch()
    for i in range(num):
        add_path(batch, f"p{i}", DirectoryNode(b"", Directory().digest(), 0))
    guest.store.commit(batch)
    names = [record.name for record in guest.listing(ROOT)]
    assert sorted(names[2:]) == sorted(basename(f"p{i}") for i in range(num))
