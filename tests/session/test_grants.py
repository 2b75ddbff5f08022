"""Grants are found by name and by nodeid, even by readers that mapped the memory before."""

import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, FileNode, Node, SymlinkNode
from appliance.errors import StoreError
from appliance.fuse_proto._fuse_wire import ENTRY_OUT_SIZE, unpack_entry_out
from appliance.fuse_proto.encode import FOREVER_S
from appliance.images.layout import Kind, name_of
from appliance.session import grant_table as module
from appliance.session.grant_table import GrantTable
from appliance.session.grants import Grants
from appliance.session.grants_layout import FIRST_BASE, NODEID_LIMIT

DIGEST = Digest.of(b"x")


@pytest.fixture
def table() -> Iterator[GrantTable]:
    made = GrantTable()
    yield made
    made.close()


def directory(number: int, size: int = 3) -> DirectoryNode:
    return DirectoryNode(b"directory-%d" % number, DIGEST, size)


def test_bases_follow_each_other_and_each_nodeid_is_in_one_grant(table: GrantTable) -> None:
    reader = Grants(table.fd)
    nodes: list[Node] = [
        directory(1, 10),
        FileNode(b"file", DIGEST, 1 << 40, executable=False),
        SymlinkNode(b"link", b"target" * 100),
        FileNode(b"run", DIGEST, 5, executable=True),
        directory(2, 0),
    ]
    for node in nodes:
        table.grant(node)
    table.grant(nodes[1])  # changes nothing
    assert len(table) == len(reader) == 5
    found = [reader.by_name(node.name) for node in nodes]
    grants = [grant for grant in found if grant is not None]
    assert [(grant.base, grant.span) for grant in grants] == [
        (FIRST_BASE, 11), (13, 1), (14, 1), (15, 1), (16, 1),
    ]  # fmt: skip
    assert [grant.kind for grant in grants] == [
        Kind.DIRECTORY, Kind.FILE, Kind.SYMLINK, Kind.EXECUTABLE, Kind.DIRECTORY,
    ]  # fmt: skip
    assert (grants[1].digest, grants[1].size) == (DIGEST, 1 << 40)
    assert grants[2].target == b"target" * 100
    for grant in grants:
        for nodeid in (grant.base, grant.base + grant.span - 1):
            assert reader.by_nodeid(nodeid) == grant
    for nodeid in (0, 1, 17, NODEID_LIMIT, (1 << 64) - 1):
        assert reader.by_nodeid(nodeid) is None
    assert reader.by_name(b"other") is None


@pytest.mark.slow
def test_a_reader_finds_what_came_after_it_mapped_the_memory(table: GrantTable) -> None:
    early = Grants(table.fd)
    num = 20_000  # enough for the memory and the hash table to grow
    for i in range(num):
        table.grant(directory(i))
    late = Grants(table.fd)
    for reader in (early, late):
        for i in (*range(100), *range(100, num, 997), num - 1):
            grant = reader.by_name(b"directory-%d" % i)
            assert grant is not None
            assert grant.base == FIRST_BASE + 4 * i
            assert reader.by_nodeid(grant.base + 3) == grant
        names = [name_of(record) for record in reader.listing(num - 3)]
        assert names == [b"directory-%d" % i for i in range(num - 3, num)]


def test_blank_grants_cost_next_to_nothing() -> None:
    table = GrantTable()
    assert os.fstat(table.fd).st_blocks * 512 <= 16 << 10
    assert os.fstat(table.fd).st_size > 32 << 20  # reserved, but not allocated
    table.close()


