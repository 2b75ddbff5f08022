"""Imports of content whose digests are published."""

from pathlib import Path

import pytest

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.castore.size_dialect import DEFAULT_DIALECT, SizeDialect
from appliance.importer.importer import import_paths
from appliance.nix.path_info import PathInfo
from appliance.store.store import Store
from tests.importer.trees import Silent
from tests.store.audit import audit, content

HELLO = b"Hello World!"
HELLO_DIGEST = Digest(
    bytes.fromhex("5ca7815adcb484e9a136c11efe69c1d530176d549b5d18d038eb5280b4b3470c")
)
WITH_KEEP_DIGEST = Digest(
    bytes.fromhex("8b5b5d642b646bb8ed504b0862c39413e87e57491497de7bd075953f7b83810e")
)
COMPLICATED = {
    SizeDialect.DOCUMENTED: (
        "3f951a15afd586fb3121ef4d13d582e811ce0e5a7f21c0497fd87490e9e2355a",
        4,
    ),
    SizeDialect.DOUBLED: ("424a7f6ce08d805d15b428062faae96299a1675d708c3a39261afe38cdd04feb", 8),
}


def imported(
    store: Path, path: Path, dialect: SizeDialect = DEFAULT_DIALECT
) -> tuple[PathInfo, Node]:
    """Return the PathInfo and its node, without the name of the node."""
    (name,) = import_paths(store, [path], progress=Silent(), dialect=dialect)
    (info,) = audit(store).path_infos
    assert info.path.absolute() == name
    assert info.node.name == info.path.basename().encode()
    return info, info.node._replace(name=b"")


def test_symlink_is_its_target(tmp_path: Path) -> None:
    (tmp_path / "doesntmatter").symlink_to("/nix/store/somewhereelse")
    info, node = imported(tmp_path / "store", tmp_path / "doesntmatter")

    assert node == SymlinkNode(b"", b"/nix/store/somewhereelse")
    assert (info.path.name, info.nar_size) == ("doesntmatter", 136)


def test_file_is_the_digest_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(HELLO)
    info, node = imported(tmp_path / "store", tmp_path / "root")

    assert node == FileNode(b"", HELLO_DIGEST, 12, executable=False)
    assert info.nar_size == 128
    store = Store.open(tmp_path / "store", is_readonly=True)
    with store.snapshot() as snapshot:
        assert content(store, snapshot, HELLO_DIGEST) == HELLO
    store.close()


@pytest.mark.parametrize("dialect", SizeDialect)
def test_tree_is_the_digest_of_its_directories(tmp_path: Path, dialect: SizeDialect) -> None:
    tree = tmp_path / "test"
    (tree / "keep").mkdir(parents=True)
    (tree / ".keep").touch()
    (tree / "keep" / ".keep").touch()
    (tree / "aa").symlink_to("/nix/store/somewhereelse")
    info, node = imported(tmp_path / "store", tree, dialect)

    digest, size = COMPLICATED[dialect]
    assert node == DirectoryNode(b"", Digest(bytes.fromhex(digest)), size)
    assert info.path.basename() == "4jagc832b703jlcbarhzgf6m4yxp3hj1-test"
    assert info.nar_size == 840
    store = Store.open(tmp_path / "store", is_readonly=True)
    with store.snapshot() as snapshot:
        keep = snapshot.directory(WITH_KEEP_DIGEST)
        assert keep is not None
        assert Directory.from_bytes(keep).files == (
            FileNode(b".keep", EMPTY_DIGEST, 0, executable=False),
        )
        assert snapshot.blob(EMPTY_DIGEST) is not None
    store.close()
