"""The LMDB environment: growth, other processes, full disks."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from appliance.db.environment import Environment, WriteTransaction
from appliance.errors import SchemaVersionError, StoreError, StoreFullError

DEADLINE_S = 60
DATABASES = (b"one", b"two")
SMALL_MAP = 64 * 1024
# mdb.c: MDB_page, mp_flags.
PAGE_FLAGS_AT = 10


@contextmanager
def opened(
    path: Path, *, is_readonly: bool = False, is_durable: bool = True, size: int = SMALL_MAP
) -> Iterator[Environment]:
    env = Environment(
        path,
        databases=DATABASES,
        is_readonly=is_readonly,
        is_durable=is_durable,
        map_size_bytes=size,
    )
    try:
        yield env
    finally:
        env.close()


def put(env: Environment, keys: range, *, size: int = 1000) -> None:
    def work(txn: WriteTransaction) -> None:
        for key in keys:
            txn.put(b"%08d" % key, bytes(size), db=env.database(b"one"))

    env.write(work)


def num_entries(env: Environment) -> int:
    with env.read() as txn:
        return txn.stat(env.database(b"one"))["entries"]


def serve_reads(path: Path, channel: Connection) -> None:
    with opened(path, is_readonly=True) as env:
        while channel.poll(DEADLINE_S) and channel.recv() is not None:
            channel.send(num_entries(env))


def hold_a_snapshot(path: Path, channel: Connection) -> None:
    with opened(path, is_readonly=True) as env, env.read():
        channel.send("open")
        channel.poll(DEADLINE_S)


@contextmanager
def process(target: object, path: Path) -> Iterator[tuple[Connection, int]]:
    context = multiprocessing.get_context("spawn")
    channel, theirs = context.Pipe()
    child = context.Process(target=target, args=(path, theirs))  # type: ignore[arg-type]
    child.start()
    theirs.close()
    assert child.pid is not None
    try:
        yield channel, child.pid
    finally:
        # Closing the channel would make it exit normally, and close its environment.
        child.kill()
        child.join(DEADLINE_S)
        channel.close()


def test_full_map_is_grown_and_the_work_run_again(tmp_path: Path) -> None:
    with opened(tmp_path / "env") as env:
        runs = []

        def work(txn: WriteTransaction) -> str:
            runs.append(1)
            for key in range(1000):
                txn.put(b"%d" % key, bytes(1000), db=env.database(b"one"))
            return "done"

        assert env.write(work) == "done"
        assert len(runs) > 1
        assert num_entries(env) == 1000
        assert env.map_size_bytes() > 1000 * 1000


@pytest.mark.slow
def test_reader_in_another_process_follows_a_growing_map(tmp_path: Path) -> None:
    path = tmp_path / "env"
    with opened(path) as env:
        put(env, range(1))
        with process(serve_reads, path) as (channel, _):
            for total in (1, 300, 5000):
                put(env, range(total))
                channel.send("read")
                assert channel.poll(DEADLINE_S)
                assert channel.recv() == total


@pytest.mark.slow
def test_writer_adopts_a_map_grown_by_another_writer(tmp_path: Path) -> None:
    path = tmp_path / "env"
    with opened(path) as env:
        put(env, range(1))
        script = (
            "import sys; from pathlib import Path; from tests.db import test_environment as t\n"
            "with t.opened(Path(sys.argv[1])) as env: t.put(env, range(3000))"
        )
        subprocess.run([sys.executable, "-c", script, path], check=True, timeout=DEADLINE_S)
        put(env, range(3000, 3001))
        assert num_entries(env) == 3001


def test_exception_in_the_work_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "env") as env:

        def work(txn: WriteTransaction) -> None:
            txn.put(b"key", b"value", db=env.database(b"one"))
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            env.write(work)
        assert num_entries(env) == 0


def test_second_transaction_beside_an_open_one_is_a_bug(tmp_path: Path) -> None:
    with opened(tmp_path / "env") as env:
        with env.read():
            with pytest.raises(RuntimeError):
                env.write(lambda _: None)
            with pytest.raises(RuntimeError), env.read():
                pass
        assert env.write(lambda _: 7) == 7


def test_readonly_of_what_has_not_all_databases_is_another_version(tmp_path: Path) -> None:
    path = tmp_path / "env"
    Environment(path, databases=[b"one"], is_readonly=False, is_durable=True).close()
    with pytest.raises(SchemaVersionError, match="two"), opened(path, is_readonly=True):
        pass


def test_readonly_of_nothing_fails_and_creates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "env"
    with pytest.raises(StoreError, match=str(path)), opened(path, is_readonly=True):
        pass
    assert not path.exists()


def test_file_in_place_of_the_directory_fails(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_bytes(b"")
    with pytest.raises(StoreError, match=str(path)), opened(path):
        pass


def test_file_that_is_no_database_fails(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.mkdir()
    (path / "data.mdb").write_bytes(os.urandom(8192))
    with pytest.raises(StoreError, match=str(path)), opened(path):
        pass


def test_damaged_pages_are_an_error_of_the_store(tmp_path: Path) -> None:
    path = tmp_path / "env"
    with opened(path) as env:
        put(env, range(100))
        with (path / "data.mdb").open("r+b") as file:
            page_size = os.sysconf("SC_PAGE_SIZE")
            num_pages = file.seek(0, os.SEEK_END) // page_size
            for page in range(2, num_pages):  # the first two say where the others are
                file.seek(page * page_size + PAGE_FLAGS_AT)
                file.write(b"\xff\xff")
        with pytest.raises(StoreError, match=str(path)), env.read() as txn:
            txn.get(b"%08d" % 1, db=env.database(b"one"))


@pytest.mark.slow
def test_slot_of_a_killed_reader_is_reaped(tmp_path: Path) -> None:
    path = tmp_path / "env"
    with opened(path) as env:
        put(env, range(1))
        with process(hold_a_snapshot, path) as (channel, _):
            assert channel.poll(DEADLINE_S)
            assert channel.recv() == "open"
            assert env.reap_readers() == 0
        assert env.reap_readers() == 1
        assert env.reap_readers() == 0


@pytest.mark.slow
def test_slot_of_a_killed_reader_is_freed_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "env"
    with opened(path) as env:
        put(env, range(1))
    # LMDB does not reset the reader slots as long as a process has the environment open.
    with process(serve_reads, path) as (channel, _):
        channel.send("read")
        assert channel.poll(DEADLINE_S)
        with process(hold_a_snapshot, path) as (holding, _):
            assert holding.poll(DEADLINE_S)
        with opened(path) as env:
            assert env.reap_readers() == 0


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("is_durable", [True, False])
def test_full_disk_is_told_and_what_was_there_stays(tmp_path: Path, is_durable: bool) -> None:  # noqa: FBT001 -- a pytest parameter
    with small_disk(tmp_path / "disk", "2m") as disk:
        with opened(disk / "env", is_durable=is_durable) as env:
            put(env, range(100))
            with pytest.raises(StoreFullError, match=str(disk)):
                put(env, range(100, 5000))
            assert num_entries(env) == 100
        with opened(disk / "env", is_durable=is_durable) as env:
            assert num_entries(env) == 100
            put(env, range(100, 200))
            assert num_entries(env) == 200
