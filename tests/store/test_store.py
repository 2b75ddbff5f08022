"""The store: committed objects are there, complete, and in the order of their commits."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory, FileNode
from appliance.errors import SchemaVersionError, StoreError, StoreFullError
from appliance.store import schema
from appliance.store.batch import Batch
from appliance.store.blob_files import BlobFile
from appliance.store.store import Store
from tests.db.test_environment import small_disk
from tests.store.audit import blob_path, content, read_file

LARGE = os.urandom(schema.INLINE_MAX + 1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.open(tmp_path / "store", create=True)
    yield made
    made.close()


def stage(store: Store, data: bytes) -> Path:
    path = store.path / "staged"
    path.write_bytes(data)
    return path


def batch_of(*blobs: bytes) -> Batch:
    batch = Batch()
    for blob in blobs:
        batch.add_blob(Digest.of(blob), blob)
    return batch


def path_infos_batch(*infos: tuple[bytes, bytes]) -> Batch:
    batch = Batch()
    for digest, encoded in infos:
        batch.add_path_info(digest, encoded)
    return batch


def key(number: int) -> bytes:
    return number.to_bytes(20, "big")


@pytest.mark.parametrize("size", [0, 1, 4096, schema.INLINE_MAX])
def test_small_blob_comes_back_from_the_map(store: Store, size: int) -> None:
    data = os.urandom(size)
    store.commit(batch_of(data))
    with store.snapshot() as snapshot:
        found = snapshot.blob(Digest.of(data))
        assert isinstance(found, memoryview)
        assert found == data


def test_large_blob_comes_back_as_a_file_of_its_own(store: Store) -> None:
    digest = Digest.of(LARGE)
    batch = Batch()
    staged = stage(store, LARGE)
    batch.add_file(digest, staged, len(LARGE))
    store.commit(batch)
    assert not staged.exists()
    with store.snapshot() as snapshot:
        found = snapshot.blob(digest)
    assert found == BlobFile(digest, len(LARGE))
    assert read_file(store, found) == LARGE
    name = digest.hex()
    assert (store.path / "blobs" / name[:2] / name).read_bytes() == LARGE


def test_large_blob_that_is_there_is_not_replaced(store: Store) -> None:
    digest = Digest.of(LARGE)
    inodes = set()
    for _ in range(2):
        batch = Batch()
        batch.add_file(digest, stage(store, LARGE), len(LARGE))
        store.commit(batch)
        inodes.add(blob_path(store, digest).stat().st_ino)
        assert not (store.path / "staged").exists()
    assert len(inodes) == 1


def test_torn_file_without_a_record_is_replaced(store: Store) -> None:
    digest = Digest.of(LARGE)
    blob_path(store, digest).parent.mkdir(parents=True)
    blob_path(store, digest).write_bytes(LARGE[:100])
    with store.snapshot() as snapshot:
        assert snapshot.blob(digest) is None
    batch = Batch()
    batch.add_file(digest, stage(store, LARGE), len(LARGE))
    store.commit(batch)
    with store.snapshot() as snapshot:
        assert content(store, snapshot, digest) == LARGE


def test_absent_objects_are_none_but_the_empty_ones_are_always_there(store: Store) -> None:
    with store.snapshot() as snapshot:
        assert snapshot.blob(bytes(32)) is None
        assert snapshot.directory(bytes(32)) is None
        assert snapshot.path_info(bytes(20)) is None
        assert content(store, snapshot, EMPTY_DIGEST) == b""
        assert snapshot.directory(EMPTY_DIGEST) == b""


def test_directory_comes_back_as_it_was_put(store: Store) -> None:
    directory = Directory(files=[FileNode(b"f", EMPTY_DIGEST, 0, executable=True)])
    batch = Batch()
    batch.add_directory(directory.digest(), directory.to_bytes())
    store.commit(batch)
    with store.snapshot() as snapshot:
        assert snapshot.directory(directory.digest()) == directory.to_bytes()


def test_path_infos_are_listed_by_digest_after_any_point(store: Store) -> None:
    infos = {key(number): b"info %d" % number for number in (5, 1, 3)}
    store.commit(path_infos_batch(*infos.items()))
    with store.snapshot() as snapshot:
        assert list(snapshot.path_infos()) == sorted(infos.items())
        assert list(snapshot.path_infos(key(1))) == sorted(infos.items())[1:]
        assert list(snapshot.path_infos(key(2))) == sorted(infos.items())[1:]
        assert list(snapshot.path_infos(key(5))) == []
        assert snapshot.path_info(key(3)) == b"info 3"


def test_path_infos_since_a_generation_come_in_the_order_they_were_put(store: Store) -> None:
    for number in (9, 2, 7):
        store.commit(path_infos_batch((key(number), b"%d" % number)))
    with store.snapshot() as snapshot:
        assert snapshot.generation == 3
        assert list(snapshot.path_infos_since(0)) == [(1, b"9"), (2, b"2"), (3, b"7")]
        assert list(snapshot.path_infos_since(2)) == [(3, b"7")]
        assert list(snapshot.path_infos_since(3)) == []


def test_generation_counts_path_infos_and_nothing_else(store: Store) -> None:
    store.commit(batch_of(b"x"))
    with store.snapshot() as snapshot:
        assert snapshot.generation == 0
    store.commit(path_infos_batch((key(1), b"a"), (key(2), b"b")))
    store.commit(path_infos_batch((key(1), b"a")))
    with store.snapshot() as snapshot:
        assert snapshot.generation == 2
    store.commit(path_infos_batch((key(1), b"changed")))
    with store.snapshot() as snapshot:
        assert snapshot.generation == 3
        assert list(snapshot.path_infos_since(2)) == [(3, b"changed")]
        assert [encoded for _, encoded in snapshot.path_infos()] == [b"changed", b"b"]


def test_store_grows_from_a_tiny_map(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True, map_size_bytes=1 << 16)
    blobs = [os.urandom(5000) for _ in range(500)]
    for start in range(0, 500, 50):
        store.commit(batch_of(*blobs[start : start + 50]))
    with store.snapshot() as snapshot:
        assert all(content(store, snapshot, Digest.of(blob)) == blob for blob in blobs)
    store.close()


def test_large_blob_survives_a_commit_that_had_to_grow_the_map(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True, map_size_bytes=1 << 16)
    batch = batch_of(*(os.urandom(5000) for _ in range(200)))
    batch.add_file(Digest.of(LARGE), stage(store, LARGE), len(LARGE))
    store.commit(batch)
    with store.snapshot() as snapshot:
        assert content(store, snapshot, Digest.of(LARGE)) == LARGE
    store.close()


def test_reopened_store_has_what_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = Store.open(path, create=True)
    store.commit(batch_of(b"kept"))
    store.close()
    for is_readonly in (True, False):
        again = Store.open(path, is_readonly=is_readonly)
        with again.snapshot() as snapshot:
            assert content(again, snapshot, Digest.of(b"kept")) == b"kept"
        again.close()


@pytest.mark.parametrize("is_readonly", [True, False])
def test_absent_store_is_not_created_unasked(tmp_path: Path, is_readonly: bool) -> None:  # noqa: FBT001 -- a pytest parameter
    path = tmp_path / "store"
    with pytest.raises(StoreError, match=f"{path}: no store there"):
        Store.open(path, is_readonly=is_readonly)
    assert not path.exists()


def test_store_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = Store.open(path, create=True)
    meta = store.env.database(schema.META)
    store.env.write(lambda txn: txn.put(b"version", schema.pack_number(99), db=meta))
    store.close()
    for is_readonly in (True, False):
        with pytest.raises(SchemaVersionError, match="version 99"):
            Store.open(path, is_readonly=is_readonly)


def test_full_disk_leaves_neither_records_nor_files(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        store = Store.open(disk / "store", create=True)
        store.commit(batch_of(b"before"))
        batch = batch_of(*(os.urandom(60000) for _ in range(100)))
        batch.add_file(Digest.of(LARGE), stage(store, LARGE), len(LARGE))
        with pytest.raises(StoreFullError):
            store.commit(batch)
        assert not (store.path / "staged").exists()
        assert not blob_path(store, Digest.of(LARGE)).exists()
        with store.snapshot() as snapshot:
            assert snapshot.blob(Digest.of(LARGE)) is None
            assert all(snapshot.blob(digest) is None for digest in batch.blobs)
            assert content(store, snapshot, Digest.of(b"before")) == b"before"
        store.commit(batch_of(b"after"))
        store.close()
