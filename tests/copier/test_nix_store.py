"""The database of Nix is read without a trace, whether Nix has it open or not."""

import os
import sqlite3
from pathlib import Path

import pytest

from appliance.copier.nix_store import NixStore, NixStorePlace
from appliance.errors import StoreError
from appliance.nix.store_path import StorePath

SCHEMA = """
create table ValidPaths (
    id integer primary key autoincrement not null, path text unique not null, hash text not null,
    registrationTime integer not null, deriver text, narSize integer, ultimate integer, sigs text,
    ca text
);
create table Refs (referrer integer not null, reference integer not null);
"""
LIB, APP = (StorePath.parse(f"{digit * 32}-{name}") for digit, name in (("1", "lib"), ("0", "app")))
HASH = f"sha256:{'ab' * 32}"


@pytest.fixture
def place(tmp_path: Path) -> NixStorePlace:
    place = NixStorePlace.below(tmp_path)
    place.database.parent.mkdir(parents=True)
    with writer(place) as connection:
        connection.executescript(SCHEMA)
        add(connection, LIB)
        add(connection, APP, references=[LIB, APP])
    connection.close()
    return place


def writer(place: NixStorePlace) -> sqlite3.Connection:
    connection = sqlite3.connect(place.database)
    connection.execute("pragma journal_mode = wal")
    return connection


def add(
    connection: sqlite3.Connection, path: StorePath, references: list[StorePath] | None = None
) -> None:
    words = "insert into ValidPaths (path, hash, registrationTime, narSize) values (?, ?, 1, 120)"
    connection.execute(words, (path.absolute(), HASH))
    for reference in references or []:
        connection.execute(
            "insert into Refs select a.id, b.id from ValidPaths a, ValidPaths b"
            " where a.path = ? and b.path = ?",
            (path.absolute(), reference.absolute()),
        )


def files(place: NixStorePlace) -> dict[str, tuple[int, int]]:
    return {
        path.name: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in place.database.parent.iterdir()
    }


def references(store: NixStore, path: StorePath) -> list[StorePath] | None:
    claim = store.claim(path)
    return None if claim is None else [*claim.references]


def test_nothing_is_written_beside_it(place: NixStorePlace) -> None:
    before = files(place)
    assert [*before] == ["db.sqlite"]
    store = NixStore(place)
    assert references(store, APP) == [APP, LIB]
    assert references(store, LIB) == []
    assert files(place) == before
    store.close()
    assert files(place) == before


def test_what_is_in_the_log_only_is_read(place: NixStorePlace) -> None:
    other = StorePath.parse(f"{'2' * 32}-other")
    connection = writer(place)
    with connection:
        add(connection, other, references=[LIB])
    assert files(place)["db.sqlite-wal"][0] > 0
    store = NixStore(place)
    assert references(store, other) == [LIB]
    store.close()
    connection.close()


def test_what_is_written_meanwhile(place: NixStorePlace) -> None:
    other = StorePath.parse(f"{'2' * 32}-other")
    store = NixStore(place)
    assert references(store, other) is None
    with writer(place) as connection:
        add(connection, other)
    connection.close()
    os.utime(place.database)  # what was written so soon after may have the same time
    assert references(store, other) == []
    store.close()


def test_a_log_that_cannot_be_read(place: NixStorePlace) -> None:
    # A directory in its place, as root may read all else.
    (place.database.parent / "db.sqlite-wal").mkdir()
    (place.database.parent / "db.sqlite-wal" / "x").touch()
    with pytest.raises(StoreError, match=r"db\.sqlite: cannot be read as the database of Nix"):
        NixStore(place)


def test_another_schema(place: NixStorePlace) -> None:
    with writer(place) as connection:
        connection.execute("drop table Refs")
    connection.close()
    store = NixStore(place)
    with pytest.raises(StoreError, match=r"db\.sqlite: no such table: Refs"):
        store.claim(APP)
    store.close()


def test_a_path_of_another_store_directory(place: NixStorePlace) -> None:
    store = NixStore(place)
    assert store.claim(StorePath.parse(f"{'3' * 32}-missing")) is None
    store.close()
