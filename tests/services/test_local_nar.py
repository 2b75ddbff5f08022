"""NARs rendered straight from a store: equal to those of `nar_render`, whole and in parts."""

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.errors import (
    ApplianceError,
    ConfigError,
    ContentMissingError,
    NarError,
    StoreError,
    WrongDigestError,
)
from appliance.nix.nar import NarWriter
from appliance.nix.path_info import encode_nar_addressed
from appliance.nix.store_path import nar_path
from appliance.services.local_nar import LocalNar, find_node
from appliance.store.batch import Batch
from appliance.store.store import Store
from tests.fakes.appliance_process import import_tree
from tests.fakes.running_command import APPLIANCE, DEADLINE_S
from tests.refusal import refused

SMALL = b"content"
LARGE = bytes(range(256)) * 3000
CONTENTS = (b"", SMALL, b"x" * 8, LARGE)


def file(name: bytes, content: bytes, *, executable: bool = False) -> FileNode:
    return FileNode(name, Digest.of(content), len(content), executable)


def directory(name: bytes, content: Directory) -> DirectoryNode:
    return DirectoryNode(name, content.digest(), content.size())


INNER = Directory(files=[file(b"large", LARGE), file(b"run", SMALL, executable=True)])
EMPTY = Directory()
MIDDLE = Directory([directory(b"empty", EMPTY), directory(b"inner", INNER)])
ROOT = Directory(
    [directory(b"b", MIDDLE), directory(b"d", INNER)],
    [file(b"a", SMALL), file(b"c", b""), file(b"e", b"x" * 8)],
    [SymlinkNode(b"f", b"a")],
)
ROOT_NODE = directory(b"", ROOT)
ROOTS: dict[str, Node] = {
    "directory": ROOT_NODE,
    "empty directory": directory(b"", EMPTY),
    "file": file(b"", SMALL),
    "large file": file(b"", LARGE, executable=True),
    "empty file": file(b"", b""),
    "symlink": SymlinkNode(b"", b"target"),
}


def fill(store: Store, tmp_path: Path) -> None:
    batch = Batch()
    for content in CONTENTS:
        if content is LARGE:
            staged = tmp_path / "staged"
            staged.write_bytes(content)
            batch.add_file(Digest.of(content), staged, len(content))
        else:
            batch.add_blob(Digest.of(content), content)
    for item in (EMPTY, INNER, MIDDLE, ROOT):
        batch.add_directory(item.digest(), item.to_bytes())
    store.commit(batch)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "store", create=True)
    try:
        fill(opened, tmp_path)
        yield opened
    finally:
        opened.close()


def expected_nar(root: Node) -> bytes:
    """Write the NAR with the plain writer."""
    contents = {Digest.of(content): content for content in CONTENTS}
    directories = {item.digest(): item for item in (EMPTY, INNER, MIDDLE, ROOT)}
    out = bytearray()
    writer = NarWriter(out.extend)

    def write(node: Node) -> None:
        match node:
            case FileNode():
                writer.file(contents[node.digest], executable=node.executable)
            case SymlinkNode():
                writer.symlink(node.target)
            case DirectoryNode():
                writer.directory()
                for child in directories[node.digest].nodes():
                    writer.entry(child.name)
                    write(child)
                writer.end_directory()

    write(root)
    writer.finish()
    return bytes(out)


def rendered(store: Store, root: Node, start: int = 0, end: int | None = None) -> bytes:
    return b"".join(map(bytes, LocalNar(store, root).pieces(start, end)))


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS.keys())
def test_equals_what_the_writer_writes(store: Store, root: Node) -> None:
    nar = rendered(store, root)

    assert nar == expected_nar(root)
    assert LocalNar(store, root).measure().extent.nar_size == len(nar)


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS.keys())
def test_every_range_is_that_part_of_the_nar(store: Store, root: Node) -> None:
    nar = expected_nar(root)
    # All offsets but those inside of large contents, and some of those.
    step = 997 if len(nar) > 10_000 else 7
    offsets = sorted({*range(min(len(nar), 700)), *range(0, len(nar) + 1, step), len(nar)})
    local = LocalNar(store, root)
    for start in offsets[:: 5 if step == 997 else 1]:
        for size in (1, 8, 300_000):
            got = b"".join(map(bytes, local.pieces(start, start + size)))
            assert got == nar[start : start + size], (start, size)
        assert hashlib.sha256(b"".join(map(bytes, local.pieces(start)))).digest() == (
            hashlib.sha256(nar[start:]).digest()
        )


