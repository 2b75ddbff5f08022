"""What a guest gets for each operation, errors included."""

import base64
import errno
import os
from pathlib import Path

import pytest

from appliance.bounds import OPEN_FILES_MAX
from appliance.castore.digest import Digest
from appliance.castore.directory import Directory
from appliance.fs.handler import Handler
from appliance.fuse_proto.encode import FOREVER_S, NO_ENTRY
from appliance.fuse_proto.operations import Request
from appliance.images.layout import name_of
from appliance.session.grants import Grants
from appliance.session.grants_layout import FIRST_BASE
from appliance.session.wants import RootListWanted, RootNameWanted
from appliance.store.schema import INLINE_MAX
from tests.fakes import fuse_client
from tests.fakes.fuse_client import ROOT
from tests.fs.guest import File, Guest, Link, Tree, basename, put

SMALL = b"small content"
BIG = bytes(range(256)) * 400
TREE: Tree = {
    b"small": File(SMALL),
    b"twin": File(SMALL),
    b"run": File(SMALL, is_executable=True),
    b"big": File(BIG),
    b"empty": File(b""),
    b"link": Link(b"../target"),
    b"here": {b"same": {b"inner": {b"f": File(b"1")}}},
    b"there": {b"same": {b"inner": {b"f": File(b"1")}}},
    b"hollow": {},
}


@pytest.fixture
def top(guest: Guest) -> int:
    return guest.walk(put(guest.store, "tree", TREE))


def test_lookup_tells_all_there_is_to_know_for_ever(guest: Guest, top: int) -> None:
    entry = guest.lookup(top, b"run")
    assert (entry.entry_valid, entry.attr_valid) == (FOREVER_S, FOREVER_S)
    assert (entry.attr.mode, entry.attr.size) == (0o100555, len(SMALL))
    assert entry.attr.ino == entry.nodeid
    attr = fuse_client.parse_attr(guest.body(fuse_client.getattr_(entry.nodeid)))
    assert (attr.attr_valid, attr.attr) == (FOREVER_S, entry.attr)


def test_a_name_that_a_directory_does_not_have_is_absent_for_ever(guest: Guest, top: int) -> None:
    for parent in (top, guest.walk(basename("tree"), b"hollow")):
        assert guest.lookup(parent, b"absent") == NO_ENTRY._replace(entry_valid=FOREVER_S)


def test_nodeids_are_the_base_of_the_path_and_the_position_in_its_tree(
    guest: Guest, top: int
) -> None:
    assert top == FIRST_BASE
    names = [b"big", b"empty", b"here", b"hollow", b"link", b"run", b"small", b"there", b"twin"]
    assert sorted(TREE) == names
    # "here" and "there" take up three more numbers each.
    expected = [1, 2, 3, 7, 8, 9, 10, 11, 15]
    assert [guest.lookup(top, name).nodeid - top for name in names] == expected
    for name, place in ((b"here", 3), (b"there", 11)):
        for deeper in range(4):
            path = [name, b"same", b"inner", b"f"][: deeper + 1]
            assert guest.walk(basename("tree"), *path) == top + place + deeper
    following = guest.walk(put(guest.store, "next", File(b"")))
    assert following == top + 16


def test_only_what_was_granted_is_answered(guest: Guest) -> None:
    # The store has two more paths; this session has looked up one of the three.
    for name in ("a", "b", "c"):
        put(guest.store, name, TREE)
    top = guest.walk(basename("b"))
    last = top + 15
    answered = [
        nodeid
        for nodeid in range(1, last + 1001)
        if guest.ask(fuse_client.getattr_(nodeid)).error != errno.ESTALE
    ]
    assert answered == [ROOT, *range(top, last + 1)]


def test_a_walk_from_any_nodeid_needs_nothing_but_grants_and_store(guest: Guest, top: int) -> None:
    entries = {}
    for nodeid in range(top, top + 16):
        entries[nodeid] = guest.lookup(nodeid, b".")
    num_wants = len(guest.wants)
    successor = Handler(Grants(guest.table.fd), guest.store, is_root_listable=True)
    for nodeid in reversed(range(top, top + 16)):
        request = Request(1, 5, nodeid, 0, 0, 1, None, (b".",))
        with successor.batch():
            assert fuse_client.parse_entry(bytes(successor.lookup(request))) == entries[nodeid]
    assert len(guest.wants) == num_wants
    successor.close()


