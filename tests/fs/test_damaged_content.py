"""What a guest gets where content is missing, damaged or of another size than its node says."""

import errno
import os

import pytest

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node
from appliance.store.batch import Batch
from tests.fakes import fuse_client
from tests.fakes.fuse_client import ROOT
from tests.fs.guest import File, Guest, Tree, add_path, basename, put
from tests.store.audit import blob_path

SMALL = b"small content"
BIG = bytes(range(256)) * 400
TREE: Tree = {b"small": File(SMALL), b"here": {b"f": File(b"1")}}


@pytest.fixture
def top(guest: Guest) -> int:
    return guest.walk(put(guest.store, "tree", TREE))


def put_node(guest: Guest, name: str, node: Node, batch: Batch | None = None) -> int:
    batch = batch or Batch()
    add_path(batch, name, node)
    guest.store.commit(batch)
    return guest.walk(basename(name))


def missing_blob(guest: Guest, size: int) -> int:
    file = FileNode(b"", Digest.of(b"lost" * size), size, executable=False)
    return put_node(guest, "lost", file)


def test_a_missing_blob_is_an_error_that_is_logged(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    nodeid = missing_blob(guest, 5)
    for _ in range(3):
        assert guest.ask(fuse_client.read(nodeid, 0, 5)).error == errno.EIO
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
    assert "is not in the store" in caplog.text


@pytest.mark.parametrize("content", [b"inline", BIG])
def test_a_blob_shorter_than_its_node_says_is_an_error_and_no_one_elses(
    guest: Guest, content: bytes
) -> None:
    liar = FileNode(b"", Digest.of(content), len(content) + 1, executable=False)
    lie = put_node(guest, "liar", liar)
    put(guest.store, "honest", {b"f": File(content)})
    honest = guest.walk(basename("honest"), b"f")
    for _ in range(2):
        assert guest.ask(fuse_client.read(lie, 0, 5)).error == errno.EIO
        assert guest.body(fuse_client.read(honest, 0, 5)) == content[:5]


@pytest.mark.parametrize("damage", ["unlink", "truncate"])
def test_a_damaged_blob_file_is_an_error(
    guest: Guest, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    nodeid = guest.walk(put(guest.store, "file", File(BIG)))
    path = blob_path(guest.store, Digest.of(BIG))
    if damage == "unlink":
        path.unlink()
    else:
        os.truncate(path, 100)
    assert guest.ask(fuse_client.read(nodeid, 0, 5)).error == errno.EIO
    assert f"blob {Digest.of(BIG).hex()}" in caplog.text


def test_a_file_is_read_from_a_store_that_was_moved(guest: Guest) -> None:
    nodeid = guest.walk(put(guest.store, "file", File(BIG)))
    path = guest.store.path
    path.rename(path.with_name("moved"))
    path.mkdir()
    assert guest.body(fuse_client.read(nodeid, 0, 5)) == BIG[:5]


@pytest.mark.parametrize("stored", [{}, {Digest.of(b"broken"): b"\xff\xff"}])
def test_a_directory_that_is_missing_or_garbled_can_be_seen_but_not_entered(
    guest: Guest, stored: dict[Digest, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    batch = Batch()
    for digest, encoded in stored.items():
        batch.add_directory(digest, encoded)
    node = DirectoryNode(b"", Digest.of(b"broken"), 3)
    nodeid = put_node(guest, "broken", node, batch)
    reply = fuse_client.parse_attr(guest.body(fuse_client.getattr_(nodeid)))
    assert reply.attr.mode == 0o040555
    assert guest.ask(fuse_client.lookup(nodeid, b"x")).error == errno.EIO
    assert guest.ask(fuse_client.readdirplus(nodeid, 0)).error == errno.EIO
    assert f"directory {Digest.of(b'broken').hex()}" in caplog.text


@pytest.mark.parametrize("where", ["root", "below"])
def test_a_size_that_does_not_hold_the_entries_is_an_error(
    guest: Guest, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    batch = Batch()
    inner = Directory(
        files=[FileNode(b"%d" % i, EMPTY_DIGEST, 0, executable=False) for i in range(5)]
    )
    outer = Directory(directories=[DirectoryNode(b"liar", inner.digest(), 4)])
    for directory in (inner, outer):
        batch.add_directory(directory.digest(), directory.to_bytes())
    root = inner if where == "root" else outer
    size = 4 if where == "root" else outer.size()
    nodeid = put_node(guest, "liar", DirectoryNode(b"", root.digest(), size), batch)
    if where == "below":
        nodeid = guest.lookup(nodeid, b"liar").nodeid
    following = guest.walk(put(guest.store, "honest", TREE))
    for request in (fuse_client.lookup(nodeid, b"0"), fuse_client.readdirplus(nodeid, 0)):
        assert guest.ask(request).error == errno.EIO
    # Numbers beyond the stated size belong to the next path, and still do.
    for beyond in range(nodeid + 1, following):
        assert guest.ask(fuse_client.getattr_(beyond)).error in {errno.EIO, errno.ESTALE}
    assert guest.lookup(following, b"small").attr.size == len(SMALL)
    assert f"directory {inner.digest()}" in caplog.text


def test_a_size_that_leaves_no_numbers_is_refused(guest: Guest, top: int) -> None:
    huge = DirectoryNode(b"", Directory().digest(), (1 << 63) - top)
    batch = Batch()
    add_path(batch, "huge", huge)
    guest.store.commit(batch)
    answer = guest.ask(fuse_client.lookup(ROOT, basename("huge")))
    assert answer.error == errno.EOVERFLOW
    assert len(guest.listing(ROOT)) == 3
    assert guest.walk(put(guest.store, "next", File(b"")))
