"""Whoever reads a whole environment keeps few of its pages."""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.db.environment import Environment, WriteTransaction

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