def test_a_revoked_path_is_stale_and_absent_until_it_is_granted_again(
    guest: Guest, top: int
) -> None:
    other = guest.walk(put(guest.store, "other", TREE))
    file = guest.lookup(top, b"small").nodeid
    guest.table.revoke(basename("tree"))
    for nodeid in (top, file):
        assert guest.ask(fuse_client.getattr_(nodeid)).error == errno.ESTALE
    assert guest.grants.by_name(basename("tree")) is None
    assert [name_of(record) for record in guest.grants.listing(0)] == [basename("other")]
    assert guest.lookup(other, b"small").attr.size == len(SMALL)
    again = guest.lookup(ROOT, basename("tree")).nodeid
    assert again > other
    assert guest.lookup(again, b"small").nodeid == again + file - top
    for nodeid in (top, file):
        assert guest.ask(fuse_client.getattr_(nodeid)).error == errno.ESTALE


def test_dots_are_looked_up(guest: Guest, top: int) -> None:
    here = guest.walk(basename("tree"), b"here")
    assert guest.lookup(here, b"..") == guest.lookup(ROOT, basename("tree"))
    assert guest.lookup(here, b".").nodeid == here
    file = guest.lookup(top, b"small")
    assert guest.lookup(file.nodeid, b".") == file
    # Linux looks up this name in a node that it has found by a file handle, when overlayfs
    # revalidates it.
    assert guest.lookup(file.nodeid, b"/") == file
    for nodeid, name in ((top, b".."), (ROOT, b"."), (ROOT, b".."), (ROOT, b"/")):
        root = guest.lookup(nodeid, name)
        assert (root.nodeid, root.generation, root.attr.ino) == (ROOT, 0, ROOT)
        assert root.attr.mode == 0o040555


@pytest.mark.parametrize("is_by_content", [False, True])
def test_a_store_path_that_is_the_root(tmp_path: Path, is_by_content: bool) -> None:  # noqa: FBT001
    guest = Guest(tmp_path, is_by_content=is_by_content, root=TREE)
    names = [record.name for record in guest.listing(ROOT)]
    assert names == [b".", b"..", *sorted(TREE)]
    root = fuse_client.parse_attr(guest.body(fuse_client.getattr_(ROOT)))
    assert root.attr.mode == 0o040555
    assert root.attr_valid == FOREVER_S
    here = guest.walk(b"here", b"same")
    assert guest.lookup(guest.walk(b"here"), b"..") == guest.lookup(ROOT, b".")
    for nodeid, name in ((ROOT, b"."), (ROOT, b".."), (ROOT, b"/"), (here, b"..")):
        entry = guest.lookup(nodeid, name)
        assert entry.nodeid == (ROOT if nodeid == ROOT else guest.walk(b"here"))
    # Linux requires generation 0 of the root's inode.
    assert guest.lookup(ROOT, b"..").generation == 0
    listed = {record.name: record.ino for record in guest.listing(ROOT)}
    assert listed[b"."] == listed[b".."] == root.attr.ino
    below = {record.name: record.ino for record in guest.listing(guest.walk(b"here"))}
    assert below[b".."] == root.attr.ino
    small = guest.walk(b"small")
    assert guest.body(fuse_client.read(small, 0, 100)) == SMALL
    # Absence is for ever here, as everywhere below a store path, and nothing else can be named.
    assert guest.lookup(ROOT, basename("root")).nodeid == 0
    assert guest.lookup(ROOT, b"absent").entry_valid == FOREVER_S
    digest = guest.body(fuse_client.getxattr(ROOT, b"user.snix.castore.directory.digest", 100))
    assert digest.startswith(b"blake3-")
    assert guest.wants == []
    last = guest.grants.by_nodeid(ROOT)
    assert last is not None
    for nodeid in (0, last.span + 1, 1 << 63, (1 << 64) - 1):
        assert guest.ask(fuse_client.getattr_(nodeid)).error == errno.ESTALE
    assert guest.ask(fuse_client.lookup(0, b"small")).error == errno.ESTALE
    guest.close()


def test_the_root_is_a_directory_whose_mtime_follows_the_store(guest: Guest) -> None:
    before = fuse_client.parse_attr(guest.body(fuse_client.getattr_(ROOT)))
    assert (before.attr.mode, before.attr.ino, before.attr_valid) == (0o040555, 1, 1)
    put(guest.store, "new", File(b""))
    after = fuse_client.parse_attr(guest.body(fuse_client.getattr_(ROOT)))
    assert (after.attr.mtime, after.attr.mtimensec) > (before.attr.mtime, before.attr.mtimensec)


def test_a_root_that_cannot_be_listed_never_expires(tmp_path: Path) -> None:
    guest = Guest(tmp_path, is_root_listable=False)
    put(guest.store, "tree", TREE)
    top = guest.walk(basename("tree"))
    root = fuse_client.parse_attr(guest.body(fuse_client.getattr_(ROOT)))
    assert (root.attr_valid, root.attr.mode) == (FOREVER_S, 0o040555)
    for nodeid, name in ((top, b".."), (ROOT, b"."), (ROOT, b"..")):
        entry = guest.lookup(nodeid, name)
        assert (entry.nodeid, entry.entry_valid, entry.attr_valid) == (ROOT, FOREVER_S, FOREVER_S)
    assert [record.name for record in guest.listing(ROOT)] == [b".", b".."]
    guest.close()


