"""Looks at every object in a store, as somebody who trusts nobody."""

from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.castore.nodes import Directory, DirectoryNode, FileNode, Node
from appliance.castore.path_info import read_path_info
from appliance.store import schema
from appliance.store.store import BlobFile, Store, Transaction


def check_store(path: Path) -> int:
    """Check a store after a start; return the number of its objects.

    Every object hashes to its digest, what every PathInfo refers to is there, and nothing
    temporary is left.
    """
    store = Store.open(path)
    try:
        left = list((path / schema.TEMP_DIRECTORY).rglob("*"))
        assert left == []
        with store.read() as txn:
            return sum(1 for _ in _objects(store, txn))
    finally:
        store.close()


def _objects(store: Store, txn: Transaction) -> Iterator[bytes]:
    for key, _value in txn.cursor(db=store.env.database(schema.BLOBS)):
        digest = bytes(key)
        assert _content_digest(store, txn, digest) == digest
        yield digest
    for key, value in txn.cursor(db=store.env.database(schema.DIRECTORIES)):
        assert Digest.of(value) == bytes(key)
        Directory.from_bytes(value)
        yield bytes(key)
    complete: set[bytes] = set()
    for path_digest, encoded in store.path_infos(txn):
        info = read_path_info(encoded)
        assert info.path.digest == path_digest
        _check_closure(store, txn, info.node, complete)
        yield path_digest


def _content_digest(store: Store, txn: Transaction, digest: bytes) -> bytes:
    found = store.blob(txn, digest)
    assert found is not None
    if not isinstance(found, BlobFile):
        return Digest.of(found)
    assert found.path.stat().st_size == found.size
    return blake3().update_mmap(found.path).digest()


def _check_closure(store: Store, txn: Transaction, root: Node, complete: set[bytes]) -> None:
    left: list[Node] = [root]
    while left:
        node = left.pop()
        if isinstance(node, FileNode):
            assert store.blob(txn, node.digest) is not None, node
        elif isinstance(node, DirectoryNode) and node.digest not in complete:
            encoded = store.directory(txn, node.digest)
            assert encoded is not None, node
            complete.add(node.digest)
            left.extend(Directory.from_bytes(encoded).nodes())
