"""The C answers are the handler's, byte for byte; what C does not answer, it leaves untouched."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, FileNode
from appliance.fuse_proto._fuse_wire import Opcode
from appliance.images.layout import PIECE_ENTRIES
from appliance.store.store_reader import StoreReader
from tests.fakes import fuse_client
from tests.fakes.fuse_client import ROOT
from tests.fs.guest import File, Link, Model, Tree, basename
from tests.fs.test_readdir import NAMES, TREES
from tests.worker.twins import ROOM, Twins, filled_store

BIG: Final = bytes(range(256)) * 1024  # kept in a file
TREE: Final[Tree] = {
    b"a": File(b"content of a"),
    b"big": File(BIG),
    b"empty": File(b""),
    b"exec": File(b"#!", is_executable=True),
    b"link": Link(b"a/b/c"),
    b"no": {},
    b"sub": {
        b"deep": {b"deeper": {b"deepest": {b"file": File(b"x" * 65536)}}, b"other": Link(b"x")},
        b"n" * 255: File(b"long"),
    },
    b"z": File(BIG, is_executable=True),
}


@contextmanager
def twins_of(
    model: Model, *, is_by_content: bool = False, has_root: bool = False
) -> Iterator[Twins]:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "store"
        nodes = filled_store(path, {"tree": model, "file": File(BIG), "link": Link(b"t")})
        store = StoreReader(path)
        twins = Twins(store, nodes, is_by_content=is_by_content, has_root=has_root)
        try:
            yield twins
        finally:
            twins.close()
            store.close()


@pytest.fixture(scope="module", params=[False, True], ids=["by place", "by content"])
def twins(request: pytest.FixtureRequest) -> Iterator[Twins]:
    with twins_of(TREE, is_by_content=request.param) as pair:
        yield pair


def check_listings(twins: Twins, nodeid: int, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Compare listings from every cookie; return (nodeid, type) of the entries."""
    found: list[tuple[int, int]] = []
    cookie = 0
    while True:
        body = twins.both(fuse_client.readdirplus(nodeid, cookie, 1 << 16))
        for size in sizes:
            twins.check(fuse_client.readdirplus(nodeid, cookie, size))
            twins.check(fuse_client.readdir(nodeid, cookie, size))
        assert twins.check(fuse_client.readdir(nodeid, cookie, 1 << 16))
        if not body:
            break
        entry, record = fuse_client.parse_direntplus(body)[0]
        cookie = record.off
        if entry.nodeid:
            found.append((entry.nodeid, record.kind))
    for far in (cookie + 1, 1 << 31, 1 << 32, (1 << 64) - 1):
        assert twins.check(fuse_client.readdirplus(nodeid, far))
        assert twins.check(fuse_client.readdir(nodeid, far))
    return found


def check_node(twins: Twins, nodeid: int) -> None:
    attr = fuse_client.parse_attr(twins.both(fuse_client.getattr_(nodeid))).attr
    is_link = attr.mode >> 12 == 10
    is_file = attr.mode >> 12 == 8
    assert twins.check(fuse_client.readlink(nodeid)) == is_link
    for offset in {0, 1, attr.size - 1, attr.size, attr.size + 1, 1 << 63, (1 << 64) - 1}:
        for size in (0, 1, 4096, attr.size, (1 << 32) - 1):
            request = fuse_client.read(nodeid, offset % (1 << 64), size)
            assert twins.check(request) == is_file


def check_tree(twins: Twins, nodeid: int, sizes: tuple[int, ...]) -> int:
    num = 0
    for child, kind in check_listings(twins, nodeid, sizes):
        check_node(twins, child)
        num += 1 + (check_tree(twins, child, sizes) if kind == 4 else 0)
    return num


@settings(max_examples=40, deadline=None)
@given(TREES, st.booleans(), st.lists(NAMES, max_size=3))
def test_generated_trees(tree: Tree, by_content: bool, names: list[bytes]) -> None:  # noqa: FBT001
    with twins_of(tree, is_by_content=by_content) as twins:
        top = twins.lookup(ROOT, basename("tree")).nodeid
        check_node(twins, top)
        check_tree(twins, top, (1, 152, 160, 333, 4096))
        for name in [*tree, *names]:
            assert twins.check(fuse_client.lookup(top, name))


