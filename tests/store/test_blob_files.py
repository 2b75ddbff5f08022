"""Blob files are found through a descriptor of the store's directory, wherever it was moved."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.resolve.local import open_blob
from appliance.session.wants import BlobWanted
from appliance.store.batch import Batch
from appliance.store.blob_cache import BlobCache
from appliance.store.blob_files import BlobFile, BlobFiles
from appliance.store.schema import INLINE_MAX
from appliance.store.store import Store
from tests.store.audit import blob_path, content

LARGE = os.urandom(INLINE_MAX + 1)
OTHER = os.urandom(INLINE_MAX + 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    made = Store.open(path, create=True)
    yield made
    made.close()


def put(store: Store, spare: Path, data: bytes) -> BlobFile:
    digest = Digest.of(data)
    staged = spare / "staged"
    staged.write_bytes(data)
    batch = Batch()
    batch.add_file(digest, staged, len(data))
    store.commit(batch)
    with store.snapshot() as snapshot:
        found = snapshot.blob(digest)
    assert isinstance(found, BlobFile)
    return found


def read(store: Store, digest: bytes) -> bytes:
    with store.snapshot() as snapshot:
        return content(store, snapshot, digest)


def test_files_are_found_in_a_store_that_was_moved(store: Store, path: Path) -> None:
    blob = put(store, path.parent, LARGE)
    path.rename(path.parent / "moved")
    assert read(store, blob.digest) == LARGE
    with store.snapshot() as snapshot:
        assert snapshot.has_blob(blob.digest, len(LARGE))
    fd = open_blob(store, BlobWanted(blob.digest, blob.size))
    assert fd is not None
    assert os.pread(fd, len(LARGE) + 1, 0) == LARGE
    os.close(fd)


def test_files_are_put_into_a_store_that_was_moved(store: Store, path: Path) -> None:
    path.rename(path.parent / "moved")
    blob = put(store, path.parent, LARGE)
    assert read(store, blob.digest) == LARGE
    assert not path.exists()
    assert (path.parent / "moved/blobs").is_dir()


def test_another_store_in_the_place_of_an_open_one_is_left_alone(store: Store, path: Path) -> None:
    blob = put(store, path.parent, LARGE)
    path.rename(path.parent / "moved")
    other = Store.open(path, create=True)
    put(other, path.parent, OTHER)
    torn = blob_path(other, blob.digest)
    torn.parent.mkdir(exist_ok=True)
    torn.write_bytes(b"torn")
    assert read(store, blob.digest) == LARGE
    assert read(other, Digest.of(OTHER)) == OTHER
    with pytest.raises(FileNotFoundError):
        store.open_blob(BlobFile(Digest.of(OTHER), len(OTHER)))
    other.close()


def test_a_cache_that_was_moved_evicts_its_own_files(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 2 * len(LARGE))
    blob = put(cache.store, tmp_path, LARGE)
    moved = cache.store.path.rename(tmp_path / "moved")
    cache.drop(Digest(blob.digest))
    assert not [path for path in moved.glob("blobs/*/*") if path.is_file()]
    cache.close()


def test_a_reader_that_was_there_before_the_first_file_finds_it(store: Store, path: Path) -> None:
    reader = BlobFiles(path)
    with pytest.raises(FileNotFoundError):
        reader.open(Digest.of(LARGE))
    assert not reader.is_whole(BlobFile(Digest.of(LARGE), len(LARGE)))
    assert reader.is_whole(put(store, path.parent, LARGE))
    reader.close()


def test_a_file_that_is_gone_is_named_by_its_whole_path(store: Store, path: Path) -> None:
    blob = put(store, path.parent, LARGE)
    where = blob_path(store, blob.digest)
    where.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        store.open_blob(blob)
    assert caught.value.filename == str(where)
    with store.snapshot() as snapshot:
        assert not snapshot.has_blob(blob.digest)


def test_no_descriptor_outlives_an_exec_or_its_store(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    fd = store.open_blob(put(store, tmp_path, LARGE))
    store_fd = store.files._store_fd
    for number in (fd, store_fd):
        assert fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    store.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(store_fd)
    assert os.pread(fd, len(LARGE) + 1, 0) == LARGE
    os.close(fd)
