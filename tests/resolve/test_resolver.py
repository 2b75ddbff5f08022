"""Wants of several sessions, and what each may take of the resolver."""

import asyncio
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.errors import CorruptBlobError
from appliance.images.layout import name_of
from appliance.resolve.local import LocalResolver
from appliance.resolve.resolver import SessionGrants
from appliance.session.grant_table import GrantTable
from appliance.session.grants import Grants
from appliance.session.wants import (
    BackingWanted,
    BlobWanted,
    DirectoryWanted,
    RootListWanted,
    RootNameWanted,
)
from appliance.store.store import Store
from tests.fs.guest import File, basename, put

NUM_NAMES = 2000


@contextmanager
def grant_tables(num: int) -> Iterator[list[GrantTable]]:
    tables = [GrantTable() for _ in range(num)]
    try:
        yield tables
    finally:
        for table in tables:
            table.close()


def test_a_session_that_tries_names_keeps_no_other_waiting(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    put(store, "wanted", File(b"x"))

    async def main(one: GrantTable, other: GrantTable) -> None:
        resolver = LocalResolver(store)
        flood, neighbour = SessionGrants(one), SessionGrants(other)
        num_answered = 0

        async def miss(number: int) -> None:
            nonlocal num_answered
            want = RootNameWanted(basename(f"absent-{number}"))
            assert await resolver.resolve(want, flood) == errno.ENOENT
            num_answered += 1

        misses = [asyncio.create_task(miss(number)) for number in range(NUM_NAMES)]
        await asyncio.sleep(0)  # all of them are asked for
        assert await resolver.resolve(RootNameWanted(basename("wanted")), neighbour) == 0
        # It came after those that were under way, not after all.
        assert num_answered < NUM_NAMES // 10
        await asyncio.gather(*misses)
        await resolver.close()

    with grant_tables(2) as (one, other):
        asyncio.run(main(one, other))
        assert len(one) == 0
        assert Grants(other.fd).by_name(basename("wanted")) is not None
    store.close()


def test_sessions_list_the_root_each_for_itself(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    first, second = (put(store, name, File(name.encode())) for name in ("first", "second"))

    async def main(one: GrantTable, other: GrantTable) -> None:
        resolver = LocalResolver(store)
        sessions = [SessionGrants(table) for table in (one, other)]
        assert await resolver.resolve(RootNameWanted(second), sessions[0]) == 0
        assert await resolver.resolve(RootListWanted(), sessions[0]) == 0
        third = put(store, "third", File(b"3"))
        assert await resolver.resolve(RootListWanted(), sessions[1]) == 0
        listings = [
            [name_of(record) for record in Grants(table.fd).listing(0)] for table in (one, other)
        ]
        assert listings == [[second, first], [first, second, third]]
        assert one.root_generation < other.root_generation
        await resolver.close()

    with grant_tables(2) as (one, other):
        asyncio.run(main(one, other))
    store.close()


def test_a_local_store_has_every_blob_where_workers_read_and_no_backing_file(
    tmp_path: Path,
) -> None:
    store = Store.open(tmp_path / "store", create=True)

    async def main(table: GrantTable) -> None:
        resolver, session = LocalResolver(store), SessionGrants(table)
        assert await resolver.resolve(BlobWanted(bytes(32), 5), session) == 0
        assert await resolver.resolve(BackingWanted(2, 1, bytes(32), 5), session) == errno.EINVAL
        await resolver.close()

    with grant_tables(1) as (table,):
        asyncio.run(main(table))
    store.close()


def test_equal_wants_make_the_images_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path / "store", create=True)
    digest = Digest.of(b"unknown")
    made: list[bytes] = []

    def make(_self: LocalResolver, digest: bytes) -> None:
        made.append(digest)
        raise CorruptBlobError("no image")

    async def main(table: GrantTable) -> None:
        monkeypatch.setattr(LocalResolver, "_make", make)
        resolver, session = LocalResolver(store), SessionGrants(table)
        wants = [resolver.resolve(DirectoryWanted(digest), session) for _ in range(5)]
        assert await asyncio.gather(*wants) == [errno.EIO] * 5
        assert made == [digest]
        assert await resolver.resolve(DirectoryWanted(digest), session) == errno.EIO
        assert made == [digest] * 2  # a failure is not remembered
        await resolver.close()

    with grant_tables(1) as (table,):
        asyncio.run(main(table))
    store.close()
