"""The reader of a store through the C module, beside writers in other processes.

No test here opens the store by py-lmdb while the reader has it open: two libraries in one process
do not know of each other's locks.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory, FileNode
from appliance.errors import PidInUseError, SchemaVersionError, SnapshotLostError, StoreError
from appliance.store import schema
from appliance.store.batch import Batch
from appliance.store.blob_files import BlobFile
from appliance.store.snapshot import Snapshot
from appliance.store.store import Store
from appliance.store.store_reader import StoreReader

BLOB = b"content"
BIG = b"b" * 100_000
DIRECTORY = Directory([], [FileNode(b"file", Digest.of(BLOB), len(BLOB), False)], [])  # noqa: FBT003
WRITER = """
import sys
from pathlib import Path
from appliance.castore.digest import Digest
from appliance.store.batch import Batch
from appliance.store.snapshot import Snapshot
from appliance.store.store import Store
path, num, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store = Store.open(path)
for i in range(num):
    batch = Batch()
    for j in range(max(1, size // 60000)):
        content = (b"%d/%d/" % (i, j)).ljust(min(size, 60000), b"x")
        batch.add_blob(Digest.of(content), content)
    store.commit(batch)
store.close()
"""


def commit_elsewhere(path: Path, num: int, size: int = 100) -> None:
    """Commit `num` batches of `size` bytes in another process."""
    subprocess.run([sys.executable, "-c", WRITER, path, str(num), str(size)], check=True)


def content(i: int, size: int = 100) -> bytes:
    """Return the first blob of batch `i` of `commit_elsewhere`."""
    return (b"%d/0/" % i).ljust(min(size, 60000), b"x")


def inline(snapshot: Snapshot, digest: bytes) -> bytes:
    found = snapshot.blob(digest)
    assert isinstance(found, memoryview)
    return bytes(found)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    store = Store.open(path, create=True, map_size_bytes=1 << 20)
    batch = Batch()
    batch.add_blob(Digest.of(BLOB), BLOB)
    (tmp_path / "big").write_bytes(BIG)
    batch.add_file(Digest.of(BIG), tmp_path / "big", len(BIG))
    batch.add_directory(DIRECTORY.digest(), DIRECTORY.to_bytes())
    batch.add_path_info(bytes(20), b"path info")
    store.commit(batch)
    store.close()
    return path


def test_reads_what_a_store_has(path: Path) -> None:
    store = Store.open(path, is_readonly=True)
    with store.snapshot() as snapshot:
        image = bytes(snapshot.image(DIRECTORY.digest()) or b"")
    store.close()
    reader = StoreReader(path)
    with reader.snapshot() as snapshot:
        assert inline(snapshot, Digest.of(BLOB)) == BLOB
        big = snapshot.blob(Digest.of(BIG))
        assert big == BlobFile(Digest.of(BIG), len(BIG))
        assert snapshot.blob(bytes(32)) is None
        assert inline(snapshot, EMPTY_DIGEST) == b""
        assert snapshot.directory(DIRECTORY.digest()) == DIRECTORY.to_bytes()
        assert bytes(snapshot.image(DIRECTORY.digest()) or b"") == image
        assert snapshot.image(EMPTY_DIGEST) is not None
        assert snapshot.image(DIRECTORY.digest(), 1) is None
        assert snapshot.generation == 1
        assert snapshot.path_info(bytes(20)) == b"path info"
        assert snapshot.nar_info(bytes(32)) is None
    assert isinstance(big, BlobFile)
    with os.fdopen(reader.open_blob(big), "rb") as file:
        assert file.read() == BIG
    reader.close()


def test_a_snapshot_stays_as_it_is_and_the_next_one_is_new(path: Path) -> None:
    reader = StoreReader(path)
    with reader.snapshot() as snapshot:
        commit_elsewhere(path, 5)
        assert snapshot.blob(Digest.of(content(0))) is None
        assert inline(snapshot, Digest.of(BLOB)) == BLOB
    with reader.snapshot() as snapshot:
        assert inline(snapshot, Digest.of(content(4))) == content(4)
    reader.close()


def test_a_file_that_outgrows_the_map_is_mapped_anew(path: Path) -> None:
    reader = StoreReader(path, map_size_bytes=1 << 20)
    commit_elsewhere(path, 1, 8 << 20)
    for _ in range(2):
        with reader.snapshot() as snapshot:
            assert inline(snapshot, Digest.of(content(0, 8 << 20))) == content(0, 8 << 20)
    reader.close()


def test_growth_within_a_limit_of_address_space(path: Path) -> None:
    reader = StoreReader(path, map_size_bytes=1 << 20)
    commit_elsewhere(path, 1, 8 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + (4 << 20), hard))
        with pytest.raises(StoreError, match="bytes of address space"), reader.snapshot():
            pass
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + (256 << 20), hard))
        with reader.snapshot() as snapshot:
            assert inline(snapshot, Digest.of(BLOB)) == BLOB
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    reader.close()


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


def test_writers_see_the_snapshot(path: Path) -> None:
    size_before = (path / "data.mdb").stat().st_size
    reader = StoreReader(path)
    with reader.snapshot() as snapshot:
        view = snapshot.blob(Digest.of(BLOB))
        assert isinstance(view, memoryview)
        commit_elsewhere(path, 50, 1000)
        assert view == BLOB, "its pages were not reused"
    grown = (path / "data.mdb").stat().st_size - size_before
    reader.close()
    assert grown > 50 * 4096


def test_without_the_lock_a_snapshot_can_be_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("appliance.store.store_reader.check_pid", refuse)
    reader = StoreReader(path)
    assert not reader.is_registered
    with reader.snapshot() as snapshot:
        assert inline(snapshot, Digest.of(BLOB)) == BLOB
        commit_elsewhere(path, 1)
    with pytest.raises(SnapshotLostError), reader.snapshot():
        commit_elsewhere(path, 4)
    with reader.snapshot() as snapshot:
        assert inline(snapshot, Digest.of(content(3))) == content(3)
    reader.close()


def test_a_process_of_the_same_id(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> None:
        raise PidInUseError("lock.mdb", 1)

    monkeypatch.setattr("appliance.store.store_reader.check_pid", refuse)
    with pytest.raises(PidInUseError):
        StoreReader(path)


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        StoreReader(tmp_path / "none")


def test_a_store_that_was_cut_off(path: Path) -> None:
    os.truncate(path / "data.mdb", 8192)
    with pytest.raises(StoreError, match="truncated"):
        StoreReader(path)


def test_a_store_of_another_version(path: Path) -> None:
    with lmdb.open(str(path), max_dbs=8) as env:
        database = env.open_db(schema.META)
        with env.begin(write=True) as txn:
            txn.put(schema.VERSION_KEY, schema.pack_number(99), db=database)
    with pytest.raises(SchemaVersionError, match="version 99"):
        StoreReader(path)


def test_a_database_that_is_missing(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), max_dbs=8) as env:
        env.open_db(schema.META)
    with pytest.raises(SchemaVersionError, match="a database is missing"):
        StoreReader(tmp_path)


def test_a_store_without_images(path: Path) -> None:
    with lmdb.open(str(path), max_dbs=8) as env:
        database = env.open_db(schema.IMAGES)
        with env.begin(write=True) as txn:
            txn.drop(database)
    reader = StoreReader(path)
    with reader.snapshot() as snapshot:
        assert snapshot.image(DIRECTORY.digest()) is None
        assert snapshot.image(EMPTY_DIGEST) is not None
        assert snapshot.directory(DIRECTORY.digest()) == DIRECTORY.to_bytes()
    reader.close()


def test_one_snapshot_at_a_time(path: Path) -> None:
    reader = StoreReader(path)
    with reader.snapshot(), pytest.raises(StoreError, match="busy"), reader.snapshot():
        pass
    reader.close()