def test_a_path_is_found_by_its_whole_name_only_and_absence_is_not_remembered(
    guest: Guest,
) -> None:
    name = put(guest.store, "path", Link(b"x"))
    assert guest.lookup(ROOT, name).attr.mode == 0o120444
    for absent in (name + b"x", name[:-1], name[:32] + b"-other", basename("later")):
        assert guest.ask(fuse_client.lookup(ROOT, absent)).error == errno.ENOENT
    put(guest.store, "later", File(b"now"))
    assert guest.lookup(ROOT, basename("later")).attr.size == 3


def test_what_cannot_be_a_store_path_does_not_reach_the_resolver(guest: Guest) -> None:
    for name in (b".git", b"\xff" * 40, basename("x").replace(b"-", b"_"), b"e" * 32 + b"-x"):
        assert guest.ask(fuse_client.lookup(ROOT, name)).error == errno.ENOENT
    assert guest.wants == []


def test_each_want_is_asked_for_once(guest: Guest, top: int) -> None:
    for _ in range(2):
        guest.lookup(top, b"small")
        guest.listing(ROOT)
    assert guest.wants == [RootNameWanted(basename("tree")), RootListWanted()]


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
@pytest.mark.parametrize("name", [b"small", b"run", b"big", b"empty"])
def test_a_file_reads_in_pieces_of_any_size_as_it_is(
    guest: Guest, top: int, name: bytes, size: int
) -> None:
    model = TREE[name]
    assert isinstance(model, File)
    content = model.content[: 50 * size]
    nodeid = guest.lookup(top, name).nodeid
    pieces = [
        guest.body(fuse_client.read(nodeid, offset, size))
        for offset in range(0, len(content), size)
    ]
    assert b"".join(pieces)[: len(content)] == content
    for offset in (len(model.content), len(model.content) + 1, 2**62, 2**64 - 1):
        assert guest.body(fuse_client.read(nodeid, offset, size)) == b""


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_reads_of_more_files_than_may_be_open_all_work(guest: Guest) -> None:
    num = OPEN_FILES_MAX + 5
    tree = {b"%d" % i: File(b"%d" % i * INLINE_MAX) for i in range(10, 10 + num)}
    top = guest.walk(put(guest.store, "many", tree))
    fds_before = open_fds()
    for _ in range(2):
        for name in tree:
            nodeid = guest.lookup(top, name).nodeid
            assert guest.body(fuse_client.read(nodeid, INLINE_MAX, 2)) == name
    assert open_fds() - fds_before == OPEN_FILES_MAX
    guest.handler.close()
    assert open_fds() == fds_before


def test_a_slice_stays_valid_until_the_end_of_its_batch(guest: Guest) -> None:
    num = OPEN_FILES_MAX + 5
    tree = {b"%d" % i: File(b"%d" % i * INLINE_MAX) for i in range(10, 10 + num)}
    top = guest.walk(put(guest.store, "many", tree))
    nodeids = {name: guest.lookup(top, name).nodeid for name in tree}
    with guest.handler.batch():
        replies = {}
        for name, nodeid in nodeids.items():
            request = memoryview(fuse_client.read(nodeid, 0, 2))
            replies[name] = guest.dispatcher.handle_untrusted(request, len(request), 4096)
        for name, reply in replies.items():
            assert reply is not None
            assert fuse_client.wire(reply)[16:] == name


def test_statfs_has_the_figures_of_the_store(guest: Guest) -> None:
    figures = fuse_client.parse_statfs(guest.body(fuse_client.statfs()))
    truth = os.statvfs(guest.store.path)
    assert (figures.blocks, figures.bsize, figures.frsize) == (
        truth.f_blocks,
        truth.f_bsize,
        truth.f_frsize,
    )
    assert figures.namelen == 255
    assert 0 < figures.bavail <= figures.bfree <= figures.blocks


def digests(kind: str, digest: bytes) -> dict[bytes, bytes]:
    text = base64.b64encode(digest)
    return {
        f"user.snix.castore.{kind}.digest".encode(): b"blake3-" + text,
        f"user.tvix.castore.{kind}.digest".encode(): b"b3:" + text,
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"small", digests("blob", Digest.of(SMALL))),
        (b"run", digests("blob", Digest.of(SMALL))),
        (b"hollow", digests("directory", Directory().digest())),
        (b"link", {}),
    ],
)
def test_extended_attributes_are_the_digest_under_two_names(
    guest: Guest, top: int, name: bytes, expected: dict[bytes, bytes]
) -> None:
    nodeid = guest.lookup(top, name).nodeid
    # Not listed, as copies would get a digest that is wrong after their first change.
    assert guest.body(fuse_client.listxattr(nodeid, 4096)) == b""
    assert fuse_client.parse_xattr_size(guest.body(fuse_client.listxattr(nodeid, 0))) == 0
    for attribute, value in expected.items():
        size = fuse_client.parse_xattr_size(guest.body(fuse_client.getxattr(nodeid, attribute, 0)))
        assert size == len(value)
        assert guest.body(fuse_client.getxattr(nodeid, attribute, size)) == value
        answer = guest.ask(fuse_client.getxattr(nodeid, attribute, size - 1))
        assert answer.error == errno.ERANGE
    for other in (b"security.capability", b"user.tvix.castore.other.digest"):
        assert guest.ask(fuse_client.getxattr(nodeid, other, 4096)).error == errno.ENODATA


