"""Temporary directories: kept while their process lives, and swept after that."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.errors import StoreFullError
from appliance.store.temp_directory import TempDirectory, sweep
from tests.db.test_environment import small_disk

DEADLINE_S = 60
HOLDER = """
import os, sys
from pathlib import Path
from appliance.store.temp_directory import TempDirectory
temp = TempDirectory(Path(sys.argv[1]))
(temp.path / "file").write_bytes(b"x")
child = os.fork()
if child:
    print(child, flush=True)
sys.stdin.read()
"""


def test_directory_is_there_until_it_is_closed(tmp_path: Path) -> None:
    with TempDirectory(tmp_path) as temp:
        (temp.path / "sub").mkdir()
        sweep(tmp_path)
        assert (temp.path / "sub").is_dir()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_two_directories_of_a_process_are_two(tmp_path: Path) -> None:
    with TempDirectory(tmp_path) as one, TempDirectory(tmp_path) as two:
        assert one.path != two.path


def test_full_disk_is_told(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m,nr_inodes=2") as disk:
        (disk / "tmp").mkdir()
        with pytest.raises(StoreFullError, match=str(disk)):
            TempDirectory(disk)


def test_directory_is_swept_once_its_process_and_its_children_are_gone(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        holder.kill()
        holder.wait(DEADLINE_S)
        sweep(tmp_path)
        assert len(list((tmp_path / "tmp").iterdir())) == 1
        kill(child)
    sweep(tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []


def kill(pid: int) -> None:
    # When a process ends, its pipes may be closed before its locks are released; wait(2) returns
    # after both.
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        ended, _, _ = select.select([pidfd], [], [], DEADLINE_S)
        assert ended
    finally:
        os.close(pidfd)


def test_what_is_not_a_temporary_directory_is_left(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "note").write_bytes(b"")
    sweep(tmp_path)
    assert (tmp_path / "tmp" / "note").exists()


def test_store_without_temporary_directories_is_swept(tmp_path: Path) -> None:
    sweep(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
