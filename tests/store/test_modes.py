"""Who can read a store."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.importer.importer import import_paths
from appliance.store.store import Store
from tests.importer.trees import Silent

NOBODY = 65534
READERS = 4711


@pytest.fixture
def store() -> Iterator[Path]:
    """A store that is made without a umask, in a directory that others can enter."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    (directory / "file").write_bytes(b"x" * 100_000)
    umask = os.umask(0)
    try:
        list(import_paths(directory / "store", [directory / "file"], progress=Silent()))
    finally:
        os.umask(umask)
    yield directory / "store"
    shutil.rmtree(directory)


def reads_as(uid: int, group: int, store_path: Path) -> bool:
    """Whether a user can read a blob of the store; each way runs in its own process."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            os.setgroups([])
            os.setresgid(group, group, group)
            os.setresuid(uid, uid, uid)
            Store.open(store_path, is_readonly=True).close()
            (blob,) = (path for path in (store_path / "blobs").rglob("*") if path.is_file())
            status = 0 if blob.read_bytes() == b"x" * 100_000 else 2
        except PermissionError:
            status = 1
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in {0, 1}
    return status == 0


def test_a_new_store_is_for_its_owner_and_a_group(store: Path) -> None:
    modes = {
        path.relative_to(store).parts[0]: stat.S_IMODE(path.stat().st_mode)
        for path in (store / "data.mdb", store / "lock.mdb", store / "blobs", store / "tmp")
    }
    assert stat.S_IMODE(store.stat().st_mode) == 0o750
    assert modes["data.mdb"] == modes["lock.mdb"] == 0o644
    assert modes["blobs"] & 0o055 == modes["tmp"] & 0o055 == 0o055
    blobs = [path for path in (store / "blobs").rglob("*") if path.is_file()]
    assert [stat.S_IMODE(path.stat().st_mode) for path in blobs] == [0o444]


def test_the_group_of_a_store_reads_it_and_nobody_else(store: Path) -> None:
    os.chown(store, -1, READERS)
    assert reads_as(NOBODY, READERS, store)
    assert not reads_as(NOBODY, NOBODY, store)


def test_the_mode_of_a_store_that_exists_is_left_alone(store: Path) -> None:
    store.chmod(0o755)
    Store.open(store, create=True).close()
    assert stat.S_IMODE(store.stat().st_mode) == 0o755
