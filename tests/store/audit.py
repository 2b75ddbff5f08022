"""Checking all that a store shows against what it says of itself."""

from pathlib import Path
from typing import NamedTuple

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node
from appliance.castore.size_dialect import SizeDialect
from appliance.db.environment import ReadTransaction
from appliance.nix.path_info import PathInfo, read_path_info
from appliance.store import schema
from appliance.store.store import BlobFile, Store


class Audit(NamedTuple):
    """What is in the store; all of it was hashed and found complete."""

    num_blobs: int
    num_directories: int
    path_infos: list[PathInfo]


def content(store: Store, txn: ReadTransaction, digest: bytes) -> bytes:
    """Return the content of a blob, which must be there."""
    blob = store.blob(txn, digest)
    assert blob is not None, f"blob {digest.hex()} is absent"
    if isinstance(blob, BlobFile):
        found = blob.path.read_bytes()
        assert len(found) == blob.size
        return found
    return bytes(blob)


def audit(path: Path, *, is_readonly: bool = False) -> Audit:
    """Open the store at `path`, and check everything in it; a writer's is without leftovers."""
    store = Store.open(path, is_readonly=is_readonly)
    try:
        assert is_readonly or not has_leftovers(path)
        with store.read() as txn:
            blobs = _all_keys(store, txn, schema.BLOBS)
            for digest in blobs:
                assert Digest.of(content(store, txn, digest)) == digest
            directories = _all_keys(store, txn, schema.DIRECTORIES)
            for digest in directories:
                _check_directory(store, txn, digest)
            path_infos = [read_path_info(encoded) for _, encoded in store.path_infos(txn)]
            for info in path_infos:
                _check_closure(store, txn, info.node)
            log = [read_path_info(encoded) for _, encoded in store.path_infos_since(txn, 0)]
            assert set(log) == set(path_infos)
            assert store.generation(txn) >= len(path_infos)
        return Audit(len(blobs), len(directories), path_infos)
    finally:
        store.close()


def has_leftovers(path: Path) -> bool:
    """Whether there are temporary files below the store at `path`."""
    return any((path / "tmp").glob("*"))


def _all_keys(store: Store, txn: ReadTransaction, database: bytes) -> list[bytes]:
    cursor = txn.cursor(db=store.env.database(database))
    return [bytes(key) for key in cursor.iternext(keys=True, values=False)]


def _check_directory(store: Store, txn: ReadTransaction, digest: bytes) -> Directory:
    encoded = store.directory(txn, digest)
    assert encoded is not None, f"directory {digest.hex()} is absent"
    directory = Directory.from_bytes(encoded)
    assert directory.to_bytes() == encoded
    assert directory.digest() == digest
    return directory


def _check_closure(store: Store, txn: ReadTransaction, root: Node) -> None:
    stack = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, FileNode):
            blob = store.blob(txn, node.digest)
            assert blob is not None
            assert node.size == (blob.size if isinstance(blob, BlobFile) else len(blob))
        elif isinstance(node, DirectoryNode):
            directory = (
                Directory()
                if node.digest == EMPTY_DIGEST
                else _check_directory(store, txn, node.digest)
            )
            assert node.size in {directory.size(dialect) for dialect in SizeDialect}
            stack += directory.nodes()
