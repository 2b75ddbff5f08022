"""How many blob files may be open: shares of sessions that come and go."""

import mmap
from collections.abc import Iterator

import pytest

from appliance.session.grant_table import GrantTable
from appliance.supervisor.open_files import OPEN_FILES, OpenFiles

OPEN_FILES_AT = 56


@pytest.fixture
def tables() -> Iterator[list[GrantTable]]:
    made = [GrantTable() for _ in range(3)]
    yield made
    for table in made:
        table.close()


def share(table: GrantTable) -> int:
    """Return the number as a worker finds it in the memory that it maps."""
    with mmap.mmap(table.fd, 4096, access=mmap.ACCESS_READ) as memory:
        return int.from_bytes(memory[OPEN_FILES_AT : OPEN_FILES_AT + 8], "little")


def test_sessions_have_equal_shares_whatever_their_workers(tables: list[GrantTable]) -> None:
    files = OpenFiles(1200)
    files.join(tables[0], 1)
    assert share(tables[0]) == 1200
    files.join(tables[1], 4)
    assert [share(table) for table in tables[:2]] == [600, 150]
    files.join(tables[2], 2)
    assert [share(table) for table in tables] == [400, 100, 200]


def test_what_leaves_gives_its_share_to_the_others(tables: list[GrantTable]) -> None:
    files = OpenFiles(1200)
    for table in tables:
        files.join(table, 2)
    files.leave(tables[0])
    assert [share(table) for table in tables[1:]] == [300, 300]
    files.leave(tables[1])
    assert share(tables[2]) == 600


def test_a_worker_may_always_hold_a_few(tables: list[GrantTable]) -> None:
    files = OpenFiles(5)
    files.join(tables[0], 255)
    assert share(tables[0]) == 4


def test_all_workers_together_stay_within_the_bound(tables: list[GrantTable]) -> None:
    files = OpenFiles()
    for table, num_workers in zip(tables, (3, 7, 33), strict=True):
        files.join(table, num_workers)
    together = sum(map(lambda one, num: share(one) * num, tables, (3, 7, 33)))
    assert OPEN_FILES * 0.99 < together <= OPEN_FILES
