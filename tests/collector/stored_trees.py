"""Small trees in a store, and a check of everything that a store has against them."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode
from appliance.castore.size_dialect import DEFAULT_DIALECT
from appliance.nix.path_info import encode_nar_addressed, read_path_info
from appliance.nix.store_path import StorePath, nar_path
from appliance.protos import pathinfo_pb2
from appliance.store import schema
from appliance.store.batch import Batch
from appliance.store.store import Store
from tests.store.audit import content


class Tree(NamedTuple):
    """A tree with its files at the top and in a directory `sub`, and what it refers to."""

    path: StorePath
    files: Mapping[bytes, bytes]
    directories: tuple[Directory, ...]
    """Children first; the last one is the root."""
    references: tuple[StorePath, ...]

    @property
    def root(self) -> DirectoryNode:
        directory = self.directories[-1]
        name = self.path.basename().encode()
        return DirectoryNode(name, directory.digest(), directory.size(DEFAULT_DIALECT))

    def path_info(self) -> bytes:
        sha256 = hashlib.sha256(repr(sorted(self.files.items())).encode()).digest()
        message = pathinfo_pb2.PathInfo.FromString(
            encode_nar_addressed(self.path, self.root, nar_size=1, nar_sha256=sha256)
        )
        message.narinfo.ClearField("ca")
        message.references.extend(sorted(path.digest for path in self.references))
        by_digest = sorted(self.references, key=lambda path: path.digest)
        message.narinfo.reference_names.extend(path.basename() for path in by_digest)
        return message.SerializeToString(deterministic=True)


def make_tree(
    name: str, files: Mapping[bytes, bytes], references: Sequence[StorePath] = ()
) -> Tree:
    """Return a tree whose files, by name, are both at its top and in `sub`."""
    nodes = [
        FileNode(file, Digest.of(data), len(data), executable=False)
        for file, data in sorted(files.items())
    ]
    sub = Directory(files=nodes)
    top = Directory(
        directories=[DirectoryNode(b"sub", sub.digest(), sub.size(DEFAULT_DIALECT))], files=nodes
    )
    key = hashlib.sha256(repr((sorted(files.items()), references)).encode()).digest()
    return Tree(nar_path(key, name), files, (sub, top), tuple(references))


def objects_batch(store: Store, tree: Tree) -> Batch:
    """Return what a tree is made of, without its PathInfo."""
    batch = Batch()
    for data in tree.files.values():
        if len(data) <= schema.INLINE_MAX:
            batch.add_blob(Digest.of(data), data)
        else:
            staged = store.path / f"staged-{os.getpid()}-{Digest.of(data)}"
            staged.write_bytes(data)
            batch.add_file(Digest.of(data), staged, len(data))
    for directory in tree.directories:
        batch.add_directory(directory.digest(), directory.to_bytes())
    return batch


def put_tree(store: Store, tree: Tree) -> None:
    """Put a tree in one commit."""
    batch = objects_batch(store, tree)
    batch.add_path_info(tree.path.digest, tree.path_info())
    store.commit(batch)


def check_readable(store: Store, trees: Iterable[Tree]) -> None:
    """Check that each of `trees` is in the store, byte for byte."""
    with store.snapshot() as snapshot:
        for tree in trees:
            encoded = snapshot.path_info(tree.path.digest)
            assert encoded is not None, f"{tree.path.absolute()} is gone"
            assert read_path_info(encoded).node == tree.root
            for directory in tree.directories:
                assert snapshot.directory(directory.digest()) == directory.to_bytes()
                assert snapshot.image(directory.digest()) is not None
            for data in tree.files.values():
                assert content(store, snapshot, Digest.of(data)) == data


def check_exactly(store: Store, trees: Iterable[Tree]) -> None:
    """Check that the store has `trees` and nothing else, in any table or file."""
    trees = list(trees)
    check_readable(store, trees)
    directories = {one.digest() for tree in trees for one in tree.directories}
    blobs = {Digest.of(data) for tree in trees for data in tree.files.values()}
    large = {
        Digest.of(data)
        for tree in trees
        for data in tree.files.values()
        if len(data) > schema.INLINE_MAX
    }
    paths = {tree.path.digest for tree in trees}
    assert set(keys_of(store, schema.BLOBS)) == blobs
    assert set(keys_of(store, schema.DIRECTORIES)) == directories
    assert {key[:32] for key in keys_of(store, schema.IMAGES)} == directories
    assert set(keys_of(store, schema.PATH_INFOS)) == paths
    assert set(keys_of(store, schema.PATH_TIMES)) == paths
    with store.env.read() as txn:
        log = txn.cursor(db=store.env.database(schema.PATH_INFO_LOG))
        assert {bytes(value) for _, value in log} == paths
    assert files_of(store.path) == large


def keys_of(store: Store, table: bytes) -> list[bytes]:
    with store.env.read() as txn:
        return [bytes(key) for key, _ in txn.cursor(db=store.env.database(table))]


def files_of(store_path: Path) -> set[bytes]:
    """Return the digests that files of blobs are named by."""
    return {bytes.fromhex(path.name) for path in (store_path / "blobs").glob("*/*")}