def test_no_snapshot_is_open_between_pieces(store: Store) -> None:
    for _piece in LocalNar(store, ROOT_NODE).pieces():
        # A thread has at most one transaction open.
        with store.snapshot():
            pass


def test_contents_before_the_range_are_not_read(store: Store) -> None:
    missing = FileNode(b"0", Digest(bytes(32)), 5, executable=False)
    after = Directory(files=[missing, file(b"1", SMALL)])
    batch = Batch()
    batch.add_directory(after.digest(), after.to_bytes())
    store.commit(batch)
    node = directory(b"", after)

    with refused(ContentMissingError, "blob-not-found"):
        rendered(store, node)
    nar = rendered(store, node, start=300)
    assert SMALL in nar


@pytest.mark.parametrize(
    ("node", "error", "rule"),
    [
        (DirectoryNode(b"", Digest(bytes(32)), 1), ContentMissingError, "directory-not-found"),
        (FileNode(b"", Digest(bytes(32)), 1, executable=False), ContentMissingError, None),
        (file(b"", SMALL)._replace(size=6), NarError, "blob-too-long"),
        (file(b"", SMALL)._replace(size=8), NarError, "blob-too-short"),
        (file(b"", LARGE)._replace(size=1), NarError, "blob-too-long"),
    ],
)
def test_what_is_not_as_its_node_says_is_an_error(
    store: Store, node: Node, error: type[ApplianceError], rule: str | None
) -> None:
    with refused(error, rule or "blob-not-found"):
        rendered(store, node)


def test_wrong_content_is_found(store: Store) -> None:
    wrong = Digest.of(b"another")
    batch = Batch()
    batch.add_blob(wrong, SMALL)
    store.commit(batch)
    with pytest.raises(WrongDigestError):
        rendered(store, FileNode(b"", wrong, len(SMALL), executable=False))

    (large,) = (path for path in (store.path / "blobs").rglob("*") if path.is_file())
    large.chmod(0o600)
    with large.open("r+b") as changed:
        changed.seek(500_000)
        changed.write(b"changed")
    with pytest.raises(WrongDigestError):
        rendered(store, file(b"", LARGE))
    large.unlink()
    with refused(ContentMissingError, "blob-not-found"):
        rendered(store, file(b"", LARGE))


def test_nodes_are_found_by_their_paths(store: Store) -> None:
    path = nar_path(bytes(32), "tree")
    batch = Batch()
    encoded = encode_nar_addressed(path, ROOT_NODE, nar_size=1, nar_sha256=bytes(32))
    batch.add_path_info(path.digest, encoded)
    store.commit(batch)

    assert find_node(store, path.absolute()) == ROOT_NODE._replace(name=path.basename().encode())
    assert find_node(store, f"{path.basename()}/b/./inner/run") == INNER.files[1]
    for missing in (f"{path.absolute()}r", f"{path.absolute()}/x", f"{path.absolute()}/a/x"):
        with pytest.raises(StoreError):
            find_node(store, missing)
    with pytest.raises(ConfigError):
        find_node(store, "/nowhere")


@pytest.mark.slow
def test_command_that_wrote_wrong_content_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(LARGE * 10)
    (name,) = import_tree(tmp_path / "store", tmp_path / "file")
    command = [*APPLIANCE, "nar", "--store", f"lmdb://{tmp_path}/store", f"/nix/store/{name}"]
    done = subprocess.run(command, check=True, capture_output=True)
    assert done.stdout.count(LARGE * 10) == 1

    (blob,) = (path for path in (tmp_path / "store" / "blobs").rglob("*") if path.is_file())
    blob.chmod(0o600)
    with blob.open("r+b") as changed:
        changed.write(b"changed")
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == 1
    assert b"the content has the digest" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.slow
def test_command_whose_reader_has_gone_ends(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(LARGE * 10)
    (name,) = import_tree(tmp_path / "store", tmp_path / "file")
    command = [*APPLIANCE, "nar", "--store", f"lmdb://{tmp_path}/store", f"/nix/store/{name}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(100)
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 1