def test_the_root_has_no_extended_attributes(guest: Guest) -> None:
    assert guest.body(fuse_client.listxattr(ROOT, 4096)) == b""
    answer = guest.ask(fuse_client.getxattr(ROOT, b"user.tvix.castore.directory.digest", 99))
    assert answer.error == errno.ENODATA


def test_an_operation_on_the_wrong_kind_of_node_says_so(guest: Guest, top: int) -> None:
    file = guest.lookup(top, b"small").nodeid
    link = guest.lookup(top, b"link").nodeid
    directory = guest.lookup(top, b"here").nodeid
    expected = [
        (fuse_client.lookup(file, b"x"), errno.ENOTDIR),
        (fuse_client.lookup(link, b"x"), errno.ENOTDIR),
        (fuse_client.readdir(file, 0), errno.ENOTDIR),
        (fuse_client.readdirplus(link, 0), errno.ENOTDIR),
        (fuse_client.readlink(file), errno.EINVAL),
        (fuse_client.readlink(directory), errno.EINVAL),
        (fuse_client.readlink(ROOT), errno.EINVAL),
        (fuse_client.read(directory, 0, 10), errno.EISDIR),
        (fuse_client.read(ROOT, 0, 10), errno.EISDIR),
        (fuse_client.read(link, 0, 10), errno.EINVAL),
    ]
    assert [guest.ask(request).error for request, _ in expected] == [error for _, error in expected]
    assert guest.body(fuse_client.readlink(link)) == b"../target"


@pytest.mark.parametrize("nodeid", [0, 1 | 1 << 32, 99999, 2**32 - 1, 2**63, 2**64 - 1])
def test_a_nodeid_never_given_out_is_stale(guest: Guest, top: int, nodeid: int) -> None:
    assert nodeid != top
    for request in (
        fuse_client.lookup(nodeid, b"x"),
        fuse_client.getattr_(nodeid),
        fuse_client.readlink(nodeid),
        fuse_client.read(nodeid, 0, 10),
        fuse_client.readdir(nodeid, 0),
        fuse_client.readdirplus(nodeid, 0),
        fuse_client.getxattr(nodeid, b"x", 10),
        fuse_client.listxattr(nodeid, 10),
    ):
        assert guest.ask(request).error == errno.ESTALE


def test_what_needs_no_answer_is_not_asked_again(guest: Guest, top: int) -> None:
    file = guest.lookup(top, b"small").nodeid
    for request in (
        fuse_client.open_(file),
        fuse_client.opendir(top),
        fuse_client.access(file),
        fuse_client.flush(file),
        fuse_client.fsync(file),
        fuse_client.lseek(file, 0, os.SEEK_DATA),
        fuse_client.statx(file),
    ):
        assert guest.ask(request).error == errno.ENOSYS
    assert guest.ask(fuse_client.release(file)).error == 0
    assert guest.ask(fuse_client.ioctl(file, 0x5401)).error == errno.ENOTTY


def test_every_change_is_refused(guest: Guest, top: int) -> None:
    file = guest.lookup(top, b"small").nodeid
    for request in (
        fuse_client.setattr_(file),
        fuse_client.mkdir(top, b"x"),
        fuse_client.unlink(top, b"small"),
        fuse_client.create(ROOT, b"x"),
        fuse_client.write(file, 0, b"x"),
        fuse_client.rename2(top, b"small", top, b"x"),
        fuse_client.setxattr(file, b"user.x", b"1"),
    ):
        assert guest.ask(request).error == errno.EROFS


def test_a_root_that_may_not_be_listed_still_answers_by_name(tmp_path: Path) -> None:
    guest = Guest(tmp_path, is_root_listable=False)
    name = put(guest.store, "path", TREE)
    for listing in (guest.listing(ROOT), [record for _, record in guest.listing_plus(ROOT)]):
        assert [record.name for record in listing] == [b".", b".."]
    for request in (fuse_client.readdir(ROOT, 2), fuse_client.readdirplus(ROOT, 2)):
        assert guest.body(request) == b""
    assert guest.listing(guest.walk(name))
    guest.close()