def test_a_worker_cannot_write_to_the_grants(table: GrantTable) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(table.fd, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(table.fd, 4096)
    with pytest.raises(OSError, match="Invalid argument"):
        os.ftruncate(table.fd, 0)


def test_numbers_run_out_with_an_error_and_what_was_granted_stays(table: GrantTable) -> None:
    table.grant(directory(1, NODEID_LIMIT - FIRST_BASE - 2))
    with pytest.raises(OSError, match="4 nodeids needed, 1 left") as caught:
        table.grant(directory(2))
    assert caught.value.errno == errno.EOVERFLOW
    table.grant(FileNode(b"last", DIGEST, 5, executable=False))
    reader = Grants(table.fd)
    grant = reader.by_name(b"last")
    assert grant is not None
    assert grant.base == NODEID_LIMIT - 1
    with pytest.raises(OSError, match="1 nodeids needed, 0 left"):
        table.grant(FileNode(b"one more", DIGEST, 5, executable=False))


def test_the_number_of_grants_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRANTS_MAX", 3)
    table = GrantTable()
    for i in range(3):
        table.grant(directory(i))
    with pytest.raises(StoreError, match="can be granted 3 store paths"):
        table.grant(directory(3))
    table.close()


def test_a_revoked_name_is_gone_and_comes_back_with_other_nodeids(table: GrantTable) -> None:
    reader = Grants(table.fd)
    for i in range(3):
        table.grant(directory(i))
    assert reader.num_revoked == 0
    table.revoke(b"directory-1")
    assert reader.num_revoked == 1
    assert reader.by_name(b"directory-1") is None
    assert [reader.by_nodeid(FIRST_BASE + 4 * i) is not None for i in range(3)] == [1, 0, 1]
    assert [name_of(record) for record in reader.listing(0)] == [b"directory-0", b"directory-2"]
    assert table.names() == (b"directory-0", b"directory-2")
    with pytest.raises(KeyError):
        table.revoke(b"directory-1")

    table.grant(directory(1))
    again = reader.by_name(b"directory-1")
    assert again is not None
    assert again.base == FIRST_BASE + 12
    assert reader.by_nodeid(FIRST_BASE + 4) is None
    assert [name_of(record) for record in reader.listing(0)] == [
        b"directory-0", b"directory-2", b"directory-1",
    ]  # fmt: skip


def test_names_are_found_however_often_they_were_revoked_and_granted(table: GrantTable) -> None:
    reader = Grants(table.fd)
    for turn in range(40):
        for i in range(10):
            table.grant(directory(i, turn))
        found = [reader.by_name(b"directory-%d" % i) for i in range(10)]
        assert [grant.size for grant in found if grant is not None] == [turn] * 10
        for i in range(10):
            table.revoke(b"directory-%d" % i)
        assert [reader.by_name(b"directory-%d" % i) for i in range(10)] == [None] * 10
    assert reader.num_revoked == 400
    assert list(reader.listing(0)) == []


def test_a_replaced_node_has_a_new_nodeid_under_its_name(table: GrantTable) -> None:
    reader = Grants(table.fd)
    table.grant(FileNode(b".file", DIGEST, 1, executable=False), name_valid_s=1)
    old = reader.by_name(b".file")
    table.replace(FileNode(b".file", DIGEST, 2, executable=False), name_valid_s=1)
    new = reader.by_name(b".file")
    assert old is not None
    assert new is not None
    assert (old.base, old.size, new.base, new.size) == (FIRST_BASE, 1, FIRST_BASE + 1, 2)
    assert reader.by_nodeid(old.base) is None
    assert reader.num_revoked == 1
    entry = unpack_entry_out(new.record[:ENTRY_OUT_SIZE])
    assert (entry.entry_valid, entry.attr_valid) == (1, FOREVER_S)


def test_a_store_path_that_is_the_root_has_nodeids_from_1_on(table: GrantTable) -> None:
    assert not Grants(table.fd).has_path_as_root
    table.grant_root(directory(7, 3))
    reader = Grants(table.fd)
    assert reader.has_path_as_root
    root = reader.by_nodeid(1)
    assert root is not None
    assert (root.base, root.span) == (1, 4)
    assert reader.by_nodeid(4) == root
    assert reader.by_nodeid(0) is None
    assert reader.by_nodeid(5) is None
    assert unpack_entry_out(root.record[:ENTRY_OUT_SIZE]).generation == 0
    table.start_apart()  # has no effect on it


def test_a_session_that_starts_apart_shares_no_numbers_with_another() -> None:
    bases = set()
    for _ in range(8):
        table = GrantTable()
        table.start_apart()
        table.grant(directory(1))
        grant = Grants(table.fd).by_name(b"directory-1")
        assert grant is not None
        bases.add(grant.base >> 41)
        assert grant.base < NODEID_LIMIT // 2
        table.start_apart()  # has no effect after the first grant
        table.grant(directory(2))
        following = Grants(table.fd).by_name(b"directory-2")
        assert following is not None
        assert following.base == grant.base + grant.span
        table.close()
    assert len(bases) > 6
    assert 0 not in bases


def test_generations_differ_from_session_to_session() -> None:
    generations = set()
    for is_by_content in (True, False, True, False):
        table = GrantTable(is_by_content=is_by_content)
        reader = Grants(table.fd)
        assert reader.is_by_content == is_by_content
        assert 0 < reader.generation < 1 << 32
        generations.add(reader.generation)
        table.close()
    assert len(generations) == 4


def test_grants_that_begin_again_are_those_of_another_session(table: GrantTable) -> None:
    for number in range(100):
        table.grant(directory(number))
    table.revoke(b"directory-7")
    table.set_root_generation(9)
    table.set_view_state(4)
    before = [directory(number, 5) for number in range(200, 300)]

    table.begin_again(1234)
    assert len(Grants(table.fd)) == 0
    assert Grants(table.fd).by_name(b"directory-8") is None
    bases = []
    for number, node in enumerate(before):
        bases.append(1000 + 10 * number)
        table.go_on_at(bases[-1])
        table.grant(node)
    table.go_on_at(5000)
    table.leave_out(50)
    table.go_on_at(6000)

    reader = Grants(table.fd)
    assert (reader.generation, reader.next_base, reader.view_state) == (1234, 6000, 4)
    assert (reader.root_generation, reader.num_revoked) == (0, 1)
    for base, node in zip(bases, before, strict=True):
        grant = reader.by_name(node.name)
        assert grant is not None
        assert (grant.base, grant.span, grant.name) == (base, 6, node.name)
        entry = unpack_entry_out(grant.record)
        assert (entry.nodeid, entry.generation) == (base, 1234)
        assert reader.by_nodeid(base + 5) == grant
        assert reader.by_nodeid(base + 6) is None
    assert reader.by_nodeid(5000) is None
    assert reader.by_nodeid(5049) is None
    assert [is_revoked for _grant, is_revoked in reader.rows()] == [False] * 100 + [True]
    table.grant(directory(1))
    assert (found := reader.by_name(b"directory-1")) is not None
    assert found.base == 6000
    # The next supervisor finds the same.
    with_next = GrantTable(writable_fd=os.dup(table.writable_fd))
    assert set(with_next.names()) == set(table.names())
    with_next.close()
