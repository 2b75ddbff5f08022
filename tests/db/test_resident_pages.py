"""Whoever reads a whole environment reads its file in order, and keeps few of its pages."""

import mmap
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.db.environment import Environment, WriteTransaction
from appliance.db.resident_pages import read_ahead

MIB = 1 << 20
SIZE = 160 * MIB
TABLE = b"table"


@pytest.fixture
def env() -> Iterator[Environment]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        made = Environment(Path(directory), databases=[TABLE], is_readonly=False, is_durable=False)
        yield made
        made.close()


def resident_bytes() -> int:
    """Return the pages of files, and of memory that has a file as these do."""
    status = Path("/proc/self/status").read_text()
    return sum(int(size) * 1024 for size in re.findall(r"Rss(?:File|Shmem):\s*(\d+)", status))


def test_pages_that_were_read_are_given_back(env: Environment) -> None:
    database = env.database(TABLE)

    def put(txn: WriteTransaction) -> None:
        for number in range(SIZE // MIB):
            txn.put(b"%04d" % number, b"%d" % (number % 7) * MIB, db=database)

    env.write(put)
    most = 0
    with env.read() as txn:
        for number, (_, value) in enumerate(txn.cursor(db=database)):
            assert bytes(value) == b"%d" % (number % 7) * MIB
            most = max(most, resident_bytes())
            env.limit_pages()
    assert most < 128 * MIB


def faults_of_reading(file: Path) -> int:
    """Return how often reading single pages through a map had to wait for the disk to begin."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        mapped.madvise(mmap.MADV_RANDOM)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
        assert not any(mapped[at] for at in range(0, len(mapped), MIB // 2))
        return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt - before


def test_a_file_is_read_before_its_pages_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "data.mdb"
    with file.open("wb") as opened:
        for _ in range(64):
            opened.write(bytes(MIB))
        os.fsync(opened.fileno())

    def forget() -> None:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    forget()
    without = faults_of_reading(file)
    forget()
    read_ahead(tmp_path)
    assert faults_of_reading(file) < without / 4
