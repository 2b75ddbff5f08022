"""Checks that a store is consistent: digests, closures, and the log of PathInfos."""

import os
from pathlib import Path
from typing import NamedTuple

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node
from appliance.castore.size_dialect import SizeDialect
from appliance.nix.path_info import PathInfo, read_path_info
from appliance.store.blob_files import BlobFile
from appliance.store.snapshot import Snapshot
from appliance.store.store import Store


class Audit(NamedTuple):
    """The contents of a store, all hashed and found complete."""

    num_blobs: int
    num_directories: int
    path_infos: list[PathInfo]


def blob_path(store: Store, digest: bytes) -> Path:
    """Return the path of the file of a blob."""
    name = digest.hex()
    return store.path / "blobs" / name[:2] / name


def read_file(store: Store, blob: BlobFile) -> bytes:
    """Return the content of a blob file."""
    with os.fdopen(store.open_blob(blob), "rb") as file:
        return file.read()


def content(store: Store, snapshot: Snapshot, digest: bytes) -> bytes:
    """Return the content of a blob, which must be there."""
    blob = snapshot.blob(digest)
    assert blob is not None, f"blob {digest.hex()} is absent"
    if isinstance(blob, BlobFile):
        found = read_file(store, blob)
        assert len(found) == blob.size
        return found
    return bytes(blob)


def audit(path: Path, *, is_readonly: bool = False) -> Audit:
    """Check everything in the store at `path`; one that is writable must have no leftovers."""
    store = Store.open(path, is_readonly=is_readonly)
    try:
        assert is_readonly or not has_leftovers(path)
        with store.snapshot() as snapshot:
            blobs = list(snapshot.blob_digests())
            for digest in blobs:
                assert Digest.of(content(store, snapshot, digest)) == digest
            directories = [digest for digest, _ in snapshot.directories()]
            for digest in directories:
                _check_directory(snapshot, digest)
            path_infos = [read_path_info(encoded) for _, encoded in snapshot.path_infos()]
            for info in path_infos:
                _check_closure(snapshot, info.node)
            log = [read_path_info(encoded) for _, encoded in snapshot.path_infos_since(0)]
            assert set(log) == set(path_infos)
            assert snapshot.generation >= len(path_infos)
        return Audit(len(blobs), len(directories), path_infos)
    finally:
        store.close()


def has_leftovers(path: Path) -> bool:
    """Whether there are temporary files below the store at `path`."""
    return any((path / "tmp").glob("*"))


def _check_directory(snapshot: Snapshot, digest: bytes) -> Directory:
    encoded = snapshot.directory(digest)
    assert encoded is not None, f"directory {digest.hex()} is absent"
    directory = Directory.from_bytes(encoded)
    assert directory.to_bytes() == encoded
    assert directory.digest() == digest
    return directory


def _check_closure(snapshot: Snapshot, root: Node) -> None:
    stack = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, FileNode):
            blob = snapshot.blob(node.digest)
            assert blob is not None
            assert node.size == (blob.size if isinstance(blob, BlobFile) else len(blob))
        elif isinstance(node, DirectoryNode):
            directory = (
                Directory()
                if node.digest == EMPTY_DIGEST
                else _check_directory(snapshot, node.digest)
            )
            assert node.size in {directory.size(dialect) for dialect in SizeDialect}
            stack += directory.nodes()
