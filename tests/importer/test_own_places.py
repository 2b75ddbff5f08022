"""An import does not read the store that it writes."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from appliance.errors import ImportTreeError
from appliance.importer.importer import import_paths
from appliance.importer.own_places import excluded_directories, own_places
from appliance.importer.roots import identity_of
from appliance.services.addresses import ServiceAddresses, parse_service_uri
from tests.importer.trees import Silent
from tests.store.audit import audit


def run(store: Path, *paths: Path) -> list[str]:
    return list(import_paths(store, paths, progress=Silent()))


def refusal(store: Path, path: Path) -> str:
    with pytest.raises(ImportTreeError) as caught:
        run(store, path)
    return str(caught.value)


@contextmanager
def bound(directory: Path, at: Path) -> Iterator[Path]:
    """Bind-mount `directory` at another place, too."""
    at.mkdir(parents=True)
    subprocess.run(["mount", "--bind", directory, at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a path in it, two directories down."""
    store = tmp_path / "above" / "parent" / "store"
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    run(store, tmp_path / "file")
    return store


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_contains_a_store_that_is_not_there_yet_is_refused_and_nothing_made(
    tmp_path: Path, depth: int
) -> None:
    store = tmp_path / "above" / "parent" / "store"
    store.parent.mkdir(parents=True)
    container = store.parents[depth - 1]
    assert refusal(store, container) == f"{container}: contains the store {store}"
    assert not store.exists()


def test_what_contains_the_store_is_refused(store: Path) -> None:
    for container in (store.parent, store.parents[1]):
        assert refusal(store, container) == f"{container}: contains the store {store}"
    assert refusal(store, Path("/")).startswith("/: no name")


def test_the_store_and_its_parts_are_refused(store: Path) -> None:
    assert refusal(store, store) == f"{store}: is the store {store}"
    for part in ("blobs", "tmp"):
        assert refusal(store, store / part) == f"{store}/{part}: is part of the store {store}"


def test_the_directory_counts_and_not_what_it_is_called(store: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store.parent)
    assert refusal(store, tmp_path / "link" / "..").endswith(f"contains the store {store}")
    assert refusal(store, tmp_path / "link" / "store").endswith(f"is the store {store}")
    with bound(store.parent, tmp_path / "elsewhere") as elsewhere:
        assert refusal(store, elsewhere) == f"{elsewhere}: contains the store {store}"


@pytest.mark.parametrize(("depth", "what"), [(0, "is"), (1, "contains"), (2, "contains")])
def test_what_contains_the_store_is_refused_where_the_walk_comes_to_it(
    store: Path, tmp_path: Path, depth: int, what: str
) -> None:
    tree = tmp_path / "tree"
    place = (store, *store.parents)[depth]
    with bound(place, tree / "sub" / "bound") as at:
        assert refusal(store, tree) == f"{at}: {what} the store {store}"
    assert len(audit(store).path_infos) == 1


def test_what_lies_beside_the_store_is_imported(store: Path) -> None:
    beside = store.with_name("store-of-something-else")
    beside.mkdir()
    (store.parent / "link").symlink_to(store)
    assert len(run(store, beside, store.parent / "link")) == 2


def test_on_the_way_to_services_large_files_are_not_imported_from_where_they_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    remote = parse_service_uri("grpc+unix:///run/none")
    local = parse_service_uri(f"lmdb://{tmp_path}/one/store")
    excluded = excluded_directories(own_places(ServiceAddresses(remote, local, remote)))
    above = excluded[identity_of(tmp_path.stat())]
    assert above.startswith("contains the store ")
    waiting = tmp_path / f"appliance-import-{os.geteuid()}"
    assert excluded[identity_of(waiting.stat())] == (
        f"is the staging directory of this import, {waiting}"
    )
