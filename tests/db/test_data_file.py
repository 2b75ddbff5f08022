"""Truncated or garbled files of an environment, and full disks: errors, never a signal."""

import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest

from appliance.db.data_file import check_data
from appliance.db.environment import Environment
from appliance.errors import StoreError, StoreFullError
from tests.db.test_environment import opened, put, small_disk
from tests.fakes.appliance_process import import_tree
from tests.fakes.running_command import APPLIANCE

DEADLINE_S = 60


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("store")
    tree = directory / "tree"
    tree.mkdir()
    for number in range(60):
        (tree / f"{number}").write_bytes(os.urandom(5000))
    import_tree(directory / "store", tree)
    return directory / "store"


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*APPLIANCE, *arguments], capture_output=True, check=False, text=True, timeout=DEADLINE_S
    )


def cut_to(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size)


def cut_by(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, path.stat().st_size - size)


def garble(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a few bytes": cut_to(100),
    "half the first page": cut_to(2048),
    "one page": cut_to(4096),
    "half the second page": cut_to(4096 + 100),
    "the first two pages": cut_to(8192),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "all but the last page": cut_by(4096),
    "all but the last byte": cut_by(1),
    "garbage": garble,
}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["verify", "path-info", "import"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_database_that_is_not_whole_is_one_line_and_status_one(
    imported: Path, tmp_path: Path, damage: str, command: str
) -> None:
    store = Path(shutil.copytree(imported, tmp_path / "store"))
    DAMAGES[damage](store / "data.mdb")
    more = [__file__] if command == "import" else []
    done = run(command, "--store", f"lmdb://{store}", *more)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"appliance: {store}")
    assert done.stderr.count("\n") == 1


def test_database_short_by_pages_that_are_free_is_whole(tmp_path: Path) -> None:
    # LMDB does not write the last pages if one transaction has allocated and freed them.
    path = tmp_path / "env"
    env = lmdb.Environment(os.fspath(path), map_size=1 << 28, max_dbs=1)
    database = env.open_db(b"0")
    for _ in range(3):
        with env.begin(write=True) as txn:
            txn.put(b"key", bytes(5000), db=database)
        with env.begin(write=True) as txn:
            txn.delete(b"key", db=database)
    with env.begin(write=True) as txn:
        txn.put(b"key", b"small", db=database)
        txn.put(b"big", bytes(20 << 20), db=database)
        txn.delete(b"big", db=database)
    stated = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    env.close()
    size = (path / "data.mdb").stat().st_size
    assert size < 1 << 20 < 20 << 20 < stated
    assert check_data(path) == size
    with Environment(path, databases=[b"0"], is_readonly=True, is_durable=False).read() as txn:
        assert txn.stat()["entries"] == 1
    os.truncate(path / "data.mdb", size - 4096)
    with pytest.raises(StoreError, match="truncated: has"):
        check_data(path)


def test_lock_file_has_its_space_from_the_start(tmp_path: Path) -> None:
    with opened(tmp_path / "env"):
        status = (tmp_path / "env/lock.mdb").stat()
        assert status.st_blocks * 512 >= status.st_size > 4096 * 64
        assert status.st_mode & 0o777 == 0o644


def test_lock_file_with_a_hole_is_filled(tmp_path: Path) -> None:
    with opened(tmp_path / "env"):
        pass
    lock = tmp_path / "env/lock.mdb"
    size = lock.stat().st_size
    os.truncate(lock, 0)
    os.truncate(lock, size)
    assert lock.stat().st_blocks == 0
    with opened(tmp_path / "env"):
        assert lock.stat().st_blocks * 512 >= size


@pytest.mark.parametrize("is_readonly", [True, False])
def test_disk_too_full_for_the_lock_file_is_an_error(tmp_path: Path, is_readonly: bool) -> None:  # noqa: FBT001 - a pytest parameter
    with small_disk(tmp_path / "disk", "1m") as disk:
        with opened(disk / "env") as env:
            put(env, range(10))
        (disk / "env/lock.mdb").unlink()
        (disk / "filler").write_bytes(bytes(available(disk) - (64 << 10)))
        with pytest.raises(StoreFullError), opened(disk / "env", is_readonly=is_readonly):
            pass
        (disk / "filler").unlink()
        with opened(disk / "env") as env:
            put(env, range(20))


def available(path: Path) -> int:
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


@contextmanager
def address_space(limit_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def address_space_in_use() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    return int(pages) * resource.getpagesize()


@pytest.mark.slow
def test_map_takes_no_more_address_space_than_there_is(tmp_path: Path) -> None:
    with opened(tmp_path / "env") as env:
        put(env, range(100))
    with (
        address_space(address_space_in_use() + (200 << 20)),
        opened(tmp_path / "env", size=1 << 30) as env,
    ):
        assert env.map_size_bytes() < 100 << 20
        put(env, range(30), size=1 << 20)
        put(env, range(60), size=1 << 20)
        with pytest.raises(StoreError, match="RLIMIT_AS"):
            put(env, range(60, 400), size=1 << 20)
        # The store can be read and written.
        put(env, range(60), size=1 << 10)


@pytest.mark.slow
def test_reader_follows_a_writer_that_reserves_more_than_it_may(tmp_path: Path) -> None:
    with opened(tmp_path / "env") as env:
        put(env, range(100))
    script = (
        "import sys; from pathlib import Path; from tests.db import test_environment as t\n"
        "with t.opened(Path(sys.argv[1]), size=1 << 30) as env: t.put(env, range(30000))"
    )
    with (
        address_space(address_space_in_use() + (300 << 20)),
        opened(tmp_path / "env", is_readonly=True, size=1 << 30) as env,
    ):
        subprocess.run(
            ["prlimit", "--as=unlimited:", sys.executable, "-c", script, tmp_path / "env"],
            check=True,
            timeout=DEADLINE_S,
        )
        with env.read() as txn:
            assert txn.stat(env.database(b"one"))["entries"] == 30000