def test_every_node_of_a_tree(twins: Twins) -> None:
    top = twins.lookup(ROOT, basename("tree")).nodeid
    assert check_tree(twins, top, tuple(range(0, 1500, 7))) == 14


@pytest.mark.parametrize("is_by_content", [False, True])
def test_every_node_of_a_tree_that_is_the_root_directory(is_by_content: bool) -> None:  # noqa: FBT001
    with twins_of(TREE, is_by_content=is_by_content, has_root=True) as twins:
        check_node(twins, ROOT)
        assert check_tree(twins, ROOT, tuple(range(0, 1500, 7))) == 14
        for name in [*TREE, b"absent", basename("tree"), basename("file")]:
            assert twins.check(fuse_client.lookup(ROOT, name)), name
        for name in (b".", b"..", b"/", b"", b"a/b"):
            assert not twins.check(fuse_client.lookup(ROOT, name)), name
        (dot, _), (dotdot, _) = fuse_client.parse_direntplus(
            twins.both(fuse_client.readdirplus(ROOT, 0))
        )[:2]
        assert dot.nodeid == dotdot.nodeid == 0
        span = 1 + twins.grants_of_root().size
        for nodeid in (*range(1, 40), 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
            is_plain = twins.check(fuse_client.getattr_(nodeid))
            assert nodeid <= span or not is_plain
        for request in (fuse_client.getattr_(0), fuse_client.lookup(0, b"a")):
            assert not twins.check(request)


@settings(max_examples=20, deadline=None)
@given(TREES, st.booleans())
def test_generated_trees_that_are_the_root_directory(tree: Tree, by_content: bool) -> None:  # noqa: FBT001
    with twins_of(tree, is_by_content=by_content, has_root=True) as twins:
        check_node(twins, ROOT)
        check_tree(twins, ROOT, (1, 152, 160, 333, 4096))
        for name in [*tree, b"absent"]:
            assert twins.check(fuse_client.lookup(ROOT, name))


def test_roots_that_are_no_directories(twins: Twins) -> None:
    for name in ("file", "link"):
        nodeid = twins.lookup(ROOT, basename(name)).nodeid
        check_node(twins, nodeid)
        assert not twins.check(fuse_client.lookup(nodeid, b"a"))
        assert not twins.check(fuse_client.readdir(nodeid, 0))


def test_names_of_all_kinds(twins: Twins) -> None:
    top = twins.lookup(ROOT, basename("tree")).nodeid
    plain = [*TREE, b"absent", b"a" * 255, b"...", b"..a", b"\xff", b"A", b"zz", b"suba"]
    for name in plain:
        assert twins.check(fuse_client.lookup(top, name)), name
    for name in (b"", b".", b"..", b"/", b"a/b", b"/a", b"a" * 256, b"a" * 300):
        assert not twins.check(fuse_client.lookup(top, name)), name
    for name in (b"absent", basename("tree") + b"x", b".", b"..", b"/", b""):
        assert not twins.check(fuse_client.lookup(ROOT, name)), name


def test_the_root_is_left_to_the_handler(twins: Twins) -> None:
    for request in (
        fuse_client.getattr_(ROOT),
        fuse_client.readdir(ROOT, 0),
        fuse_client.readdirplus(ROOT, 0),
        fuse_client.read(ROOT, 0, 1),
        fuse_client.readlink(ROOT),
    ):
        assert not twins.check(request)


def test_numbers_of_no_node(twins: Twins) -> None:
    last = 60
    stale = {0, ROOT, last, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1}
    for nodeid in stale:
        assert not twins.check(fuse_client.getattr_(nodeid))
    for nodeid in range(2, last):
        twins.check(fuse_client.getattr_(nodeid))
        twins.check(fuse_client.readlink(nodeid))
        twins.check(fuse_client.readdirplus(nodeid, 0))
        twins.check(fuse_client.read(nodeid, 0, 10))


def requests_of(twins: Twins) -> list[bytes]:
    top = twins.lookup(ROOT, basename("tree")).nodeid
    file, link = twins.lookup(top, b"big").nodeid, twins.lookup(top, b"link").nodeid
    return [
        fuse_client.lookup(ROOT, basename("tree")),
        fuse_client.lookup(top, b"a"),
        fuse_client.lookup(top, b"absent"),
        fuse_client.getattr_(file),
        fuse_client.readlink(link),
        fuse_client.read(file, 100, 5000),
        fuse_client.readdir(top, 0),
        fuse_client.readdirplus(top, 3),
        fuse_client.forget(top),
        fuse_client.batch_forget([top, file]),
    ]


def test_every_truncation(twins: Twins) -> None:
    for request in requests_of(twins):
        assert twins.check(request)
        assert twins.check(request + b"more")
        for size in range(len(request)):
            twins.check(request[:size])
            # With a length that tells the truth.
            twins.check(size.to_bytes(4, "little") + request[4:size])
            # With fewer bytes than were sent.
            twins.check(request[:size], readable_len=len(request))
            # With a length that is less than what was sent.
            twins.check(size.to_bytes(4, "little") + request[4:])
        for length in (0, 39, 40, len(request) + 1, 1 << 31, (1 << 32) - 1):
            twins.check(length.to_bytes(4, "little") + request[4:])


def test_every_room(twins: Twins) -> None:
    for request in requests_of(twins):
        for room in [*range(400), 4112, 5015, 5016, 5017, 1 << 32, (1 << 32) + 100]:
            twins.check(request, room)


def test_every_opcode(twins: Twins) -> None:
    top = twins.lookup(ROOT, basename("tree")).nodeid
    plain = set()
    for opcode in [*range(70), 4096, 1 << 31, (1 << 32) - 1]:
        for body in (b"", bytes(16), bytes(40), bytes(200), b"a\0" * 20):
            if opcode not in {Opcode.INIT, Opcode.DESTROY} and twins.check(
                fuse_client.request(opcode, top, body)
            ):
                plain.add(opcode)
    assert plain == {1, 2, 3, 42, 28, 44}


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_damaged_requests(twins: Twins, data: st.DataObject) -> None:
    request = bytearray(data.draw(st.sampled_from(requests_of(twins))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(request) - 1))
        request[at] = data.draw(st.integers(0, 255))
    if struct.unpack_from("<I", request, 4)[0] not in {Opcode.INIT, Opcode.DESTROY}:
        twins.check(bytes(request), data.draw(st.integers(0, 20000)))


def test_nothing_is_plain_without_a_session(twins: Twins) -> None:
    twins.session[0] = 0
    try:
        plain = [twins.plain.answer(request, len(request), ROOM) for request in requests_of_none()]
    finally:
        twins.session[0] = 1
    assert plain == [None, None, b""]


def requests_of_none() -> list[bytes]:
    tree = basename("tree")
    return [fuse_client.lookup(ROOT, tree), fuse_client.getattr_(2), fuse_client.forget(2)]


def test_a_grant_that_is_revoked() -> None:
    with twins_of(TREE) as twins:
        tree = basename("tree")
        top = twins.lookup(ROOT, tree).nodeid
        sub = twins.lookup(top, b"sub").nodeid
        twins.both(fuse_client.readdirplus(sub, 0))
        twins.table.revoke(tree)
        for request in (
            fuse_client.lookup(ROOT, tree),
            fuse_client.lookup(top, b"a"),
            fuse_client.getattr_(sub),
            fuse_client.readdirplus(sub, 0),
        ):
            assert not twins.check(request)
        assert twins.check(fuse_client.lookup(ROOT, basename("file")))


def test_a_directory_whose_node_states_too_small_a_size() -> None:
    with twins_of(TREE) as twins:
        node = twins.grants.by_name(basename("tree"))
        assert node is not None
        twins.table.grant(DirectoryNode(b"small", Digest(node.digest), node.size - 1))
        small = twins.lookup(ROOT, b"small").nodeid
        assert twins.check(fuse_client.getattr_(small))
        for request in (
            fuse_client.lookup(small, b"a"),
            fuse_client.getattr_(small + 1),
            fuse_client.readdir(small, 0),
            fuse_client.readdirplus(small, 0),
        ):
            assert not twins.check(request)


def test_files_whose_nodes_state_other_sizes_than_their_blobs() -> None:
    with twins_of(TREE) as twins:
        top = twins.lookup(ROOT, basename("tree")).nodeid
        twins.both(fuse_client.read(twins.lookup(top, b"big").nodeid, 0, 10))  # it is open now
        for content in (b"content of a", BIG):
            for stated in (len(content) + 10, len(content) - 10):
                name = b"%d" % stated
                node = FileNode(name, Digest.of(content), stated, executable=False)
                twins.table.grant(node)
                nodeid = twins.lookup(ROOT, name).nodeid
                for offset in (0, stated // 2, stated - 1):
                    is_there = twins.check(fuse_client.read(nodeid, offset, 100))
                    assert is_there == (stated < len(content))
                assert twins.check(fuse_client.read(nodeid, stated, 100))


@pytest.mark.slow
def test_so_many_grants_that_they_are_mapped_anew() -> None:
    with twins_of(TREE) as twins:
        top = twins.lookup(ROOT, basename("tree")).nodeid
        names = [b"%032d-%s" % (i, b"n" * 200) for i in range(4000)]
        for name in names:
            twins.table.grant(FileNode(name, Digest.of(BIG), len(BIG), executable=False))
        for name in [names[-1], *names[::97]]:
            nodeid = twins.lookup(ROOT, name).nodeid
            assert twins.check(fuse_client.getattr_(nodeid))
            assert twins.check(fuse_client.read(nodeid, 5, 100))
        assert twins.check(fuse_client.lookup(top, b"a"))


@pytest.mark.slow
@pytest.mark.parametrize("is_by_content", [False, True])
def test_a_directory_of_several_pieces(is_by_content: bool) -> None:  # noqa: FBT001
    num = 2 * PIECE_ENTRIES + 5
    wide: dict[bytes, Model] = {b"%07d" % i: File(b"%d" % (i % 5)) for i in range(num)}
    for i in range(0, num, 1000):
        wide[b"%07d" % i] = {b"in": File(b"%d" % i)}
    borders = [0, 1, 2, PIECE_ENTRIES - 1, PIECE_ENTRIES, PIECE_ENTRIES + 1, num - 1, num]
    with twins_of(wide, is_by_content=is_by_content) as twins:
        top = twins.lookup(ROOT, basename("tree")).nodeid
        for i in [*borders, *range(0, num, 500)]:
            nodeid = twins.lookup(top, b"%07d" % i).nodeid
            if nodeid:
                check_node(twins, nodeid)
                twins.check(fuse_client.readdirplus(nodeid, 0))
            assert twins.check(fuse_client.lookup(top, b"%07dx" % i))
        for cookie in (*borders, 2 * PIECE_ENTRIES + 2, num + 1, num + 2, num + 3):
            for size in (160, 4096, 1 << 20):
                assert twins.check(fuse_client.readdirplus(top, cookie, size))
                assert twins.check(fuse_client.readdir(top, cookie, size))


@pytest.mark.slow
def test_a_real_tree() -> None:
    root = Path(__file__).parents[2]
    model = model_of(root / "appliance") | {b"tests": model_of(root / "tests" / "fakes")}
    with twins_of(model) as twins:
        top = twins.lookup(ROOT, basename("tree")).nodeid
        assert check_tree(twins, top, (300, 1000, 4096)) > 200


def model_of(path: Path) -> dict[bytes, Model]:
    model: dict[bytes, Model] = {}
    for below in path.iterdir():
        name = below.name.encode()
        if below.is_dir():
            if below.name != "__pycache__":
                model[name] = model_of(below)
        elif below.is_file():
            model[name] = File(below.read_bytes(), below.suffix == ".py")
    return model
